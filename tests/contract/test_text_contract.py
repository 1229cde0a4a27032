"""Full text over every index backend that has it, with `memory` as oracle."""

import random
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from serve.config import Index as IndexSettings
from serve.errors import BadInput
from serve.index.filters import parse
from serve.index.lancedb import LanceIndex
from serve.index.memory import MemoryIndex
from serve.ports import Index
from serve.records import CollectionSpec, Record, Tombstone
from tests.contract.test_index_contract import HOSTILE, LOCAL_MODE, backend


NS = "0" * 31 + "a"
OTHER = "0" * 31 + "b"
DIMENSIONS = 8
WORDS = """
the a of and to in is it on for pump valve seal motor shaft bearing rotor stator Größe Ventil Straße été
naïve игра насос данные λόγος ürün İzmir x2000 42 7 v1 rev2
"""
VOCABULARY = [*WORDS.split(), *(f"word{number}" for number in range(40))]
EVERYTHING = 10_000


@pytest.fixture(params=["memory", "lancedb", pytest.param("pgvector", marks=pytest.mark.postgres)])
async def index(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Index]:
    async with backend(request.param, tmp_path) as made:
        await made.ensure(CollectionSpec(NS, DIMENSIONS))
        yield made


@pytest.fixture
async def oracle() -> Index:
    made = MemoryIndex(IndexSettings())
    await made.ensure(CollectionSpec(NS, DIMENSIONS))
    return made


def record(number: int, text: str, generation: int = 1) -> Record:
    vector = np.random.default_rng(number).normal(size=DIMENSIONS).astype(np.float32)
    return Record(
        f"{number:032x}",
        f"doc{number}",
        generation,
        0,
        vector,
        text,
        0,
        len(text),
        {"even": number % 2 == 0},
    )


def corpus(rng: random.Random, count: int) -> list[Record]:
    """Texts in which the first words are common and the last ones rare."""
    weights = [1 / (rank + 1) for rank in range(len(VOCABULARY))]
    texts = [rng.choices(VOCABULARY, weights, k=rng.randint(3, 60)) for _ in range(count)]
    signs = [" ", " ", ", ", ". ", "\n", "-", "_", "'", ' "', " (", "/"]
    return [
        record(number, "".join(word + rng.choice(signs) for word in text))
        for number, text in enumerate(texts)
    ]


async def found(index: Index, text: str, top_k: int = EVERYTHING, raw: object = None) -> list[str]:
    where = None if raw is None else parse(raw, terms_max=4)
    hits = await index.match(NS, text, top_k, where)
    keys = [(-hit.score, hit.record.id) for hit in hits]
    assert keys == sorted(keys)
    assert all(hit.score > 0 for hit in hits)
    return [hit.record.id for hit in hits]


def ids(*numbers: int) -> list[str]:
    return [f"{number:032x}" for number in numbers]


async def test_what_holds_a_word_is_found_whole(index):
    written = record(1, "Die Pumpe läuft; 'quoted' \x00 🎉")
    await index.upsert(NS, [written, record(2, "nothing of it")])
    [hit] = await index.match(NS, "PUMPE", 5)
    assert replace(hit.record, vector=written.vector) == written
    assert np.allclose(hit.record.vector, written.vector)


async def test_a_rare_word_counts_for_more_than_common_ones(index):
    common = [record(number, f"how do the pumps run in hall {number}") for number in range(40)]
    rare = record(50, "a cavitation that nobody had expected in a plant of this size and age")
    await index.upsert(NS, [*common, rare])
    order = await found(index, "how do the pumps do with cavitation")
    assert order[0] == rare.id
    assert len(order) == 41


async def test_more_often_and_shorter_is_better(index):
    once, twice = record(1, "valve seal motor shaft"), record(2, "valve seal valve shaft")
    long = record(3, "valve " + " ".join(f"word{number}" for number in range(60)))
    await index.upsert(NS, [long, once, twice, *(record(9 + n, "rotor") for n in range(9))])
    assert await found(index, "valve") == [twice.id, once.id, long.id]


async def test_equal_scores_are_sorted_by_id_and_top_k_cuts(index):
    await index.upsert(NS, [record(number, "pump valve") for number in (5, 3, 9, 1)])
    assert await found(index, "valve") == ids(1, 3, 5, 9)
    assert len(await found(index, "valve", 2)) == 2


async def test_matches_are_the_oracles_and_the_best_nearly(index, oracle, rng):
    rows = corpus(rng, 300)
    for part in range(0, 300, 100):
        await index.upsert(NS, rows[part : part + 100])
    await oracle.upsert(NS, rows)
    shared = wanted = 0
    for turn in range(60):
        if turn == 30:
            await index.maintain()
        text = " ".join(rng.choices(VOCABULARY, k=rng.randint(1, 4)))
        raw = rng.choice([None, {"even": True}, {"even": {"$ne": True}}])
        expected = await found(oracle, text, raw=raw)
        assert set(await found(index, text, raw=raw)) == set(expected), (text, raw)
        best = await found(index, text, 10, raw)
        shared += len(set(best) & set(expected[:10]))
        wanted += len(expected[:10])
    assert wanted > 300
    assert shared >= 0.8 * wanted  # lengths are not counted alike, and here they differ widely


QUERIES = (
    *HOSTILE,
    "'a' & !b | (c <-> d)",
    "a OR b AND NOT c",
    "+a -b ~c ^d",
    "text:a* id:[0 TO 9]",
    '"a b"~3',
    "((((",
    "a\\",
    ":*",
    "%s %(any)s {where}",
    "E'\\\\x61'",
    "a" * 5000,
    "\ud800 a",
)


async def test_odd_queries_and_odd_texts_are_only_words(index, oracle):
    rows = [record(number, text) for number, text in enumerate(QUERIES) if "\ud800" not in text]
    for one in (index, oracle):
        landed = await one.upsert(NS, rows)
        assert landed.rejected == ()
    for text in QUERIES:
        assert set(await found(index, text)) == set(await found(oracle, text)), text
    assert await found(oracle, "'a' & !b") != []


async def test_the_longest_word_and_one_that_is_longer(index):
    longest = ["x" * 63, "ü" * 31, "漢" * 21]
    longer = ["y" * 64, "ö" * 32, "字" * 22]
    await index.upsert(NS, [record(n, text) for n, text in enumerate([*longest, *longer])])
    for number, text in enumerate(longest):
        assert await found(index, text) == ids(number)
    for text in longer:
        assert await found(index, text) == []


@pytest.mark.parametrize("text", ["", " ", "'", "!?", "🎉", "___", "\x00", "\ud800", "x" * 200])
async def test_without_a_word_there_are_no_hits(index, text):
    await index.upsert(NS, [record(1, f"pump {text}".encode("utf-8", "ignore").decode())])
    assert await found(index, text) == []


async def test_what_was_replaced_or_deleted_is_not_found(index):
    await index.upsert(NS, [record(1, "pump", 2), record(2, "pump"), record(3, "pump")])
    await index.upsert(NS, [record(1, "rotor", 1), record(2, "valve", 2)])
    await index.delete(NS, [Tombstone(record(3, "").id, "doc3", 1)])
    for _ in range(2):
        assert await found(index, "pump") == ids(1)
        assert await found(index, "valve") == ids(2)
        assert await found(index, "rotor") == []
        await index.maintain()


async def test_namespaces_are_apart_and_a_missing_one_is_empty(index):
    assert await found(index, "pump") == []
    await index.ensure(CollectionSpec(OTHER, DIMENSIONS))
    await index.upsert(NS, [record(1, "pump")])
    assert list(await index.match(OTHER, "pump", 5)) == []
    await index.drop(NS)
    assert await found(index, "pump") == []
    with pytest.raises(BadInput):
        await index.match("x", "pump", 5)


async def test_a_long_text_of_different_words_is_taken(index):
    text = " ".join(f"{number:07}ü" for number in range(100_000))
    assert (await index.upsert(NS, [record(1, text)])).rejected == ()
    assert await found(index, "0000007ü") == ids(1)


@pytest.mark.parametrize("name", [pytest.param("qdrant", marks=LOCAL_MODE), "pinecone"])
async def test_an_index_of_vectors_only_says_so(name, tmp_path):
    async with AsyncExitStack() as stack:
        made = await stack.enter_async_context(backend(name, tmp_path))
        assert not made.caps.full_text
        with pytest.raises(BadInput) as caught:
            await made.match(NS, "pump", 5)
        assert (caught.value.code, caught.value.param) == ("mode_unsupported", "mode")


# LanceDB: rows that its index covers, and rows that came since


def lance(folder: Path) -> LanceIndex:
    return LanceIndex(str(folder / "index"), IndexSettings(compact_commits=2))


async def test_lance_finds_what_came_before_and_after_the_index_was_brought_up(
    tmp_path, oracle, rng
):
    index = lance(tmp_path)
    await index.ensure(CollectionSpec(NS, DIMENSIONS))
    reader = lance(tmp_path)
    rows = corpus(rng, 120)
    for start in range(0, 120, 20):
        await index.upsert(NS, rows[start : start + 20])
        await oracle.upsert(NS, rows[start : start + 20])
        for text in ("pump", "the Größe", "word3 насос"):
            expected = await found(oracle, text)
            assert set(await found(index, text)) == set(expected)
            assert set(await found(reader, text)) == set(expected)
        await index.maintain()
    for made in (index, reader):
        await made.aclose()
