"""What only LanceDB must show: other processes, kill -9, compaction, errors of its own."""

import asyncio
import sys
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import lancedb
import numpy as np
import pytest

from serve.config import Index as IndexSettings
from serve.errors import IndexUnavailable
from serve.index.errors import IndexOffline, IndexRetryable
from serve.index.lance_commits import FEW
from serve.index.lancedb import LanceIndex, _Open
from serve.index.rows import schema_of
from serve.records import CollectionSpec, Record, Tombstone


ROOT = Path(__file__).parents[2]
NS = "0" * 32
DIMENSIONS = 4
SPEC = CollectionSpec(NS, DIMENSIONS)
HASTY = IndexSettings(compact_commits=4).model_copy(update={"keep_versions_s": 0.001})
"""Removes old versions after a millisecond, which no valid settings allow."""


def records(start: int, stop: int, generation: int = 1) -> list[Record]:
    return [
        Record(
            f"r{number}", f"d{number}", generation, 0, np.full(DIMENSIONS, 1 + number, np.float32)
        )
        for number in range(start, stop)
    ]


@pytest.fixture
def uri(tmp_path: Path) -> str:
    return str(tmp_path / "index")


@pytest.fixture
async def index(uri: str) -> AsyncIterator[LanceIndex]:
    made = LanceIndex(uri, HASTY)
    await made.ensure(SPEC)
    yield made
    await made.aclose()


@pytest.fixture
async def reader(uri: str) -> AsyncIterator[LanceIndex]:
    made = LanceIndex(uri, IndexSettings())
    yield made
    await made.aclose()


async def test_it_opens_again_after_close(uri, index):
    await index.open()
    await index.upsert(NS, records(0, 5))
    await index.aclose()
    again = LanceIndex(uri, IndexSettings())
    assert (await again.stats(NS)).records == 5
    await again.aclose()
    assert (await index.stats(NS)).records == 5


async def test_what_it_keeps_in_memory_is_bounded(uri, monkeypatch):
    sessions, made_by = [], lancedb.Session

    def noted(*sizes: int) -> lancedb.Session:
        sessions.append(made_by(*sizes))
        return sessions[-1]

    monkeypatch.setattr(lancedb, "Session", noted)
    small = {"index_cache_bytes": 2**20, "metadata_cache_bytes": 2**20}
    made = LanceIndex(uri, IndexSettings.model_validate({"lancedb": small, "tables_open_max": 4}))
    for number in range(12):
        ns = f"{number:032x}"
        await made.ensure(CollectionSpec(ns, DIMENSIONS))
        for start in range(0, 60, 20):
            await made.upsert(ns, records(start, start + 20))
        assert (await made.stats(ns)).records == 60
    [session] = sessions
    assert 0 < session.size_bytes <= 2 * 2**20
    await made.aclose()


WRITER = """
import asyncio, sys
sys.path.insert(0, sys.argv[2])
import numpy as np
from serve.config import Index
from serve.index.lance_commits import FEW
from serve.index.lancedb import LanceIndex
from serve.records import Record

async def main():
    index = LanceIndex(sys.argv[1], Index())
    start = 0
    while True:
        batch = [
            Record(f"r{n}", f"d{n}", 1, 0, np.full(4, 1 + n, np.float32))
            for n in range(start, start + 20)
        ]
        await index.upsert("0" * 32, batch)
        start += 20
        print(start, flush=True)

asyncio.run(main())
"""


async def test_another_process_is_seen_at_once_and_its_death_loses_nothing(index, reader, uri):
    assert (await reader.stats(NS)).records == 0
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", WRITER, uri, str(ROOT), stdout=asyncio.subprocess.PIPE
    )
    assert process.stdout is not None
    landed = 0
    for _ in range(5):
        landed = int(await process.stdout.readline())
        assert (await reader.stats(NS)).records >= landed
        [last] = await reader.fetch(NS, [f"r{landed - 1}"])
        assert last.vector[0] == landed
    process.kill()
    rest = await process.stdout.read()  # what it acknowledged before it died
    await process.wait()
    landed = max([landed, *map(int, rest.split(b"\n")[:-1])])
    held = await reader.fetch(NS, [f"r{number}" for number in range(landed)])
    assert len(held) == landed
    await index.upsert(NS, records(0, landed + 100))
    assert (await reader.stats(NS)).records == landed + 100  # and nothing twice


async def fragments(index: LanceIndex) -> int:
    opened = await index._open(NS)
    assert opened is not None
    stats: dict[str, dict[str, int]] = await opened.table.stats()  # type: ignore[assignment]
    return stats["fragment_stats"]["num_fragments"]


async def test_compaction_by_commits_leaves_readers_alone(index, reader):
    for start in range(0, 9, 3):
        await index.upsert(NS, records(start, start + 3))
    assert (await reader.stats(NS)).records == 9
    await index.maintain()
    assert await fragments(index) == 3  # three commits are too few
    await index.delete(NS, [Tombstone("r0", "d0", 1)])
    await index.maintain()
    assert await fragments(index) == 1
    assert (await reader.stats(NS)).records == 8
    hits = await reader.query(NS, np.ones(DIMENSIONS, np.float32), 20)
    assert {hit.record.id for hit in hits} == {f"r{number}" for number in range(1, 9)}
    await index.upsert(NS, [replace(records(1, 2)[0], text="later")])
    assert [found.text for found in await reader.fetch(NS, ["r1"])] == ["later"]


async def test_a_table_that_rests_is_compacted_after_a_few_commits(uri):
    now = 0.0
    rested = LanceIndex(uri, IndexSettings(compact_rest_s=10), clock=lambda: now)
    await rested.ensure(CollectionSpec(NS, DIMENSIONS))
    for start in range(FEW):
        await rested.upsert(NS, records(start, start + 1))
        await rested.maintain()
    assert await fragments(rested) == FEW
    now = 10.0
    await rested.maintain()
    assert await fragments(rested) == 1
    await rested.aclose()


async def test_readers_search_while_versions_vanish_under_them(index, reader):
    await index.upsert(NS, records(0, 20))

    async def search() -> None:
        for _ in range(25):
            hits = await reader.query(NS, np.ones(DIMENSIONS, np.float32), 50)
            assert len(hits) == 20

    async def churn() -> None:
        for generation in range(2, 22):
            await index.upsert(NS, records(0, 20, generation))
            await index.maintain()

    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(search())
        tasks.create_task(churn())
    assert (await reader.stats(NS)).records == 20


async def test_what_an_earlier_process_left_counts_as_commits(index, uri):
    for start in range(3):
        await index.upsert(NS, records(start, start + 1))
    successor = LanceIndex(uri, HASTY)
    await successor.upsert(NS, records(3, 4))
    await successor.maintain()
    assert await fragments(successor) == 1
    await successor.aclose()


class Broken:
    """A table that answers with an error and counts how often it was asked."""

    def __init__(self, message: str) -> None:
        self.message = message
        self.asked = 0

    async def _fail(self, *_: object, **__: object) -> int:
        self.asked += 1
        raise RuntimeError(self.message)

    count_rows = optimize = delete = list_indices = _fail

    def close(self) -> None:
        """As a table does."""

    def plant(self, index: LanceIndex) -> None:
        index._tables[NS] = _Open(self, DIMENSIONS)  # type: ignore[arg-type]


async def test_a_reader_whose_version_is_gone_opens_the_table_afresh(index, reader):
    await index.upsert(NS, records(0, 3))
    broken = Broken("lance error: Not found: data/1.lance")
    broken.plant(reader)
    assert (await reader.stats(NS)).records == 3
    assert broken.asked == 1
    await index.drop(NS)
    broken.plant(reader)
    assert (await reader.stats(NS)).records == 0


async def test_other_read_errors_are_unavailable(reader):
    Broken("disk on fire").plant(reader)
    with pytest.raises(IndexUnavailable):
        await reader.stats(NS)


@pytest.mark.parametrize(
    ("message", "error"),
    [("No space left on device", IndexOffline), ("commit conflict", IndexRetryable)],
)
async def test_write_errors_are_the_buffers_and_the_handle_is_renewed(index, message, error):
    Broken(message).plant(index)
    with pytest.raises(error):
        await index.delete(NS, [Tombstone("r0", "d0", 1)])
    await index.upsert(NS, records(0, 1))


async def test_a_compaction_that_conflicts_is_put_off(index, caplog):
    for start in range(4):
        await index.upsert(NS, records(start, start + 1))
    broken = Broken("Retryable commit conflict")
    broken.plant(index)
    await index.maintain()
    await index.maintain()
    assert broken.asked == 1
    assert "put off" in caplog.text
    index._forget(NS)
    for start in range(4, 6):
        await index.upsert(NS, records(start, start + 1))
    await index.maintain()
    assert await fragments(index) == 1


async def test_a_table_from_before_there_was_full_text_gets_its_index_when_it_is_compacted(uri):
    index = LanceIndex(uri, HASTY)
    database = await index._place.database()
    schema = schema_of(DIMENSIONS)
    # from before its ids were told to be keys, too
    schema = schema.set(0, schema.field("id").remove_metadata())
    await database.create_table(NS, schema=schema)
    await index.upsert(NS, [replace(records(0, 1)[0], text="the pumps", generation=2)])
    await index.upsert(NS, records(0, 1))
    assert [hit.record.id for hit in await index.match(NS, "pumps", 5)] == ["r0"]
    for start in range(1, 4):
        await index.upsert(NS, records(start, start + 1))
    await index.maintain()
    opened = await index._open(NS)
    assert [one.name for one in await opened.table.list_indices()] == ["text_idx"]
    assert [hit.record.id for hit in await index.match(NS, "the pumps", 5)] == ["r0"]
    assert await index.match(NS, "pump", 5) == []
    await index.aclose()


async def test_a_folder_that_cannot_be_made_takes_the_index_offline(tmp_path):
    (tmp_path / "file").write_text("in the way")
    index = LanceIndex(str(tmp_path / "file" / "index"), IndexSettings())
    with pytest.raises(IndexOffline):
        await index.ensure(SPEC)
    with pytest.raises(IndexUnavailable):
        await index.query(NS, np.ones(DIMENSIONS, np.float32), 1)
    with pytest.raises(IndexUnavailable):
        await index.open()


async def test_an_object_store_that_does_not_answer_costs_no_records():
    away = {
        "aws_endpoint": "http://127.0.0.1:9",
        "allow_http": "true",
        "aws_region": "us-east-1",
        "aws_access_key_id": "test",
        "aws_secret_access_key": "test",
        "client_max_retries": "0",
        "client_retry_timeout": "1",
    }
    index = LanceIndex("s3://bucket/prefix", IndexSettings(), away)
    with pytest.raises(IndexRetryable):
        await index.upsert(NS, records(0, 1))
    with pytest.raises(IndexUnavailable):
        await index.query(NS, np.ones(DIMENSIONS, np.float32), 1)
    await index.aclose()


async def test_open_tables_are_bounded(uri):
    index = LanceIndex(uri, IndexSettings(tables_open_max=2))
    spaces = [f"{number:032x}" for number in range(5)]
    for ns in spaces:
        await index.ensure(CollectionSpec(ns, DIMENSIONS))
        await index.upsert(ns, records(0, 2))
    assert [(await index.stats(ns)).records for ns in spaces] == [2] * 5
    assert list(index._tables) == spaces[-2:]
    await index.aclose()
