"""How a job goes on: from state to state as its items end, to its end, or to a stop before it."""

from collections.abc import Mapping
from typing import Any

import sqlalchemy as sa

from serve.items import STAGES, Job, JobState, Task
from serve.jobs import order
from serve.jobs.book import TOLD_S, Book, Delta
from serve.jobs.job_tables import IS_UNIT, items, jobs
from serve.jobs.rows import write


EXPAND_SEQ, FINISH_SEQ = -1, -2
"""Numbers of a job's own items: the one that reads its file, the one that writes its output."""

OWN_COST = 1.0
"""Tokens that such an item counts as in the fair order: it embeds nothing."""

STOPS: Mapping[str, JobState] = {
    "expiring": "expired",
    "stopping": "failed",
    "cancelling": "cancelled",
}
"""Why a job stops before its items are done, the strongest first, and what it ends as."""

MOVE_ROWS = 2000
"""Items of a job that are stopped, paused or resumed in one transaction, about 40 ms: others wait
behind it. Ticks do the rest, and what is claimed before follows then."""

_JOB: sa.BindParameter[str] = sa.bindparam("_job")
_MOST: sa.BindParameter[int] = sa.bindparam("_most")
_NOW: sa.BindParameter[float] = sa.bindparam("_now")
_WAITING = ("ready", "delayed", "paused")


def _units(*states: str) -> sa.Select[int]:
    """Units of a job in these states."""
    here = items.c.stage.in_(STAGES), items.c.state.in_(states), IS_UNIT
    return sa.select(items.c.id).where(items.c.job == _JOB, *here)


def _some(*states: str) -> sa.Select[int]:
    """Some of them, but on Postgres none that a claim has locked: it may be waiting for the job.

    A CTE, so that it runs once whatever the plan.
    """
    free = _units(*states).limit(_MOST).with_for_update(skip_locked=True).cte("free")
    return sa.select(free.c.id)


_CANCEL = (
    sa.update(items)
    .where(items.c.id.in_(_some(*_WAITING)))
    .values(state="cancelled", run_at=None, updated_at=_NOW)
    .returning(items.c.cost)
)
_CANCEL_EXPAND = (
    sa.update(items)
    .where(items.c.job == _JOB, items.c.seq == EXPAND_SEQ, items.c.state.in_(_WAITING))
    .values(state="cancelled", run_at=None, updated_at=_NOW)
)
_PAUSE = (
    sa.update(items).where(items.c.id.in_(_some("ready"))).values(state="paused", updated_at=_NOW)
)
_LEFT_TO_CANCEL, _LEFT_TO_PAUSE, _LEFT_TO_RESUME = (
    _units(*states).limit(1) for states in (_WAITING, ("ready",), ("paused",))
)
_PAUSED = (
    sa.select(items.c.id, items.c.cost)
    .where(
        items.c.job == sa.bindparam("job"),
        items.c.stage == sa.bindparam("stage"),
        items.c.state == "paused",
    )
    .order_by(items.c.seq)
    .limit(sa.bindparam("most"))
)
_MOVING = (
    sa.select(jobs.c.id).where(sa.text("moving")).order_by(jobs.c.id).limit(sa.bindparam("most"))
)
_UNTOLD = (
    sa.select(jobs.c.id)
    .where(sa.text("untold"), jobs.c.told_at <= sa.bindparam("before"))
    .limit(sa.bindparam("most"))
)


def counted(book: Book, deltas: Mapping[str, Delta]) -> None:
    """Items of these jobs have ended, or their cost is known better."""
    for job_id, delta in deltas.items():
        job = book.count(job_id, delta)
        if delta.dead > 0 and job.on_error == "stop" and not stopping(job):
            stop(book, job_id, "stopping")
        elif not advance(book, job_id) and _shows(delta):
            book.progress(job_id)


def stopping(job: Job) -> bool:
    """Whether its waiting items are not to be worked on any more."""
    return job.ended or job.state == "cancelling"


def advance(book: Book, job_id: str) -> bool:
    """Take a job on when all its items have ended; returns whether it came to a new state."""
    job = book[job_id]
    if job.ended or job.state == "validating" or job.processed < job.total:
        return False
    if job.kind == "embeddings" and not job.errors:
        if "finalizing" in job.times:
            return False  # until its output is written
        turn(book, job_id, "finalizing", shown="cancelling" if stopping(job) else "finalizing")
        add_own_item(book, job_id, "finish", {})
    else:
        end(book, job_id)
    return True


def end(book: Book, job_id: str) -> None:
    """All is done: the state that the counts and the reasons to stop come to."""
    job = book[job_id]
    state: JobState
    reasons = [state for why, state in STOPS.items() if why in job.times]
    if reasons:
        state = reasons[0]
    elif not job.dead:
        state = "completed"
    else:
        state = "completed_with_errors" if job.done + job.skipped else "failed"
    book.change(job_id, cost_left=0.0)  # sums of fractions leave a rest
    turn(book, job_id, state)


def stop(book: Book, job_id: str, why: str, rows_max: int = MOVE_ROWS) -> int:
    """What waits is cancelled, what a worker has is let finish. `why` is one of `STOPS`.

    Returns how many items were cancelled already, `rows_max` at most.
    """
    job = book[job_id]
    book.change(job_id, state="cancelling", times={why: book.now, **job.times})
    book.tell(job_id, "job.cancelling")
    order.withdraw(book.conn, job)
    # What was not yet read from the file is not the job's: it never became an item.
    book.conn.execute(_CANCEL_EXPAND, {"_job": job_id, "_now": book.now})
    return move(book, job_id, rows_max)


def pause(book: Book, job_id: str) -> None:
    """What is ready leaves the fair order; what is delayed stays so until its moment."""
    book.change(job_id, paused=True)
    order.withdraw(book.conn, book[job_id])
    move(book, job_id)
    book.tell(job_id, "job.paused")


def resume(book: Book, job_id: str) -> None:
    """What was paused joins the fair order anew."""
    book.change(job_id, paused=False)
    move(book, job_id)
    book.tell(job_id, "job.resumed")


def move(book: Book, job_id: str, rows_max: int = MOVE_ROWS) -> int:
    """Let waiting items of a job follow it; returns how many did, `rows_max` at most."""
    job = book[job_id]
    values = {"_job": job_id, "_most": rows_max, "_now": book.now}
    if stopping(job):
        costs = book.conn.execute(_CANCEL, values).scalars().all()
        count, left = len(costs), _LEFT_TO_CANCEL
        counted(book, {job_id: Delta(cancelled=count, cost=-sum(costs))})
    elif job.paused:
        count, left = book.conn.execute(_PAUSE, values).rowcount, _LEFT_TO_PAUSE
    else:
        count, left = _let_go(book, job, rows_max), _LEFT_TO_RESUME
    book.move(job_id, rest=book.conn.execute(left, {"_job": job_id}).first() is not None)
    return count


def go_on_moving(conn: sa.Connection, now: float, rows_max: int) -> int:
    """Move more items of jobs of which not all have followed; returns how many."""
    book = Book(conn, now)
    found = conn.execute(_MOVING, {"most": rows_max}).scalars().all()
    book.open(found, if_free=True)
    mine = [job for each in found if (job := book.find(each)) is not None]
    order.hold(conn, {job.tenant for job in mine})
    count = 0
    for job in mine:
        if count < rows_max:
            count += move(book, job.id, rows_max - count)
    book.close()
    return count


def _let_go(book: Book, job: Job, rows_max: int) -> int:
    """Paused items join the fair order, in their order."""
    count = 0
    for stage in order.BY_NAME:
        values = {"job": job.id, "stage": stage, "most": rows_max - count}
        rows = book.conn.execute(_PAUSED, values).all()
        if not rows:
            continue
        count += len(rows)
        line = order.Line(stage, job.klass, job.tenant)
        costs = [row.cost for row in rows]
        given = order.tags(book.conn, line, weight=job.weight, costs=costs, priority=job.priority)
        fixed = {"state": "ready", "updated_at": book.now}
        changes = ((row.id, {**fixed, "tag": tag}) for row, tag in zip(rows, given, strict=True))
        write(book.conn, items, changes)
    return count


def expanded(book: Book, job_id: str) -> None:
    """All items of a job's file are there."""
    if book[job_id].state == "validating":
        turn(book, job_id, "running")
        advance(book, job_id)


def finished(book: Book, job_id: str, files: Mapping[str, Any]) -> None:
    """A batch's output files are written; `files` are their ids by role, empty: there is none."""
    named = {**book[job_id].files, **files}
    book.change(job_id, files={role: file for role, file in named.items() if file})
    end(book, job_id)


def fail(book: Book, job_id: str, fault: Mapping[str, Any]) -> None:
    """A job's own item died, and the job with it: its file is wrong, or cannot be written.

    `errors` of `fault["result"]`, where there are any, say what is wrong with which line.
    """
    single = {"code": fault.get("error_code", ""), "message": fault.get("error_text", "")}
    book.change(job_id, errors=list(fault.get("result", {}).get("errors") or [single]))
    if stopping(book[job_id]):
        advance(book, job_id)
    else:
        stop(book, job_id, "stopping")


def turn(book: Book, job_id: str, state: JobState, *, shown: JobState | None = None) -> Job:
    """Note that a job came to a state, and tell. `shown`: the state that it keeps instead."""
    times = {**book[job_id].times, state: book.now}
    job = book.change(job_id, state=shown or state, times=times)
    book.tell(job_id, f"job.{job.state}")
    return job


def tell_rest(conn: sa.Connection, now: float, rows_max: int) -> int:
    """Tell of jobs whose last change was too soon after a telling; returns how many."""
    values = {"before": now - TOLD_S, "most": rows_max}
    found = conn.execute(_UNTOLD, values).scalars().all()
    book = Book(conn, now)
    book.open(found, if_free=True)
    for job_id in found:
        if book.find(job_id) is not None:
            book.progress(job_id)
    book.close()
    return len(found)


def add_own_item(
    book: Book, job_id: str, task: Task, payload: Mapping[str, Any], cost: float = OWN_COST
) -> None:
    """An item that is the job's own, not one of its units: it reads its file, or writes its output.

    `cost` is in tokens, for its place in the fair order.
    """
    job = book[job_id]
    line = order.Line("prepare", job.klass, job.tenant)
    (tag,) = order.tags(book.conn, line, weight=job.weight, costs=[cost], priority=job.priority)
    book.conn.execute(
        sa.insert(items),
        {
            "job": job_id,
            "seq": EXPAND_SEQ if task == "expand" else FINISH_SEQ,
            "klass": job.klass,
            "stage": "prepare",
            "state": "ready",
            "task": task,
            "name": task,
            "tag": tag,
            "cost": cost,
            "payload": dict(payload),
            "updated_at": book.now,
        },
    )


def _shows(delta: Delta) -> bool:
    return any((delta.done, delta.skipped, delta.dead, delta.cancelled, delta.tokens))
