"""Statements of `job_ports.Jobs` and `job_ports.Events` about what was handed over already: find, list, change,
retry, count; and of the ticks that end and forget jobs. What a tenant asks for is scoped to it.
"""

from collections.abc import Iterable, Sequence
from typing import get_args

import sqlalchemy as sa

from serve.errors import Conflict, NotFound
from serve.items import (
    ENDS,
    STAGES,
    Change,
    Event,
    ItemState,
    ItemView,
    Job,
    JobState,
    JobView,
    Kind,
    Replay,
    StageCount,
    Stats,
)
from serve.jobs import order, progress, tokens
from serve.jobs.book import JOBS, Book, Delta, Sums, job_of, read
from serve.jobs.job_tables import IS_UNIT, JOB_IS_OPEN, items, job_events, job_totals, jobs
from serve.jobs.pages import newest
from serve.records import KLASSES


PURGE_JOBS = 200
"""Ended jobs forgotten at once, when they are small."""

EXPIRED_JOBS = 10
"""Jobs stopped in one transaction when their time is over: each has a place in the fair order to give
up, up to 100 ms, and others wait behind it."""

_OF_THE_END = ("completed", "completed_with_errors", "failed", "finalizing")

_VIEW = sa.select(
    *(items.c[name] for name in ("job", "seq", "name", "task", "stage", "state", "attempts")),
    *(items.c[name] for name in ("updated_at", "run_at", "generation", "tokens", "result")),
    *(items.c[name] for name in ("error_kind", "error_code", "error_text")),
)
_COUNTS = (
    sa.select(items.c.stage, items.c.state, sa.func.count())
    .where(items.c.job == sa.bindparam("job"), IS_UNIT)
    .group_by(items.c.stage, items.c.state)
    .order_by(items.c.stage, items.c.state)
)
_EVENT = sa.select(
    *(job_events.c[name] for name in ("number", "job", "tenant", "at", "type", "data"))
)
_EVENTS = (
    _EVENT.where(job_events.c.number > sa.bindparam("after"))
    .order_by(job_events.c.number)
    .limit(sa.bindparam("most"))
)
_LAST_EVENT = sa.select(sa.func.max(job_events.c.number))
_IS_DEAD = items.c.state == sa.literal_column("'dead'")
_FINISH = sa.delete(items).where(
    items.c.job == sa.bindparam("_job"), items.c.seq == progress.FINISH_SEQ
)
_OPEN_JOBS = sa.select(jobs.c.id).where(
    jobs.c.tenant == sa.bindparam("tenant"), jobs.c.klass.in_(KLASSES), sa.text(JOB_IS_OPEN)
)
_OF_OPEN_JOBS = (
    sa.select(items.c.stage, items.c.state, sa.func.count())
    .where(items.c.job.in_(_OPEN_JOBS), items.c.stage.in_(STAGES), IS_UNIT)
    .group_by(items.c.stage, items.c.state)
)
_ENDED = sa.select(
    *(job_totals.c[name] for name in ("total", "done", "skipped", "dead", "cancelled"))
).where(job_totals.c.tenant == sa.bindparam("tenant"))
_OVER = (
    sa.select(jobs.c.id)
    .where(
        sa.text(JOB_IS_OPEN),
        jobs.c.expires_at <= sa.bindparam("now"),
        jobs.c.state.not_in(("cancelling", "finalizing")),
    )
    .order_by(jobs.c.expires_at)
    .limit(sa.bindparam("most"))
)
_OLD = (
    JOBS.where(jobs.c.finished_at < sa.bindparam("before"))
    .order_by(jobs.c.finished_at)
    .limit(PURGE_JOBS)
    .with_for_update(skip_locked=True)
)


def find(conn: sa.Connection, tenant: str, job: str) -> JobView | None:
    """One job with its counts by stage, and how far it has landed."""
    found = read(conn, [job]).get(job)
    if found is None or found.tenant != tenant:
        return None
    counts = [StageCount(*row) for row in conn.execute(_COUNTS, {"job": job})]
    return JobView(found, counts, tokens.find(conn, job))


def listed(
    conn: sa.Connection,
    tenant: str,
    *,
    kind: Kind | None,
    states: Sequence[JobState],
    after: str,
    limit: int,
) -> list[Job]:
    """The tenant's jobs, newest first: ids sort by time."""
    runs = [
        (jobs.c.tenant == tenant, jobs.c.kind == one, jobs.c.state == state)
        for one in ([kind] if kind else get_args(Kind))
        for state in frozenset(states or get_args(JobState))
    ]
    some = JOBS.where(jobs.c.id.in_(newest(jobs.c.id, runs, after, limit)))
    return [job_of(row) for row in conn.execute(some.order_by(jobs.c.id.desc()))]


def list_items(
    conn: sa.Connection,
    tenant: str,
    job: str,
    *,
    states: Sequence[ItemState],
    after: int,
    limit: int,
) -> list[ItemView]:
    """A job's items by number, above `after`; none of another tenant's job."""
    mine = sa.select(jobs.c.id).where(jobs.c.id == job, jobs.c.tenant == tenant)
    if conn.execute(mine).first() is None:
        return []
    some = (
        _VIEW.where(items.c.job == job, items.c.seq > max(after, -1))
        .order_by(items.c.seq)
        .limit(limit)
    )
    if tuple(states) == ("dead",):
        some = some.where(_IS_DEAD)  # they are few, and have an index of their own
    elif states:
        some = some.where(items.c.state.in_(list(states)))
    return [ItemView(*row) for row in conn.execute(some)]


def change(conn: sa.Connection, tenant: str, job_id: str, what: Change, now: float) -> Job:
    """Cancel, pause or resume; a repeat changes nothing. Raises NotFound, Conflict (it has ended)."""
    book = Book(conn, now)
    job = _mine(book, tenant, job_id)
    if job.ended:
        raise Conflict(f"Job {job.id} has ended: it is {job.state}.", param="id", code="job_ended")
    if what == "cancel":
        if not progress.stopping(job):
            progress.stop(book, job_id, "cancelling")
    elif job.paused != (what == "pause"):
        progress.pause(book, job_id) if what == "pause" else progress.resume(book, job_id)
    book.close()
    return book[job_id]


def retry(conn: sa.Connection, tenant: str, job_id: str, replay: Replay, now: float) -> int:
    """Dead items are ready again, their attempts forgotten; returns how many that are, or would be.

    A write keeps its generation, so it never passes one that was accepted since. Raises NotFound,
    Conflict (the job was stopped, or its time is over).
    """
    book = Book(conn, now)
    job = _mine(book, tenant, job_id)
    if _is_over(job, now):
        raise Conflict(
            f"Job {job.id} was stopped: hand over a new one.", param="id", code="job_stopped"
        )
    dead = [items.c.job == job.id, _IS_DEAD, *_asked(replay)]
    sums = sa.select(sa.func.count(), sa.func.coalesce(sa.func.sum(items.c.cost), 0.0))
    count, cost = conn.execute(sums.where(*dead)).one()
    if replay.dry_run or not count:
        return int(count)
    again = sa.update(items).where(*dead)
    blank = again.values(state="paused", attempts=0, crashes=0, result={}, updated_at=now)
    conn.execute(blank)
    book.count(job_id, Delta(dead=-count, cost=cost))
    if job.ended or job.state == "finalizing":
        # What was written of its output, or is being written, is not all of it any more.
        conn.execute(_FINISH, {"_job": job_id})
        times = {name: at for name, at in job.times.items() if name not in _OF_THE_END}
        book.change(job_id, times=times)
        progress.turn(book, job_id, "queued")
    else:
        book.progress(job_id)
    progress.move(book, job_id)
    book.close()
    return int(count)


def over(conn: sa.Connection, ids: Iterable[str], now: float) -> dict[str, bool]:
    """See `job_ports.Files.jobs_over`."""
    return {
        job.id: job.ended and (job.kind == "documents" or not job.dead or _is_over(job, now))
        for job in read(conn, ids).values()
    }


def stats(conn: sa.Connection, tenant: str) -> Stats:
    """The tenant's items by how far they are: those that have ended are summed already."""
    mine = {"tenant": tenant}
    row = conn.execute(_ENDED, mine).one_or_none()
    if row is None:
        return Stats()
    total, done, skipped, dead, cancelled = row
    at = {"uploaded": 0, "preparing": 0, "predicting": 0, "embedding": 0}
    words = {"prepare": "preparing", "predict": "predicting", "embed": "embedding"}
    for stage, state, count in conn.execute(_OF_OPEN_JOBS, mine):
        if state not in ENDS:
            # What waits for its first stage has only been handed over.
            waits = stage == "prepare" and state != "leased"
            at["uploaded" if waits else words[stage]] += count
    return Stats(total, **at, ready=done + skipped, failed=dead, cancelled=cancelled)


def events(conn: sa.Connection, after: int, limit: int) -> list[Event]:
    """Events above number `after`, of all tenants; after -1 only the last one's number."""
    if after < 0:
        last = conn.execute(_LAST_EVENT).scalar_one_or_none()
        return [Event(last or 0, "", "", 0.0, "", {})]
    return [Event(*row) for row in conn.execute(_EVENTS, {"after": after, "most": limit})]


def job_log(conn: sa.Connection, tenant: str, job: str, after: int, limit: int) -> list[Event]:
    """A job's events above number `after`, or after -1 its last one; none of another tenant's job."""
    mine = _EVENT.where(job_events.c.job == job, job_events.c.tenant == tenant)
    if after < 0:
        some = mine.order_by(job_events.c.number.desc()).limit(1)
    else:
        some = mine.where(job_events.c.number > after).order_by(job_events.c.number).limit(limit)
    return [Event(*row) for row in conn.execute(some)]


def expire(conn: sa.Connection, now: float, rows_max: int) -> int:
    """Stop open jobs whose time is over; returns how many, `rows_max` when there are more.

    One that stops already goes on so, and one of which only the output is missing gets it.
    """
    book = Book(conn, now)
    most = min(rows_max, EXPIRED_JOBS)
    found = conn.execute(_OVER, {"now": now, "most": most}).scalars().all()
    book.open(found, if_free=True)
    mine = [job for each in found if (job := book.find(each)) is not None]
    order.hold(conn, {job.tenant for job in mine})
    room, count = progress.MOVE_ROWS, 0
    for job in mine:
        if not progress.stopping(job) and job.state != "finalizing":
            room -= progress.stop(book, job.id, "expiring", room)
            count += 1
    book.close()
    return rows_max if count and len(found) == most else count


def purge(conn: sa.Connection, now: float, rows_max: int, *, kept_s: float) -> int:
    """Forget jobs that ended so long ago, with items and events; returns how many rows."""
    old = conn.execute(_OLD, {"before": now - kept_s}).all()
    if not old:
        return 0
    ids = [row.id for row in old]
    count = 0
    for table, key in ((items, items.c.id), (job_events, job_events.c.number)):
        some = sa.select(key).where(table.c.job.in_(ids)).limit(rows_max - count)
        count += conn.execute(sa.delete(table).where(key.in_(some))).rowcount
        if count >= rows_max:
            return count  # there is more to do
    tokens.forget(conn, ids)
    conn.execute(sa.delete(jobs).where(jobs.c.id.in_(ids)))
    sums = Sums()
    for row in old:
        sums.add(row, -1)
    sums.write(conn)
    return count + len(ids)


def _mine(book: Book, tenant: str, job_id: str) -> Job:
    book.open([job_id])
    found = book.find(job_id)
    if found is None or found.tenant != tenant:
        raise NotFound(f"There is no job {job_id!r}.", param="id")
    return found


def _is_over(job: Job, now: float) -> bool:
    """Whether its dead items cannot be tried again: it was stopped, or its time is over."""
    late = job.expires_at is not None and job.expires_at <= now
    return late or any(why in job.times for why in progress.STOPS)


def _asked(replay: Replay) -> list[sa.ColumnElement[bool]]:
    """Which of a job's dead items that means; never its own ones, below zero."""
    if replay.seq is not None:
        which = [items.c.seq == max(replay.seq, 0)]
    else:
        first, end = replay.part or (0, None)
        which = [items.c.seq >= first]
        if end is not None:
            which.append(items.c.seq < end)
    if replay.error_code is not None:
        which.append(items.c.error_code == replay.error_code)
    return which
