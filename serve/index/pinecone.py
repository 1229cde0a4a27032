"""Pinecone: one index of it, given by its host, and one of its namespaces per namespace of ours.

Traps this file steps around (SDK 10.2):

- The SDK repeats 408, 429, 5xx and broken connections up to three times and waits up to 90 s before
  each; that cannot be switched off. So each call has a deadline of ours.
- Its own batching (`batch_size`) never raises: one request here is one request there.
- NaN would go out as null, and an empty id unseen: `checks.refuse` sees both before.
- Bytes decide, not records: of 1,000 vectors of 384 only 418 fit into 2 MB. A flush that does not fit
  goes out as several requests; a repeat of all of them is harmless.
- Rates of writes are in `caps`, for the buffer: a flush that waited for them here would hold its place.
- Reads lag behind writes, for `fetch` and `query` by different times. A write returns its place in
  the log (LSN), a query the place that it has seen: `reached` compares them. The SDK gives none for
  a delete.

Pinecone has no conditional write. Against replacing a higher generation stand the order of the one
writer, what it remembers of its own last writes, and a fetch before the write. What remains: a
predecessor's request that is still under way, or landed less than a lag ago, when a new writer begins.

A missing namespace reads as empty and cannot be told from one that is made but empty, since it
appears with the first upsert. Only what this process dropped makes an upsert retryable.
"""

import asyncio
import importlib
import math
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from serve.capabilities import Capabilities, Rates
from serve.config.index import Pinecone as PineconeSettings
from serve.errors import BadInput, IndexUnavailable
from serve.index.checks import RECORD_ID, check_namespace, check_query, newest, refuse
from serve.index.errors import IndexFault, IndexOffline, IndexRetryable, RecordsRejected
from serve.index.filters import matches
from serve.index.full_text import VectorsOnly
from serve.index.lanes import WRITE_BYTES
from serve.index.latest import GONE, Latest
from serve.index.pace import Pace
from serve.index.pinecone_filters import to_filter
from serve.index.pinecone_wire import Sized, fit, parts, to_records, to_values
from serve.index.statuses import NOT_FOUND, REFUSED, RETRY_AFTER_S, fault
from serve.ports import IndexStats, Landed
from serve.records import CollectionSpec, Filter, Hit, Record, Tombstone, Vector


if TYPE_CHECKING:
    from pinecone import AsyncIndex

FLOAT_BYTES = 13
"""A float32 in JSON with its comma; unit vectors of 384 take 12.2. The buffer counts four."""

TOP_K_MAX = 10_000
REPLY_BYTES_MAX = 4 * 10**6
"""Of a query's reply."""

REPLY_FLOAT_BYTES = 16
IDS_PER_FETCH = 100
"""They stand in the URL: 100 ids of 64 characters stay below 8 KB. A page of a listing holds 100."""

IDS_PER_DELETE = 1000
MORE = 4
"""Times as many are asked for when `matches` left too few."""


@dataclass(frozen=True, slots=True)
class _Open:
    client: "AsyncIndex"
    dimensions: int
    rows_max: int
    """Whole records of any size that fit into one reply."""


class _Unusable(Exception):
    """The index is not one that can hold our vectors, or the key is not one."""


class PineconeIndex(VectorsOnly):
    """Implements `serve.ports.Index`. Imports the SDK and asks for the dimension on first use.

    Write calls raise the errors of `serve.index.errors`, read calls `IndexUnavailable` and BadInput.
    """

    def __init__(
        self, settings: PineconeSettings, api_key: str, clock: Callable[[], float]
    ) -> None:
        self.caps = Capabilities(
            max_items=settings.max_items,
            max_bytes=int(_estimated(settings.max_bytes)),
            max_dim=settings.max_dim,
            max_top_k=TOP_K_MAX,
            consistency="token",
            single_writer=True,
            upserts=Rates(settings.upserts_s, _estimated(settings.upsert_bytes_s)),
            deletes=Rates(settings.deletes_s, settings.delete_ids_s * WRITE_BYTES),
        )
        self._settings = settings
        self._api_key = api_key
        self._clock = clock
        self._fetches = Pace(settings.fetches_s, math.inf, 1)
        self._latest = Latest(settings.ids_tracked_max)
        self._dropped: OrderedDict[str, None] = OrderedDict()
        self._opened: _Open | None = None
        self._opening = asyncio.Lock()
        self._errors: tuple[type[Exception], ...] = ()

    async def open(self) -> None:
        """Import and connect now instead of on first use. Raises IndexUnavailable, ImportError."""
        async with self._reading():
            await self._open()

    async def upsert(self, ns: str, records: Sequence[Record]) -> Landed:
        """As many requests as the bytes need. What would replace a higher generation is skipped."""
        check_namespace(ns)
        if ns in self._dropped:
            raise IndexRetryable(f"namespace {ns} was dropped", retry_after_s=RETRY_AFTER_S)
        limits = self._settings
        token: str | None = None
        async with self._writing():
            opened = await self._open()
            rejected = refuse(records, opened.dimensions)
            refused = {record_id for record_id, _ in rejected}
            rows = newest([record for record in records if record.id not in refused])
            held = await self._held(
                opened, ns, [row.id for row in rows], fetch=limits.fetch_before_upsert
            )
            rows = [row for row in rows if held.get(row.id, GONE) <= row.generation]
            light, heavy = fit(rows, limits.max_bytes, limits.metadata_bytes_max)
            for part in parts(light, limits.max_items, limits.max_bytes):
                token = await self._send(opened, ns, part)
        return Landed(rejected=(*rejected, *heavy), token=token)

    async def delete(self, ns: str, tombstones: Sequence[Tombstone]) -> Landed:
        """Remove all but what is known to be newer: what a fetch does not see yet must go, too."""
        check_namespace(ns)
        rows = newest([row for row in tombstones if RECORD_ID.fullmatch(row.id)])
        async with self._writing():
            opened = await self._open()
            held = await self._held(opened, ns, [row.id for row in rows], fetch=True)
            ids = [row.id for row in rows if held.get(row.id, GONE) <= row.generation]
            for start in range(0, len(ids), IDS_PER_DELETE):
                part = ids[start : start + IDS_PER_DELETE]
                self._latest.forget(ns, part)
                with self._missing_or_not():
                    await opened.client.delete(ids=part, namespace=ns)
                self._latest.keep(ns, [(record_id, GONE) for record_id in part])
        return Landed()

    async def query(
        self, ns: str, vector: Vector, top_k: int, where: Filter | None = None
    ) -> Sequence[Hit]:
        """As exact as Pinecone's search; a filter is exact, for what does not satisfy it is replaced.

        Equal scores are sorted by id, but which of them is the last of `top_k` is not defined.
        Raises BadInput (vector; a filter whose candidates exceed 10,000), IndexUnavailable.
        """
        check_namespace(ns)
        top_k = asked = min(top_k, TOP_K_MAX)
        async with self._reading(filtered=where is not None):
            opened = await self._open()
            check_query(vector, opened.dimensions)
            while True:
                hits, found = await self._ask(opened, ns, vector, asked, where)
                if where is None or len(hits) >= top_k or found < asked:
                    return sorted(hits, key=lambda hit: (-hit.score, hit.record.id))[:top_k]
                if asked == TOP_K_MAX:
                    message = "This filter leaves too many records to compare one by one."
                    raise BadInput(message, param="filter")
                asked = min(asked * MORE, TOP_K_MAX)

    async def fetch(self, ns: str, ids: Sequence[str]) -> Sequence[Record]:
        """The records that exist among `ids`."""
        check_namespace(ns)
        async with self._reading():
            return await self._fetch(await self._open(), ns, ids)

    async def scan(self, ns: str, where: Filter | None = None) -> AsyncIterator[Sequence[Record]]:
        """Page by page: a listing of ids, then their records. Raises IndexUnavailable."""
        check_namespace(ns)
        page = None
        while True:
            async with self._reading():
                opened = await self._open()
                listed = None
                with self._missing_or_not():
                    listed = await opened.client.list_paginated(
                        namespace=ns, limit=IDS_PER_FETCH, pagination_token=page
                    )
                if listed is None:
                    return
                ids = [item.id for item in listed.vectors if item.id]
                records = await self._fetch(opened, ns, ids)
            yield [record for record in records if matches(where, record.metadata)]
            page = listed.pagination.next if listed.pagination else None
            if not page:
                return

    async def reached(self, ns: str, token: str, /) -> bool | None:
        """One query, for only queries say what they see. None: no place in the log on one side."""
        check_namespace(ns)
        if not (token.isascii() and token.isdigit()):
            return None
        async with self._reading():
            opened = await self._open()
            anywhere = [1.0] * opened.dimensions
            reply = await opened.client.query(top_k=1, vector=anywhere, namespace=ns)
        seen = reply.response_info.lsn_reconciled if reply.response_info else None
        return None if seen is None else seen >= int(token)

    async def ensure(self, spec: CollectionSpec) -> None:
        """Makes nothing: a namespace appears with its first record.

        Raises BadInput when the index has vectors of another length.
        """
        check_namespace(spec.ns)
        async with self._writing():
            opened = await self._open()
        if spec.dimensions != opened.dimensions:
            message = f"The Pinecone index holds vectors of {opened.dimensions} dimensions."
            raise BadInput(message, param="dimensions")
        self._dropped.pop(spec.ns, None)

    async def drop(self, ns: str) -> None:
        """Remove the namespace and all in it."""
        check_namespace(ns)
        async with self._writing():
            opened = await self._open()
            with self._missing_or_not():
                await opened.client.delete_namespace(name=ns)
        self._latest.drop(ns)
        self._dropped[ns] = None
        while len(self._dropped) > self._settings.namespaces_tracked_max:
            self._dropped.popitem(last=False)

    async def stats(self, ns: str) -> IndexStats:
        """What Pinecone counted, which lags behind writes."""
        check_namespace(ns)
        async with self._reading():
            opened = await self._open()
            with self._missing_or_not():
                described = await opened.client.describe_namespace(name=ns)
                return IndexStats(records=described.record_count)
        return IndexStats(records=0)

    async def maintain(self) -> None:
        """Nothing to do."""

    async def aclose(self) -> None:
        """Close the connections; a later call would connect again."""
        opened, self._opened = self._opened, None
        if opened is not None:
            await opened.client.close()

    async def _open(self) -> _Open:
        async with self._opening:
            if self._opened is None:
                self._opened = await self._connect()
            return self._opened

    async def _connect(self) -> _Open:
        sdk = await asyncio.to_thread(importlib.import_module, "pinecone")
        make, self._errors = await asyncio.to_thread(lambda: (sdk.AsyncIndex, (sdk.PineconeError,)))
        settings = self._settings
        try:
            client = make(host=settings.host, api_key=self._api_key, timeout=settings.deadline_s)
        except self._errors as error:
            raise _Unusable(f"the API key cannot be used: {error}") from error
        async with AsyncExitStack() as closing:
            closing.push_async_callback(client.close)
            about = await client.describe_index_stats()
            if not about.dimension or about.metric not in (None, "cosine"):
                raise _Unusable("the Pinecone index must be dense, with the metric cosine")
            closing.pop_all()
        row_bytes = about.dimension * REPLY_FLOAT_BYTES + settings.metadata_bytes_max
        rows_max = max(1, min(IDS_PER_FETCH, REPLY_BYTES_MAX // row_bytes))
        return _Open(client, about.dimension, rows_max)

    async def _held(
        self, opened: _Open, ns: str, ids: Sequence[str], *, fetch: bool
    ) -> dict[str, int]:
        """Generations held, as far as they are known."""
        held = self._latest.find(ns, ids)
        if fetch and (unknown := [record_id for record_id in ids if record_id not in held]):
            found = await self._fetch(opened, ns, unknown)
            held |= {record.id: record.generation for record in found}
        return held

    async def _fetch(self, opened: _Open, ns: str, ids: Sequence[str]) -> list[Record]:
        """Part after part, so that no search takes all of the index's fetches."""
        wanted = [record_id for record_id in dict.fromkeys(ids) if RECORD_ID.fullmatch(record_id)]
        records: list[Record] = []
        for start in range(0, len(wanted), opened.rows_max):
            some = wanted[start : start + opened.rows_max]
            await asyncio.sleep(self._fetches.take("", 1, self._clock()))
            with self._missing_or_not():
                found = await opened.client.fetch(ids=some, namespace=ns)
                records += to_records(found.vectors.values())
        return records

    async def _ask(
        self, opened: _Open, ns: str, vector: Vector, top_k: int, where: Filter | None
    ) -> tuple[list[Hit], int]:
        """The hits that satisfy `where`, and how many Pinecone found."""
        whole = top_k <= opened.rows_max
        reply = await opened.client.query(
            top_k=top_k,
            vector=to_values(np.asarray(vector, np.float32))[0],
            namespace=ns,
            filter=None if where is None else to_filter(where),
            include_values=whole,
            include_metadata=whole,
        )
        scores = {match.id: min(1.0, max(-1.0, match.score)) for match in reply.matches}
        if whole:
            records = to_records(reply.matches)
        else:
            records = await self._fetch(opened, ns, list(scores))
        hits = [
            Hit(record, scores[record.id]) for record in records if matches(where, record.metadata)
        ]
        return hits, len(reply.matches)

    async def _send(self, opened: _Open, ns: str, part: Sequence[Sized]) -> str | None:
        self._latest.forget(ns, (row.id for row in part))
        reply = await opened.client.upsert(vectors=[row.vector for row in part], namespace=ns)
        self._latest.keep(ns, ((row.id, row.generation) for row in part))
        committed = reply.response_info.lsn_committed if reply.response_info else None
        return None if committed is None else str(committed)

    @contextmanager
    def _missing_or_not(self) -> Iterator[None]:
        """Leaves the block where the namespace does not exist."""
        try:
            yield
        except self._errors as error:
            # A wrong host is a 404, too: that one must pause the index.
            missing = getattr(error, "status_code", None) == NOT_FOUND
            if not (missing and "namespace" in str(error).lower()):
                raise

    @asynccontextmanager
    async def _writing(self) -> AsyncIterator[None]:
        """A deadline, and Pinecone's errors as those that the buffer decides on."""
        try:
            async with asyncio.timeout(self._settings.deadline_s):
                yield
        except _Unusable as error:
            raise IndexOffline(str(error)) from error
        except self._errors as error:
            raise _fault(error) from error
        except TimeoutError as error:
            raise IndexRetryable("deadline", retry_after_s=RETRY_AFTER_S) from error

    @asynccontextmanager
    async def _reading(self, *, filtered: bool = False) -> AsyncIterator[None]:
        """A deadline, and Pinecone's errors as those that a caller may see."""
        try:
            async with asyncio.timeout(self._settings.deadline_s):
                yield
        except self._errors as error:
            if filtered and getattr(error, "status_code", None) in REFUSED:
                raise BadInput("The index refuses this filter.", param="filter") from error
            why = _fault(error)
            wait_s = why.retry_after_s if isinstance(why, IndexRetryable) else RETRY_AFTER_S
            raise IndexUnavailable("The index cannot be read.", retry_after_s=wait_s) from error
        except (_Unusable, TimeoutError) as error:
            message = "The index cannot be read."
            raise IndexUnavailable(message, retry_after_s=RETRY_AFTER_S) from error


def _estimated(size_bytes: float) -> float:
    """Bytes of requests as the buffer counts them, whose vectors take four a number."""
    return size_bytes * 4 / FLOAT_BYTES


def _fault(error: Exception) -> IndexFault:
    message = f"{type(error).__name__}: {error}"
    status = getattr(error, "status_code", None)
    if status is not None:
        return fault(status, message, getattr(error, "headers", None) or {})
    if isinstance(error, ValueError | TypeError):  # before a request: the SDK's own checks
        return RecordsRejected(message)
    return IndexRetryable(message, retry_after_s=RETRY_AFTER_S)
