"""What became of claimed items: their end, their wait or their next stage, with the job's counts and
the document's generation in the same transaction. A settlement whose lease is over changes nothing.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

from serve.freshness import UNPROVED
from serve.items import ENDS, Fault, ItemState, Job, Settlement
from serve.jobs import generations, order, progress, tokens
from serve.jobs.bell import note
from serve.jobs.book import Book, Delta
from serve.jobs.efforts import Efforts
from serve.jobs.job_tables import items
from serve.jobs.rows import parts, write


CRASHED = Fault("poison", "crashed", "Its worker died each time that it was tried.")
"""Of an item that was given up."""

ALONE_FROM = 2
"""An item that has crashed so often is worked on alone, so that it takes no other with it."""

_THESE = items.c.id.in_(sa.bindparam("ids", expanding=True))
_ROWS = (
    sa.select(
        *(items.c[name] for name in ("id", "lease", "job", "seq", "task", "stage", "cost", "tag")),
        *(items.c[name] for name in ("attempts", "crashes", "tokens", "error_kind")),
        *(items.c[name] for name in ("name", "generation", "sha256", "leased_at")),
    )
    .where(_THESE)
    .order_by(items.c.id)
)
_LEASED = _ROWS.where(items.c.state == sa.literal_column("'leased'")).with_for_update()
_LEASED_TO = _LEASED.where(items.c.owner == sa.bindparam("who"))
_DELAYED = _ROWS.where(items.c.state == sa.literal_column("'delayed'")).with_for_update()
_DUE = (
    sa.select(items.c.id, items.c.job)
    .where(items.c.state == sa.literal_column("'delayed'"), items.c.run_at <= sa.bindparam("now"))
    .order_by(items.c.run_at)
    .limit(sa.bindparam("most"))
)
_FREE = {"owner": None, "leased_at": None}


@dataclass(slots=True)
class _Change:
    """A row that is about to be written. `fresh`: it joins the fair order anew, at its cost."""

    row: Any
    values: dict[str, Any]
    fresh: bool = False

    @property
    def ends(self) -> bool:
        return self.values["state"] in ENDS


def settle(
    conn: sa.Connection, settlements: Sequence[Settlement], *, attempts_max: int, now: float
) -> list[bool]:
    """See `job_ports.Queue`."""
    book = Book(conn, now)
    rows = {row.id: row for row in _locked(conn, [one.item for one in settlements])}
    book.open({row.job for row in rows.values()})
    changes: list[_Change] = []
    landed: list[tuple[Any, int]] = []
    widened: list[tuple[Any, int]] = []
    applied: list[bool] = []
    reached: dict[str, int] = {}
    efforts = Efforts(now)
    for one in settlements:
        row = rows.get(one.item)
        applied.append(row is not None and row.lease == one.lease)
        if row is None or row.lease != one.lease:
            continue
        del rows[one.item]
        changes.append(_settled(row, book[row.job], one, attempts_max, now))
        efforts.add(book[row.job].tenant, row, one.word)
        _reach(book, reached, book[row.job], one.token)
        if one.chunks is not None and one.word in ("done", "advance"):
            (landed if one.word == "done" else widened).append((row, one.chunks))
    _widen(book, widened)
    _land(book, landed)
    _apply(book, changes)
    efforts.write(conn)
    tokens.reach(conn, reached)
    book.close()
    return applied


def requeue(
    conn: sa.Connection, owner: str, ids: Sequence[int], now: float, *, if_free: bool = False
) -> None:
    """What this owner has of these items goes back to where it waited; no attempt, no crash.

    With `if_free` no job is waited for: what of a locked one is still ready for whoever comes next.
    """
    book = Book(conn, now)
    rows = _locked(conn, ids, owner)
    book.open({row.job for row in rows}, if_free=if_free)
    known = [row for row in rows if book.find(row.job) is not None]
    _apply(book, [_waiting(row, book[row.job], {}) for row in known])
    book.close()
    unknown = {row.id for row in rows} - {row.id for row in known}
    write(conn, items, ((each, {"state": "ready", **_FREE}) for each in unknown))


def crashed(
    conn: sa.Connection, held: Mapping[str, Sequence[int]], *, crashes_max: int, now: float
) -> None:
    """These owners died, with what they have of these items: it goes back, until it has done so
    too often.

    When one worked on an item alone, that one is to blame and its others are not.
    """
    book = Book(conn, now)
    rows = [_locked(conn, ids, owner) for owner, ids in held.items()]
    book.open({row.job for some in rows for row in some})
    _apply(book, [change for some in rows for change in _blamed(book, some, crashes_max)])
    book.close()


def due(conn: sa.Connection, now: float, rows_max: int) -> int:
    """Items whose moment has come join the fair order anew; returns how many."""
    found = conn.execute(_DUE, {"now": now, "most": rows_max}).all()
    if not found:
        return 0
    book = Book(conn, now)
    book.open({row.job for row in found})  # before their items, as who stops a job does
    rows = conn.execute(_DELAYED, {"ids": [row.id for row in found]}).all()
    _apply(book, [_waiting(row, book[row.job], {"run_at": None}, fresh=True) for row in rows])
    book.close()
    return len(found)


def _locked(conn: sa.Connection, ids: Sequence[int], owner: str | None = None) -> list[Any]:
    """Those of these items that are leased, to this owner if one is named.

    Who read their ids before may find them with another owner by now.
    """
    found: list[Any] = []
    for part in parts(sorted(ids)):
        if owner is None:
            found += conn.execute(_LEASED, {"ids": part}).all()
        else:
            found += conn.execute(_LEASED_TO, {"ids": part, "who": owner}).all()
    return found


def _blamed(book: Book, rows: Sequence[Any], crashes_max: int) -> Iterator[_Change]:
    """What becomes of the items of one owner that died."""
    alone = any(row.crashes >= ALONE_FROM for row in rows)
    for row in rows:
        crashes = row.crashes + (not alone or row.crashes >= ALONE_FROM)
        if crashes >= crashes_max:
            yield _ended(row, "dead", {"crashes": crashes, **_fault(CRASHED)})
        else:
            yield _waiting(row, book[row.job], {"crashes": crashes})


def _settled(row: Any, job: Job, one: Settlement, attempts_max: int, now: float) -> _Change:
    values: dict[str, Any] = {}
    if one.tokens:
        values["tokens"] = row.tokens + one.tokens
    if one.result:
        values["result"] = dict(one.result)
    if one.fault is not None:
        values |= _fault(one.fault)
    attempts = row.attempts + 1
    if one.word in ("done", "skipped"):
        if row.error_kind:
            values |= _fault(None)
        return _ended(row, one.word, {**values, "payload": {}})
    if one.word == "dead" or (one.word == "retry" and attempts >= attempts_max):
        return _ended(row, "dead", {**values, "attempts": attempts})
    if one.word in ("retry", "release"):
        if one.word == "retry":
            values["attempts"] = attempts
        until = now + one.delay_s if one.delay_s > 0 else None
        return _waiting(row, job, values, until=until)
    values |= {"stage": one.stage, "cost": one.cost, "attempts": 0, "crashes": 0}
    if one.payload is not None:
        values["payload"] = dict(one.payload)
    return _waiting(row, job, values, fresh=True)


def _ended(row: Any, state: ItemState, values: Mapping[str, Any]) -> _Change:
    return _Change(row, {**values, "state": state})


def _waiting(
    row: Any,
    job: Job,
    values: Mapping[str, Any],
    *,
    until: float | None = None,
    fresh: bool = False,
) -> _Change:
    """Back to wait, unless the job has stopped meanwhile: then only its output is still written."""
    if progress.stopping(job) and row.seq != progress.FINISH_SEQ:
        return _ended(row, "cancelled", values)
    if until is not None:
        return _Change(row, {**values, "state": "delayed", "run_at": until})
    state = "paused" if job.paused and row.seq >= 0 else "ready"
    return _Change(row, {**values, "state": state}, fresh)


def _apply(book: Book, changes: Sequence[_Change]) -> None:
    """Write the rows with their tags, and what that means for their jobs."""
    _tag(book, changes)
    rest = {**_FREE, "updated_at": book.now}
    write(book.conn, items, ((change.row.id, change.values | rest) for change in changes))
    deltas: dict[str, Delta] = defaultdict(Delta)
    for change in changes:
        row = change.row
        if row.crashes >= ALONE_FROM:
            note(book.conn, row.stage)  # its worker may have more again
        if row.seq >= 0:
            _add(deltas[row.job], change)
    progress.counted(book, deltas)
    for change in changes:
        if change.row.seq < 0 and change.ends:
            _own_item_ended(book, change)


def _add(delta: Delta, change: _Change) -> None:
    row, values = change.row, change.values
    delta.tokens += values.get("tokens", row.tokens) - row.tokens
    if change.ends:
        state = values["state"]
        setattr(delta, state, getattr(delta, state) + 1)
        delta.cost -= row.cost
    else:
        delta.cost += values.get("cost", row.cost) - row.cost


def _tag(book: Book, changes: Sequence[_Change]) -> None:
    """Places in the fair order: behind the tenant's others for a fresh one, else as it was."""
    lines: dict[tuple[order.Line, int], list[_Change]] = defaultdict(list)
    for change in changes:
        row, values, job = change.row, change.values, book[change.row.job]
        if values["state"] != "ready":
            continue
        if change.fresh:
            line = order.Line(values.get("stage", row.stage), job.klass, job.tenant)
            lines[line, job.priority].append(change)
        else:
            values["tag"] = max(row.tag, order.clock_of(book.conn, row.stage, job.klass))
            note(book.conn, row.stage)
    for (line, priority), fresh in sorted(lines.items(), key=lambda each: str(each[0])):
        given = order.tags(
            book.conn,
            line,
            weight=book[fresh[0].row.job].weight,
            costs=[change.values.get("cost", change.row.cost) for change in fresh],
            priority=priority,
        )
        for change, tag in zip(fresh, given, strict=True):
            change.values["tag"] = tag


def _land(book: Book, landed: Sequence[tuple[Any, int]]) -> None:
    by_collection: dict[str, list[generations.Landed]] = defaultdict(list)
    for row, chunks in landed:
        by_collection[book[row.job].collection].append(
            generations.Landed(row.name, row.generation, chunks, row.sha256)
        )
    for collection, versions in by_collection.items():
        generations.settle(book.conn, collection, versions, book.now)


def _reach(book: Book, reached: dict[str, int], job: Job, token: int | None) -> None:
    """A write of a job has landed there. A collection's token stands for the documents that it holds, so
    it leaves out writes of which there is no proof; one that is gone has none any more.
    """
    if token is None:
        return
    reached[job.id] = max(token, reached.get(job.id, 0))
    here = job.collection
    if token != UNPROVED and (here in reached or generations.is_live(book.conn, here)):
        reached[here] = max(token, reached.get(here, 0))


def _widen(book: Book, widened: Sequence[tuple[Any, int]]) -> None:
    by_collection: dict[str, dict[str, int]] = defaultdict(dict)
    for row, chunks in widened:
        by_collection[book[row.job].collection][row.name] = chunks
    for collection, counts in by_collection.items():
        generations.widen(book.conn, collection, counts)


def _own_item_ended(book: Book, change: _Change) -> None:
    """A job's file is read, or its output is written."""
    row, values = change.row, change.values
    if book[row.job].ended or values["state"] == "cancelled":
        return
    if values["state"] == "dead":
        progress.fail(book, row.job, values)
    elif row.seq == progress.FINISH_SEQ:
        progress.finished(book, row.job, values.get("result", {}))
    else:
        progress.expanded(book, row.job)


def _fault(fault: Fault | None) -> dict[str, str]:
    if fault is None:
        return {"error_kind": "", "error_code": "", "error_text": ""}
    return {
        "error_kind": fault.kind,
        "error_code": fault.code,
        "error_text": fault.text,
    }
