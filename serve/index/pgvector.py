"""Vectors in a Postgres with the extension pgvector: one table per namespace, in a schema of its own.

Any number of processes write and read, and see a write as soon as it returned. A record of lower
generation never replaces one of a higher: both statements compare where they write, whatever else
writes at that moment.

A table starts without an index, and a search compares every row. Past `hnsw_rows_min` rows
`maintain` builds one, beside reads and writes: rows go in 3 to 5 times faster without. From then on
a search walks the index until it has `top_k` rows that satisfy the filter; when the index gives up
before (after 20,000 rows), every row is compared after all, so that a rare value is never missed.

`maintain` does no more than that: autovacuum counts changed rows for all processes and tidies up
tables and their indexes by itself.
"""

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from logging import getLogger
from typing import Any, TypeVar

import numpy as np
import psycopg
from psycopg import sql

from serve.capabilities import Capabilities
from serve.config import Index as IndexSettings
from serve.errors import BadInput, IndexUnavailable
from serve.index.checks import RECORD_ID, check_namespace, check_query, newest, refuse
from serve.index.errors import IndexOffline, IndexRetryable, RecordsRejected
from serve.index.pg_connections import RETRY_AFTER_S, Connection, Connections, fault
from serve.index.pg_statements import (
    AIM,
    AIM_EXACTLY,
    COLUMNS,
    COUNT,
    COUNT_UP_TO,
    CREATE,
    DELETE,
    DROP,
    FETCH,
    HALF_DIM_MAX,
    LOOK,
    SCAN,
    STOP_BUILD,
    UPSERT,
    Params,
    Table,
    from_row,
    to_pairs,
    to_rows,
    to_sql,
)
from serve.index.pg_text import asked
from serve.ports import IndexStats, Landed
from serve.records import CollectionSpec, Filter, Hit, Record, Tombstone, Vector


log = getLogger("headrace.index")

T = TypeVar("T")

DIM_MAX = 16_000
"""Of the extension's type `vector`."""

TOP_K_MAX = 10_000
SCAN_ROWS = 500
"""Records of one part of a scan: 1.5 MB of vectors of 768."""

SCHEMA_LOCK = 7_164_264
"""Key of the advisory lock under which one process makes the schema or a table in it."""

LOOKS = 8
"""A table is looked at again after a part of `hnsw_rows_min` rows."""


class PgIndex:
    """Implements `serve.ports.Index`. Connects on first use; `url` is that of the database.

    Write calls raise the errors of `serve.index.errors`, read calls `IndexUnavailable`.
    """

    def __init__(self, url: str, settings: IndexSettings) -> None:
        """Raises ValueError unless `url` can be one of Postgres; it is not repeated in the message."""
        self.caps = Capabilities(
            max_items=settings.max_items,
            max_bytes=settings.max_bytes,
            max_dim=min(settings.max_dim, DIM_MAX),
            max_top_k=TOP_K_MAX,
            consistency="strong",
            single_writer=False,
            full_text=True,
        )
        self._settings = own = settings.pgvector
        try:
            self._connections = Connections(
                url, size=own.connections, statement_s_max=own.statement_s_max
            )
        except psycopg.ProgrammingError:
            raise ValueError("not the URL of a Postgres") from None
        self._grown: dict[str, int] = {}

    async def open(self) -> None:
        """Connect now instead of on first use. Raises IndexUnavailable."""

        async def nothing(_: Connection) -> None:
            """A connection was made for it."""

        async with _reading():
            await self._connections.run(nothing)

    async def upsert(self, ns: str, records: Sequence[Record]) -> Landed:
        """One statement. A record of lower generation than the one held is skipped."""
        table = self._table(ns)

        async def write(connection: Connection) -> Landed:
            looked = await _row(connection, LOOK, table.named)
            if looked is None:
                raise IndexRetryable(f"table {ns} is missing", retry_after_s=RETRY_AFTER_S)
            rejected = refuse(records, looked[0])
            refused = {record_id for record_id, _ in rejected}
            rows = newest([record for record in records if record.id not in refused])
            if rows:
                await _put(connection, table, rows)
                # The first time as if it were full: what earlier processes left counts, too.
                grown = self._grown.get(ns, self._settings.hnsw_rows_min)
                self._grown[ns] = grown + len(rows)
            return Landed(rejected=rejected)

        async with _writing():
            return await self._connections.run(write)

    async def delete(self, ns: str, tombstones: Sequence[Tombstone]) -> Landed:
        """One statement."""
        table = self._table(ns)
        rows = newest([row for row in tombstones if RECORD_ID.fullmatch(row.id)])

        async def write(connection: Connection) -> Landed:
            if rows and await _row(connection, LOOK, table.named) is not None:
                await connection.execute(table.said(DELETE), to_pairs(rows))
            return Landed()

        async with _writing():
            return await self._connections.run(write)

    async def query(
        self, ns: str, vector: Vector, top_k: int, where: Filter | None = None
    ) -> Sequence[Hit]:
        """Exact while the table has no HNSW index; with it approximate, and never short of hits.

        With an index, which of equal scores is the last of `top_k` is not defined. Raises BadInput
        (vector), IndexUnavailable.
        """
        table = self._table(ns)
        params: Params = {"top_k": min(top_k, TOP_K_MAX)}
        predicate = to_sql(where, params)
        aim = {**table.named, "ef_search": str(self._settings.ef_search)}

        async def ask(connection: Connection) -> Sequence[Hit]:
            async with connection.transaction():
                looked = await _row(connection, AIM, aim)
                if looked is None:
                    return ()
                dimensions, indexed, *_ = looked
                check_query(vector, dimensions)
                params["vector"] = _unit(vector)
                if indexed:
                    nearest = table.nearest_roughly(predicate, dimensions)
                    rows = await _rows(connection, nearest, params)
                    if len(rows) == params["top_k"]:
                        return _hits(rows)
                    await connection.execute(AIM_EXACTLY)
                return _hits(await _rows(connection, table.nearest(predicate), params))

        return await self._read(ask, ())

    async def match(
        self, ns: str, text: str, top_k: int, where: Filter | None = None, /
    ) -> Sequence[Hit]:
        """BM25 over the rows that hold a word. Raises IndexUnavailable."""
        table = self._table(ns)
        params: Params = {"top_k": min(top_k, TOP_K_MAX)}
        statement = table.matching(to_sql(where, params))
        words = asked(text)
        if words is None:
            return ()

        async def ask(connection: Connection) -> Sequence[Hit]:
            rows = await _rows(connection, statement, {**params, **words})
            return [Hit(from_row(row), row[-1]) for row in rows]

        return await self._read(ask, ())

    async def fetch(self, ns: str, ids: Sequence[str]) -> Sequence[Record]:
        """The records that exist among `ids`."""
        table = self._table(ns)
        wanted = [record_id for record_id in dict.fromkeys(ids) if RECORD_ID.fullmatch(record_id)]
        statement = table.said(FETCH, columns=COLUMNS)

        async def ask(connection: Connection) -> Sequence[Record]:
            return [from_row(row) for row in await _rows(connection, statement, {"ids": wanted})]

        return await self._read(ask, ())

    async def scan(self, ns: str, where: Filter | None = None) -> AsyncIterator[Sequence[Record]]:
        """In the order of ids, each part by a statement of its own. Raises IndexUnavailable.

        A cursor would hold a connection, and dead rows in the whole database, for as long as the
        slowest reader takes. An id never changes, so going on behind the last one is as exact.
        """
        table = self._table(ns)
        params: Params = {"after": "", "rows": SCAN_ROWS}
        statement = table.said(SCAN, columns=COLUMNS, where=to_sql(where, params))

        async def ask(connection: Connection) -> Sequence[Record]:
            return [from_row(row) for row in await _rows(connection, statement, params)]

        none: Sequence[Record] = ()
        while part := await self._read(ask, none):
            yield part
            if len(part) < SCAN_ROWS:
                return
            params["after"] = part[-1].id

    async def reached(self, ns: str, _token: str, /) -> bool | None:
        """A write that returned is seen."""
        check_namespace(ns)
        return True

    async def ensure(self, spec: CollectionSpec) -> None:
        """Make the table, and the schema before the first. Raises BadInput (dimensions)."""
        table = self._table(spec.ns)
        if not 1 <= spec.dimensions <= self.caps.max_dim:
            raise BadInput(f"1 to {self.caps.max_dim} dimensions.", param="dimensions")
        schema = self._settings.schema_name

        async def make(connection: Connection) -> None:
            if await _row(connection, LOOK, table.named) is not None:
                return
            async with connection.transaction():
                await connection.execute("SELECT pg_advisory_xact_lock(%s)", (SCHEMA_LOCK,))
                there = "SELECT FROM pg_namespace WHERE nspname = %(schema)s"
                # Not `IF NOT EXISTS`: it wants the right to make one also where there is one.
                if await _row(connection, there, {"schema": schema}) is None:
                    await connection.execute(
                        sql.SQL("CREATE SCHEMA {}").format(sql.Identifier(schema))
                    )
                dimensions = sql.Literal(spec.dimensions)
                await connection.execute(table.said(CREATE, dimensions=dimensions))
                for statement in table.with_words():
                    await connection.execute(statement)

        async with _writing():
            await self._connections.run(make)

    async def drop(self, ns: str) -> None:
        """Remove the table; a build of its index is stopped."""
        table = self._table(ns)

        async def remove(connection: Connection) -> None:
            if await _row(connection, LOOK, table.named) is not None:
                await connection.execute(STOP_BUILD, {"key": table.key})
                await connection.execute(table.said(DROP))

        async with _writing():
            await self._connections.run(remove)
        self._grown.pop(ns, None)

    async def stats(self, ns: str) -> IndexStats:
        """Count the rows: exact."""
        statement = self._table(ns).said(COUNT)

        async def ask(connection: Connection) -> IndexStats:
            [[records]] = await _rows(connection, statement)
            return IndexStats(records=records)

        return await self._read(ask, IndexStats(records=0))

    async def maintain(self) -> None:
        """Build the HNSW index of tables that this process wrote to and that have become large.

        A build that fails is not an error: it is tried again after more rows.
        """
        enough = max(1, self._settings.hnsw_rows_min // LOOKS)
        for ns in [ns for ns, rows in self._grown.items() if rows >= enough]:
            self._grown[ns] = 0
            table = self._table(ns)
            try:
                dimensions = await self._connections.run(self._wanting(table))
                if dimensions is not None:
                    await self._build(table, dimensions)
            except (psycopg.Error, IndexOffline) as error:
                log.warning("the HNSW index of %s is put off: %s", ns, error)

    def _wanting(self, table: Table) -> Callable[[Connection], Awaitable[int | None]]:
        """Dimensions of a table that is large and has no index; else None."""
        enough = self._settings.hnsw_rows_min

        async def look(connection: Connection) -> int | None:
            looked = await _row(connection, LOOK, table.named)
            if looked is None or looked[1] or looked[0] > HALF_DIM_MAX:
                return None
            counted = await _row(connection, table.said(COUNT_UP_TO), {"rows": enough})
            return int(looked[0]) if counted is not None and counted[0] >= enough else None

        return look

    async def _build(self, table: Table, dimensions: int) -> None:
        """On a connection of its own, which may take long, and ends with it."""
        own = self._settings
        connection = await self._connections.connect()
        try:
            mine = await _row(
                connection, "SELECT pg_try_advisory_lock(%(key)s)", {"key": table.key}
            )
            if mine != (True,):
                return
            bounds = {
                "lock_timeout": "0",  # it waits for every older transaction
                "statement_timeout": f"{int(own.build_s_max * 1000)}",
                "maintenance_work_mem": f"{own.build_bytes_max // 1024}",
            }
            for name, value in bounds.items():
                await connection.execute("SELECT set_config(%s, %s, false)", (name, value))
            log.info("building the HNSW index %s", table.hnsw)
            await connection.execute(table.drop_hnsw())  # what a build that failed left
            await connection.execute(table.create_hnsw(dimensions, own.m, own.ef_construction))
        finally:
            await connection.close()

    async def aclose(self) -> None:
        """Close the connections; a later call would connect again."""
        await self._connections.close()

    def _table(self, ns: str) -> Table:
        check_namespace(ns)
        return Table(self._settings.schema_name, ns)

    async def _read(self, ask: Callable[[Connection], Awaitable[T]], missing: T) -> T:
        async with _reading():
            try:
                return await self._connections.run(ask)
            except (psycopg.errors.UndefinedTable, psycopg.errors.UndefinedColumn):
                return missing


async def _put(connection: Connection, table: Table, rows: Sequence[Record]) -> None:
    values = to_rows(rows)
    try:
        await connection.execute(table.said(UPSERT), values)
    except psycopg.errors.UndefinedColumn:  # made before there was full text
        for statement in table.with_words():
            await connection.execute(statement)
        await connection.execute(table.said(UPSERT), values)


async def _row(
    connection: Connection, statement: str | sql.Composed, params: Params | None = None
) -> tuple[Any, ...] | None:
    rows = await _rows(connection, statement, params)
    return rows[0] if rows else None


async def _rows(
    connection: Connection, statement: str | sql.Composed, params: Params | None = None
) -> list[tuple[Any, ...]]:
    cursor = connection.cursor(binary=True)
    await cursor.execute(statement, params)
    return await cursor.fetchall()


def _unit(vector: Vector) -> Vector:
    # A query's length says nothing, and float16 ends at 65,504.
    wide = np.asarray(vector, np.float64)
    return (wide / np.linalg.norm(wide)).astype(np.float32)


def _hits(rows: Sequence[Sequence[Any]]) -> list[Hit]:
    return [Hit(from_row(row), min(1.0, max(-1.0, 1.0 - row[-1]))) for row in rows]


@asynccontextmanager
async def _writing() -> AsyncIterator[None]:
    """Turns what psycopg raises into what the buffer decides on."""
    try:
        yield
    except psycopg.Error as error:
        raise fault(error) from error
    except (ValueError, TypeError, OverflowError) as error:
        raise RecordsRejected(str(error)) from error


@asynccontextmanager
async def _reading() -> AsyncIterator[None]:
    try:
        yield
    except (psycopg.Error, IndexOffline) as error:
        raise IndexUnavailable("The index cannot be read.", retry_after_s=1) from error
