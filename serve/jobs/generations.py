"""Generations of documents: they only rise, and `chunks_max` bounds what may lie in the index. It is
raised before a write lands and lowered only when a write has settled, so an interrupted write or
delete is cleaned up by the next one. `sha256` is of what has landed, empty while something newer has
been accepted, and `RAW` for a vector that its user computed.

`sent_at` is when the last accepted write or delete was sent: its queue message's own time, else that of
the Store when it was accepted. What was sent before that is older, however late it comes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import sqlalchemy as sa

from serve.errors import BadInput, NotFound
from serve.jobs.rows import execute, parts
from serve.jobs.tables import collections, documents
from serve.records import DocumentVersion, DocumentWrite


RAW = "raw"
"""In the place of a document's hash: its last write was of a raw vector, so no item waits to write or
delete it. No hash is like it."""

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
        sha256=sa.bindparam("h"),
        sent_at=sa.bindparam("s"),
        updated_at=sa.bindparam("u"),
    )
)
_SENT = (
    sa.update(documents)
    .where(*_KEY, documents.c.sent_at < sa.bindparam("s"))
    .values(sent_at=sa.bindparam("s"))
)
_WIDEN = (
    sa.update(documents)
    .where(*_KEY, documents.c.chunks_max < sa.bindparam("n"))
    .values(chunks_max=sa.bindparam("n"))
)
_SETTLE = (
    sa.update(documents)
    .where(*_KEY, documents.c.generation == sa.bindparam("g"))
    .values(
        chunks=sa.bindparam("n"),
        chunks_max=sa.bindparam("n"),
        sha256=sa.bindparam("h"),
        updated_at=sa.bindparam("u"),
    )
)


class Landed(NamedTuple):
    """A document write that the index holds: so many chunks, none of an older generation.

    `sha256` is of its content and all that shaped its vectors.
    """

    document: str
    generation: int
    chunks: int
    sha256: str = ""


class Known(NamedTuple):
    """What is kept of a document."""

    generation: int
    chunks_max: int
    tombstone: bool
    sha256: str
    sent_at: float

    def is_newer(self, sent_at: float | None) -> bool:
        """Whether its last accepted write was sent after that; None: now."""
        return sent_at is not None and sent_at < self.sent_at


_INSERT = sa.insert(documents).inline()
_ROWS = sa.select(documents.c.document, *(documents.c[field] for field in Known._fields)).where(
    documents.c.collection == sa.bindparam("c"),
    documents.c.document.in_(sa.bindparam("names", expanding=True)),
)
_LIVE = sa.select(collections.c.uuid).where(
    collections.c.uuid == sa.bindparam("c"), collections.c.deleted_at.is_(None)
)
_LIVE_LOCKED = _LIVE.with_for_update()


def known(conn: sa.Connection, collection: str, names: Sequence[str]) -> dict[str, Known]:
    """Hold a collection, and tell which of these documents it knows. Before `begin` and `delete`.

    Raises NotFound (collection), BadInput (a document named twice).
    """
    _once_each(names)
    lock_live(conn, collection)
    return _rows(conn, collection, names)


def begin(
    conn: sa.Connection,
    collection: str,
    writes: Sequence[DocumentWrite],
    there: Mapping[str, Known],
    now: float,
    *,
    sha256: str = "",
) -> Sequence[DocumentVersion]:
    """Accept a write of each document; versions in the order of `writes`. `there` is `known`.

    A version's `chunks_max` counts this write's own chunks too; it may be above them although
    the document did not exist, after an interrupted delete.
    """
    versions = [_next_write(write, there.get(write.document)) for write in writes]
    sent = {one.document: one.sent_at for one in writes if one.sent_at is not None}
    new = [version for version in versions if version.document not in there]
    old = [version for version in versions if version.document in there]
    fresh = [
        {**_fresh(collection, each, now, sent.get(each.document)), "sha256": sha256} for each in new
    ]
    execute(conn, _INSERT, fresh)
    rows = [_raised(each, there[each.document], now, sent.get(each.document)) for each in old]
    _raise(conn, collection, rows, tombstone=False, sha256=sha256, now=now)
    return versions


def begin_raw(
    conn: sa.Connection,
    collection: str,
    names: Sequence[str],
    sent: Sequence[float | None],
    now: float,
) -> Sequence[int | None]:
    """A generation for a write of each raw vector, in order; 0 where the name is a document's, None
    where a write that was sent later has been accepted. `sent` has an entry a name; None: now.

    Such a write is no item: should it never land, it must not have superseded one that was accepted.
    So it takes a name that is new, another raw vector's, or free since a delete has settled.
    Raises NotFound (collection), BadInput (named twice).
    """
    there = known(conn, collection, names)
    writes = [DocumentWrite(name, 1, at) for name, at in zip(names, sent, strict=True)]
    granted: dict[str, int | None] = {
        one.document: None
        for one in writes
        if one.document in there and there[one.document].is_newer(one.sent_at)
    }
    taken = {name for name, row in there.items() if not _is_free(row)}
    due = [one for one in writes if one.document not in granted.keys() | taken]
    versions = begin(conn, collection, due, there, now, sha256=RAW)
    granted |= {version.document: version.generation for version in versions}
    return [granted.get(name, 0) for name in names]


def widen(conn: sa.Connection, collection: str, chunks: Mapping[str, int]) -> None:
    """A write is about to land so many chunks of each document."""
    rows = [{"c": collection, "d": name, "n": count} for name, count in chunks.items()]
    execute(conn, _WIDEN, rows)


def settle(conn: sa.Connection, collection: str, versions: Sequence[Landed], now: float) -> None:
    """Note what the index holds; older generations change nothing.

    Tombstones stay as rows: a generation must never go back.
    """
    fixed = {"c": collection, "u": now}
    rows = [
        {**fixed, "d": one.document, "g": one.generation, "n": one.chunks, "h": one.sha256}
        for one in versions
    ]
    execute(conn, _SETTLE, rows)


def delete(
    conn: sa.Connection,
    collection: str,
    names: Sequence[str],
    there: Mapping[str, Known],
    now: float,
    *,
    sent: Mapping[str, float],
) -> Sequence[DocumentVersion]:
    """Accept a delete of each document; versions in the order of `names`. `there` is `known`.

    An unknown document gets generation 0. One that is deleted already gets a new generation and
    keeps its `chunks_max`: repeating an interrupted delete finishes it. `sent` has the times of those
    that do not count as sent now: of these an unknown one leaves a row, for what was sent before it.
    """
    versions = [_next_delete(name, there.get(name)) for name in names]
    unseen = [each for each in versions if each.document in sent and each.document not in there]
    marks = [
        {
            **_fresh(collection, replace(each, generation=1), now, sent[each.document]),
            "sha256": "",
            "tombstone": True,
        }
        for each in unseen
    ]
    execute(conn, _INSERT, marks)
    old = [version for version in versions if version.document in there]
    rows = [_raised(each, there[each.document], now, sent.get(each.document)) for each in old]
    _raise(conn, collection, rows, tombstone=True, now=now)
    return versions


def note_sent(conn: sa.Connection, collection: str, sent: Mapping[str, float]) -> None:
    """A write was accepted that changes nothing: what was sent before it is older all the same."""
    execute(conn, _SENT, [{"c": collection, "d": name, "s": at} for name, at in sent.items()])


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


def _is_free(row: Known) -> bool:
    """Whether no item of a job has written the name, or has deleted it to the end."""
    return row.sha256 == RAW or (row.tombstone and row.chunks_max == 0)


def _next_write(write: DocumentWrite, row: Known | None) -> DocumentVersion:
    if row is None:
        return DocumentVersion(write.document, 1, write.chunks, existed=False)
    chunks_max = max(row.chunks_max, write.chunks)
    return DocumentVersion(
        write.document, row.generation + 1, chunks_max, existed=not row.tombstone
    )


def _next_delete(name: str, row: Known | None) -> DocumentVersion:
    if row is None:
        return DocumentVersion(name, 0, 0, existed=False)
    return DocumentVersion(name, row.generation + 1, row.chunks_max, existed=not row.tombstone)


def _fresh(
    collection: str, version: DocumentVersion, now: float, sent_at: float | None
) -> dict[str, Any]:
    return {
        "collection": collection,
        "document": version.document,
        "generation": version.generation,
        "chunks_max": version.chunks_max,
        "chunks": 0,
        "tombstone": False,
        "sent_at": now if sent_at is None else sent_at,
        "updated_at": now,
    }


def _raised(
    version: DocumentVersion, row: Known, now: float, sent_at: float | None
) -> dict[str, Any]:
    """The clock of a queue may be ahead of ours: the time never goes back."""
    return {
        "d": version.document,
        "g": version.generation,
        "m": version.chunks_max,
        "s": max(now if sent_at is None else sent_at, row.sent_at),
    }


def _raise(
    conn: sa.Connection,
    collection: str,
    rows: Sequence[dict[str, Any]],
    *,
    tombstone: bool,
    now: float,
    sha256: str = "",
) -> None:
    fixed = {"c": collection, "t": tombstone, "h": sha256, "u": now}
    execute(conn, _RAISE, [{**fixed, **row} for row in rows])


def _rows(conn: sa.Connection, collection: str, names: Sequence[str]) -> dict[str, Known]:
    """The documents that have a row, by name."""
    found: dict[str, Known] = {}
    for part in parts(names):
        values = {"c": collection, "names": part}
        found.update((row[0], Known(*row[1:])) for row in conn.execute(_ROWS, values).all())
    return found
