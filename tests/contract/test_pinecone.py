"""What only Pinecone must show: its errors, hidden retries, lag, limits; over the loopback server."""

import asyncio
import socket
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from pinecone import AsyncIndex
from pinecone._internal import http_client

from serve.capabilities import Rates
from serve.config import Buffer as BufferSettings
from serve.config.index import Pinecone
from serve.errors import BadInput, IndexUnavailable
from serve.freshness import UNPROVED
from serve.index import pinecone as adapter
from serve.index.errors import BatchTooLarge, IndexOffline, IndexRetryable, RecordsRejected
from serve.index.filters import matches, parse
from serve.index.lanes import WRITE_BYTES, size_bytes
from serve.index.pinecone import PineconeIndex
from serve.index.probes import Probes
from serve.index.writer import Writer
from serve.pressure import Sender
from serve.records import CollectionSpec, Record, Tombstone
from tests.contract.pinecone_index import connected
from tests.contract.pinecone_server import BODY_BYTES_MAX, KEY, PineconeServer, serving


NS = "0" * 31 + "c"
ME = Sender("me", 1.0)
DIMENSIONS = 8
UPSERT = "/vectors/upsert"
NEVER = 10**9
"""Reads that do not see a write."""


class Rig:
    """A server, and as many adapters over it as a test asks for."""

    def __init__(self, stack: AsyncExitStack) -> None:
        self._stack = stack
        self.server: Any = None

    async def serve(self, dimensions: int = DIMENSIONS, **options: Any) -> PineconeServer:
        self.server = PineconeServer(dimensions, **options)
        self.url = await self._stack.enter_async_context(serving(self.server))
        return self.server

    async def index(self, *, opened: bool = True, **settings: Any) -> PineconeIndex:
        if self.server is None:
            await self.serve()
        index = connected(self.url, **settings)
        self._stack.push_async_callback(index.aclose)
        if opened:
            await index.open()
        return index


@pytest.fixture
async def rig() -> AsyncIterator[Rig]:
    async with AsyncExitStack() as stack:
        yield Rig(stack)


@pytest.fixture(autouse=True)
def _fresh_retries() -> None:
    """The SDK stops repeating a host that failed 50 times, over all tests of a process."""
    http_client.get_budget_registry()._reset()


@pytest.fixture
def naps(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """How long the SDK's hidden retries would have slept."""
    slept: list[float] = []

    async def nap(seconds: float) -> None:
        slept.append(seconds)

    monkeypatch.setattr(http_client, "_async_retry_sleep", nap)
    return slept


def records(count: int, generation: int = 1, dimensions: int = DIMENSIONS) -> list[Record]:
    rows = np.random.default_rng(0).normal(size=(count, dimensions)).astype(np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    return [Record(f"{n:032x}", f"d{n}", generation, n, rows[n], f"text {n}") for n in range(count)]


async def generations(index: PineconeIndex, rows: list[Record]) -> list[int]:
    found = {one.id: one.generation for one in await index.fetch(NS, [row.id for row in rows])}
    return [found.get(row.id, 0) for row in rows]


# Errors


@pytest.mark.parametrize(
    ("status", "error", "tries"),
    [
        (400, RecordsRejected, 1),
        (422, RecordsRejected, 1),
        (413, BatchTooLarge, 1),
        (401, IndexOffline, 1),
        (402, IndexOffline, 1),
        (403, IndexOffline, 1),
        (404, IndexOffline, 1),
        (412, IndexOffline, 1),
        (418, IndexOffline, 1),
        (301, IndexOffline, 1),
        (409, IndexRetryable, 1),
        (425, IndexRetryable, 1),
        (408, IndexRetryable, 4),
        (429, IndexRetryable, 4),
        (500, IndexRetryable, 4),
        (503, IndexRetryable, 4),
        (529, IndexRetryable, 1),
    ],
)
async def test_a_status_becomes_what_the_buffer_decides_on(rig, naps, status, error, tries):
    index = await rig.index()
    rig.server.fail(status, tries, path=UPSERT)
    with pytest.raises(error) as caught:
        await index.upsert(NS, records(1))
    assert getattr(caught.value, "pairs", None) is None
    assert rig.server.count(UPSERT) == tries
    assert len(naps) == tries - 1
    rig.server.fail(status, tries, path="/vectors/delete")
    with pytest.raises(error):
        await index.delete(NS, [Tombstone("a", "d", 1)])
    assert (await index.upsert(NS, records(1))).rejected == ()
    assert await generations(index, records(1)) == [1]


@pytest.mark.parametrize("status", [400, 401, 403, 404, 413, 429, 503])
async def test_a_read_that_fails_is_an_index_that_is_unavailable(rig, naps, status):
    index = await rig.index()
    rig.server.fail(status, 99)
    vector = np.ones(DIMENSIONS, np.float32)
    calls = [
        index.query(NS, vector, 3),
        index.fetch(NS, ["a"]),
        index.stats(NS),
        index.reached(NS, "1"),
        anext(aiter(index.scan(NS))),
    ]
    for call in calls:
        with pytest.raises(IndexUnavailable) as caught:
            await call
        assert caught.value.retry_after_s


async def test_a_filter_that_is_refused_is_the_callers(rig):
    index = await rig.index()
    rig.server.fail(400, path="/query")
    with pytest.raises(BadInput) as caught:
        await index.query(NS, np.ones(DIMENSIONS, np.float32), 3, parse({"a": 1}, terms_max=1))
    assert caught.value.param == "filter"


@pytest.mark.parametrize(
    ("asked", "told"), [("7", 7), ("0.5", 0.5), ("-1", 1), ("nan", 1), ("soon", 1), (None, 1)]
)
async def test_the_wait_that_was_asked_for_is_told(rig, naps, asked, told):
    index = await rig.index()
    headers = {} if asked is None else {"retry-after": asked}
    rig.server.fail(429, 4, path=UPSERT, headers=headers)
    with pytest.raises(IndexRetryable) as caught:
        await index.upsert(NS, records(1))
    assert caught.value.retry_after_s == told
    rig.server.fail(503, 4, path="/query", headers=headers)
    with pytest.raises(IndexUnavailable) as unread:
        await index.query(NS, np.ones(DIMENSIONS, np.float32), 1)
    assert unread.value.retry_after_s == told


async def test_a_reply_that_is_no_json_is_tried_again(rig):
    index = await rig.index()
    rig.server.fail(200, path=UPSERT, body=b"<html>")
    with pytest.raises(IndexRetryable):
        await index.upsert(NS, records(1))


async def test_hidden_retries_end_at_the_deadline(rig):
    """The SDK would sleep for 30 s and more before each of three further tries."""
    index = await rig.index(deadline_s=0.3)
    rig.server.fail(429, 99, headers={"retry-after": "30"})
    with pytest.raises(IndexRetryable, match="deadline"):
        await index.upsert(NS, records(1))
    assert rig.server.count("/vectors/fetch") == 1
    with pytest.raises(IndexUnavailable):
        await index.query(NS, np.ones(DIMENSIONS, np.float32), 1)
    assert rig.server.count("/query") == 1


async def test_a_slow_answer_ends_at_the_deadline(rig):
    index = await rig.index(deadline_s=0.3)
    rig.server.hold.clear()
    with pytest.raises(IndexRetryable):
        await index.upsert(NS, records(1))
    with pytest.raises(IndexUnavailable):
        await index.fetch(NS, ["a"])
    rig.server.hold.set()
    await index.upsert(NS, records(1))


async def test_no_server_is_retryable_and_is_found_once_it_is_there(rig, naps):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    index = connected(f"http://127.0.0.1:{port}")
    with pytest.raises(IndexUnavailable):
        await index.open()
    with pytest.raises(IndexRetryable):
        await index.ensure(CollectionSpec(NS, DIMENSIONS))
    index = await rig.index(opened=False)
    rig.server.fail(503, 4, path="/describe_index_stats")
    with pytest.raises(IndexUnavailable):
        await index.open()
    await index.ensure(CollectionSpec(NS, DIMENSIONS))


async def test_a_key_that_is_refused_pauses_the_index(rig):
    index = await rig.index(opened=False)
    rig.server.key = "another"
    with pytest.raises(IndexUnavailable):
        await index.open()
    for call in (index.ensure(CollectionSpec(NS, DIMENSIONS)), index.upsert(NS, records(1))):
        with pytest.raises(IndexOffline):
            await call
    rig.server.key = KEY
    await index.upsert(NS, records(1))


async def test_a_key_that_is_no_header_pauses_the_index():
    index = PineconeIndex(Pinecone(host="http://127.0.0.1:1"), "key\n", time.monotonic)
    with pytest.raises(IndexOffline):
        await index.upsert(NS, records(1))
    with pytest.raises(IndexUnavailable):
        await index.open()


@pytest.mark.parametrize(("dimension", "metric"), [(None, "cosine"), (DIMENSIONS, "dotproduct")])
async def test_an_index_of_another_kind_is_not_used(rig, dimension, metric):
    await rig.serve(dimension, metric=metric)
    index = await rig.index(opened=False)
    with pytest.raises(IndexUnavailable):
        await index.open()
    with pytest.raises(IndexOffline):
        await index.ensure(CollectionSpec(NS, DIMENSIONS))


async def test_a_collection_of_another_dimension_is_bad_input(rig):
    index = await rig.index()
    with pytest.raises(BadInput, match="8 dimensions") as caught:
        await index.ensure(CollectionSpec(NS, DIMENSIONS + 1))
    assert caught.value.param == "dimensions"


async def test_a_wrong_host_is_not_a_missing_namespace(rig):
    index = await rig.index()
    await index.drop(NS)
    await index.delete(NS, [Tombstone("a", "d", 1)])
    for call in (index.drop(NS), index.delete(NS, [Tombstone("a", "d", 1)])):
        rig.server.fail(404, body=b"no such host")
        with pytest.raises(IndexOffline):
            await call


# What is sent


async def test_what_pinecone_would_garble_is_never_sent(rig):
    index = await rig.index()
    good = records(2)
    bad = [
        replace(good[0], id="nan", vector=np.full(DIMENSIONS, np.nan, np.float32)),
        replace(good[0], id="inf", vector=np.full(DIMENSIONS, np.inf, np.float32)),
        replace(good[0], id=""),
        replace(good[0], id="none", metadata={"a": None}),
    ]
    landed = await index.upsert(NS, bad)
    assert len(landed.rejected) == 4
    assert landed.token is None
    assert UPSERT not in rig.server.calls
    landed = await index.upsert(NS, [*bad, *good])
    assert len(landed.rejected) == 4
    [body] = [body for body in rig.server.bodies if b'"vectors"' in body]
    assert b"null" not in body


async def test_a_flush_that_does_not_fit_goes_out_in_parts(rig):
    await rig.serve(384)
    index = await rig.index()
    some = records(1000, dimensions=384)
    landed = await index.upsert(NS, some)
    sizes = [len(body) for body in rig.server.bodies if b'"vectors"' in body]
    assert len(sizes) == 3
    assert max(sizes) <= BODY_BYTES_MAX
    assert min(sizes[:2]) > 0.99 * BODY_BYTES_MAX - 5000  # and they are filled
    assert landed.token == str(3)
    assert (await index.stats(NS)).records == 1000


@pytest.mark.parametrize("dimensions", [384, 768, 3072])
async def test_a_flush_as_the_buffer_cuts_it_is_one_request(rig, dimensions):
    await rig.serve(dimensions)
    index = await rig.index()
    some = records(300, dimensions=dimensions)
    room = BufferSettings().bytes_fill * index.caps.max_bytes
    await index.upsert(NS, some[: int(room // size_bytes(some[0]))])
    assert rig.server.count(UPSERT) == 1


async def test_settings_bound_a_request(rig):
    index = await rig.index(max_items=4, max_bytes=2**17)
    assert (index.caps.max_items, index.caps.consistency) == (4, "token")
    assert (await index.upsert(NS, records(10))).rejected == ()
    assert rig.server.count(UPSERT) == 3


async def test_metadata_beyond_40_kb_is_refused_alone_with_its_size(rig):
    index = await rig.index()
    good = records(3)
    heavy = [
        replace(good[0], text="x" * 41_000),
        replace(good[1], metadata={"list": [f"value {number}" for number in range(1500)]}),
    ]
    landed = await index.upsert(NS, [*heavy, good[2]])
    reasons = dict(landed.rejected)
    assert set(reasons) == {heavy[0].id, heavy[1].id}
    assert all(
        "metadata take" in reason and "allows 40960" in reason for reason in reasons.values()
    )
    assert await generations(index, good) == [0, 0, 1]
    edge = replace(good[0], text="x" * 40_000)
    assert (await index.upsert(NS, [edge])).rejected == ()


async def test_a_record_that_no_request_holds_is_refused_alone(rig):
    await rig.serve(20_000)
    index = await rig.index(max_bytes=2**17)
    landed = await index.upsert(NS, records(1, dimensions=20_000))
    assert len(landed.rejected) == 1
    assert "and a request 131072" in landed.rejected[0][1]


async def test_large_records_are_read_within_the_reply(rig):
    """100 of them are 4.1 MB: more than one reply may hold."""
    index = await rig.index()
    some = [replace(record, text="x" * 40_000) for record in records(110)]
    await index.upsert(NS, some)
    assert len(await index.query(NS, some[0].vector, 100)) == 100
    assert len(await index.query(NS, some[0].vector, 60)) == 60
    assert len(await index.fetch(NS, [record.id for record in some])) == 110
    assert sum([len(part) async for part in index.scan(NS)]) == 110


async def test_the_longest_ids_fit_into_urls(rig):
    index = await rig.index()
    some = [replace(row, id=f"{row.ordinal:064}") for row in records(150)]
    await index.upsert(NS, some)
    assert len(await index.fetch(NS, [record.id for record in some])) == 150


async def test_rates_of_writes_are_told_and_those_of_fetches_kept(rig):
    index = await rig.index(
        upserts_s=3, upsert_bytes_s=13e6, deletes_s=2, delete_ids_s=10, fetches_s=1, deadline_s=0.3
    )
    assert index.caps.upserts == Rates(3, 4e6)
    assert index.caps.deletes == Rates(2, 10 * WRITE_BYTES)
    for _ in range(2):
        await index.upsert(NS, records(1))  # of the second the writer knows what is held
    with pytest.raises(IndexRetryable, match="deadline"):
        await index.upsert("f" * 32, records(1))
    assert rig.server.count(UPSERT) == 2


async def test_vectors_that_others_wrote_are_left_out(rig):
    index = await rig.index()
    await index.upsert(NS, records(1))
    theirs: list[dict[str, Any]] = [
        {"id": "bare", "values": [1.0] * DIMENSIONS},
        {"id": "other", "values": [1.0] * DIMENSIONS, "metadata": {"a": 1}},
    ]
    async with AsyncIndex(host=rig.url, api_key=KEY) as client:
        await client.upsert(vectors=theirs, namespace=NS)
    assert len(await index.query(NS, np.ones(DIMENSIONS, np.float32), 10)) == 1
    assert await index.fetch(NS, ["bare", "other"]) == []


# Freshness, generations


async def test_a_write_is_reached_after_the_lag(rig):
    await rig.serve(lag=3)
    index = await rig.index()
    landed = await index.upsert(NS, records(1))
    assert landed.token is not None
    assert [await index.reached(NS, landed.token) for _ in range(5)] == [False] * 3 + [True] * 2
    again = await index.upsert(NS, records(1, 2))
    assert await index.reached(NS, landed.token) is True
    assert await index.reached(NS, again.token) is False


async def test_without_a_place_in_the_log_nothing_is_known(rig):
    await rig.serve()
    index = await rig.index()
    landed = await index.upsert(NS, records(1))
    for token in ("", "-1", "1.5", "x", "²"):
        assert await index.reached(NS, token) is None
    assert await index.reached("f" * 32, landed.token) is None
    rig.server.lsn = False
    assert await index.reached(NS, landed.token) is None
    assert (await index.upsert(NS, records(1))).token is None
    assert (await index.delete(NS, [Tombstone("a", "d", 1)])).token is None


async def test_what_another_process_wrote_is_not_replaced_by_an_older_one(rig):
    first, second = await rig.index(), await rig.index()
    await first.upsert(NS, records(3, 5))
    await second.upsert(NS, records(3, 4))
    assert await generations(second, records(3)) == [5, 5, 5]
    assert rig.server.count(UPSERT) == 1
    await second.delete(NS, [Tombstone(row.id, row.document, 4) for row in records(3)])
    assert await generations(second, records(3)) == [5, 5, 5]


async def test_the_fetch_before_an_upsert_can_be_saved(rig):
    first, second = await rig.index(), await rig.index(fetch_before_upsert=False)
    await first.upsert(NS, records(1, 5))
    rig.server.calls.clear()
    await second.upsert(NS, records(1, 4))
    assert rig.server.calls == [UPSERT]
    assert await generations(second, records(1)) == [4]  # what it costs
    await second.upsert(NS, records(1, 3))
    assert await generations(second, records(1)) == [4]  # its own it remembers


async def test_a_writer_remembers_what_reads_do_not_see_yet(rig):
    await rig.serve(lag=NEVER)
    index = await rig.index()
    await index.upsert(NS, records(3, 5))
    await index.upsert(NS, records(1, 4))
    await index.delete(NS, [Tombstone(row.id, row.document, 4) for row in records(3)])
    rig.server.settle()
    assert await generations(index, records(3)) == [5, 5, 5]
    await index.delete(NS, [Tombstone(row.id, row.document, 5) for row in records(3)])
    await index.upsert(NS, records(1, 2))
    rig.server.settle()
    assert await generations(index, records(3)) == [2, 0, 0]


async def test_what_a_fetch_does_not_see_yet_is_deleted_all_the_same(rig):
    await rig.serve(lag=NEVER)
    await (await rig.index()).upsert(NS, records(2, 5))
    index = await rig.index()
    await index.delete(NS, [Tombstone(row.id, row.document, 5) for row in records(2)])
    rig.server.settle()
    assert await generations(index, records(2)) == [0, 0]


async def test_a_write_of_which_the_answer_was_lost_is_not_remembered(rig, naps):
    index = await rig.index()
    await index.upsert(NS, records(1, 5))
    rig.server.fail(503, 4, path=UPSERT, after=True)
    with pytest.raises(IndexRetryable):
        await index.upsert(NS, records(1, 7))
    await index.upsert(NS, records(1, 6))
    assert await generations(index, records(1)) == [7]


async def test_what_was_dropped_is_bounded_and_made_again_by_ensure(rig):
    index = await rig.index(namespaces_tracked_max=2)
    spaces = [f"{number:032x}" for number in range(3)]
    for ns in spaces:
        await index.drop(ns)
    assert list(index._dropped) == spaces[1:]
    with pytest.raises(IndexRetryable):
        await index.upsert(spaces[2], records(1))
    await index.ensure(CollectionSpec(spaces[2], DIMENSIONS))
    await index.upsert(spaces[2], records(1, 3))
    await index.drop(spaces[2])
    await index.ensure(CollectionSpec(spaces[2], DIMENSIONS))
    await index.upsert(spaces[2], records(1, 2))
    assert [row.generation for row in await index.fetch(spaces[2], [records(1)[0].id])] == [2]


async def test_it_opens_again_after_close_and_another_process_reads(rig):
    index = await rig.index()
    await index.upsert(NS, records(5))
    await index.aclose()
    await index.aclose()
    assert (await index.stats(NS)).records == 5
    assert await generations(await rig.index(), records(5)) == [1] * 5


# Filters


@pytest.mark.parametrize("nin_on_lists", ["none", "any"])
async def test_results_agree_whatever_nin_means_on_lists(rig, rng, nin_on_lists):
    await rig.serve()
    rig.server.nin_on_lists = nin_on_lists
    index = await rig.index()
    words = ["a", "b", ["a", "b"], [], "2026-01-01T10:00:00Z", "2026-01-01T10:00:01Z", True, 3]
    some = [replace(row, metadata={"f": rng.choice(words)}) for row in records(200)]
    await index.upsert(NS, some)
    trees: list[dict[str, Any]] = [
        {"f": {"$ne": "a"}},
        {"f": {"$nin": ["a", 3, True]}},
        {"g": {"$ne": 1}},
        {"g": {"$exists": False}},
        {"f": {"$gt": "2026-01-01T10:00:00Z"}},
        {"$or": [{"f": {"$lt": "2026-01-01T10:00:01Z"}}, {"f": {"$eq": 3}}]},
    ]
    vector = np.ones(DIMENSIONS, np.float32)
    order = [hit.record.id for hit in await index.query(NS, vector, 200)]
    for raw in trees:
        tree = parse(raw, terms_max=8)
        expected = {row.id for row in some if matches(tree, row.metadata)}
        for top_k in (1, 5, 200):
            hits = await index.query(NS, vector, top_k, tree)
            wanted = [record_id for record_id in order if record_id in expected][:top_k]
            assert [hit.record.id for hit in hits] == wanted, raw


async def test_a_filter_with_too_many_candidates_is_refused_not_cut(rig, monkeypatch):
    index = await rig.index()
    same = "18 bytes and more: "
    some = [replace(row, metadata={"f": f"{same}{row.ordinal:03}"}) for row in records(60)]
    await index.upsert(NS, some)
    vector = np.ones(DIMENSIONS, np.float32)
    tree = parse({"f": {"$gte": f"{same}050"}}, terms_max=1)
    assert len(await index.query(NS, vector, 10, tree)) == 10
    monkeypatch.setattr(adapter, "TOP_K_MAX", 40)
    with pytest.raises(BadInput) as caught:
        await index.query(NS, vector, 20, tree)
    assert caught.value.param == "filter"


# Through the writer


class Unfenced:
    async def superseded(self, *_: Any) -> frozenset[str]:
        return frozenset()


@asynccontextmanager
async def written(index: PineconeIndex, rng: Any) -> AsyncIterator[Writer]:
    """A writer that runs."""
    writer = Writer(
        index,
        Unfenced(),  # type: ignore[arg-type]
        name="w",
        epoch=1,
        settings=BufferSettings(),
        clock=time.monotonic,
        rng=rng,
    )
    running = asyncio.create_task(writer.run())
    yield writer
    await writer.drain(5)
    await running


async def test_one_poison_is_found_and_the_rest_lands(rig, rng):
    await rig.serve()
    rig.server.poison = b"d13"
    index = await rig.index()
    async with written(index, rng) as writer:
        outcomes = await writer.offer(ME, NS, records(40), 30)
    assert [at for at, one in enumerate(outcomes) if one.word != "landed"] == [13]
    assert "400" in outcomes[13].reason
    assert await generations(index, records(40)) == [int(at != 13) for at in range(40)]


async def test_a_landed_write_is_waited_for_until_searches_see_it(rig, rng):
    await rig.serve(lag=5)
    index = await rig.index()
    probes = Probes(index, 0.001)
    looking = asyncio.create_task(probes.run())
    async with written(index, rng) as writer:
        (outcome,) = await writer.offer(ME, NS, records(1), 30)
        assert outcome.token is not None
        assert await index.query(NS, np.ones(DIMENSIONS, np.float32), 1) == []
        assert await probes.sees(NS, outcome.token, 0.0) is False
        assert await probes.sees(NS, outcome.token, 30) is True
        assert len(await index.query(NS, np.ones(DIMENSIONS, np.float32), 1)) == 1
        (gone,) = await writer.offer(ME, NS, [Tombstone(f"{0:032x}", "d0", 2)], 30)
        assert gone.token == UNPROVED
        assert await probes.sees(NS, gone.token, 30) is None
        rig.server.lsn = False
        assert (await writer.offer(ME, NS, records(1, 3), 30))[0].token == UNPROVED
        assert await probes.sees(NS, outcome.token + 1, 30) is None
    looking.cancel()
