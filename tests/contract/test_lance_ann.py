"""LanceDB's ANN index against a scan, and the table's shape after many small writes."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from serve.config import Index as IndexSettings
from serve.index.errors import IndexRetryable
from serve.index.filters import parse
from serve.index.lance_ann import PARTS_MAX, parts
from serve.index.lancedb import LanceIndex
from serve.records import CollectionSpec, Record, Tombstone


NS = "0" * 32
DIMENSIONS = 16
ROWS = 1000
TOP_K = 10
OWN = {"ann_rows_min": ROWS, "partition_rows": 50, "probes": 4}
SETTINGS = IndexSettings.model_validate({"compact_commits": 4, "lancedb": OWN})
EXACT = IndexSettings.model_validate({"lancedb": {"exact": True}})
BRIEF = SETTINGS.model_copy(update={"keep_versions_s": 0.001})
"""Removes old versions after a millisecond, which no valid settings allow."""


def records(start: int, stop: int, generation: int = 1, seed: int = 0) -> list[Record]:
    rows = np.random.default_rng((seed, start)).normal(size=(stop - start, DIMENSIONS))
    return [
        Record(
            f"r{start + number}",
            f"d{start + number}",
            generation,
            0,
            row.astype(np.float32),
            metadata={"share": (start + number) % 100, "number": start + number},
        )
        for number, row in enumerate(rows)
    ]


QUERIES = [record.vector for record in records(9000, 9040)]


@pytest.fixture
def uri(tmp_path: Path) -> str:
    return str(tmp_path / "index")


@pytest.fixture
async def index(uri: str) -> AsyncIterator[LanceIndex]:
    made = LanceIndex(uri, SETTINGS)
    await made.ensure(CollectionSpec(NS, DIMENSIONS))
    yield made
    await made.aclose()


@pytest.fixture
async def exact(uri: str) -> AsyncIterator[LanceIndex]:
    """Reads all of the same table."""
    made = LanceIndex(uri, EXACT)
    yield made
    await made.aclose()


async def table_of(index: LanceIndex) -> Any:
    opened = await index._open(NS)
    assert opened is not None
    return opened.table


async def settle(index: LanceIndex) -> None:
    await index.maintain()
    if index._builds._task is not None:
        await asyncio.wait({index._builds._task})


async def built(index: LanceIndex) -> None:
    await index.upsert(NS, records(0, ROWS))
    await settle(index)
    assert await parts(await table_of(index))


async def test_an_index_comes_past_a_size_and_agrees_with_a_scan(index, exact):
    await index.upsert(NS, records(0, ROWS - 1))
    await settle(index)
    assert not await parts(await table_of(index))
    await index.upsert(NS, records(ROWS, ROWS + 200))
    await settle(index)
    assert await parts(await table_of(index))
    found = 0
    for query in QUERIES:
        rough = await index.query(NS, query, TOP_K)
        whole = await exact.query(NS, query, TOP_K)
        assert len(rough) == TOP_K
        assert rough == sorted(rough, key=lambda hit: (-hit.score, hit.record.id))
        by_id = {hit.record.id: hit.score for hit in whole}
        shared = [hit for hit in rough if hit.record.id in by_id]
        found += len(shared)
        assert [hit.score for hit in shared] == pytest.approx(
            [by_id[hit.record.id] for hit in shared], abs=1e-5
        )
    # A fifth of the partitions is read: were it all of them, none were missed.
    assert 0.4 < found / len(QUERIES) / TOP_K < 1


async def test_a_filter_comes_before_the_index_and_none_is_missed_for_it(index, exact):
    await built(index)
    tenth = parse({"share": {"$lt": 10}}, terms_max=2)
    few = parse({"number": {"$lt": 3}}, terms_max=2)
    found = 0
    for query in QUERIES:
        hits = await index.query(NS, query, TOP_K, tenth)
        assert len(hits) == TOP_K
        assert all(hit.record.metadata["share"] < 10 for hit in hits)
        whole = await exact.query(NS, query, TOP_K, tenth)
        found += len({hit.record.id for hit in hits} & {hit.record.id for hit in whole})
        assert {hit.record.id for hit in await index.query(NS, query, TOP_K, few)} == {
            "r0",
            "r1",
            "r2",
        }
        every = await index.query(NS, query, 2 * ROWS)
        assert len({hit.record.id for hit in every}) == ROWS
    assert found / len(QUERIES) / TOP_K > 0.95  # all partitions, in eight bits


async def test_later_writes_are_found_at_once_and_only_as_they_are(index):
    await built(index)
    moved = [
        replace(one, vector=query) for one, query in zip(records(0, 40, 2), QUERIES, strict=True)
    ]
    await index.upsert(NS, moved)
    await index.upsert(NS, records(ROWS, ROWS + 10))
    await index.delete(NS, [Tombstone("r50", "d50", 1)])
    for where in range(2):
        for record in [*moved, *records(ROWS, ROWS + 10)]:
            hits = await index.query(NS, record.vector, TOP_K)
            assert hits[0].record.id == record.id
            assert len({hit.record.id for hit in hits}) == TOP_K
        hits = await index.query(NS, records(0, ROWS)[50].vector, TOP_K)
        assert "r50" not in {hit.record.id for hit in hits}
        stats = await (await table_of(index)).index_stats("ann")
        assert (stats.num_unindexed_rows > 0) == (where == 0)
        await index.upsert(NS, records(ROWS, ROWS + 1, 2))
        await index.maintain()  # the fourth commit: compaction


async def test_a_build_keeps_neither_writes_nor_reads(index, monkeypatch):
    go, begun = asyncio.Event(), asyncio.Event()
    opening = index._open_afresh

    async def slowly(ns: str) -> Any:
        table = await opening(ns)
        create = table.create_index

        async def wait(*words: Any, **named: Any) -> None:
            begun.set()
            await go.wait()
            await create(*words, **named)

        table.create_index = wait
        return table

    monkeypatch.setattr(index, "_open_afresh", slowly)
    await index.upsert(NS, records(0, ROWS))
    await index.maintain()
    await begun.wait()
    for start in range(5):
        await index.upsert(NS, records(ROWS + start, ROWS + start + 1))
        await index.maintain()
    table = await table_of(index)
    assert (await table.stats())["fragment_stats"]["num_fragments"] == 6  # not compacted meanwhile
    assert len(await index.query(NS, QUERIES[0], TOP_K)) == TOP_K
    go.set()
    await settle(index)
    assert await parts(table)
    await index.maintain()
    assert (await table.stats())["fragment_stats"]["num_fragments"] == 1
    assert (await table.index_stats("ann")).num_unindexed_rows == 0


async def test_what_an_earlier_process_left_gets_its_index(uri, index):
    await index.upsert(NS, records(0, ROWS))
    successor = LanceIndex(uri, SETTINGS)
    await successor.upsert(NS, records(0, 1, 2))
    await settle(successor)
    assert await parts(await table_of(successor))
    await successor.aclose()


async def test_a_dropped_table_stays_away(index):
    await index.upsert(NS, records(0, ROWS))
    await index.maintain()
    await index.drop(NS)
    await index.maintain()
    assert (await index.stats(NS)).records == 0
    assert not (await (await index._place.database()).list_tables()).tables


async def shape(index: LanceIndex) -> tuple[int, int]:
    table = await table_of(index)
    stats = await table.stats()
    return stats["fragment_stats"]["num_fragments"], len(await table.list_versions())


@pytest.mark.parametrize("rows", [0, ROWS], ids=["plain", "indexed"])
async def test_hundreds_of_small_writes_leave_few_pieces(uri, rows):
    index = LanceIndex(uri, BRIEF)
    await index.ensure(CollectionSpec(NS, DIMENSIONS))
    if rows:
        await built(index)
    pieces = []
    for number in range(300):
        await index.upsert(NS, records(5000 + number, 5001 + number))
        await settle(index)
        pieces.append(await shape(index))
    fragments, versions = map(max, zip(*pieces, strict=True))
    # What a part of the ANN index covers is one fragment, at best.
    assert fragments <= SETTINGS.compact_commits + 1 + (PARTS_MAX + 1 if rows else 0)
    assert versions <= SETTINGS.compact_commits + 4  # compaction itself makes some
    assert (await index.stats(NS)).records == rows + 300
    assert (await parts(await table_of(index)) > 0) == (rows > 0)
    await index.aclose()


async def test_two_writers_leave_no_id_twice_and_the_higher_generation(uri, index):
    other = LanceIndex(uri, SETTINGS)

    async def write(writer: LanceIndex, start: int, generation: int) -> None:
        while True:
            try:
                await writer.upsert(NS, records(start, start + 5, generation))
                break
            except IndexRetryable:  # a conflict: the buffer comes again
                continue
        await writer.maintain()

    for start in range(0, 150, 5):  # both insert the same new ids at once, from the same version
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(write(index, start, 2))
            tasks.create_task(write(other, start, 1 + start % 2))
    held = [(record.id, record.generation) async for part in index.scan(NS) for record in part]
    assert sorted(held) == sorted((f"r{number}", 2) for number in range(150))
    await other.aclose()
