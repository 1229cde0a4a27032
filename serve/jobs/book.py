"""The jobs that one transaction changes: locked when it opens them, written once when it closes, with
their events and their tenants' totals. So counts never drift from the items, and a batch of items of
many jobs costs a few statements.
"""

from collections.abc import Container, Iterable
from dataclasses import dataclass, fields, replace
from typing import Any

import sqlalchemy as sa

from serve.items import JOB_ENDS, Event, Job
from serve.jobs import deliveries
from serve.jobs.bell import note
from serve.jobs.job_tables import job_events, job_totals, jobs
from serve.jobs.rows import execute, parts, write


TOLD_S = 0.5
"""Between two progress events of a job."""

EVENTS_LOCK = 7_164_263
"""Key of the advisory lock under which Postgres numbers events; those of `postgres` come before it."""

EVENTS = "events"
"""What the bell is rung for when there are new ones."""

_FIELDS = tuple(each.name for each in fields(Job))
_CHANGING = (
    *("state", "paused", "total", "done", "skipped", "dead", "cancelled", "tokens", "cost_left"),
    *("files", "times", "errors"),
)
TOTALS = ("total", "done", "skipped", "dead", "cancelled", "cost_left")

JOBS = sa.select(
    *(jobs.c["notes" if name == "metadata" else name] for name in _FIELDS),
    jobs.c.told_at,
    jobs.c.untold,
    jobs.c.moving,
)
_BY_ID = JOBS.where(jobs.c.id.in_(sa.bindparam("ids", expanding=True)))
# One order for all: no deadlock on Postgres.
_LOCKED = _BY_ID.order_by(jobs.c.id).with_for_update()
_LOCKED_IF_FREE = _BY_ID.order_by(jobs.c.id).with_for_update(skip_locked=True)
_INSERT = sa.insert(jobs).inline()
_TELL = sa.insert(job_events).inline()
_IN_ORDER = sa.select(sa.func.pg_advisory_xact_lock(EVENTS_LOCK))
_ADD_TOTALS = (
    sa.update(job_totals)
    .where(job_totals.c.tenant == sa.bindparam("_tenant"))
    .values({name: job_totals.c[name] + sa.bindparam(f"_{name}") for name in ("open", *TOTALS)})
)
_NEW_TOTALS = sa.insert(job_totals)


@dataclass(slots=True)
class Delta:
    """By how much a job's counts change."""

    done: int = 0
    skipped: int = 0
    dead: int = 0
    cancelled: int = 0
    tokens: int = 0
    cost: float = 0.0


def job_of(row: Any) -> Job:
    """A row of `JOBS` as a Job."""
    return Job(*row[: len(_FIELDS)])


def read(conn: sa.Connection, ids: Iterable[str]) -> dict[str, Job]:
    """The jobs of these ids that exist, whoever's they are."""
    return {row.id: job_of(row) for row in conn.execute(_BY_ID, {"ids": list(ids)})}


class Book:
    """Jobs by id as this transaction makes them. Only opened ones may be asked for and changed."""

    def __init__(self, conn: sa.Connection, now: float) -> None:
        self.conn = conn
        self.now = now
        self._jobs: dict[str, Job] = {}
        self._was: dict[str, Any] = {}
        self._untold: dict[str, bool] = {}
        self._moving: dict[str, bool] = {}
        self._events: list[dict[str, Any]] = []

    def open(self, ids: Iterable[str], *, if_free: bool = False) -> None:
        """Lock these jobs; those that do not exist stay closed, with `if_free` locked ones too."""
        locking = _LOCKED_IF_FREE if if_free else _LOCKED
        for part in parts(sorted({each for each in ids if each not in self._jobs})):
            for row in self.conn.execute(locking, {"ids": part}).all():
                self._jobs[row.id] = job_of(row)
                self._was[row.id] = row
                self._untold[row.id] = row.untold
                self._moving[row.id] = row.moving

    def add(self, job: Job) -> None:
        """A new job."""
        self._jobs[job.id] = job
        self._untold[job.id] = self._moving[job.id] = False

    def find(self, job_id: str) -> Job | None:
        """An opened job."""
        return self._jobs.get(job_id)

    def __getitem__(self, job_id: str) -> Job:
        """An opened job. Raises KeyError."""
        return self._jobs[job_id]

    def change(self, job_id: str, **values: Any) -> Job:
        """Set fields of a job."""
        self._jobs[job_id] = job = replace(self._jobs[job_id], **values)
        return job

    def count(self, job_id: str, delta: Delta) -> Job:
        """Change a job's counts."""
        job = self._jobs[job_id]
        return self.change(
            job_id,
            done=job.done + delta.done,
            skipped=job.skipped + delta.skipped,
            dead=job.dead + delta.dead,
            cancelled=job.cancelled + delta.cancelled,
            tokens=job.tokens + delta.tokens,
            cost_left=job.cost_left + delta.cost,
        )

    def move(self, job_id: str, *, rest: bool) -> None:
        """Items of a job were moved; `rest`: not all of them."""
        self._moving[job_id] = rest

    def tell(self, job_id: str, kind: str) -> None:
        """Note an event with the job's figures of this moment."""
        job = self._jobs[job_id]
        self._events.append(
            {
                "job": job.id,
                "tenant": job.tenant,
                "at": self.now,
                "type": kind,
                "data": _figures(job),
            }
        )
        self._untold[job_id] = False

    def progress(self, job_id: str) -> None:
        """A job's counts have changed: tell now, or when the last telling is long enough ago."""
        was = self._was.get(job_id)
        if was is not None and self.now - was.told_at < TOLD_S:
            self._untold[job_id] = True
        else:
            self.tell(job_id, "job.progress")

    def close(self) -> None:
        """Write all that has changed."""
        new = [self._row(job) for job in self._jobs.values() if job.id not in self._was]
        execute(self.conn, _INSERT, new)
        told = {event["job"] for event in self._events}
        write(self.conn, jobs, ((each, self._changes(each, told)) for each in self._was))
        self._add_totals()
        if self._events:
            self._announce()
            self._log()
            note(self.conn, EVENTS)

    def _log(self) -> None:
        """Write the events, last of all: on Postgres they are numbered in the order of the commits.

        Else who has read number 11 would never see a 10 that is committed later.
        """
        if self.conn.dialect.name == "postgresql":
            self.conn.execute(_IN_ORDER)
        execute(self.conn, _TELL, self._events)

    def _announce(self) -> None:
        """The ends of jobs, to their webhooks."""
        for event in self._events:
            job = self._jobs[event["job"]]
            if job.webhook and job.ended and event["type"] == f"job.{job.state}":
                deliveries.announce(self.conn, job.webhook, Event(number=0, **event))

    def _changes(self, job_id: str, told: Container[str]) -> dict[str, Any]:
        was, job = self._was[job_id], self._jobs[job_id]
        changes = {
            name: value for name in _CHANGING if (value := getattr(job, name)) != getattr(was, name)
        }
        if job.ended != (was.state in JOB_ENDS):
            changes["finished_at"] = self.now if job.ended else None
        if job_id in told:
            changes["told_at"] = self.now
        if self._untold[job_id] != was.untold:
            changes["untold"] = self._untold[job_id]
        if self._moving[job_id] != was.moving:
            changes["moving"] = self._moving[job_id]
        return changes

    def _row(self, job: Job) -> dict[str, Any]:
        values = {name: getattr(job, name) for name in _FIELDS}
        values["notes"] = values.pop("metadata")
        return {
            **values,
            "told_at": self.now,
            "untold": False,
            "moving": False,
            "finished_at": self.now if job.ended else None,
        }

    def _add_totals(self) -> None:
        """To their tenants' sums."""
        sums = Sums()
        for job_id, job in self._jobs.items():
            was = self._was.get(job_id)
            if was is not None:
                sums.add(was, -1)
            sums.add(job, 1)
        sums.write(self.conn)


class Sums:
    """By how much the sums over the jobs of tenants change."""

    def __init__(self) -> None:
        self._counts: dict[str, dict[str, float]] = {}

    def add(self, job: Any, times: int) -> None:
        """Count a job, or with -1 no longer."""
        counts = self._counts.setdefault(job.tenant, dict.fromkeys(("open", *TOTALS), 0))
        counts["open"] += times * (job.state not in JOB_ENDS)
        for name in TOTALS:
            counts[name] += times * getattr(job, name)

    def write(self, conn: sa.Connection) -> None:
        """Make it so."""
        for tenant, counts in sorted(self._counts.items()):
            values = {f"_{name}": count for name, count in counts.items()}
            if not any(counts.values()):
                continue
            if conn.execute(_ADD_TOTALS, {"_tenant": tenant, **values}).rowcount == 0:
                conn.execute(_NEW_TOTALS, {"tenant": tenant, **counts})


def _figures(job: Job) -> dict[str, Any]:
    """What an event says of a job."""
    return {
        "state": job.state,
        "paused": job.paused,
        "total": job.total,
        "done": job.done,
        "skipped": job.skipped,
        "dead": job.dead,
        "cancelled": job.cancelled,
        "tokens": job.tokens,
    }
