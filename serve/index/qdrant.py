"""Qdrant, 1.16 or newer, over REST: one Qdrant collection per namespace.

Any process reads and any may write. What it does not do by itself, and how that is met:

- A generation never replaces a higher one: `update_filter` is evaluated where the write is applied,
  one write after the other, and what is not there yet is inserted. An older server does not know
  the word and overwrites in silence, so it is refused when the connection opens.
- Reads see writes that returned: with `wait=true` a write waits until each copy has applied it or is
  out of use, and fails unless most of them have (`write_consistency_factor`).
- A status may say that a write was taken but not applied: then it is repeated.

A missing collection reads as empty (the Store knows whether it exists), deletes nothing, and makes
an upsert retryable.
"""

import asyncio
import importlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from logging import getLogger
from typing import TYPE_CHECKING, TypeAlias, TypeVar

import orjson

from serve.capabilities import Capabilities
from serve.config import Index as IndexSettings
from serve.errors import BadInput, IndexUnavailable
from serve.index.checks import RECORD_ID, check_namespace, check_query, newest, refuse
from serve.index.errors import IndexOffline, IndexRetryable, RecordsRejected
from serve.index.full_text import VectorsOnly
from serve.index.qdrant_collections import (
    check_applied,
    check_version,
    create,
    create_indexes,
    dimensions_of,
)
from serve.index.qdrant_faults import (
    RETRY_AFTER_S,
    is_missing,
    retry_after_s,
    to_fault,
    vendor_errors,
)
from serve.index.qdrant_points import (
    SHOWN,
    Sized,
    direction,
    from_point,
    not_newer,
    numbers,
    parts,
    point_id,
    to_point,
)
from serve.index.qdrant_terms import to_filter
from serve.ports import IndexStats, Landed
from serve.records import CollectionSpec, Filter, Hit, Record, Tombstone, Vector


if TYPE_CHECKING:
    from qdrant_client import AsyncQdrantClient, models

log = getLogger("headrace.index")

T = TypeVar("T")
_Page: TypeAlias = "tuple[list[models.Record], models.ExtendedPointId | None]"

DIMENSIONS_MAX = 65_536
TOP_K_MAX = 10_000
IDS_PER_REQUEST = 1000
TOO_LARGE = "is too large for one request"


class QdrantIndex(VectorsOnly):
    """Implements `serve.ports.Index`. Connects on first use, which imports the library.

    `connect` makes the client; the tests give one of the library's local mode. Write calls raise the
    errors of `serve.index.errors`, read calls `IndexUnavailable`.
    """

    def __init__(
        self,
        settings: IndexSettings,
        api_key: str = "",
        connect: "Callable[[], AsyncQdrantClient] | None" = None,
    ) -> None:
        self._own = settings.qdrant
        self.caps = Capabilities(
            max_items=settings.max_items,
            max_bytes=min(settings.max_bytes, self._own.request_bytes_max),
            max_dim=min(settings.max_dim, DIMENSIONS_MAX),
            max_top_k=TOP_K_MAX,
            consistency="strong",
            single_writer=False,
        )
        self._api_key = api_key
        self._connect = connect or self._client_of_settings
        self._connecting = asyncio.Lock()
        self._client: AsyncQdrantClient | None = None
        self._checked = False
        self._known_max = settings.tables_open_max
        self._known: dict[str, int] = {}

    async def open(self) -> None:
        """Import, connect and look at the server's version. Raises IndexUnavailable, ImportError."""
        with _reading():
            await self._server()

    async def upsert(self, ns: str, records: Sequence[Record]) -> Landed:
        """One request, or more where one would be too large; repeating what landed is harmless."""
        check_namespace(ns)
        with self._writing(ns):
            client = await self._server()
            dimensions = await self._dimensions(client, ns)
            if dimensions is None:
                raise IndexRetryable(f"collection {ns} is missing", retry_after_s=RETRY_AFTER_S)
            rejected = refuse(records, dimensions)
            refused = {record_id for record_id, _ in rejected}
            sized = _to_points(newest([row for row in records if row.id not in refused]))
            bytes_max = self._own.request_bytes_max
            large = tuple((one.record.id, TOO_LARGE) for one in sized if one.size_bytes > bytes_max)
            fitting = [one for one in sized if one.size_bytes <= bytes_max]
            for part in parts(fitting, bytes_max):
                result = await client.upsert(
                    self._name(ns),
                    [one.point for one in part],
                    wait=True,
                    ordering=self._ordering(),
                    update_filter=not_newer([one.record for one in part]),
                )
                check_applied(result)
        return Landed(rejected=rejected + large)

    async def delete(self, ns: str, tombstones: Sequence[Tombstone]) -> Landed:
        """One request per 1,000 tombstones: a filter of ids and generations."""
        check_namespace(ns)
        rows = newest([row for row in tombstones if RECORD_ID.fullmatch(row.id)])
        with self._writing(ns):
            client = await self._server()
            from qdrant_client import models  # noqa: PLC0415

            for start in range(0, len(rows), IDS_PER_REQUEST):
                some = not_newer(rows[start : start + IDS_PER_REQUEST])
                try:
                    result = await client.delete(
                        self._name(ns),
                        models.FilterSelector(filter=some),
                        wait=True,
                        ordering=self._ordering(),
                    )
                except vendor_errors() as error:
                    if is_missing(error):
                        break
                    raise
                check_applied(result)
        return Landed()

    async def query(
        self, ns: str, vector: Vector, top_k: int, where: Filter | None = None
    ) -> Sequence[Hit]:
        """The nearest by the graph, or exactly where it is small or `exact` is set.

        Equal scores are sorted by id, but which of them is the last of `top_k` is not defined.
        Raises BadInput (vector), IndexUnavailable.
        """
        check_namespace(ns)

        async def ask(client: "AsyncQdrantClient") -> Sequence[Hit]:
            dimensions = await self._dimensions(client, ns)
            if dimensions is None:
                return ()
            check_query(vector, dimensions)
            from qdrant_client import models  # noqa: PLC0415

            found = await client.query_points(
                self._name(ns),
                query=orjson.loads(numbers(direction(vector)[0])),
                query_filter=None if where is None else to_filter(where),
                search_params=models.SearchParams(hnsw_ef=self._own.hnsw_ef, exact=self._own.exact),
                limit=min(top_k, TOP_K_MAX),
                with_payload=_shown(),
                with_vectors=True,
            )
            hits = [
                Hit(from_point(point), min(1.0, max(-1.0, point.score))) for point in found.points
            ]
            return sorted(hits, key=lambda hit: (-hit.score, hit.record.id))

        return await self._read(ns, ask, ())

    async def fetch(self, ns: str, ids: Sequence[str]) -> Sequence[Record]:
        """The records that exist among `ids`."""
        check_namespace(ns)
        wanted = [point_id(one) for one in dict.fromkeys(ids) if RECORD_ID.fullmatch(one)]

        async def ask(client: "AsyncQdrantClient") -> Sequence[Record]:
            records: list[Record] = []
            for start in range(0, len(wanted), IDS_PER_REQUEST):
                found = await client.retrieve(
                    self._name(ns),
                    wanted[start : start + IDS_PER_REQUEST],
                    with_payload=_shown(),
                    with_vectors=True,
                )
                records += map(from_point, found)
            return records

        return await self._read(ns, ask, ())

    async def scan(self, ns: str, where: Filter | None = None) -> AsyncIterator[Sequence[Record]]:
        """By id, `scan_rows` at a time, each part as it is then. Raises IndexUnavailable."""
        check_namespace(ns)
        offset = None
        while True:
            ended: _Page = ([], None)
            found, offset = await self._read(ns, self._page(ns, where, offset), ended)
            if found:
                yield [from_point(point) for point in found]
            if offset is None:
                return

    async def reached(self, ns: str, _token: str, /) -> bool | None:
        """A write that returned is seen."""
        check_namespace(ns)
        return True

    async def ensure(self, spec: CollectionSpec) -> None:
        """Make the collection and its indexes. Raises BadInput when it has too many dimensions.

        What an earlier call did not finish is made by the next.
        """
        check_namespace(spec.ns)
        if not 1 <= spec.dimensions <= self.caps.max_dim:
            raise BadInput(f"1 to {self.caps.max_dim} dimensions.", param="dimensions")
        with self._writing(spec.ns):
            client, name = await self._server(), self._name(spec.ns)
            if not await client.collection_exists(name):
                await create(client, name, spec.dimensions, self._own)
            await create_indexes(client, name)

    async def drop(self, ns: str) -> None:
        """Remove the collection."""
        check_namespace(ns)
        with self._writing(ns):
            client = await self._server()
            self._known.pop(ns, None)
            try:
                await client.delete_collection(self._name(ns))
            except vendor_errors() as error:
                if not is_missing(error):
                    raise

    async def stats(self, ns: str) -> IndexStats:
        """Count the points."""
        check_namespace(ns)

        async def ask(client: "AsyncQdrantClient") -> IndexStats:
            return IndexStats(records=(await client.count(self._name(ns), exact=True)).count)

        return await self._read(ns, ask, IndexStats(records=0))

    async def maintain(self) -> None:
        """Nothing to do: the server optimises by itself."""

    async def aclose(self) -> None:
        """Close the connections; a later call would connect again."""
        client, self._client, self._checked = self._client, None, False
        if client is not None:
            await client.close()

    async def _server(self) -> "AsyncQdrantClient":
        async with self._connecting:
            if self._client is None:
                await asyncio.to_thread(importlib.import_module, "qdrant_client")
                self._client = self._connect()
            client = self._client
        if not self._checked:  # outside the lock: who waits for a mute server waits at once
            await check_version(client)
            self._checked = True
        return client

    def _client_of_settings(self) -> "AsyncQdrantClient":
        from qdrant_client import AsyncQdrantClient  # noqa: PLC0415

        # As a header, since with `api_key` the client warns where the URL is not https.
        headers = {"api-key": self._api_key} if self._api_key else {}
        if headers and self._own.url.startswith("http://"):
            log.warning("index.qdrant.url is not https: its API key can be read on the way")
        return AsyncQdrantClient(
            url=self._own.url,
            timeout=self._own.timeout_s,
            headers=headers,
            check_compatibility=False,  # a thread that warns; `_check_version` raises
        )

    async def _dimensions(self, client: "AsyncQdrantClient", ns: str) -> int | None:
        """Those of a namespace; None when it is missing."""
        known = self._known.get(ns)
        if known is None:
            known = await dimensions_of(client, self._name(ns))
            if known is None:
                return None
            while len(self._known) >= self._known_max:
                self._known.pop(next(iter(self._known)))
            self._known[ns] = known
        return known

    def _page(
        self, ns: str, where: Filter | None, offset: "models.ExtendedPointId | None"
    ) -> "Callable[[AsyncQdrantClient], Awaitable[_Page]]":
        async def ask(client: "AsyncQdrantClient") -> _Page:
            return await client.scroll(
                self._name(ns),
                None if where is None else to_filter(where),
                limit=self._own.scan_rows,
                offset=offset,
                with_payload=_shown(),
                with_vectors=True,
            )

        return ask

    async def _read(
        self, ns: str, ask: "Callable[[AsyncQdrantClient], Awaitable[T]]", missing: T
    ) -> T:
        with _reading():
            client = await self._server()
            try:
                return await ask(client)
            except vendor_errors() as error:
                if not is_missing(error):
                    raise
            self._known.pop(ns, None)
            return missing

    @contextmanager
    def _writing(self, ns: str) -> Iterator[None]:
        try:
            yield
        except vendor_errors() as error:
            if is_missing(error):
                self._known.pop(ns, None)
            raise to_fault(error) from error

    def _name(self, ns: str) -> str:
        return self._own.prefix + ns

    def _ordering(self) -> "models.WriteOrdering":
        from qdrant_client import models  # noqa: PLC0415

        return models.WriteOrdering(self._own.ordering)


def _to_points(records: Sequence[Record]) -> list[Sized]:
    try:
        return [to_point(record) for record in records]
    except (ValueError, TypeError, OverflowError) as error:
        raise RecordsRejected(str(error)) from error


@contextmanager
def _reading() -> Iterator[None]:
    try:
        yield
    except IndexOffline as error:
        raise IndexUnavailable(str(error), retry_after_s=RETRY_AFTER_S) from error
    except vendor_errors() as error:
        wait_s = retry_after_s(error)
        raise IndexUnavailable("The index cannot be read.", retry_after_s=wait_s) from error


def _shown() -> "models.PayloadSelectorInclude":
    from qdrant_client import models  # noqa: PLC0415

    return models.PayloadSelectorInclude(include=list(SHOWN))
