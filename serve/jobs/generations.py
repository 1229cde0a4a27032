"""Statements of `ports.Documents`: generations only rise, and `chunks_max` bounds what may lie in
the index. It is raised before a write lands and lowered only when a write has settled, so an
interrupted write or delete is cleaned up by the next one.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import sqlalchemy as sa

from serve.errors import BadInput, NotFound
from serve.jobs.schema import collections, documents
from serve.records import DocumentVersion, DocumentWrite


IN_MAX = 500
"""Values of one IN list: SQLite takes 32,766 variables, older builds 999."""

# Statements are made once: building them at each call made a one-document write cost 1.4 ms of
# CPU instead of 0.5 ms.
_KEY = (documents.c.collection == sa.bindparam("c"), documents.c.document == sa.bindparam("d"))
_RAISE = (
    sa.update(documents)
    .where(*_KEY)
    .values(
        generation=sa.bindparam("g"),
        chunks_max=sa.bindparam("m"),
        tombstone=sa.bindparam("t"),
        updated_at=sa.bindparam("u"),
    )
)
_SETTLE = (
    sa.update(documents)
    .where(*_KEY, documents.c.generation == sa.bindparam("g"))
    .values(chunks=sa.bindparam("n"), chunks_max=sa.bindparam("n"), updated_at=sa.bindparam("u"))
)


class _Row(NamedTuple):
    generation: int
    chunks_max: int
    tombstone: bool


_ROWS = sa.select(documents.c.document, *(documents.c[field] for field in _Row._fields)).where(
    documents.c.collection == sa.bindparam("c"),
    documents.c.document.in_(sa.bindparam("names", expanding=True)),
)
_LIVE = sa.select(collections.c.uuid).where(
    collections.c.uuid == sa.bindparam("c"), collections.c.deleted_at.is_(None)
)
_LIVE_LOCKED = _LIVE.with_for_update()


def begin(
    conn: sa.Connection, collection: str, writes: Sequence[DocumentWrite], now: float
) -> Sequence[DocumentVersion]:
    """Accept a write of each document; versions in the order of `writes`.

    A version's `chunks_max` counts this write's own chunks too; it may be above them although
    the document did not exist, after an interrupted delete.
    Raises NotFound (collection), BadInput (a document named twice).
    """
    names = [write.document for write in writes]
    _once_each(names)
    lock_live(conn, collection)
    rows = _rows(conn, collection, names)
    versions = [_next_write(write, rows.get(write.document)) for write in writes]
    new = [version for version in versions if version.document not in rows]
    old = [version for version in versions if version.document in rows]
    if new:
        conn.execute(sa.insert(documents), [_fresh(collection, each, now) for each in new])
    _raise(conn, collection, old, tombstone=False, now=now)
    return versions


def settle(
    conn: sa.Connection, collection: str, versions: Sequence[tuple[str, int, int]], now: float
) -> None:
    """Note (document, generation, chunks) as what the index holds; older generations change nothing.

    Tombstones stay as rows: a generation must never go back.
    """
    if versions:
        conn.execute(
            _SETTLE,
            [
                {"c": collection, "d": document, "g": generation, "n": chunks, "u": now}
                for document, generation, chunks in versions
            ],
        )


def delete(
    conn: sa.Connection, collection: str, names: Sequence[str], now: float
) -> Sequence[DocumentVersion]:
    """Accept a delete of each document; versions in the order of `names`.

    An unknown document gets generation 0. One that is deleted already gets a new generation and
    keeps its `chunks_max`: repeating an interrupted delete finishes it.
    Raises NotFound (collection), BadInput (a document named twice).
    """
    _once_each(names)
    lock_live(conn, collection)
    rows = _rows(conn, collection, names)
    versions = [_next_delete(name, rows.get(name)) for name in names]
    known = [version for version in versions if version.document in rows]
    _raise(conn, collection, known, tombstone=True, now=now)
    return versions


def newer(conn: sa.Connection, collection: str, versions: Mapping[str, int]) -> frozenset[str]:
    """Documents whose generation is above the one given."""
    rows = _rows(conn, collection, list(versions))
    return frozenset(name for name, row in rows.items() if row.generation > versions[name])


def lock_live(conn: sa.Connection, collection: str) -> None:
    """Hold a live collection's row to the transaction's end. Raises NotFound when it is gone.

    On Postgres this orders the writers of one collection, new documents included; SQLite has
    one writer and drops the clause.
    """
    if not is_live(conn, collection, lock=True):
        raise NotFound(f"collection {collection} does not exist", param="collection")


def is_live(conn: sa.Connection, collection: str, *, lock: bool = False) -> bool:
    """Whether the collection exists and is not deleted."""
    live = _LIVE_LOCKED if lock else _LIVE
    return conn.execute(live, {"c": collection}).first() is not None


def _once_each(names: Sequence[str]) -> None:
    seen: set[str] = set()
    for position, name in enumerate(names):
        if name in seen:
            raise BadInput(f"document {name!r} is named twice", param=f"documents[{position}]")
        seen.add(name)


def _next_write(write: DocumentWrite, row: _Row | None) -> DocumentVersion:
    if row is None:
        return DocumentVersion(write.document, 1, write.chunks, existed=False)
    chunks_max = max(row.chunks_max, write.chunks)
    return DocumentVersion(
        write.document, row.generation + 1, chunks_max, existed=not row.tombstone
    )


def _next_delete(name: str, row: _Row | None) -> DocumentVersion:
    if row is None:
        return DocumentVersion(name, 0, 0, existed=False)
    return DocumentVersion(name, row.generation + 1, row.chunks_max, existed=not row.tombstone)


def _fresh(collection: str, version: DocumentVersion, now: float) -> dict[str, Any]:
    return {
        "collection": collection,
        "document": version.document,
        "generation": version.generation,
        "chunks_max": version.chunks_max,
        "chunks": 0,
        "tombstone": False,
        "updated_at": now,
    }


def _raise(
    conn: sa.Connection,
    collection: str,
    versions: Sequence[DocumentVersion],
    *,
    tombstone: bool,
    now: float,
) -> None:
    if versions:
        fixed = {"c": collection, "t": tombstone, "u": now}
        conn.execute(
            _RAISE,
            [
                {**fixed, "d": each.document, "g": each.generation, "m": each.chunks_max}
                for each in versions
            ],
        )


def _rows(conn: sa.Connection, collection: str, names: Sequence[str]) -> dict[str, _Row]:
    """The documents that have a row, by name."""
    found: dict[str, _Row] = {}
    for part in _parts(names):
        values = {"c": collection, "names": part}
        found.update((row[0], _Row(*row[1:])) for row in conn.execute(_ROWS, values))
    return found


def _parts(names: Sequence[str]) -> Iterator[Sequence[str]]:
    for start in range(0, len(names), IN_MAX):
        yield names[start : start + IN_MAX]
