"""Jobs and their items as they travel between the Store, the ingress and the workers.

A job is what a caller handed over; an item is one unit of it, with a state of its own. A worker
claims items of one stage, works, and settles each of them: with an end, with a wait, or with a next
stage. Like `records`, these import nothing of the package and are never changed.
"""

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from serve.records import Collection, Key, Klass


Stage = Literal["prepare", "predict", "embed"]
STAGES: tuple[Stage, ...] = ("prepare", "predict", "embed")

Kind = Literal["documents", "embeddings"]
"""documents: texts that land in a collection. embeddings: OpenAI batch lines."""

Task = Literal["expand", "document", "delete", "request", "finish"]
"""What an item asks of a worker. expand: read a file and add the job's items. document, delete: one
write of a document. request: one line of a batch file. finish: write a batch's output files.
`expand` and `finish` are the job's own (`seq` below zero) and are not counted.
"""

ItemState = Literal["ready", "delayed", "leased", "paused", "done", "skipped", "dead", "cancelled"]
"""ready: may be claimed. delayed: from `run_at` on. leased: a worker has it. paused: with its job.
The last four are ends; `skipped` counts as a success: there was nothing to do.
"""
ENDS: tuple[ItemState, ...] = ("done", "skipped", "dead", "cancelled")

JobState = Literal[
    "validating",
    "queued",
    "running",
    "finalizing",
    "completed",
    "completed_with_errors",
    "failed",
    "cancelling",
    "cancelled",
    "expired",
]
JOB_ENDS: tuple[JobState, ...] = (
    "completed",
    "completed_with_errors",
    "failed",
    "cancelled",
    "expired",
)

ErrorKind = Literal["network", "rate_limit", "server", "invalid", "poison"]
"""network, server: may pass, tried again. rate_limit: waited for, burns no attempt. invalid, poison:
will not pass, dead at once.
"""


def new_id(prefix: str, now: float) -> str:
    """An id that sorts by time to the millisecond: prefix, 12 hex of time, 20 of chance.

    Not a secret.
    """
    return f"{prefix}_{int(now * 1e3):012x}{secrets.token_hex(10)}"


@dataclass(frozen=True, slots=True)
class Job:
    """A job as the Store keeps it.

    Attributes:
        key: family of the key that pays.
        weight: its tenant's fair-share weight when it was accepted.
        priority: 0..100, orders the tenant's own items of a class, higher first.
        collection: uuid of where its vectors land; empty: nowhere.
        on_error: whether the first dead item ends the job.
        files: ids of files by role: `input`, `output`, `error`.
        times: epoch seconds at which it came to a state, by state, or began to stop, by the reason.
        total: items, of which `done`, `skipped`, `dead` and `cancelled` have ended.
        tokens: true tokens of what was embedded.
        cost_left: estimated tokens of what has not ended.
        errors: why the job itself failed: `{code, message, line?, param?}`, a few.
    """

    id: str
    tenant: str
    key: str
    kind: Kind
    klass: Klass
    weight: float
    created_at: float
    state: JobState = "queued"
    paused: bool = False
    priority: int = 50
    collection: str = ""
    on_error: Literal["continue", "stop"] = "continue"
    webhook: str = ""
    spec: Mapping[str, Any] = field(default_factory=dict)
    metadata: Mapping[str, str] = field(default_factory=dict)
    files: Mapping[str, str] = field(default_factory=dict)
    times: Mapping[str, float] = field(default_factory=dict)
    expires_at: float | None = None
    total: int = 0
    done: int = 0
    skipped: int = 0
    dead: int = 0
    cancelled: int = 0
    tokens: int = 0
    cost_left: float = 0.0
    errors: Sequence[Mapping[str, Any]] = ()

    @property
    def ended(self) -> bool:
        """Whether nothing of it will change any more."""
        return self.state in JOB_ENDS

    @property
    def processed(self) -> int:
        """Items that have ended."""
        return self.done + self.skipped + self.dead + self.cancelled


@dataclass(frozen=True, slots=True)
class NewItem:
    """One item of a job to be.

    Attributes:
        name: the user's own word for it: a document's id, a `custom_id`.
        cost: estimated tokens and overhead, what the fair order counts.
        payload: what the worker needs, as JSON.
        sha256: of a document's content and all that shapes its vectors: one that has landed
            already is skipped. Empty: never.
    """

    name: str
    task: Task
    stage: Stage
    cost: float
    payload: Mapping[str, Any]
    sha256: str = ""


SENT = "sent_at"
"""In the payload of a document's write or delete: when it was sent, in epoch seconds. It is skipped where
one that was sent later has been accepted. Without it: when it is accepted.
"""

VERSION = "version"
"""In the payload of a delete: the highest generation that it may remove. Without it, all that was
accepted before goes.
"""


@dataclass(frozen=True, slots=True)
class Once:
    """An `Idempotency-Key`: the same key with the same fingerprint returns the first job.

    `fingerprint` is the SHA-256 of method, path and canonical body.
    """

    key: str
    fingerprint: str
    kept_s: float


@dataclass(frozen=True, slots=True)
class Accepted:
    """A job in the Store, and whether an earlier request with the same key made it."""

    job: Job
    replayed: bool = False


@dataclass(frozen=True, slots=True)
class ItemView:
    """An item as its tenant sees it. `result` is what its end gave, for example chunks.

    `run_at` is when a delayed one is tried again.
    """

    job: str
    seq: int
    name: str
    task: Task
    stage: Stage
    state: ItemState
    attempts: int
    updated_at: float
    run_at: float | None = None
    generation: int = 0
    tokens: int = 0
    result: Mapping[str, Any] = field(default_factory=dict)
    error_kind: str = ""
    error_code: str = ""
    error_text: str = ""


@dataclass(frozen=True, slots=True)
class Item:
    """A claimed item. `lease` is the fencing token: a settlement with an older one does nothing.

    Attributes:
        generation: of the document write, as granted; `chunks_max` bounds the ordinals that may be
            in the index from earlier ones.
        attempts: tries that have failed before this one.
        superseded: a newer write of the document was accepted since. Never so of a delete of a
            version: it leaves the newer one alone.
    """

    id: int
    lease: int
    job: str
    seq: int
    name: str
    task: Task
    stage: Stage
    cost: float
    attempts: int
    payload: Mapping[str, Any]
    sha256: str = ""
    generation: int = 0
    chunks_max: int = 0
    superseded: bool = False


@dataclass(frozen=True, slots=True)
class Claim:
    """What a worker has claimed, in fair order, and what its items need to be worked on.

    `jobs` is by job id; `collections` by uuid, without those that are gone; `payers` by job id: the
    key that pays, as it is now. `alone`: the one item has crashed its worker before; nothing else is
    worked on beside it.
    """

    items: tuple[Item, ...] = ()
    jobs: Mapping[str, Job] = field(default_factory=dict)
    collections: Mapping[str, Collection] = field(default_factory=dict)
    payers: Mapping[str, Key] = field(default_factory=dict)
    alone: bool = False


@dataclass(frozen=True, slots=True)
class Fault:
    """Why a try of an item failed. `text` may be read by the tenant."""

    kind: ErrorKind
    code: str
    text: str


@dataclass(frozen=True, slots=True)
class Settlement:
    """What became of a claimed item.

    done, skipped: it has ended well. dead: it has failed for good. retry: it failed and is tried
    again after `delay_s`, unless it has no attempt left: then it is dead. release: given back
    untried, for after `delay_s`; burns no attempt. advance: its next stage is `stage`, with this
    cost and payload.

    Attributes:
        tokens: true tokens of what was embedded.
        result: what its tenant may know of it; empty: what was there before stays.
        chunks: of a document write: how many the index now holds of it (`done`), or is about to
            (`advance`).
        token: of what it has landed, see `records.Outcome`.
    """

    item: int
    lease: int
    word: Literal["done", "skipped", "dead", "retry", "release", "advance"]
    tokens: int = 0
    result: Mapping[str, Any] = field(default_factory=dict)
    fault: Fault | None = None
    delay_s: float = 0.0
    chunks: int | None = None
    stage: Stage = "embed"
    cost: float = 0.0
    payload: Mapping[str, Any] | None = None
    token: int | None = None


Change = Literal["cancel", "pause", "resume"]


@dataclass(frozen=True, slots=True)
class Replay:
    """Which dead items are tried again: with this error code, of this number, or all.

    `dry_run`: none; they are only counted. `part`: only those from the first number to before the
    second, so that a large job comes in several transactions.
    """

    error_code: str | None = None
    seq: int | None = None
    dry_run: bool = False
    part: tuple[int, int] | None = None


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened to a job, with its figures at that moment.

    `number` rises over all jobs; `type` is `job.<state>`, `job.progress`, `job.paused` or
    `job.resumed`.
    """

    number: int
    job: str
    tenant: str
    at: float
    type: str
    data: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Stats:
    """Items of a tenant by how far they are. `uploaded` have not begun."""

    total: int = 0
    uploaded: int = 0
    preparing: int = 0
    predicting: int = 0
    embedding: int = 0
    ready: int = 0
    failed: int = 0
    cancelled: int = 0


@dataclass(frozen=True, slots=True)
class Effort:
    """Tries of items that ended with one word (see `Settlement`), and the seconds they took together."""

    task: Task
    stage: Stage
    word: str
    tries: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Erased:
    """What one call has removed of a tenant; `more`: call again."""

    jobs: int = 0
    items: int = 0
    webhooks: int = 0
    more: bool = False


@dataclass(frozen=True, slots=True)
class StageCount:
    """Items of a job in one stage and state."""

    stage: Stage
    state: ItemState
    items: int


@dataclass(frozen=True, slots=True)
class JobView:
    """A job with its counts by stage, and the token of what it has landed, see `records.Outcome`."""

    job: Job
    counts: Sequence[StageCount] = ()
    token: int | None = None


@dataclass(frozen=True, slots=True)
class StoredFile:
    """A tenant's file; its bytes are the blob of the same name as its id.

    Attributes:
        purpose: `batch`: uploaded for one. `batch_output`: written by one.
        size: bytes. `sha256` is of them, in hex.
    """

    id: str
    tenant: str
    purpose: Literal["batch", "batch_output"]
    filename: str
    size: int
    sha256: str
    created_at: float
    expires_at: float


Order = Literal["asc", "desc"]


@dataclass(frozen=True, slots=True)
class FileRoom:
    """The most that one tenant may keep: files, and bytes in all."""

    files: int
    size: int
