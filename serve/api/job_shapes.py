"""Replies about jobs: as OpenAPI shows them, and how they are written."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from pydantic import Field

from serve.api.shapes import Receipt, Shape
from serve.flows.jobs import JobSeen
from serve.items import Effort, ErrorKind, Event, ItemState, ItemView, JobState, Kind, Stage, Task
from serve.records import Klass


class StageShown(Shape):
    """Items of a job in one stage and state."""

    stage: Stage
    state: ItemState
    items: int


class JobShown(Shape):
    """A job. Times are seconds since 1970, `times` has one for each state it came to.

    `processed` are all that have ended: `succeeded` (done or skipped), `failed` and `cancelled`.
    `stages` is there when one job is asked for, `receipt` when it was handed over.
    """

    object: Literal["job"]
    id: str
    kind: Kind
    klass: Klass = Field(alias="class")
    state: JobState
    is_complete: bool
    paused: bool
    priority: int
    collection: str | None
    on_error: Literal["continue", "stop"]
    webhook: str | None
    metadata: dict[str, str]
    files: dict[str, str]
    created_at: float
    expires_at: float | None
    times: dict[str, float]
    total: int
    processed: int
    succeeded: int
    skipped: int
    failed: int
    cancelled: int
    progress: float = Field(ge=0, le=100)
    tokens: int
    eta_seconds: float | None
    errors: list[dict[str, Any]]
    stages: list[StageShown] | None = None
    receipt: Receipt | None = None


class JobList(Shape):
    """The caller's jobs, newest first; the next page begins after the last one's id."""

    object: Literal["list"]
    data: list[JobShown]
    has_more: bool


class ItemErrorShown(Shape):
    """Why an item's last try failed."""

    kind: ErrorKind
    code: str
    message: str


class ItemShown(Shape):
    """One item of a job. `run_at` is when it is tried again, `result` what its end gave."""

    object: Literal["job.item"]
    job: str
    seq: int
    id: str
    task: Task
    stage: Stage
    state: ItemState
    attempts: int
    updated_at: float
    run_at: float | None
    generation: int
    tokens: int
    result: dict[str, Any]
    error: ItemErrorShown | None


class ItemList(Shape):
    """A job's items by number; the next page begins after the last one's `seq`."""

    object: Literal["list"]
    data: list[ItemShown]
    has_more: bool


class RetryShown(Shape):
    """How many dead items are tried again; with `dry_run`: would be."""

    object: Literal["job.retry"]
    job: str
    items: int
    dry_run: bool


class OperationShown(Shape):
    """Tries of one task in one stage. `success_rate` leaves out those that were released: given back
    untried, for want of room or quota. `mean_s` is from claim to settlement.
    """

    task: Task
    stage: Stage
    tries: int
    succeeded: int
    failed: int
    released: int
    success_rate: float | None
    mean_s: float


class OperationsShown(Shape):
    """A tenant's operations over some days."""

    object: Literal["list"]
    days: int
    data: list[OperationShown]


class SpreadShown(Shape):
    """Median and 95th percentile, in seconds."""

    p50_s: float
    p95_s: float


class LagShown(Shape):
    """How long the tenant's last landings took from accepted to indexed, and to searchable; a landing is
    what a worker writes at once, of one job. Null: none is known.
    """

    landings: int
    indexed: SpreadShown | None
    searchable: SpreadShown | None


class StatsShown(Shape):
    """The tenant's items by how far they are; `uploaded` have not begun. `lag` is null while the writer
    does not answer.
    """

    object: Literal["stats"]
    total: int
    uploaded: int
    preparing: int
    predicting: int
    embedding: int
    ready: int
    failed: int
    cancelled: int
    lag: LagShown | None


def job_shown(seen: JobSeen) -> dict[str, Any]:
    """A job as `JobShown`, without its receipt."""
    job = seen.job
    shown = {
        "object": "job",
        "id": job.id,
        "kind": job.kind,
        "class": job.klass,
        "is_complete": job.ended,
        "priority": job.priority,
        "collection": job.spec.get("collection"),
        "on_error": job.on_error,
        "webhook": job.webhook or None,
        "metadata": job.metadata,
        "files": job.files,
        "created_at": job.created_at,
        "expires_at": job.expires_at,
        "times": job.times,
        "eta_seconds": seen.eta_s,
        "errors": list(job.errors),
        "state": job.state,
        "paused": job.paused,
        "tokens": job.tokens,
        **_counts(job.total, job.done, job.skipped, job.dead, job.cancelled),
    }
    if seen.counts is not None:
        shown["stages"] = list(seen.counts)
    return shown


def event_shown(event: Event) -> dict[str, Any]:
    """What a stream says of an event: the job's figures at that moment, in the job's words."""
    data = event.data
    counts = (data[name] for name in ("total", "done", "skipped", "dead", "cancelled"))
    return {
        "object": "job.event",
        "job": event.job,
        "number": event.number,
        "type": event.type,
        "at": event.at,
        "state": data["state"],
        "paused": data["paused"],
        "tokens": data["tokens"],
        **_counts(*counts),
    }


def item_shown(item: ItemView) -> dict[str, Any]:
    """An item as `ItemShown`."""
    error: Mapping[str, str] | None = None
    if item.error_kind:
        error = {"kind": item.error_kind, "code": item.error_code, "message": item.error_text}
    return {
        "object": "job.item",
        "job": item.job,
        "seq": item.seq,
        "id": item.name,
        "task": item.task,
        "stage": item.stage,
        "state": item.state,
        "attempts": item.attempts,
        "updated_at": item.updated_at,
        "run_at": item.run_at,
        "generation": item.generation,
        "tokens": item.tokens,
        "result": item.result,
        "error": error,
    }


def _counts(total: int, done: int, skipped: int, dead: int, cancelled: int) -> dict[str, float]:
    """Progress is rounded down: 100 is never said before all have ended."""
    processed = done + skipped + dead + cancelled
    return {
        "total": total,
        "processed": processed,
        "succeeded": done + skipped,
        "skipped": skipped,
        "failed": dead,
        "cancelled": cancelled,
        "progress": math.floor(1000 * processed / total) / 10 if total else 0.0,
    }


SUCCEEDED, FAILED = frozenset({"done", "skipped", "advance"}), frozenset({"dead", "retry"})


def operations_shown(efforts: Sequence[Effort]) -> list[dict[str, Any]]:
    """Efforts by task and stage."""
    sums: dict[tuple[str, str], dict[str, Any]] = {}
    for one in efforts:
        empty = {"tries": 0, "succeeded": 0, "failed": 0, "released": 0, "seconds": 0.0}
        total = sums.setdefault((one.task, one.stage), empty)
        good, bad = one.word in SUCCEEDED, one.word in FAILED
        total["succeeded" if good else "failed" if bad else "released"] += one.tries
        total["tries"] += one.tries
        total["seconds"] += one.seconds
    return [_operation(task, stage, total) for (task, stage), total in sums.items()]


def _operation(task: str, stage: str, total: Mapping[str, Any]) -> dict[str, Any]:
    settled = total["succeeded"] + total["failed"]
    return {
        "task": task,
        "stage": stage,
        "tries": total["tries"],
        "succeeded": total["succeeded"],
        "failed": total["failed"],
        "released": total["released"],
        "success_rate": total["succeeded"] / settled if settled else None,
        "mean_s": total["seconds"] / total["tries"],
    }
