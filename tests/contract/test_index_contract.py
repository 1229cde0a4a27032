"""One suite over every index backend, with `memory` and `matches` as oracle."""

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from qdrant_client import AsyncQdrantClient

from bench.postgres_server import careless, url
from serve.config import Index as IndexSettings
from serve.errors import BadInput
from serve.index.errors import IndexRetryable
from serve.index.filters import matches, parse
from serve.index.lancedb import LanceIndex
from serve.index.memory import MemoryIndex
from serve.index.pgvector import PgIndex
from serve.index.qdrant import QdrantIndex
from serve.ports import Index
from serve.records import CollectionSpec, Condition, Every, Filter, Record, Some, Tombstone
from tests.contract.pinecone_index import SERVICE, local, service


NS = "0" * 31 + "a"
OTHER = "0" * 31 + "b"
DIMENSIONS = 8
SETTINGS = IndexSettings()
LAG = 3
"""Reads that do not see a write yet."""

HOSTILE = (
    "",
    "'; DROP TABLE x; --",
    "it's",
    "''",
    '"quoted"',
    "back\\slash\\' OR 1=1",
    "percent%_under",
    "|6162:k|",
    "größe ✓ 漢字 🎉",
    "new\nline\x00nul",
    "a",
    "ab",
    "B",
    "x" * 600,
)


@asynccontextmanager
async def backend(name: str, folder: Path) -> AsyncIterator[Index]:
    if name.startswith("pinecone"):
        opened = service() if name == "pinecone-service" else None
        lag = LAG if name == "pinecone-late" else 0
        async with opened or local(DIMENSIONS, lag) as made:
            yield made
        return
    made = embedded(name, folder)
    yield made
    for ns in (NS, OTHER):  # a server keeps them
        await made.drop(ns)
    await made.aclose()


def embedded(name: str, folder: Path) -> Index:
    if name == "pgvector":
        careless()
        return PgIndex(url(), SETTINGS)
    if name == "qdrant":
        return QdrantIndex(SETTINGS, connect=lambda: AsyncQdrantClient(":memory:"))
    return (
        MemoryIndex(SETTINGS) if name == "memory" else LanceIndex(str(folder / "index"), SETTINGS)
    )


# Qdrant's local mode says once what has no effect in it.
LOCAL_MODE = pytest.mark.filterwarnings("ignore:.* no effect:UserWarning")


@pytest.fixture(
    params=[
        "memory",
        "lancedb",
        pytest.param("qdrant", marks=LOCAL_MODE),
        pytest.param("pgvector", marks=pytest.mark.postgres),
        "pinecone",
        "pinecone-late",
        *SERVICE,
    ]
)
async def index(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Index]:
    async with backend(request.param, tmp_path) as made:
        await made.ensure(CollectionSpec(NS, DIMENSIONS))
        yield made


def records(count: int, generation: int = 1, seed: int = 0) -> list[Record]:
    rows = np.random.default_rng(seed).normal(size=(count, DIMENSIONS)).astype(np.float32)
    return [
        Record(
            id=f"{number:032x}",
            document=f"doc{number}",
            generation=generation,
            ordinal=number,
            vector=rows[number],
            text=f"text {number}",
            start=number,
            end=number + 6,
            metadata={"number": number},
        )
        for number in range(count)
    ]


def stone(record: Record, generation: int) -> Tombstone:
    return Tombstone(record.id, record.document, generation)


def same(one: Record, other: Record) -> bool:
    return replace(one, vector=other.vector) == other and bool(
        np.allclose(one.vector, other.vector)
    )


async def test_a_record_comes_back_as_it_was_written(index):
    written = replace(
        records(1)[0],
        text="Straße 'quoted' \x00 🎉",
        metadata={
            "s": "it's",
            "n": 2**60,
            "f": -0.1,
            "b": True,
            "l": ["x", "ü"],
            "\ud800": "\udc00",
        },
    )
    await index.upsert(NS, [written])
    [found] = await index.fetch(NS, [written.id, written.id, "0" * 32, "f" * 32, "'; --"])
    assert same(found, written)
    [hit] = await index.query(NS, written.vector, 5)
    assert same(hit.record, written)
    assert hit.score == pytest.approx(1.0, abs=1e-5)


async def test_overwriting_keeps_the_count_exact(index):
    for generation in (1, 2, 2):
        landed = await index.upsert(NS, records(20, generation))
        assert landed.rejected == ()
    assert (await index.stats(NS)).records == 20
    await index.upsert(NS, records(30, 3))
    assert (await index.stats(NS)).records == 30


async def test_a_lower_generation_never_replaces_a_higher(index):
    first = records(3, 5)
    await index.upsert(NS, first)
    await index.upsert(NS, [replace(record, generation=4, text="old") for record in first[:2]])
    await index.upsert(NS, [replace(first[2], generation=5, text="again")])
    found = {record.id: record for record in await index.fetch(NS, [row.id for row in first])}
    assert [found[row.id].text for row in first] == ["text 0", "text 1", "again"]


async def test_an_id_that_stands_twice_in_a_batch_lands_once(index):
    [record] = records(1, 5)
    newer = replace(record, generation=6, text="newer")
    await index.upsert(NS, [record, newer, replace(record, generation=4, text="old")])
    assert (await index.stats(NS)).records == 1
    assert [found.text for found in await index.fetch(NS, [record.id])] == ["newer"]


async def test_deletes_respect_generations(index):
    rows = records(4, 5)
    await index.upsert(NS, rows)
    stones = [stone(rows[0], 5), stone(rows[1], 6), stone(rows[2], 4), Tombstone("absent", "d", 9)]
    await index.delete(NS, stones)
    left = await index.fetch(NS, [row.id for row in rows])
    assert {row.id for row in left} == {rows[2].id, rows[3].id}
    assert (await index.stats(NS)).records == 2
    await index.delete(NS, stones)
    await index.delete(NS, [Tombstone("'; DROP TABLE x; --", "d", 9)])
    assert (await index.stats(NS)).records == 2


async def test_many_deletes_of_many_generations(index):
    rows = [replace(row, generation=number + 1) for number, row in enumerate(records(1200))]
    await index.upsert(NS, rows)
    await index.delete(NS, [stone(row, row.generation - row.ordinal % 2) for row in rows])
    assert (await index.stats(NS)).records == 600


async def test_namespaces_are_apart(index):
    await index.ensure(CollectionSpec(OTHER, DIMENSIONS))
    await index.upsert(NS, records(3))
    assert (await index.stats(OTHER)).records == 0
    assert list(await index.query(OTHER, np.ones(DIMENSIONS, np.float32), 5)) == []
    await index.upsert(OTHER, records(2))
    await index.drop(NS)
    assert (await index.stats(OTHER)).records == 2


async def test_ensure_again_keeps_what_is_there(index):
    await index.upsert(NS, records(3))
    await index.ensure(CollectionSpec(NS, DIMENSIONS))
    assert (await index.stats(NS)).records == 3


async def test_a_dropped_namespace_reads_as_empty(index):
    rows = records(3)
    await index.upsert(NS, rows)
    await index.drop(NS)
    await index.drop(NS)
    assert (await index.stats(NS)).records == 0
    assert list(await index.query(NS, rows[0].vector, 3)) == []
    assert list(await index.fetch(NS, [rows[0].id])) == []
    await index.delete(NS, [stone(rows[0], 1)])
    with pytest.raises(IndexRetryable):
        await index.upsert(NS, rows)
    await index.ensure(CollectionSpec(NS, DIMENSIONS))
    await index.upsert(NS, rows)
    assert (await index.stats(NS)).records == 3


@pytest.mark.parametrize("ns", ["", "x", "../" + "a" * 29, "A" * 32, "a" * 33, "a" * 32 + "\n"])
async def test_a_namespace_must_be_a_uuid(index, ns):
    for call in (index.drop(ns), index.stats(ns), index.ensure(CollectionSpec(ns, 2))):
        with pytest.raises(BadInput):
            await call
    with pytest.raises(BadInput):
        await index.upsert(ns, [])


def spoilt() -> dict[str, Record]:
    """What an index must not be given, by the id it is refused under."""
    good = records(1)[0]
    changes: dict[str, dict[str, Any]] = {
        "nan": {"vector": np.full(DIMENSIONS, np.nan, np.float32)},
        "inf": {"vector": np.full(DIMENSIONS, np.inf, np.float32)},
        "zero": {"vector": np.zeros(DIMENSIONS, np.float32)},
        "loud": {"vector": np.full(DIMENSIONS, 1e19, np.float32)},
        "quiet": {"vector": np.full(DIMENSIONS, 1e-20, np.float32)},
        "short": {"vector": np.ones(DIMENSIONS - 1, np.float32)},
        "matrix": {"vector": np.ones((1, DIMENSIONS), np.float32)},
        "text": {"text": "\ud800"},
        "document": {"document": "\ud800"},
        "metadata": {"metadata": {"a": float("nan")}},
        "null": {"metadata": {"a": None}},
        "nested": {"metadata": {"a": {"b": 1}}},
        "huge": {"metadata": {"a": 10**400}},
        "a'b": {},
        "x" * 65: {},
        "": {},
    }
    return {name: replace(good, id=name, **change) for name, change in changes.items()}


async def test_bad_records_are_named_and_the_rest_lands(index):
    good = records(3)
    landed = await index.upsert(NS, [good[0], *spoilt().values(), good[1], good[2]])
    assert {record_id for record_id, _ in landed.rejected} == set(spoilt())
    assert all(reason for _, reason in landed.rejected)
    assert (await index.stats(NS)).records == 3
    landed = await index.upsert(NS, list(spoilt().values()))
    assert len(landed.rejected) == len(spoilt())


async def test_extreme_but_valid_vectors_are_compared(index):
    rows = records(2)
    loud = replace(rows[0], vector=np.full(DIMENSIONS, 1e18, np.float32))
    quiet = replace(rows[1], vector=np.full(DIMENSIONS, 1e-18, np.float32))
    assert (await index.upsert(NS, [loud, quiet])).rejected == ()
    hits = await index.query(NS, np.ones(DIMENSIONS, np.float32), 2)
    assert [hit.score for hit in hits] == pytest.approx([1.0, 1.0], abs=1e-4)


@pytest.mark.parametrize(
    "vector",
    [np.ones(DIMENSIONS + 1), np.zeros(DIMENSIONS), np.full(DIMENSIONS, np.nan)],
    ids=["shape", "zero", "nan"],
)
async def test_a_query_without_direction_is_bad_input(index, vector):
    await index.upsert(NS, records(1))
    with pytest.raises(BadInput) as caught:
        await index.query(NS, vector.astype(np.float32), 1)
    assert caught.value.param == "vector"


async def test_top_k_is_exact_and_sorted(index):
    rows = records(300)
    await index.upsert(NS, rows)
    query = np.random.default_rng(7).normal(size=DIMENSIONS).astype(np.float32)
    expected = sorted((-cosine(row.vector, query), row.id) for row in rows)
    for top_k in (1, 10, 300, 1000):
        hits = await index.query(NS, query, top_k)
        assert [hit.record.id for hit in hits] == [row_id for _, row_id in expected[:top_k]]
        assert [-hit.score for hit in hits] == pytest.approx(
            [score for score, _ in expected[:top_k]], abs=1e-5
        )


def cosine(one: np.ndarray, other: np.ndarray) -> float:
    return float(one @ other / np.linalg.norm(one) / np.linalg.norm(other))


async def test_equal_scores_are_sorted_by_id(index):
    rows = [replace(row, vector=np.ones(DIMENSIONS, np.float32)) for row in records(5)]
    await index.upsert(NS, rows[::-1])
    hits = await index.query(NS, rows[0].vector, 5)
    assert [hit.record.id for hit in hits] == [row.id for row in rows]


# Filters against the oracle


def random_value(rng: random.Random) -> object:
    return rng.choice(
        [
            rng.choice(HOSTILE),
            rng.choice(HOSTILE),
            rng.choice([-1.5, -1, -0.0, 0, 0.5, 1, 2, 2**53 + 1, 1e300, -1e-300]),
            rng.choice([True, False]),
        ]
    )


def random_metadata(rng: random.Random, fields: tuple[str, ...]) -> dict[str, object]:
    def value() -> object:
        if rng.random() < 0.3:
            return [rng.choice(HOSTILE) for _ in range(rng.randint(0, 3))]
        return random_value(rng)

    return {field: value() for field in fields if rng.random() < 0.7}


def random_tree(rng: random.Random, fields: tuple[str, ...], depth: int = 0) -> dict[str, object]:
    if depth < 4 and rng.random() < 0.4:
        parts = [random_tree(rng, fields, depth + 1) for _ in range(rng.randint(1, 3))]
        return {rng.choice(["$and", "$or"]): parts}
    op = rng.choice(["$eq", "$ne", "$gt", "$gte", "$lt", "$lte", "$in", "$nin", "$exists"])
    value: object = random_value(rng)
    if isinstance(value, str):
        value = value[:512]
    if op in ("$in", "$nin"):
        others = [random_value(rng) for _ in range(rng.randint(0, 3))]
        value = [item[:512] if isinstance(item, str) else item for item in (value, *others)]
    elif op == "$exists":
        value = rng.choice([True, False])
    elif op not in ("$eq", "$ne") and isinstance(value, bool):
        value = 1
    return {rng.choice(fields): {op: value}}


async def test_filters_agree_with_the_oracle(index, rng):
    fields = ("a", "ab", "größe", "it's", 'q"\\', "x OR 1=1 --", "k", "n")
    rows = [replace(row, metadata=random_metadata(rng, fields)) for row in records(150)]
    await index.upsert(NS, rows)
    query = np.ones(DIMENSIONS, np.float32)
    narrow = 0
    for _ in range(150):
        tree = parse(random_tree(rng, fields), terms_max=128)
        expected = {row.id for row in rows if matches(tree, row.metadata)}
        hits = await index.query(NS, query, 150, tree)
        assert {hit.record.id for hit in hits} == expected, tree
        narrow += 0 < len(expected) < 150
        top = await index.query(NS, query, 5, tree)
        assert [hit.record.id for hit in top] == [hit.record.id for hit in hits][:5]
    assert narrow > 75  # most of the trees tell records apart


async def test_the_largest_filters_are_understood(index):
    rows = [replace(row, metadata={"n": row.ordinal, "s": "ü" * 500}) for row in records(40)]
    await index.upsert(NS, rows)
    values = [f"{number:03}" + "漢" * 500 for number in range(255)]
    deep: Filter = Every(tuple(Condition("n", "$gte", -number) for number in range(50)))
    for _ in range(8):
        deep = Some((Condition("none", "$exists", True), Every((deep, Condition("n", "$lt", 30)))))
    trees: list[tuple[Filter, int]] = [
        (Condition("n", "$in", tuple(range(10, 266))), 30),
        (Condition("n", "$nin", tuple(range(10, 266))), 10),
        (Condition("s", "$in", (*values, "ü" * 500)), 40),
        (Condition("s", "$nin", tuple(values)), 40),
        (deep, 30),
    ]
    for tree, count in trees:
        hits = await index.query(NS, np.ones(DIMENSIONS, np.float32), 100, tree)
        assert len(hits) == count


async def test_concurrent_calls(index):
    await index.ensure(CollectionSpec(OTHER, DIMENSIONS))
    rows = records(60)

    async def land(ns: str, part: int) -> None:
        await index.upsert(ns, rows[part::6])
        await index.query(ns, rows[0].vector, 3)

    async with asyncio.TaskGroup() as tasks:
        for part in range(6):
            tasks.create_task(land(NS, part))
            tasks.create_task(land(OTHER, part))
    assert [(await index.stats(ns)).records for ns in (NS, OTHER)] == [60, 60]


async def test_a_scan_gives_each_record_once_that_satisfies_the_filter(index: Index) -> None:
    some = records(1200)
    await index.upsert(NS, some)
    found = [record async for part in index.scan(NS) for record in part]
    assert sorted(record.id for record in found) == sorted(record.id for record in some)
    by_id = {record.id: record for record in found}
    assert np.allclose(by_id[some[7].id].vector, some[7].vector, atol=1e-6)
    assert by_id[some[7].id].metadata == {"number": 7}
    low = parse({"number": {"$lt": 3}}, terms_max=4)
    few = [record.id async for part in index.scan(NS, low) for record in part]
    assert sorted(few) == [record.id for record in some[:3]]
    assert [part async for part in index.scan(OTHER)] in ([], [[]])


async def test_a_write_that_returned_is_reached_or_unknown(index: Index) -> None:
    landed = await index.upsert(NS, records(1))
    assert await index.reached(NS, landed.token or "") in (True, None)
