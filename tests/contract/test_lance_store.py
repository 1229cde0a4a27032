"""LanceDB in an object store: over S3's protocol, against moto on this machine."""

import asyncio
import logging
from collections.abc import AsyncIterator, Iterator

import httpx
import numpy as np
import pytest

from serve.config import Index as IndexSettings
from serve.index.errors import IndexOffline, IndexRetryable
from serve.index.filters import parse
from serve.index.lance_ann import parts
from serve.index.lancedb import LanceIndex
from serve.records import CollectionSpec, Record, Tombstone


server = pytest.importorskip(
    "moto.server", reason="moto[s3], flask and flask-cors are not installed"
)

NS = "0" * 32
DIMENSIONS = 4
BUCKET = "headrace-test"
URI = f"s3://{BUCKET}/prefix"
LATE = {"uri": URI, "keep_versions_s": 600, "lancedb": {"read_s": 60}}
"""Its readers look again after a minute only: no test waits for that."""


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    moto = server.ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    moto.start()
    host, port = moto.get_host_and_port()
    yield f"http://{host}:{port}"
    moto.stop()


@pytest.fixture
def storage(endpoint: str) -> Iterator[dict[str, str]]:
    httpx.put(f"{endpoint}/{BUCKET}").raise_for_status()
    yield {
        "aws_endpoint": endpoint,
        "allow_http": "true",
        "aws_region": "us-east-1",
        "aws_access_key_id": "test",
        "aws_secret_access_key": "test",
        "client_max_retries": "1",
        "client_retry_timeout": "2",
    }
    httpx.post(f"{endpoint}/moto-api/reset").raise_for_status()


def settings(**changes: object) -> IndexSettings:
    own = {"read_s": 0, "ann_rows_min": 300, "partition_rows": 50}
    return IndexSettings.model_validate(
        {"uri": URI, "compact_commits": 4, "lancedb": own, **changes}
    )


@pytest.fixture
async def index(storage: dict[str, str]) -> AsyncIterator[LanceIndex]:
    made = LanceIndex(URI, settings(), storage)
    await made.ensure(CollectionSpec(NS, DIMENSIONS))
    yield made
    await made.aclose()


def records(start: int, stop: int) -> list[Record]:
    rows = np.random.default_rng(start).normal(size=(stop - start, DIMENSIONS)).astype(np.float32)
    return [
        Record(f"r{start + n}", f"d{start + n}", 1, 0, row, metadata={"n": start + n})
        for n, row in enumerate(rows)
    ]


def listing(endpoint: str) -> str:
    return httpx.get(f"{endpoint}/{BUCKET}?list-type=2").raise_for_status().text


async def test_records_come_back_and_a_drop_leaves_nothing(index, endpoint):
    some = records(0, 20)
    assert (await index.upsert(NS, some)).token is None  # readers look at each read
    await index.delete(NS, [Tombstone("r0", "d0", 1)])
    assert (await index.query(NS, some[7].vector, 1))[0].record.id == "r7"
    low = parse({"n": {"$lt": 5}}, terms_max=1)
    assert {hit.record.id for hit in await index.query(NS, some[7].vector, 9, low)} == {
        "r1",
        "r2",
        "r3",
        "r4",
    }
    assert [record.id for record in await index.fetch(NS, ["r0", "r1"])] == ["r1"]
    assert sum([len(part) async for part in index.scan(NS)]) == 19
    assert "<Key>" in listing(endpoint)
    await index.drop(NS)
    assert (await index.stats(NS)).records == 0
    assert "<Key>" not in listing(endpoint)


async def test_a_reader_says_how_far_it_sees(index, storage):
    writer = LanceIndex(URI, settings(**LATE), storage)
    reader = LanceIndex(URI, settings(**LATE), storage)
    assert writer.caps.consistency == "token"
    assert index.caps.consistency == "strong"
    first = (await writer.upsert(NS, records(0, 5))).token
    assert (await reader.stats(NS)).records == 5
    second = (await writer.delete(NS, [Tombstone("r0", "d0", 1)])).token
    assert first is not None
    assert second is not None
    assert int(first) < int(second)
    assert [await writer.reached(NS, token) for token in (first, second)] == [True, True]
    assert [await reader.reached(NS, token) for token in (first, second)] == [True, False]
    assert (await reader.stats(NS)).records == 5
    assert await reader.reached(NS, "") is None
    assert (await index.stats(NS)).records == 4
    await writer.aclose()
    await reader.aclose()


async def test_two_writers_lose_nothing_and_leave_no_id_twice(index, storage):
    other = LanceIndex(URI, settings(), storage)

    async def write(writer: LanceIndex, start: int) -> None:
        for first in (*range(0, 30, 5), *range(start, start + 20, 5)):
            while True:
                try:
                    await writer.upsert(NS, records(first, first + 5))
                    break
                except IndexRetryable:  # a conflict: the buffer comes again
                    continue
            await writer.maintain()

    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(write(index, 100))
        tasks.create_task(write(other, 200))
    ids = [record.id async for part in index.scan(NS) for record in part]
    expected = {f"r{n}" for n in (*range(30), *range(100, 120), *range(200, 220))}
    assert sorted(ids) == sorted(expected)
    await other.aclose()


async def test_compaction_and_the_ann_index_work_there_too(index):
    for start in range(0, 400, 100):
        await index.upsert(NS, records(start, start + 100))
    await index.maintain()
    await asyncio.wait({index._builds._task})
    opened = await index._open(NS)
    assert await parts(opened.table)
    assert (await opened.table.stats())["fragment_stats"]["num_fragments"] == 1
    hits = await index.query(NS, records(0, 100)[7].vector, 5)
    assert hits[0].record.id == "r7"
    assert hits[0].score == pytest.approx(1, abs=1e-5)


async def test_a_bucket_that_is_not_there_takes_the_index_offline(storage):
    index = LanceIndex("s3://nowhere/prefix", settings(), storage)
    with pytest.raises(IndexOffline):
        await index.ensure(CollectionSpec(NS, DIMENSIONS))
    await index.aclose()
