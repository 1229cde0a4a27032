"""Statements of `job_ports.Handover` and of `Queue.add_items`: a job, its items and the generations of the
documents that they write, in one transaction with the idempotency key.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import sqlalchemy as sa

from serve.errors import Mismatch, QuotaExceeded
from serve.items import SENT, VERSION, Accepted, Job, JobState, NewItem, Once
from serve.jobs import generations, order, progress, tenants, tokens, webhook_rows
from serve.jobs.book import Book, read
from serve.jobs.job_tables import idempotency, items, job_totals, jobs
from serve.jobs.rows import execute
from serve.records import DocumentWrite


FULL_RETRY_S = 60.0
"""When to come again with a job for which there is no room."""


@dataclass(frozen=True, slots=True)
class Room:
    """What one tenant may have open: jobs, items, and tokens as estimated."""

    jobs: int
    items: int
    tokens: float


_INSERT = sa.insert(items).inline()
_processed = job_totals.c.done + job_totals.c.skipped + job_totals.c.dead + job_totals.c.cancelled
_OPEN = sa.select(job_totals.c.open, job_totals.c.total - _processed, job_totals.c.cost_left).where(
    job_totals.c.tenant == sa.bindparam("tenant")
)
_MINE = (
    sa.select(items.c.job, jobs.c.tenant)
    .join(jobs, jobs.c.id == items.c.job)
    .where(
        items.c.id == sa.bindparam("item"),
        items.c.lease == sa.bindparam("lease"),
        items.c.state == sa.literal_column("'leased'"),
    )
)
_THERE = sa.select(items.c.seq).where(
    items.c.job == sa.bindparam("job"),
    items.c.seq >= sa.bindparam("first"),
    items.c.seq < sa.bindparam("end"),
)
_ONCE = sa.select(idempotency).where(
    idempotency.c.tenant == sa.bindparam("tenant"), idempotency.c.key == sa.bindparam("key")
)
_ADD_ONCE = sa.insert(idempotency)
_DROP_ONCE = sa.delete(idempotency).where(
    idempotency.c.tenant == sa.bindparam("_tenant"), idempotency.c.key == sa.bindparam("_key")
)
_OLD_ONCE = (
    sa.select(idempotency.c.tenant, idempotency.c.key)
    .where(idempotency.c.expires_at <= sa.bindparam("now"))
    .limit(sa.bindparam("most"))
)


def submit(
    conn: sa.Connection,
    job: Job,
    new: Sequence[NewItem],
    once: Once | None,
    *,
    room: Room,
    now: float,
) -> Accepted:
    """See `job_ports.Handover.submit_job`. The job's own times and counts are set here."""
    tenants.hold(conn, job.tenant)
    if once is not None:
        earlier = first(conn, job.tenant, once, now)
        if earlier is not None:
            return Accepted(earlier, replayed=True)
    if job.webhook:
        webhook_rows.mine(conn, job.tenant, job.webhook)
    _check_room(conn, job.tenant, room, jobs=1, items=len(new), cost=sum(one.cost for one in new))
    own = [one for one in new if one.task == "expand"]
    units = [one for one in new if one.task != "expand"]
    state: JobState = "validating" if own else "queued"
    book = Book(conn, now)
    book.add(replace(job, state=state, created_at=now, times={**job.times, state: now}))
    rows = _rows(book[job.id], enumerate(units), now)
    skipped = _grant(book, job.collection, rows)
    order.reweigh(conn, job.tenant, job.weight)  # after the documents, as who settles does
    _keep(book, job.id, rows, skipped)
    _inherit(book, job.id, skipped)
    book.tell(job.id, f"job.{state}")
    for one in own:
        progress.add_own_item(book, job.id, one.task, one.payload, one.cost)
    progress.advance(book, job.id)
    book.close()
    if once is not None:
        row = {"tenant": job.tenant, "key": once.key, "fingerprint": once.fingerprint}
        conn.execute(_ADD_ONCE, {**row, "job": job.id, "expires_at": now + once.kept_s})
    return Accepted(book[job.id])


def add_items(
    conn: sa.Connection,
    item: int,
    lease: int,
    *,
    start: int,
    new: Sequence[NewItem],
    room: Room,
    now: float,
) -> bool:
    """See `job_ports.Queue.add_items`. The job is open already: only its items need room."""
    mine = conn.execute(_MINE, {"item": item, "lease": lease}).one_or_none()
    if mine is None:
        return False
    job_id, tenant = mine
    tenants.hold(conn, tenant)
    book = Book(conn, now)
    book.open([job_id])
    job = book.find(job_id)
    if job is None or job.state != "validating":  # None: erased, since its item was read
        return False
    found = conn.execute(_THERE, {"job": job_id, "first": start, "end": start + len(new)})
    there = frozenset(found.scalars())
    units = [(seq, one) for seq, one in enumerate(new, start) if seq not in there]
    if units:
        cost = sum(one.cost for _, one in units)
        _check_room(conn, tenant, room, jobs=0, items=len(units), cost=cost)
        rows = _rows(book[job_id], units, now)
        skipped = _grant(book, book[job_id].collection, rows)
        _keep(book, job_id, rows, skipped)
        _inherit(book, job_id, skipped)
    book.progress(job_id)
    book.close()
    return True


def first(conn: sa.Connection, tenant: str, once: Once, now: float) -> Job | None:
    """The job that this key made before. Raises Mismatch when it was for something else."""
    row = conn.execute(_ONCE, {"tenant": tenant, "key": once.key}).one_or_none()
    if row is None:
        return None
    job = read(conn, [row.job]).get(row.job)
    if row.expires_at <= now or job is None:
        conn.execute(_DROP_ONCE, {"_tenant": tenant, "_key": once.key})
        return None
    if row.fingerprint != once.fingerprint:
        raise Mismatch(
            "This Idempotency-Key was used with another request.", param="Idempotency-Key"
        )
    return job


def purge_idempotency(conn: sa.Connection, now: float, rows_max: int) -> int:
    """Forget keys whose time is over; returns how many."""
    rows = [
        {"_tenant": row.tenant, "_key": row.key}
        for row in conn.execute(_OLD_ONCE, {"now": now, "most": rows_max})
    ]
    if rows:
        conn.execute(_DROP_ONCE, rows)
    return len(rows)


def _check_room(
    conn: sa.Connection, tenant: str, room: Room, *, jobs: int, items: int, cost: float
) -> None:
    """For so many more. Raises QuotaExceeded, naming what is full."""
    row = conn.execute(_OPEN, {"tenant": tenant}).one_or_none()
    open_jobs, open_items, open_tokens = row or (0, 0, 0.0)
    bounds = (
        ("open_jobs", open_jobs, jobs, room.jobs),
        ("open_items", open_items, items, room.items),
        ("open_tokens", open_tokens, cost, room.tokens),
    )
    for word, has, more, most in bounds:
        if more and has + more > most:
            raise QuotaExceeded(
                f"You have {has:.0f} {word.replace('_', ' ')}, and this is {more:.0f} more; "
                f"{most:.0f} are allowed.",
                code=word,
                retry_after_s=FULL_RETRY_S,
            )


def _keep(
    book: Book, job_id: str, rows: Sequence[dict[str, Any]], skipped: Sequence[dict[str, Any]]
) -> None:
    """Insert a job's new items; the skipped ones among them have ended."""
    if not rows:
        return
    job = book[job_id]
    done = {row["seq"] for row in skipped}
    waiting = [row for row in rows if row["seq"] not in done]
    if not job.paused:
        _tag(book, job, waiting)
    # Apart: what others leave to the defaults, these set.
    for some in (waiting, skipped):
        execute(book.conn, _INSERT, some)
    book.change(
        job_id,
        total=job.total + len(rows),
        skipped=job.skipped + len(skipped),
        cost_left=job.cost_left + sum(row["cost"] for row in waiting),
    )


def _inherit(book: Book, job_id: str, skipped: Sequence[dict[str, Any]]) -> None:
    """What is unchanged was landed by an earlier job, which searches may not see yet."""
    if any(row["result"]["status"] == "unchanged" for row in skipped):
        token = tokens.find(book.conn, book[job_id].collection)
        if token is not None:
            tokens.reach(book.conn, {job_id: token})


def _tag(book: Book, job: Job, rows: Sequence[dict[str, Any]]) -> None:
    by_stage: dict[Any, list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        by_stage[row["stage"]].append(row)
    for stage, some in sorted(by_stage.items()):  # flows are locked in one order
        line = order.Line(stage, job.klass, job.tenant)
        costs = [row["cost"] for row in some]
        given = order.tags(book.conn, line, weight=job.weight, costs=costs, priority=job.priority)
        for row, tag in zip(some, given, strict=True):
            row["tag"] = tag


def _rows(job: Job, units: Iterable[tuple[int, NewItem]], now: float) -> list[dict[str, Any]]:
    return [_row(job, seq, one, now) for seq, one in units]


def _row(job: Job, seq: int, one: NewItem, now: float) -> dict[str, Any]:
    return {
        "job": job.id,
        "seq": seq,
        "klass": job.klass,
        "stage": one.stage,
        "state": "paused" if job.paused else "ready",
        "task": one.task,
        "name": one.name,
        "tag": 0.0,
        "cost": one.cost,
        "generation": 0,
        "sha256": one.sha256,
        "payload": one.payload,
        "updated_at": now,
    }


def _grant(book: Book, collection: str, rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """A generation for each write of a document; returns those that need not be written.

    Raises NotFound (the collection is gone), BadInput (a document named twice).
    """
    if not (collection and rows):
        return []
    conn, now = book.conn, book.now
    there = generations.known(conn, collection, [row["name"] for row in rows])
    skipped, writes, deletes, same = [], [], [], {}
    for row in rows:
        known, sent_at = there.get(row["name"]), row["payload"].get(SENT)
        if known is not None and known.is_newer(sent_at):
            skipped.append(_skip(row, "superseded", known.generation))
        elif row["task"] == "delete":
            if not _is_older(row, known):
                deletes.append(row)
        elif known is not None and known.sha256 and known.sha256 == row["sha256"]:
            skipped.append(_skip(row, "unchanged", known.generation))
            same[row["name"]] = now if sent_at is None else sent_at
        else:
            writes.append(row)
    generations.note_sent(conn, collection, same)
    # Each input of a request is a chunk; those of a document are counted by its `prepare`.
    asked = [
        DocumentWrite(row["name"], row["payload"].get("inputs", 0), row["payload"].get(SENT))
        for row in writes
    ]
    for row, version in zip(
        writes, generations.begin(conn, collection, asked, there, now), strict=True
    ):
        row["generation"] = version.generation
    names = [row["name"] for row in deletes]
    sent = {row["name"]: row["payload"][SENT] for row in deletes if SENT in row["payload"]}
    for row, version in zip(
        deletes, generations.delete(conn, collection, names, there, now, sent=sent), strict=True
    ):
        row["generation"] = version.generation
        row["payload"] = {"existed": version.existed or VERSION in row["payload"]}
        if version.generation == 0:
            skipped.append(_skip(row, "absent", 0))
    return skipped


def _is_older(row: dict[str, Any], known: generations.Known | None) -> bool:
    """Whether it is the delete of a version that a newer write has replaced, or will.

    Then it keeps that version's generation: it supersedes nothing, and removes what is left of it.
    """
    version = row["payload"].get(VERSION)
    if version is None or known is None or known.tombstone or known.generation <= version:
        return False
    row |= {"generation": version, "payload": {"existed": True, VERSION: version}}
    return True


def _skip(row: dict[str, Any], status: str, generation: int) -> dict[str, Any]:
    """Nothing to do for it."""
    result = {"status": status}
    row |= {"state": "skipped", "payload": {}, "generation": generation, "result": result}
    return row
