"""What only pgvector must show: two writers, the HNSW index, long vectors, a server that refuses or goes."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psycopg
import pytest
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from bench.postgres_server import careless
from bench.postgres_server import url as server_url
from serve.config import Index as IndexSettings
from serve.config.index import Pgvector
from serve.errors import BadInput, IndexUnavailable
from serve.index import pg_connections, pgvector
from serve.index.errors import IndexOffline, IndexRetryable, RecordsRejected
from serve.index.filters import matches, parse
from serve.index.pg_statements import AIM, LOOK, Table, to_sql
from serve.index.pgvector import PgIndex
from serve.records import CollectionSpec, Record, Tombstone


pytestmark = pytest.mark.postgres

NS = "0" * 31 + "c"
SCHEMA = "headrace_tests"
DIMENSIONS = 16
TABLE = Table(SCHEMA, NS)


def settings(**changes: Any) -> IndexSettings:
    own = {"url_env": "X", "schema_name": SCHEMA, "hnsw_rows_min": 400, **changes}
    return IndexSettings(backend="pgvector", pgvector=Pgvector(**own))


def records(
    start: int, stop: int, generation: int = 1, dimensions: int = DIMENSIONS
) -> list[Record]:
    rows = np.random.default_rng(start).normal(size=(stop - start, dimensions))
    return [
        Record(
            f"r{start + at:05}",
            f"d{start + at}",
            generation,
            0,
            row,
            metadata={"number": start + at, "tenth": (start + at) % 10},
        )
        for at, row in enumerate(rows.astype(np.float32))
    ]


@pytest.fixture
def url() -> str:
    careless()
    return server_url()


@asynccontextmanager
async def opened(url: str, **changes: Any) -> AsyncIterator[PgIndex]:
    made = PgIndex(url, settings(**changes))
    try:
        yield made
    finally:
        await made.aclose()


@asynccontextmanager
async def session(url: str) -> AsyncIterator[psycopg.AsyncConnection[Any]]:
    connection = await psycopg.AsyncConnection.connect(url, autocommit=True)
    try:
        yield connection
    finally:
        await connection.close()


@pytest.fixture
async def index(url: str) -> AsyncIterator[PgIndex]:
    async with opened(url) as made:
        await made.ensure(CollectionSpec(NS, DIMENSIONS))
        yield made
        await made.drop(NS)


@pytest.fixture
async def other(url: str) -> AsyncIterator[PgIndex]:
    async with opened(url) as made:
        yield made


async def until(found: Callable[[], Awaitable[bool]]) -> None:
    for _ in range(500):
        if await found():
            return
        await asyncio.sleep(0.02)
    pytest.fail("it never happened")


async def looked(url: str) -> Any:
    async with session(url) as connection:
        return await (await connection.execute(LOOK, TABLE.named)).fetchone()


async def indexes(url: str) -> int:
    """Of the table, the unusable ones as well, beside those of the primary key and of words."""
    async with session(url) as connection:
        count = "SELECT count(*) - 2 FROM pg_indexes WHERE schemaname = %s AND tablename = %s"
        found = await connection.execute(count, (SCHEMA, f"v_{NS}"))
        return (await found.fetchone())[0]


# Writers and readers


async def test_two_writers_at_once_leave_no_duplicate_and_the_higher_generation(index, other):
    some = records(0, 240)

    async def land(writer: PgIndex, rows: list[Record]) -> None:
        for start in range(0, 240, 40):
            await writer.upsert(NS, rows[start : start + 40])

    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(land(index, [replace(row, generation=2) for row in some]))
        tasks.create_task(land(index, some[::-1]))
        tasks.create_task(land(other, [replace(row, generation=3, text="last") for row in some]))
        tasks.create_task(land(other, some))
    assert (await index.stats(NS)).records == 240
    found = await other.fetch(NS, [row.id for row in some])
    assert {(row.generation, row.text) for row in found} == {(3, "last")}


async def test_another_connection_sees_a_write_at_once(index, other):
    for number in range(5):
        [row] = records(number, number + 1)
        await index.upsert(NS, [row])
        [hit] = await other.query(NS, row.vector, 1)
        assert hit.record.id == row.id
        await index.delete(NS, [Tombstone(row.id, row.document, 1)])
        assert await other.fetch(NS, [row.id]) == []


async def test_making_the_same_table_at_once(url, index, other):
    await index.drop(NS)
    async with asyncio.TaskGroup() as tasks:
        for maker in (index, other) * 4:
            tasks.create_task(maker.ensure(CollectionSpec(NS, DIMENSIONS)))
    assert await looked(url) == (DIMENSIONS, False)


async def test_it_opens_again_after_close(index):
    await index.open()
    await index.upsert(NS, records(0, 3))
    await index.aclose()
    assert (await index.stats(NS)).records == 3


async def test_what_the_database_cannot_hold_is_rejected(index):
    [row] = records(0, 1)
    with pytest.raises(RecordsRejected):
        await index.upsert(NS, [replace(row, generation=2**63)])
    await index.upsert(NS, [row])


VALUES = [
    2**53, 2**53 + 1, 2**63, -(2**70), 1.5, -0.0, 0, 1, 5e-324, 1.7e308, True, False, "1", "true",
    "", "n", "\x00", "\x01", "a\x00b", "\ud7ff", "\ue000", "🎉", ["1", 1, True], [], [0, ""], [2**53],
]  # fmt: skip
KEYS = ["a.b", "a'b", 'a"b', "$a"[1:], "größe", "k" * 256, "%s", "{}", "a\\b", " "]


async def test_odd_values_and_keys_agree_with_the_oracle(index):
    rows = [
        replace(
            row, metadata={KEYS[at % len(KEYS)]: VALUES[at % len(VALUES)], "both": VALUES[at % 7]}
        )
        for at, row in enumerate(records(0, len(KEYS) * len(VALUES)))
    ]
    await index.upsert(NS, rows)
    for key in [*KEYS, "both", "absent"]:
        for value in VALUES:
            if isinstance(value, list):
                continue
            ordered = [] if isinstance(value, bool) else ["$gt", "$gte", "$lt", "$lte"]
            for op in ("$eq", "$ne", *ordered):
                tree = parse({key: {op: value}}, terms_max=4)
                expected = {row.id for row in rows if matches(tree, row.metadata)}
                found = {row.id async for part in index.scan(NS, tree) for row in part}
                assert found == expected, (key, op, value)


# The HNSW index


async def test_a_large_table_gets_an_index_beside_reads_and_writes(index, url):
    await index.upsert(NS, records(0, 399))
    await index.maintain()
    assert await looked(url) == (DIMENSIONS, False)
    await index.upsert(NS, records(399, 460))
    await index.maintain()
    assert await looked(url) == (DIMENSIONS, True)
    await index.upsert(NS, records(460, 500))
    await index.delete(NS, [Tombstone("r00000", "d0", 1)])
    [row] = records(460, 461)
    [hit] = await index.query(NS, row.vector, 1)
    assert hit.record.id == row.id
    assert (await index.stats(NS)).records == 499


async def test_what_an_earlier_process_left_is_looked_at_too(index, other, url):
    await index.upsert(NS, records(0, 500))
    await other.upsert(NS, records(500, 501))
    await other.maintain()
    assert await looked(url) == (DIMENSIONS, True)


async def plan(url: str, where: Any) -> str:
    params: dict[str, Any] = {"top_k": 10, "vector": np.ones(DIMENSIONS, np.float32)}
    statement = TABLE.nearest_roughly(to_sql(where, params), DIMENSIONS).as_string(None)
    connection = await PgIndex(url, settings())._connections.connect()
    try:
        async with connection.transaction():
            await connection.execute(AIM, {**TABLE.named, "ef_search": "80"})
            found = await connection.execute("EXPLAIN " + statement, params)
            return "\n".join(row[0] for row in await found.fetchall())
    finally:
        await connection.close()


@pytest.mark.parametrize("raw", [{}, {"tenth": 3}, {"number": {"$lt": 60}}, {"tenth": {"$ne": 3}}])
async def test_recall_through_the_index_with_and_without_a_filter(index, url, raw, monkeypatch):
    monkeypatch.setattr(pgvector, "AIM_EXACTLY", "no comparing of every row after all")
    rows = records(0, 3000)
    for start in range(0, 3000, 1000):
        await index.upsert(NS, rows[start : start + 1000])
    await index.maintain()
    where = parse(raw, terms_max=4)
    assert TABLE.hnsw in await plan(url, where)
    matrix = np.stack([row.vector / np.linalg.norm(row.vector) for row in rows])
    wanted = found = 0
    for query in np.random.default_rng(5).normal(size=(20, DIMENSIONS)).astype(np.float32):
        scores = matrix @ (query / np.linalg.norm(query))
        order = [at for at in np.argsort(-scores) if matches(where, rows[at].metadata)][:10]
        hits = await index.query(NS, query, 10, where)
        assert [hit.score for hit in hits] == sorted((hit.score for hit in hits), reverse=True)
        assert all(matches(where, hit.record.metadata) for hit in hits)
        assert len(hits) == 10
        wanted += 10
        found += len({hit.record.id for hit in hits} & {rows[at].id for at in order})
    assert found >= 0.95 * wanted


async def test_hits_are_in_order_though_the_index_gives_them_roughly(index, url):
    await index.upsert(NS, records(0, 1000))
    await index.maintain()
    async with opened(url, ef_search=1) as reader:
        for query in np.random.default_rng(5).normal(size=(20, DIMENSIONS)).astype(np.float32):
            scores = [hit.score for hit in await reader.query(NS, query, 100)]
            assert scores == sorted(scores, reverse=True)


async def test_where_the_index_gives_up_every_row_is_compared(index, url):
    await index.upsert(NS, records(0, 1000))
    await index.maintain()
    # Reading the table is said to be dear: the planner would rather walk the index once more.
    options = "-c hnsw.max_scan_tuples=1 -c seq_page_cost=1000000"
    hasty = make_conninfo(url, options=options)
    async with opened(hasty, ef_search=10) as reader:
        rare = parse({"number": {"$in": [3, 500, 999]}}, terms_max=4)
        hits = await reader.query(NS, np.ones(DIMENSIONS, np.float32), 10, rare)
        assert {hit.record.metadata["number"] for hit in hits} == {3, 500, 999}
        assert len(await reader.query(NS, np.ones(DIMENSIONS, np.float32), 900)) == 900


async def test_an_index_that_was_not_finished_is_made_again_and_a_drop_stops_one(index, other, url):
    await index.upsert(NS, records(0, 500))
    async with session(url) as old:
        await old.execute("BEGIN ISOLATION LEVEL REPEATABLE READ")
        await old.execute("SELECT 1")  # a build waits for who may still see what was before

        async def build() -> asyncio.Task[None]:
            task = asyncio.create_task(index.maintain())

            async def waits() -> bool:
                return await indexes(url) == 1

            await until(waits)
            return task

        task = await build()
        await other.upsert(NS, records(500, 501))
        await other.maintain()  # it is being built: not twice
        assert await looked(url) == (DIMENSIONS, False)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert await looked(url) == (DIMENSIONS, False)
        await old.execute("ROLLBACK")
        await index.upsert(NS, records(501, 600))
        await index.maintain()
        assert (await looked(url), await indexes(url)) == ((DIMENSIONS, True), 1)

        await old.execute(TABLE.drop_hnsw())
        await old.execute("BEGIN ISOLATION LEVEL REPEATABLE READ")
        await old.execute("SELECT 1")
        await index.upsert(NS, records(600, 700))
        task = await build()
        await other.drop(NS)
        await task
        assert await looked(url) is None


async def test_a_build_that_fails_is_put_off(index, url, caplog):
    await index.upsert(NS, records(0, 500))
    async with opened(url, build_s_max=1) as hasty, session(url) as old:
        await hasty.upsert(NS, records(500, 501))
        await old.execute("BEGIN ISOLATION LEVEL REPEATABLE READ")
        await old.execute("SELECT 1")
        await hasty.maintain()
        assert "put off" in caplog.text
        await old.execute("ROLLBACK")
        await hasty.maintain()
        assert await looked(url) == (DIMENSIONS, False)  # only after more rows
        await index.maintain()
        assert (await looked(url), await indexes(url)) == ((DIMENSIONS, True), 1)


@pytest.mark.parametrize(("dimensions", "indexed"), [(2000, True), (2001, True), (4001, False)])
async def test_long_vectors(url, dimensions, indexed):
    async with opened(url, hnsw_rows_min=50) as index:
        await index.ensure(CollectionSpec(NS, dimensions))
        rows = records(0, 60, dimensions=dimensions)
        loud = replace(rows[0], vector=np.full(dimensions, 1e16, np.float32))
        await index.upsert(NS, [loud, *rows[1:]])
        await index.maintain()
        assert await looked(url) == (dimensions, indexed)
        await index.upsert(NS, [replace(rows[1], generation=2, vector=-loud.vector)])
        query = np.full(dimensions, 3e15, np.float32)
        hits = await index.query(NS, query, 60)
        assert (hits[0].record.id, hits[-1].record.id) == ("r00000", "r00001")
        assert (hits[0].score, hits[-1].score) == pytest.approx((1, -1), abs=1e-5)
        near = await index.query(NS, rows[7].vector, 3, parse({"tenth": 7}, terms_max=1))
        assert near[0].record.id == "r00007"
        await index.drop(NS)


async def test_the_longest_vectors_of_the_extension(url):
    async with opened(url) as index:
        with pytest.raises(BadInput):
            await index.ensure(CollectionSpec(NS, 16_001))
        await index.ensure(CollectionSpec(NS, 16_000))
        rows = records(0, 2, dimensions=16_000)
        await index.upsert(NS, rows)
        [hit] = await index.query(NS, rows[1].vector, 1)
        assert hit.record.id == "r00001"
        assert np.array_equal(hit.record.vector, rows[1].vector)
        await index.drop(NS)


# Errors


async def assert_refused(url: str, error: type[Exception]) -> None:
    async with opened(url) as index:
        for write in (
            index.upsert(NS, records(0, 1)),
            index.delete(NS, [Tombstone("r0", "d0", 1)]),
            index.ensure(CollectionSpec(NS, DIMENSIONS)),
            index.drop(NS),
        ):
            with pytest.raises(error):
                await write
        for read in (
            index.open(),
            index.query(NS, np.ones(DIMENSIONS, np.float32), 1),
            index.fetch(NS, ["r0"]),
            index.stats(NS),
        ):
            with pytest.raises(IndexUnavailable):
                await read
        with pytest.raises(IndexUnavailable):
            _ = [part async for part in index.scan(NS)]


@asynccontextmanager
async def locked_role(url: str) -> AsyncIterator[str]:
    """A role that must give its password, `right`; the server trusts all others."""
    role = "headrace_locked"
    async with session(url) as connection:
        await connection.execute(f"CREATE ROLE {role} LOGIN SUPERUSER PASSWORD 'right'")
        row = await (await connection.execute("SHOW hba_file")).fetchone()
        assert row is not None
        path = Path(row[0])
        rules = path.read_text()  # noqa: ASYNC240  a small file of a test's own
        path.write_text(f"local all {role} scram-sha-256\n{rules}")  # noqa: ASYNC240
        await connection.execute("SELECT pg_reload_conf()")

        async def asks() -> bool:
            try:
                async with session(make_conninfo(url, user=role, password="")):
                    return False
            except psycopg.OperationalError:
                return True

        await until(asks)
        yield role
        path.write_text(rules)  # noqa: ASYNC240
        await connection.execute("SELECT pg_reload_conf()")
        await connection.execute(f"DROP ROLE {role}")


async def test_a_wrong_password_takes_the_index_offline(index, url):
    async with locked_role(url) as role:
        for wrong in ("wrong", ""):
            await assert_refused(make_conninfo(url, user=role, password=wrong), IndexOffline)
        async with opened(make_conninfo(url, user=role, password="right")) as allowed:  # noqa: S106
            await allowed.upsert(NS, records(0, 1))


@pytest.mark.parametrize("wrong", [{"dbname": "nowhere"}, {"user": "nobody_at_all"}])
async def test_a_database_or_a_role_that_does_not_exist_takes_it_offline(url, wrong):
    await assert_refused(make_conninfo(url, **wrong), IndexOffline)


async def test_a_right_that_is_taken_away_takes_it_offline(index, url):
    role = "headrace_reader"
    async with session(url) as connection:
        await connection.execute(f"CREATE ROLE {role} LOGIN")
        await connection.execute(f"GRANT USAGE ON SCHEMA {SCHEMA} TO {role}")
        await connection.execute(f"GRANT SELECT ON ALL TABLES IN SCHEMA {SCHEMA} TO {role}")
        try:
            async with opened(make_conninfo(url, user=role)) as reader:
                assert (await reader.stats(NS)).records == 0
                with pytest.raises(IndexOffline):
                    await reader.upsert(NS, records(0, 1))
        finally:
            await connection.execute(f"DROP OWNED BY {role}")
            await connection.execute(f"DROP ROLE {role}")


async def test_an_extension_that_is_too_old_takes_it_offline(url, monkeypatch):
    monkeypatch.setattr(pg_connections, "VERSION_MIN", (99, 0))
    await assert_refused(url, IndexOffline)


async def test_nobody_listens(url):
    away = make_conninfo(url, host="127.0.0.1", port=1)
    await assert_refused(away, IndexRetryable)


class Wire:
    """A port on 127.0.0.1 that leads to the server's socket, while it is up."""

    def __init__(self, url: str) -> None:
        given = conninfo_to_dict(url)
        self._socket = f"{given['host']}/.s.PGSQL.{given.get('port', 5432)}"
        self._server: asyncio.Server | None = None
        self._ends: list[asyncio.StreamWriter] = []
        self._port = 0

    async def up(self) -> int:
        self._server = await asyncio.start_server(self._joined, "127.0.0.1", self._port)
        self._port = self._server.sockets[0].getsockname()[1]
        return self._port

    async def _joined(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        far_reader, far_writer = await asyncio.open_unix_connection(self._socket)
        self._ends += [writer, far_writer]
        await asyncio.gather(_pour(reader, far_writer), _pour(far_reader, writer))

    async def down(self) -> None:
        assert self._server is not None
        self._server.close()
        while self._ends:
            self._ends.pop().close()


async def _pour(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        while some := await reader.read(65_536):
            writer.write(some)
    except ConnectionError:
        pass
    writer.close()


async def test_a_server_that_goes_and_comes_back(index, url):
    wire = Wire(url)
    through = make_conninfo(url, host="127.0.0.1", port=await wire.up())
    async with opened(through) as far:
        some = records(0, 40)
        await asyncio.gather(*(far.upsert(NS, some[start::4]) for start in range(4)))
        assert len(far._connections._idle) == 4
        await wire.down()
        with pytest.raises(IndexRetryable):
            await far.upsert(NS, records(40, 41))
        with pytest.raises(IndexUnavailable):
            await far.stats(NS)
        await wire.up()
        await far.upsert(NS, records(40, 41))
        assert (await far.stats(NS)).records == 41
    await wire.down()


async def test_sessions_that_the_server_ended_are_replaced_unseen(index, url):
    await asyncio.gather(*(index.upsert(NS, [row]) for row in records(0, 4)))
    assert len(index._connections._idle) == 4
    end = "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity WHERE application_name = %s"
    async with session(url) as connection:
        await connection.execute(end, ("headrace",))
    await asyncio.gather(*(index.upsert(NS, [row]) for row in records(4, 8)))
    assert (await index.stats(NS)).records == 8


@asynccontextmanager
async def locked_row(url: str) -> AsyncIterator[psycopg.AsyncConnection[Any]]:
    """Somebody else has begun to write the first record, and does not end."""
    async with session(url) as connection, connection.transaction():
        await connection.execute(TABLE.said(psycopg.sql.SQL("SELECT * FROM {table} FOR UPDATE")))
        yield connection


async def test_a_statement_that_takes_too_long_may_be_repeated(index, url):
    await index.upsert(NS, records(0, 1))
    async with opened(url, statement_s_max=0.2) as hasty:
        async with locked_row(url):
            with pytest.raises(IndexRetryable):
                await hasty.upsert(NS, records(0, 1, generation=2))
        await hasty.upsert(NS, records(0, 1, generation=2))


async def test_a_call_that_is_given_up_leaves_its_place(index, url):
    await index.upsert(NS, records(0, 1))
    async with opened(url, connections=1) as single:
        async with locked_row(url) as lock:
            call = asyncio.create_task(single.upsert(NS, records(0, 1, generation=2)))
            waiting = "SELECT count(*) FROM pg_locks WHERE NOT granted"

            async def waits() -> bool:
                return (await (await lock.execute(waiting)).fetchone())[0] > 0

            await until(waits)
            call.cancel()
            with pytest.raises(asyncio.CancelledError):
                await call
            assert (await single.stats(NS)).records == 1
        [row] = await single.fetch(NS, ["r00000"])
        assert row.generation == 1


async def test_connections_are_bounded_and_so_is_the_wait_for_one(index, url):
    async with opened(url, connections=1, statement_s_max=0.2) as single:
        begun, let_go = asyncio.Event(), asyncio.Event()

        async def hold(_: object) -> None:
            begun.set()
            await let_go.wait()

        holding = asyncio.create_task(single._connections.run(hold))
        await begun.wait()
        with pytest.raises(IndexRetryable):
            await single.upsert(NS, records(0, 1))
        with pytest.raises(IndexUnavailable):
            await single.stats(NS)
        let_go.set()
        await holding
        await asyncio.gather(*(single.upsert(NS, [row]) for row in records(0, 20)))
        assert len(single._connections._idle) == 1
        assert (await single.stats(NS)).records == 20
