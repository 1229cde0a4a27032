"""What only Qdrant must show: its REST path with the real client, errors, limits, reopening."""

import json
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from qdrant_client import AsyncQdrantClient

from serve.config import Index as IndexSettings
from serve.config.index import Qdrant
from serve.errors import BadInput, IndexUnavailable
from serve.index.errors import BatchTooLarge, IndexOffline, IndexRetryable, RecordsRejected
from serve.index.filters import parse
from serve.index.qdrant import QdrantIndex
from serve.records import CollectionSpec, Record, Tombstone
from tests.contract.qdrant_door import MISSING, Answer, Door, door, error


NS = "0" * 32
DIMENSIONS = 4
SPEC = CollectionSpec(NS, DIMENSIONS)
QUERY = np.ones(DIMENSIONS, np.float32)

pytestmark = pytest.mark.filterwarnings("ignore:.* no effect:UserWarning")


def settings(url: str, **own: Any) -> IndexSettings:
    return IndexSettings(backend="qdrant", qdrant=Qdrant(url=url, **own))


def records(count: int, generation: int = 1) -> list[Record]:
    return [
        Record(
            f"r{number}",
            f"d{number}",
            generation,
            number,
            np.full(DIMENSIONS, 1 + number, np.float32),
            metadata={"n": number},
        )
        for number in range(count)
    ]


@pytest.fixture
async def server(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Door]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")  # the library obeys proxies of the environment
    async with door() as made:
        yield made


@pytest.fixture
async def index(server: Door) -> AsyncIterator[QdrantIndex]:
    made = QdrantIndex(settings(server.url, scan_rows=2))
    await made.ensure(SPEC)
    server.seen.clear()
    yield made
    await made.aclose()


async def test_the_whole_life_of_records_over_http(index, server):
    rows = [replace(row, text="Straße \x00 🎉") for row in records(5)]
    assert (await index.upsert(NS, rows)).rejected == ()
    await index.upsert(NS, [replace(rows[0], generation=0, text="old")])
    hits = await index.query(NS, QUERY, 3, parse({"n": {"$gte": 2}}, terms_max=4))
    assert [hit.record.id for hit in hits] == ["r2", "r3", "r4"]
    assert np.array_equal(hits[0].record.vector, rows[2].vector)
    await index.delete(NS, [Tombstone("r0", "d0", 0), Tombstone("r1", "d1", 1)])
    scanned = [[row.id for row in part] async for part in index.scan(NS)]
    assert sorted(one for part in scanned for one in part) == ["r0", "r2", "r3", "r4"]
    assert [len(part) for part in scanned] == [2, 2]
    [held] = await index.fetch(NS, ["r0"])
    assert replace(held, vector=rows[0].vector) == rows[0]
    assert (await index.stats(NS)).records == 4
    await index.drop(NS)
    assert (await index.stats(NS)).records == 0
    assert not server.answers


async def test_what_stands_in_the_requests(index, server):
    await index.upsert(NS, records(2, 7))
    await index.delete(NS, [Tombstone("r0", "d0", 7)])
    upsert, delete = (one for one in server.seen if "points" in one.path)
    assert (upsert.method, upsert.path) == ("PUT", f"/collections/headrace-{NS}/points")
    assert upsert.query == {"wait": "true", "ordering": "medium"}
    assert "api-key" not in upsert.headers
    body = json.loads(upsert.body)
    assert body["points"][0]["vector"] == [0.5] * DIMENSIONS
    assert body["points"][0]["payload"]["norm"] == 2
    [group] = body["update_filter"]["should"]
    ids = [point["id"] for point in body["points"]]
    assert group["must"] == [{"has_id": ids}, {"key": "generation", "range": {"lte": 7}}]
    assert delete.query == {"wait": "true", "ordering": "medium"}
    [group] = json.loads(delete.body)["filter"]["should"]
    assert group["must"] == [{"has_id": ids[:1]}, {"key": "generation", "range": {"lte": 7}}]


async def test_a_collection_is_made_with_its_indexes_and_copies(server):
    index = QdrantIndex(settings(server.url, replicas=3, shards=2, prefix="p_"))
    await index.ensure(SPEC)
    made = next(one for one in server.seen if one.method == "PUT")
    assert made.path == f"/collections/p_{NS}"
    assert json.loads(made.body) == {
        "vectors": {"size": DIMENSIONS, "distance": "Dot", "on_disk": False},
        "shard_number": 2,
        "replication_factor": 3,
        "write_consistency_factor": 2,
        "hnsw_config": {"m": 16, "ef_construct": 100},
    }
    fields = [json.loads(one.body)["field_name"] for one in server.seen if "index" in one.path]
    assert fields == ["terms", "steps[].at", "steps[].word", "generation"]
    # What another process makes meanwhile, or an earlier call left unfinished, is no error.
    server.answers += [("/exists", (200, {}, b'{"result":{"exists":false},"status":"ok"}'))]
    server.answers += [(NS, error(409, "Wrong input: Collection `x` already exists!"))]
    await index.ensure(SPEC)
    await index.aclose()


async def test_the_key_travels_as_a_header_and_its_absence_is_no_secret(server, caplog):
    index = QdrantIndex(settings(server.url), api_key="s3cret")
    await index.open()
    assert server.seen[-1].headers["api-key"] == "s3cret"
    assert "not https" in caplog.text
    assert "s3cret" not in caplog.text
    await index.aclose()


FAULTS: dict[str, tuple[Answer, type[Exception]]] = {
    "key": (error(401, "Must provide an API key"), IndexOffline),
    "unpaid": (error(402), IndexOffline),
    "forbidden": (error(403, "Forbidden: Write access required"), IndexOffline),
    "not a qdrant": ((404, {}, b"<html>no such page</html>"), IndexOffline),
    "missing": (MISSING, IndexRetryable),
    "moved": ((301, {"location": "http://127.0.0.1:1/"}, b""), IndexOffline),
    "late": (error(408, "Timeout"), IndexRetryable),
    "throttled": (error(429, "Rate limit", retry_after="7"), IndexRetryable),
    "throttled by a date": (
        error(429, "", retry_after="Wed, 21 Oct 2026 07:28:00 GMT"),
        IndexRetryable,
    ),
    "throttled, no word when": (error(429), IndexRetryable),
    "broken": (error(500, "Service internal error: 1 of 1 read operations failed"), IndexRetryable),
    "away": ((503, {}, b"upstream"), IndexRetryable),
    "disk": (error(500, "No space left on device: WAL buffer size exceeds"), IndexOffline),
    "storage": (error(507, "Insufficient storage"), IndexOffline),
    "quota": (error(400, "Max vector storage size limit of 9 reached!"), IndexOffline),
    "refused": (error(400, "Wrong input: Vector dimension error"), RecordsRejected),
    "invalid": (error(422, "Validation error in JSON body"), RecordsRejected),
    "body": (error(400, "JSON payload (9 bytes) is larger than allowed (limit)"), BatchTooLarge),
    "proxy's limit": ((413, {}, b"<html>"), BatchTooLarge),
    "a page": ((200, {}, b"<html>log in</html>"), IndexRetryable),
    "empty": ((200, {}, b""), IndexRetryable),
    "no result": ((202, {}, b'{"status":"accepted","time":0}'), IndexRetryable),
    "not applied": (
        (200, {}, b'{"result":{"operation_id":1,"status":"acknowledged"},"status":"ok"}'),
        IndexRetryable,
    ),
    "too slow": (
        (200, {}, b'{"result":{"operation_id":1,"status":"wait_timeout"},"status":"ok"}'),
        IndexRetryable,
    ),
    "unknown word": (
        (200, {}, b'{"result":{"operation_id":1,"status":"dreamt"},"status":"ok"}'),
        IndexRetryable,
    ),
}


@pytest.mark.parametrize(("answer", "fault"), FAULTS.values(), ids=FAULTS)
async def test_what_an_upsert_raises(index, server, answer, fault):
    server.answers.append(("points", answer))
    with pytest.raises(fault) as caught:
        await index.upsert(NS, records(2))
    if isinstance(caught.value, IndexRetryable):
        assert caught.value.retry_after_s == (7 if b"Rate limit" in answer[2] else 1)
    if isinstance(caught.value, RecordsRejected):
        assert caught.value.pairs is None
    await index.upsert(NS, records(2))
    assert (await index.stats(NS)).records == 2


@pytest.mark.parametrize(("answer", "fault"), FAULTS.values(), ids=FAULTS)
async def test_what_a_delete_raises(index, server, answer, fault):
    server.answers.append(("delete", answer))
    if answer is MISSING:
        await index.delete(NS, [Tombstone("r0", "d0", 1)])
        return
    with pytest.raises(fault):
        await index.delete(NS, [Tombstone("r0", "d0", 1)])


READ_FAULTS = {name: answer for name, (answer, _) in FAULTS.items() if answer is not MISSING}


@pytest.mark.parametrize("answer", READ_FAULTS.values(), ids=READ_FAULTS)
async def test_what_reads_raise(index, server, answer):
    server.answers += [(end, answer) for end in ("query", "points", "scroll", "count")]
    calls = (
        lambda: index.query(NS, QUERY, 1),
        lambda: index.fetch(NS, ["r0"]),
        lambda: anext(index.scan(NS)),
        lambda: index.stats(NS),
    )
    for call in calls:
        with pytest.raises(IndexUnavailable):
            await call()
    assert not server.answers


async def test_what_is_dropped_elsewhere_reads_as_empty(index, server):
    await index.upsert(NS, records(2))
    await server.local.delete_collection(f"headrace-{NS}")
    assert list(await index.query(NS, QUERY, 1)) == []
    assert list(await index.fetch(NS, ["r0"])) == []
    assert [part async for part in index.scan(NS)] == []
    with pytest.raises(IndexRetryable):
        await index.upsert(NS, records(2))
    await index.ensure(SPEC)
    await index.upsert(NS, records(2))


async def test_a_server_that_is_away_or_mute(server, monkeypatch):
    nobody = QdrantIndex(settings("http://127.0.0.1:1"))
    with pytest.raises(IndexRetryable):
        await nobody.upsert(NS, records(1))
    with pytest.raises(IndexUnavailable):
        await nobody.open()
    server.deaf = True
    mute = QdrantIndex(settings(server.url, timeout_s=1))
    with pytest.raises(IndexUnavailable):
        await mute.stats(NS)
    server.deaf = False
    assert (await mute.stats(NS)).records == 0
    await mute.aclose()


@pytest.mark.parametrize("version", ["1.15.5", "0.11.0", "", "dev"])
async def test_a_server_that_cannot_guard_generations_is_refused(server, version):
    server.version = version
    index = QdrantIndex(settings(server.url))
    with pytest.raises(IndexOffline, match=r"1\.16"):
        await index.upsert(NS, records(1))
    with pytest.raises(IndexUnavailable, match=r"1\.16"):
        await index.open()
    assert {one.path for one in server.seen} == {"/"}
    server.version = "1.16.0-dev"
    await index.open()
    await index.aclose()


async def test_a_key_that_is_refused_pauses_from_the_first_call(server):
    server.answers.append(("/", error(401)))
    index = QdrantIndex(settings(server.url), api_key="old")
    with pytest.raises(IndexOffline):
        await index.ensure(SPEC)
    await index.ensure(SPEC)
    await index.aclose()


async def test_requests_are_cut_and_what_fits_into_none_is_named(server):
    index = QdrantIndex(settings(server.url, request_bytes_max=2**16))
    assert index.caps.max_bytes == 2**16
    await index.ensure(SPEC)
    rows = [replace(row, text="ü" * 10_000) for row in records(7)]
    rows[3] = replace(rows[3], text="ü" * 40_000)
    landed = await index.upsert(NS, rows)
    assert [record_id for record_id, _ in landed.rejected] == ["r3"]
    bodies = [len(one.body) for one in server.seen if one.path.endswith("points")]
    assert len(bodies) == 2
    assert max(bodies) <= 2**16
    assert (await index.stats(NS)).records == 6
    await index.upsert(NS, [])
    await index.aclose()


async def test_the_limits_of_a_collection():
    index = QdrantIndex(IndexSettings(max_dim=100_000))
    for dimensions in (0, 65_537):
        with pytest.raises(BadInput):
            await index.ensure(CollectionSpec(NS, dimensions))


async def test_a_collection_that_is_not_ours_is_left_alone(server):
    index = QdrantIndex(settings(server.url))
    await server.local.create_collection(f"headrace-{NS}", vectors_config={})
    with pytest.raises(IndexOffline, match="not one of ours"):
        await index.upsert(NS, records(1))
    with pytest.raises(IndexUnavailable):
        await index.query(NS, QUERY, 1)
    await index.aclose()


async def test_what_is_known_of_collections_is_bounded(server):
    plain = settings(server.url).model_copy(update={"tables_open_max": 2})
    index = QdrantIndex(plain)
    names = [f"{number:032x}" for number in range(4)]
    for name in names:
        await index.ensure(CollectionSpec(name, DIMENSIONS))
        await index.upsert(name, records(1))
    assert list(index._known) == names[2:]
    await index.aclose()


async def test_it_opens_again_after_close(tmp_path: Path):
    def connect() -> AsyncQdrantClient:
        return AsyncQdrantClient(path=str(tmp_path / "qdrant"))

    index = QdrantIndex(IndexSettings(), connect=connect)
    await index.ensure(SPEC)
    await index.upsert(NS, records(3))
    await index.aclose()
    assert (await index.stats(NS)).records == 3
    await index.aclose()
    await index.aclose()
