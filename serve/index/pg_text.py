"""Full text in the pgvector index: words of a record as a `tsvector`, and BM25 as one statement.

Postgres' own rankings do not know how rare a word is, so that in a question of ten words "how" and "the"
would decide. What it has is how often a row holds a word (`ts_rank_cd` of one word is a tenth of
that), and an index of who holds it; the rest is arithmetic. Its parser is not asked, neither for
texts nor for queries: words are those of `full_text`, in ASCII, whatever the database's encoding is.
"""

from collections.abc import Iterable
from typing import Any

from psycopg import sql

from serve.index.full_text import K1, B, words


LEXEMES_BYTES_MAX = 2**19
"""Of one record, as they are written: Postgres takes twice as much. Words behind that are not found."""

PLACE_MAX, PLACES_MAX = 16_383, 255
"""Places that Postgres counts: in a text, and of one word in it."""

ADD_WORDS = sql.SQL(
    "ALTER TABLE {table} ADD COLUMN IF NOT EXISTS words tsvector NOT NULL DEFAULT ''"
)
"""For tables that were made before there was full text; what they hold is found when written again."""

INDEX_WORDS = sql.SQL("CREATE INDEX IF NOT EXISTS {name} ON {table} USING gin (words)")

MATCHING = sql.SQL("""
WITH held AS MATERIALIZED (
    SELECT id, words, length(words) AS size, ({where}) AS wanted FROM {table}
    WHERE words @@ %(any)s::tsquery
), sizes AS (
    SELECT avg(size) AS size, greatest(count(*), (SELECT reltuples FROM pg_class
        WHERE oid = {name}::regclass)) AS rows FROM held
), asked AS (
    SELECT word, ln(1 + (max(sizes.rows) - count(*) + 0.5) / (count(*) + 0.5)) AS rarity
    FROM unnest(%(each)s::tsquery[]) AS word JOIN held ON held.words @@ word CROSS JOIN sizes
    GROUP BY word
), counted AS (
    SELECT held.id, asked.rarity, 10 * ts_rank_cd(held.words, asked.word) AS times,
        {k1} * (1 - {b} + {b} * held.size / sizes.size) AS damping
    FROM held JOIN asked ON held.words @@ asked.word CROSS JOIN sizes WHERE held.wanted
), scored AS (
    SELECT id, sum(rarity * times * ({k1} + 1) / (times + damping))::float8 AS score
    FROM counted GROUP BY id ORDER BY score DESC, id LIMIT %(top_k)s
)
SELECT {columns}, score FROM scored JOIN {table} USING (id) ORDER BY score DESC, id
""")
"""Every row that holds a word is looked at, as any ranking must. A length is in different words."""


def matching(table: sql.Identifier, columns: sql.SQL, where: sql.Composable) -> sql.Composed:
    """The statement; it takes the parameters of `asked` and of `where`, and `top_k`."""
    return MATCHING.format(
        table=table,
        columns=columns,
        where=where,
        name=sql.Literal(table.as_string()),
        k1=sql.Literal(K1),
        b=sql.Literal(B),
    )


def asked(text: str) -> dict[str, Any] | None:
    """The words of a query: as one that any of them satisfies, and each alone; None without any."""
    each = [f"'{_ascii(word)}'" for word in dict.fromkeys(words(text))]
    return {"any": " | ".join(each), "each": each} if each else None


def to_words(text: str) -> str:
    """A text as Postgres reads a `tsvector`: each word with its places."""
    places: dict[str, list[str]] = {}
    size = 0
    for place, word in enumerate(words(text), 1):
        lexeme = _ascii(word)
        size += 6 + (0 if lexeme in places else len(lexeme))
        if size > LEXEMES_BYTES_MAX:
            break
        held = places.setdefault(lexeme, [])
        if len(held) < PLACES_MAX:
            held.append(str(min(place, PLACE_MAX)))
    return _joined(places.items())


def _joined(places: Iterable[tuple[str, list[str]]]) -> str:
    return " ".join(f"'{lexeme}':{','.join(held)}" for lexeme, held in places)


def _ascii(word: str) -> str:
    # No word holds a '~', nor anything that quotes would have to be doubled for.
    return word if word.isascii() else f"~{word.encode().hex()}"
