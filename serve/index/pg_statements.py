"""The SQL of the pgvector index: tables, statements, filters, and records as rows.

Names are identifiers that psycopg quotes, everything else is a bound parameter. What is stored of a
user's text is ASCII, so that NUL, lone surrogates and a database of any encoding do no harm: the
record as JSON in `body`, and `terms`, what filters look at. There every value is a string that says
its type first, in an order that is that of the values (`serve.index.terms`): comparing them as bytes
gives what `serve.index.filters.matches` gives, without a cast that may fail.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from psycopg import sql

from serve.index.filters import FIELD_CHARS_MAX, LISTS, is_plain
from serve.index.pg_text import ADD_WORDS, INDEX_WORDS, matching, to_words
from serve.index.terms import ORDER_SQL, hexed, tagged
from serve.records import Condition, Every, Filter, Record, Tombstone, Vector


HNSW_DIM_MAX, HALF_DIM_MAX = 2000, 4000
"""Longest vectors that an HNSW index holds in float32, and in float16."""

SPARE = 2
"""A walk of the index takes so many times `top_k`, and keeps the nearest: of the true ten under a filter
of 1 % it found 99 % instead of 91, in the same time.
"""

Params = dict[str, Any]

LOOK = """
SELECT a.atttypmod, coalesce(
    (SELECT i.indisvalid FROM pg_index i JOIN pg_class x ON x.oid = i.indexrelid
     WHERE i.indrelid = c.oid AND x.relname = %(hnsw)s), false)
FROM pg_class c
JOIN pg_namespace n ON n.oid = c.relnamespace
JOIN pg_attribute a ON a.attrelid = c.oid
WHERE n.nspname = %(schema)s AND c.relname = %(table)s AND a.attname = 'embedding'
"""
"""Dimensions of a namespace's table, and whether its HNSW index can be used."""

AIM = sql.SQL("""
SELECT dimensions, indexed,
    set_config('enable_seqscan', CASE WHEN indexed THEN 'off' ELSE 'on' END, true),
    set_config('enable_indexscan', CASE WHEN indexed THEN 'on' ELSE 'off' END, true),
    set_config('hnsw.iterative_scan', 'relaxed_order', true),
    set_config('hnsw.ef_search', %(ef_search)s, true)
FROM ({look}) AS looked (dimensions, indexed)
""").format(look=sql.SQL(LOOK))
AIM_EXACTLY = """
SELECT set_config('enable_seqscan', 'on', true), set_config('enable_indexscan', 'off', true)
"""
"""Look, and choose the way of a query, until the end of its transaction. The planner knows nothing of
our filters: it takes each to leave one row in a thousand, and would rather read a million rows than
walk an index. And where there is no index yet, one must not appear in the middle of a query.
"""

COLUMNS = sql.SQL("id, generation, embedding, body")

CREATE = sql.SQL("""
CREATE TABLE IF NOT EXISTS {table} (
    id text COLLATE "C" PRIMARY KEY,
    generation bigint NOT NULL,
    embedding vector({dimensions}) NOT NULL,
    terms jsonb NOT NULL,
    body text NOT NULL,
    words tsvector NOT NULL
)
""")

UPSERT = sql.SQL("""
INSERT INTO {table} AS held (id, generation, embedding, terms, body, words)
SELECT * FROM unnest(%(ids)s::text[], %(generations)s::bigint[], %(vectors)s::vector[],
    %(terms)s::jsonb[], %(bodies)s::text[], %(words)s::tsvector[])
ON CONFLICT (id) DO UPDATE SET generation = excluded.generation, embedding = excluded.embedding,
    terms = excluded.terms, body = excluded.body, words = excluded.words
WHERE held.generation <= excluded.generation
""")

DELETE = sql.SQL("""
DELETE FROM {table} AS held
USING unnest(%(ids)s::text[], %(generations)s::bigint[]) AS gone (id, generation)
WHERE held.id = gone.id AND held.generation <= gone.generation
""")

NEAREST = sql.SQL("""
SELECT {columns}, embedding <=> %(vector)s AS distance FROM {table} WHERE {where}
ORDER BY distance, id LIMIT %(top_k)s
""")

NEAREST_ROUGHLY = sql.SQL("""
WITH near AS MATERIALIZED (
    SELECT {columns}, embedding <=> %(vector)s AS distance FROM {table} WHERE {where}
    ORDER BY {indexed} <=> {sought} LIMIT %(top_k)s * {spare}
)
SELECT * FROM near ORDER BY distance + 0, id LIMIT %(top_k)s
""")
"""The index gives its rows in a rough order, which Postgres 17 and later takes for that of `distance`
and does not sort again; of `distance + 0` it knows nothing.
"""

FETCH = sql.SQL("SELECT {columns} FROM {table} WHERE id = ANY(%(ids)s::text[])")

SCAN = sql.SQL("""
SELECT {columns} FROM {table} WHERE id > %(after)s AND {where} ORDER BY id LIMIT %(rows)s
""")

COUNT = sql.SQL("SELECT count(*) FROM {table}")
COUNT_UP_TO = sql.SQL("SELECT count(*) FROM (SELECT FROM {table} LIMIT %(rows)s) AS first_rows")
DROP = sql.SQL("DROP TABLE IF EXISTS {table}")

DROP_HNSW = sql.SQL("DROP INDEX CONCURRENTLY IF EXISTS {hnsw}")
CREATE_HNSW = sql.SQL("""
CREATE INDEX CONCURRENTLY {name} ON {table} USING hnsw (({indexed}) {operators})
WITH (m = {m}, ef_construction = {ef_construction})
""")

STOP_BUILD = """
SELECT pg_cancel_backend(pid) FROM pg_locks
WHERE locktype = 'advisory' AND objsubid = 1 AND granted
    AND database = (SELECT oid FROM pg_database WHERE datname = current_database())
    AND (classid::bigint << 32 | objid::bigint) = %(key)s
"""
"""Whoever builds the index of a table would hold up its end for as long."""


class Table:
    """The table of one namespace, and its statements. `ns` must have been checked."""

    def __init__(self, schema: str, ns: str) -> None:
        name = f"v_{ns}"
        self.hnsw = f"{name}_hnsw"
        self.named = {"schema": schema, "table": name, "hnsw": self.hnsw}
        self.id = sql.Identifier(schema, name)
        self.key = int.from_bytes(bytes.fromhex(ns[:16]), "big", signed=True)
        """Of the advisory lock of who builds its index."""

        self._schema = schema

    def said(self, statement: sql.SQL, **parts: sql.Composable) -> sql.Composed:
        """A statement about this table."""
        return statement.format(table=self.id, **parts)

    def nearest(self, where: sql.Composable) -> sql.Composed:
        """By comparing every row."""
        return self.said(NEAREST, columns=COLUMNS, where=where)

    def nearest_roughly(self, where: sql.Composable, dimensions: int) -> sql.Composed:
        """By the HNSW index; distances are exact all the same."""
        sought: sql.Composable = sql.SQL("%(vector)s")
        if dimensions > HNSW_DIM_MAX:
            sought = sql.SQL("%(vector)s::halfvec({})").format(sql.Literal(dimensions))
        indexed = indexed_by(dimensions)
        return self.said(
            NEAREST_ROUGHLY,
            columns=COLUMNS,
            where=where,
            indexed=indexed,
            sought=sought,
            spare=sql.Literal(SPARE),
        )

    def matching(self, where: sql.Composable) -> sql.Composed:
        """By words."""
        return matching(self.id, COLUMNS, where)

    def with_words(self) -> tuple[sql.Composed, sql.Composed]:
        """The column of words, where it is missing, and its index."""
        name = sql.Identifier(f"{self.named['table']}_words")
        return self.said(ADD_WORDS), self.said(INDEX_WORDS, name=name)

    def drop_hnsw(self) -> sql.Composed:
        """Of whatever state the index is."""
        return DROP_HNSW.format(hnsw=sql.Identifier(self._schema, self.hnsw))

    def create_hnsw(self, dimensions: int, m: int, ef_construction: int) -> sql.Composed:
        """Not in a transaction."""
        halved = dimensions > HNSW_DIM_MAX
        return self.said(
            CREATE_HNSW,
            name=sql.Identifier(self.hnsw),
            indexed=indexed_by(dimensions),
            operators=sql.SQL("halfvec_cosine_ops" if halved else "vector_cosine_ops"),
            m=sql.Literal(m),
            ef_construction=sql.Literal(ef_construction),
        )


def indexed_by(dimensions: int) -> sql.Composable:
    """What the HNSW index holds of a row. Of unit length as float16, which ends at 65,504."""
    if dimensions <= HNSW_DIM_MAX:
        return sql.SQL("embedding")
    return sql.SQL("l2_normalize(embedding)::halfvec({})").format(sql.Literal(dimensions))


def to_sql(tree: Filter | None, params: Params) -> sql.Composable:
    """The predicate of a validated tree over `terms`; its values are added to `params`."""
    if tree is None:
        return sql.SQL("true")
    if isinstance(tree, Condition):
        return _condition(tree, params)
    word = sql.SQL(" AND " if isinstance(tree, Every) else " OR ")
    return sql.SQL("({})").format(word.join([to_sql(part, params) for part in tree.parts]))


def _condition(condition: Condition, params: Params) -> sql.Composable:
    field, op, value = hexed(condition.field), condition.op, condition.value
    if op in ORDER_SQL:
        return _ordered(field, ORDER_SQL[op], str(tagged(value)), params)
    if op == "$exists":
        held = sql.SQL("terms ? {}::text").format(_bound(field, params))
        wanted = bool(value)
    else:
        # `?|` asks a list for its elements and a string for itself: *is, or contains, one of*.
        tags = sorted(filter(None, map(tagged, value if op in LISTS else (value,))))
        held = sql.SQL("(terms -> {}::text) ?| {}::text[]").format(
            _bound(field, params), _bound(tags, params)
        )
        wanted = op in ("$eq", "$in")
    # A missing key is NULL, which `IS NOT TRUE` lets through, as `$ne` and `$nin` must.
    return sql.SQL("({}) IS {}").format(held, sql.SQL("TRUE" if wanted else "NOT TRUE"))


def _ordered(field: str, sign: str, tag: str, params: Params) -> sql.Composable:
    """Between the value and the end of its type on the one side: `n...` and `o`, say."""
    held = sql.SQL('(terms ->> {}::text) COLLATE "C"').format(_bound(field, params))
    kind = tag[0]
    bound, other = ("<", chr(ord(kind) + 1)) if sign.startswith(">") else (">=", kind)
    return sql.SQL("({held} {sign} {tag} AND {held} {bound} {other})").format(
        held=held,
        sign=sql.SQL(sign),
        tag=_bound(tag, params),
        bound=sql.SQL(bound),
        other=_bound(other, params),
    )


def _bound(value: object, params: Params) -> sql.Placeholder:
    name = f"filter{len(params)}"
    params[name] = value
    return sql.Placeholder(name)


def to_rows(records: Sequence[Record]) -> Params:
    """Records that passed `checks.refuse`, as columns in the order of their ids.

    In that order two writers wait for each other's rows instead of for ever. Raises ValueError for
    what is not JSON.
    """
    rows = sorted(records, key=lambda record: record.id)
    return {
        "ids": [row.id for row in rows],
        "generations": [int(row.generation) for row in rows],
        "vectors": [np.asarray(row.vector, np.float32) for row in rows],
        "terms": [_terms(row.metadata) for row in rows],
        "bodies": [_body(row) for row in rows],
        "words": [to_words(row.text) for row in rows],
    }


def to_pairs(tombstones: Iterable[Tombstone]) -> Params:
    """Tombstones as columns."""
    rows = sorted(tombstones, key=lambda row: row.id)
    return {"ids": [row.id for row in rows], "generations": [int(row.generation) for row in rows]}


def _body(record: Record) -> str:
    parts = (record.document, record.ordinal, record.text, record.start, record.end)
    return json.dumps([*parts, dict(record.metadata)], allow_nan=False)


def _terms(metadata: Mapping[str, Any]) -> str:
    """Keys that no filter can name are left out."""
    named = {
        hexed(key): _term(value)
        for key, value in metadata.items()
        if value is not None and 0 < len(key) <= FIELD_CHARS_MAX and is_plain(key)
    }
    return json.dumps(named)


def _term(value: object) -> object:
    if isinstance(value, list | tuple):
        return sorted({tag for item in value if (tag := tagged(item)) is not None})
    return tagged(value)


def from_row(row: Sequence[Any]) -> Record:
    """The record of a row of `COLUMNS`; more columns behind them do not matter."""
    document, ordinal, text, start, end, metadata = json.loads(row[3])
    vector: Vector = row[2].to_numpy()
    return Record(row[0], document, row[1], ordinal, vector, text, start, end, metadata)
