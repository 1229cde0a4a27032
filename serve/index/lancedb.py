"""The default backend: one LanceDB table per namespace, in a folder or an object store.

One process writes; any number read. In a folder they see a write as soon as it returned, in an
object store within `lancedb.read_s`. Traps this file steps around:

- Two writers that insert the same new id make silent duplicates: with a scalar index (lancedb#3377),
  hence `use_index(False)`, and without the table's key (`serve.index.rows.KEY`), which old tables lack.
- Small commits rot a table: 300 single upserts made an upsert 4 times and a query 7 times slower.
  `maintain` compacts by the number of commits, and sooner what rests.
- Compaction removes old versions, so a reader may meet "Not found": it opens the table afresh,
  once.
- Writes and compaction of one table exclude each other here: a commit conflict would starve one.
  So do compaction and the build of its ANN index (`serve.index.lance_ann`), which takes long.

A missing table reads as empty (the Store knows whether a collection exists), deletes nothing, and
makes an upsert retryable: by the next flush the table is there, or the Store says `superseded`.
"""

import asyncio
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import timedelta
from logging import getLogger
from typing import TYPE_CHECKING, Any, TypeVar
from weakref import WeakValueDictionary

from serve.capabilities import Capabilities
from serve.config import Index as IndexSettings
from serve.errors import BadInput
from serve.index.checks import RECORD_ID, check_namespace, check_query, newest, refuse
from serve.index.errors import IndexRetryable
from serve.index.lance_ann import Builds, nearest
from serve.index.lance_commits import Commits
from serve.index.lance_place import (
    RETRY_AFTER_S,
    Place,
    not_of_records,
    reading,
    says_missing,
    write_fault,
)
from serve.index.lance_text import index_text, match_text
from serve.index.rows import COLUMNS, from_arrow, from_batch, schema_of, to_arrow
from serve.index.terms import to_sql
from serve.ports import IndexStats, Landed
from serve.records import CollectionSpec, Filter, Hit, Record, Tombstone, Vector


if TYPE_CHECKING:
    import lancedb

log = getLogger("headrace.index")

T = TypeVar("T")

IDS_PER_STATEMENT = 1000
"""Ids of one `IN` or one `DELETE`; 1,000 generations in one `DELETE` took 0.15 s, 4,000 1.2 s."""

TOP_K_MAX = 10_000
SCAN_ROWS = 500
"""Records of one part of a scan: 1.5 MB of vectors of 768."""

NEWER = "target.generation <= source.generation"


@dataclass(frozen=True, slots=True)
class _Open:
    table: "lancedb.AsyncTable"
    dimensions: int


class LanceIndex:
    """Implements `serve.ports.Index`. Connects on first use; `uri` is a folder or a bucket's URI, and
    `storage` the object store's options.

    LanceDB is imported then, too: 1.5 s of a core and 80 MB, which must not delay what starts beside it.

    Write calls raise the errors of `serve.index.errors`, read calls `IndexUnavailable`.
    """

    def __init__(
        self,
        uri: str,
        settings: IndexSettings,
        storage: Mapping[str, str] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._place = Place(uri, storage or {}, settings.lancedb)
        self.caps = Capabilities(
            max_items=settings.max_items,
            max_bytes=settings.max_bytes,
            max_dim=settings.max_dim,
            max_top_k=TOP_K_MAX,
            consistency="token" if self._place.lag_s else "strong",
            single_writer=True,
            full_text=True,
        )
        self._settings = settings
        self._builds = Builds(settings.lancedb)
        self._tables: OrderedDict[str, _Open] = OrderedDict()
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self._clock = clock
        self._commits = Commits(most=settings.compact_commits, rest_s=settings.compact_rest_s)

    async def open(self) -> None:
        """Import and connect now instead of on first use. Raises IndexUnavailable, ImportError."""
        async with reading():
            await self._place.database()

    async def upsert(self, ns: str, records: Sequence[Record]) -> Landed:
        """One commit. A record of lower generation than the one held is skipped."""
        check_namespace(ns)
        version = None
        async with self._lock(ns), self._writing(ns):
            opened = await self._open(ns)
            if opened is None:
                raise IndexRetryable(f"table {ns} is missing", retry_after_s=RETRY_AFTER_S)
            rejected = refuse(records, opened.dimensions)
            refused = {record_id for record_id, _ in rejected}
            rows = newest([record for record in records if record.id not in refused])
            if rows:
                merge = opened.table.merge_insert("id").use_index(use_index=False)
                merge = merge.when_matched_update_all(where=NEWER).when_not_matched_insert_all()
                version = (await merge.execute(to_arrow(rows, opened.dimensions))).version
                await self._committed(ns, opened)
                self._builds.grew(ns, len(rows))
        return Landed(rejected=rejected, token=self._token(version))

    async def delete(self, ns: str, tombstones: Sequence[Tombstone]) -> Landed:
        """One commit per 1,000 tombstones."""
        check_namespace(ns)
        rows = newest([row for row in tombstones if RECORD_ID.fullmatch(row.id)])
        version = None
        async with self._lock(ns), self._writing(ns):
            opened = await self._open(ns)
            if opened is None:
                return Landed()
            for start in range(0, len(rows), IDS_PER_STATEMENT):
                some = _guarded(rows[start : start + IDS_PER_STATEMENT])
                version = (await opened.table.delete(some)).version
                await self._committed(ns, opened)
        return Landed(token=self._token(version))

    async def query(
        self, ns: str, vector: Vector, top_k: int, where: Filter | None = None
    ) -> Sequence[Hit]:
        """Exact while the table has no ANN index; with it approximate, and never short of hits.

        A filter is applied before the vectors are compared. Equal scores are sorted by id, but which
        of them is the last of `top_k` is not defined. Raises BadInput (vector), IndexUnavailable.
        """
        check_namespace(ns)
        predicate = None if where is None else to_sql(where)

        async def ask(opened: _Open) -> Sequence[Hit]:
            check_query(vector, opened.dimensions)
            limit, own = min(top_k, TOP_K_MAX), self._settings.lancedb
            found = await nearest(opened.table, vector, limit, predicate, own)
            scores = (1.0 - found["_distance"].to_numpy()).tolist()
            hits = [
                Hit(record, min(1.0, max(-1.0, score)))
                for record, score in zip(from_arrow(found), scores, strict=True)
            ]
            return sorted(hits, key=lambda hit: (-hit.score, hit.record.id))

        return await self._read(ns, ask, ())

    async def match(
        self, ns: str, text: str, top_k: int, where: Filter | None = None, /
    ) -> Sequence[Hit]:
        """By Lance's BM25; which of equal scores is the last of `top_k` is not defined."""
        check_namespace(ns)

        async def ask(opened: _Open) -> Sequence[Hit]:
            return await match_text(opened.table, text, min(top_k, TOP_K_MAX), where)

        return await self._read(ns, ask, ())

    async def fetch(self, ns: str, ids: Sequence[str]) -> Sequence[Record]:
        """The records that exist among `ids`."""
        check_namespace(ns)
        wanted = [record_id for record_id in dict.fromkeys(ids) if RECORD_ID.fullmatch(record_id)]

        async def ask(opened: _Open) -> Sequence[Record]:
            records: list[Record] = []
            for start in range(0, len(wanted), IDS_PER_STATEMENT):
                some = _in_ids(wanted[start : start + IDS_PER_STATEMENT])
                found = await opened.table.query().where(some).select(list(COLUMNS)).to_arrow()
                records += from_arrow(found)
            return records

        return await self._read(ns, ask, ())

    async def scan(self, ns: str, where: Filter | None = None) -> AsyncIterator[Sequence[Record]]:
        """Of one version of the table, as it was when the scan began. Raises IndexUnavailable.

        A scan that takes longer than old versions are kept (`keep_versions_s`) may fail.
        """
        check_namespace(ns)
        async with reading():
            opened = await self._open(ns)
            if opened is None:
                return
            query = opened.table.query().select(list(COLUMNS))
            if where is not None:
                query = query.where(to_sql(where))
            async for part in await query.to_batches(max_batch_length=SCAN_ROWS):
                yield from_batch(part)

    async def reached(self, ns: str, token: str, /) -> bool | None:
        """In a folder a write that returned is seen; in an object store a token is the table's version,
        and this process answers for itself: another sees it within `lancedb.read_s`.
        """
        check_namespace(ns)
        if not self._place.lag_s:
            return True
        if not token.isdecimal():
            return None

        async def ask(opened: _Open) -> bool:
            return await opened.table.version() >= int(token)

        return await self._read(ns, ask, None)

    async def ensure(self, spec: CollectionSpec) -> None:
        """Make the table. Raises BadInput when it has too many dimensions."""
        check_namespace(spec.ns)
        if not 1 <= spec.dimensions <= self.caps.max_dim:
            raise BadInput(f"1 to {self.caps.max_dim} dimensions.", param="dimensions")
        async with self._lock(spec.ns), self._writing(spec.ns):
            if await self._open(spec.ns) is None:
                schema = schema_of(spec.dimensions)
                database = await self._place.database()
                table = await database.create_table(spec.ns, schema=schema, exist_ok=True)
                await index_text(table)

    async def drop(self, ns: str) -> None:
        """Remove the table and its files."""
        check_namespace(ns)
        await self._builds.forget(ns)
        async with self._lock(ns), self._writing(ns):
            self._forget(ns)
            self._commits.forget(ns)
            database = await self._place.database()
            try:
                await database.drop_table(ns)
            except ValueError as error:
                if not says_missing(error):
                    raise

    async def stats(self, ns: str) -> IndexStats:
        """Count the rows."""
        check_namespace(ns)

        async def ask(opened: _Open) -> IndexStats:
            return IndexStats(records=await opened.table.count_rows())

        return await self._read(ns, ask, IndexStats(records=0))

    async def maintain(self) -> None:
        """Compact tables with `compact_commits` or more commits, add their new rows to the ANN index,
        remove versions that are old; begin the build of an index that is wanted, and return.

        A table that nobody has written to for `compact_rest_s` is compacted after a few. A conflict
        is not an error: the table is tried again after half as many commits.
        """
        keep, now = timedelta(seconds=self._settings.keep_versions_s), self._clock()
        for ns in self._commits.due(now):
            if ns == self._builds.under_way:
                continue
            async with self._lock(ns), self._writing(ns):
                opened = await self._open(ns)
                self._commits.compacted(ns, now)
                try:
                    if opened is not None:
                        await index_text(opened.table)  # of a table from before there was one
                        await opened.table.optimize(cleanup_older_than=keep)
                        self._builds.compacted(ns)
                except (RuntimeError, OSError) as error:
                    self._commits.put_off(ns, now)
                    log.warning("compaction of %s is put off: %s", ns, error)
        await self._builds.tick(self._open_afresh)

    async def aclose(self) -> None:
        """Close the tables and the connection; a later call would connect again."""
        await self._builds.stop()
        while self._tables:
            self._tables.popitem()[1].table.close()  # type: ignore[no-untyped-call]
        self._place.close()

    def _token(self, version: int | None) -> str | None:
        return str(version) if self._place.lag_s and version is not None else None

    async def _open_afresh(self, ns: str) -> "lancedb.AsyncTable | None":
        database = await self._place.database()
        with not_of_records():
            try:
                return await database.open_table(ns)
            except ValueError as error:
                if says_missing(error):
                    return None
                raise

    async def _open(self, ns: str) -> _Open | None:
        opened = self._tables.get(ns)
        if opened is None:
            table = await self._open_afresh(ns)
            if table is None:
                return None
            schema = await table.schema()
            opened = _Open(table, schema.field("vector").type.list_size)
            self._tables[ns] = opened
        self._tables.move_to_end(ns)
        # An evicted table is only forgotten: a query that still runs holds it and closes it.
        while len(self._tables) > self._settings.tables_open_max:
            self._tables.popitem(last=False)
        return opened

    def _forget(self, ns: str) -> None:
        self._tables.pop(ns, None)

    def _lock(self, ns: str) -> asyncio.Lock:
        lock = self._locks.get(ns)
        if lock is None:
            lock = self._locks[ns] = asyncio.Lock()
        return lock

    async def _committed(self, ns: str, opened: _Open) -> None:
        number = 1
        if ns not in self._commits:
            # What an earlier process left uncompacted counts too, one fragment a commit.
            stats: dict[str, Any] = await opened.table.stats()  # type: ignore[assignment]
            number = int(stats["fragment_stats"]["num_small_fragments"])
        self._commits.add(ns, self._clock(), number)

    async def _read(self, ns: str, ask: Callable[[_Open], Awaitable[T]], missing: T) -> T:
        async with reading():
            opened = await self._open(ns)
            if opened is None:
                return missing
            try:
                return await ask(opened)
            except (RuntimeError, OSError) as error:
                if not says_missing(error):
                    raise
            # Compacted or dropped under this handle: opening afresh tells which.
            self._forget(ns)
            opened = await self._open(ns)
            return missing if opened is None else await ask(opened)

    @asynccontextmanager
    async def _writing(self, ns: str) -> AsyncIterator[None]:
        """Turns what Lance raises into what the buffer decides on."""
        try:
            yield
        except (RuntimeError, OSError, ValueError, TypeError, OverflowError) as error:
            if isinstance(error, RuntimeError | OSError):
                self._forget(ns)
            raise write_fault(error) from error


def _in_ids(ids: Iterable[str]) -> str:
    # Every id here passed RECORD_ID: letters, digits, '-' and '_' need no quoting.
    listed = ", ".join(f"'{record_id}'" for record_id in ids)
    return f"id IN ({listed})"


def _guarded(tombstones: Iterable[Tombstone]) -> str:
    generations: dict[int, list[str]] = {}
    for tombstone in tombstones:
        generations.setdefault(int(tombstone.generation), []).append(tombstone.id)
    groups = [f"(generation <= {g} AND {_in_ids(ids)})" for g, ids in generations.items()]
    return " OR ".join(groups)
