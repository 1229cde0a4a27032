"""What only pgvector must show of full text: its index, and tables that were made before it."""

from collections.abc import AsyncIterator
from dataclasses import replace

import pytest
from psycopg import sql

from bench.postgres_server import careless
from bench.postgres_server import url as server_url
from serve.index.full_text import WORD_BYTES_MAX
from serve.index.pg_statements import to_sql
from serve.index.pg_text import LEXEMES_BYTES_MAX, asked, to_words
from serve.index.pgvector import PgIndex
from serve.records import CollectionSpec
from tests.contract.test_pgvector import DIMENSIONS, NS, TABLE, indexes, opened, records, session


@pytest.fixture
def url() -> str:
    careless()
    return server_url()


@pytest.fixture
async def index(url: str) -> AsyncIterator[PgIndex]:
    async with opened(url) as made:
        await made.ensure(CollectionSpec(NS, DIMENSIONS))
        yield made
        await made.drop(NS)


@pytest.mark.postgres
async def test_a_table_from_before_there_was_full_text_gets_its_words_with_the_next_write(
    index, url
):
    old, new = (replace(row, text="a pump") for row in records(0, 2))
    await index.upsert(NS, [old])
    async with session(url) as connection:
        drop = sql.SQL("ALTER TABLE {table} DROP COLUMN words")
        await connection.execute(TABLE.said(drop))
    assert await index.match(NS, "pump", 5) == ()
    await index.upsert(NS, [new])
    assert [hit.record.id for hit in await index.match(NS, "pump", 5)] == [new.id]
    await index.upsert(NS, [old])
    assert len(await index.match(NS, "pump", 5)) == 2
    assert await indexes(url) == 0  # beside the primary key's and that of words, made again


@pytest.mark.postgres
async def test_words_are_found_by_their_index(index, url):
    rows = [replace(row, text=f"pump{number}") for number, row in enumerate(records(0, 500))]
    await index.upsert(NS, rows)
    async with session(url) as connection:
        await connection.execute("SET enable_seqscan = off")
        statement = sql.SQL("EXPLAIN ") + TABLE.matching(to_sql(None, {}))
        found = await connection.execute(statement, {**asked("pump7"), "top_k": 5})
        assert f"v_{NS}_words" in "\n".join(row[0] for row in await found.fetchall())
    [hit] = await index.match(NS, "pump7", 5)
    assert hit.record.text == "pump7"


def test_words_are_ascii_with_their_places():
    assert to_words("Ein Ventil, ein Ü!") == "'ein':1,3 'ventil':2 '~c3bc':4"
    assert asked("Ü ein ein") == {"any": "'~c3bc' | 'ein'", "each": ["'~c3bc'", "'ein'"]}
    assert asked("?! '") is None
    assert to_words("") == ""


def test_places_and_bytes_are_bounded():
    often = to_words("a " * 20_000)
    assert often.count(",") == 254
    assert to_words("b " * 16_400 + "c").endswith("'c':16383")
    longest = "ü" * (WORD_BYTES_MAX // 2 - 1)
    many = to_words(" ".join(f"{number}{longest[5:]}" for number in range(20_000)))
    assert many.count("'") % 2 == 0
    assert LEXEMES_BYTES_MAX * 0.9 < len(many) < LEXEMES_BYTES_MAX * 1.2
