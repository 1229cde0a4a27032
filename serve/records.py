"""Values that travel between layers and across Ray handles. They import nothing of the package
but `errors`, hold no live resources, and are never changed after they were made.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from serve.errors import ServiceError
from serve.grants import Limit


Vector = NDArray[np.float32]
TokenIds = NDArray[np.int32]

Klass = Literal["interactive", "bulk"]
Mode = Literal["vector", "text", "hybrid"]
"""What a search ranks by: nearness of vectors, words, or both."""

KLASSES: tuple[Klass, ...] = ("interactive", "bulk")

InputKind = Literal["ids", "text", "image", "pair"]


Role = Literal["user", "admin"]


@dataclass(frozen=True, slots=True)
class Caller:
    """Who pays: the tenant behind a key, with its tier, the tier's fair-share weight and limits.

    `key` is the key's family: a rotated key is the same payer.
    """

    tenant: str
    tier: str
    weight: float
    key: str
    role: Role = "user"
    limits: Mapping[Klass, tuple[Limit, ...]] = field(
        default_factory=dict, compare=False, repr=False
    )


@dataclass(frozen=True, slots=True)
class Input:
    """One thing to embed; exactly one field is set.

    Attributes:
        ids: token ids with the model's special tokens, int32, shape (tokens,).
        text: plain text, for engines that tokenise themselves (remote providers).
        image: encoded image bytes.
        pair: query and text, for scoring engines.
    """

    ids: TokenIds | None = None
    text: str | None = None
    image: bytes | None = None
    pair: tuple[str, str] | None = None

    @property
    def kind(self) -> InputKind:
        """Which field is set."""
        if self.ids is not None:
            return "ids"
        if self.text is not None:
            return "text"
        return "image" if self.image is not None else "pair"


@dataclass(frozen=True, slots=True)
class EmbedCall:
    """What one handle call to an embedder carries.

    `tokens[i]` is the number of tokens of `inputs[i]`. `deadline_s` is how long the call may wait
    for others, relative to arrival because clocks of two processes must not be compared; the
    time of its own work is added by the embedder. `limit_s` is the client's own deadline, which
    includes that work: nothing of the call starts after it. `priority` (0..100, higher first) orders the tenant's own calls of a class, nobody else's.
    `tier` is the tenant's, for figures; `trace` is the caller's span, see `serve.tracing`.
    """

    request_id: str
    tenant: str
    weight: float
    klass: Klass
    model: str
    inputs: tuple[Input, ...]
    tokens: tuple[int, ...]
    deadline_s: float
    limit_s: float | None = None
    priority: int = 0
    tier: str = ""
    trace: str = ""


@dataclass(frozen=True, slots=True)
class EmbedReply:
    """Vectors in input order: float32, shape (inputs, dimensions), rows of unit length.

    `failures` names the inputs that have no vector; their rows are zero and must not be used.
    `cached` counts those that no embedder was asked for, since their vectors were at hand.
    """

    vectors: Vector
    failures: tuple[tuple[int, ServiceError], ...] = ()
    queue_ms: float = 0.0
    infer_ms: float = 0.0
    cached: int = 0


@dataclass(frozen=True, slots=True)
class Chunk:
    """A piece of a document: `text == document[start:end]` (offsets in characters)."""

    ordinal: int
    text: str
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Key:
    """An API key as the Store keeps it: never the secret, only its SHA-256 in hex.

    Attributes:
        tier: the tenant's tier of now.
        family: id of the first key of a chain of rotations; limits and usage follow it.
        limits: of this key, in the shape of `serve.allowance.Allowance`; empty: none of its own.
        tenant_limits: what the tenant has instead of its tier's, in the same shape, in parts.
        expires_at: epoch seconds after which it is no longer live; None: never.
    """

    id: str
    tenant: str
    tier: str
    secret_sha256: str
    created_at: float
    role: Role = "user"
    name: str = ""
    family: str = ""
    limits: Mapping[str, Any] = field(default_factory=dict)
    tenant_limits: Mapping[str, Any] = field(default_factory=dict)
    expires_at: float | None = None


@dataclass(frozen=True, slots=True)
class Tenant:
    """A tenant with its tier and what it has instead of the tier's limits."""

    tenant: str
    tier: str
    created_at: float
    limits: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class AuditEntry:
    """One change an operator made. `detail` holds what is new and what was before, no secrets.

    Attributes:
        number: rises by one or more with each entry.
        by: `key:<id>` over HTTP, `cli:<user>@<host>` from the command line.
        action: for example `key.create`, `key.rotate`, `key.revoke`, `tenant.set`.
        subject: the key id, or empty.
    """

    number: int
    at: float
    by: str
    action: str
    tenant: str
    subject: str
    detail: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class UsageRow:
    """What a key's family used in a month (`2026-11`, UTC) at a class.

    `tokens` and `requests` were admitted and not refunded; `refused` requests met a quota.
    """

    month: str
    tenant: str
    key: str
    klass: Klass
    requests: int
    tokens: int
    refused: int


@dataclass(frozen=True, slots=True)
class QueuePlace:
    """What one tenant has waiting in one class of one queue.

    Attributes:
        items: inputs that wait; `cost` is theirs, in tokens corrected per model.
        share: the part of the service it gets while everyone now waiting keeps waiting, 0..1.
        ahead: cost that passes, at most, before its next item starts.
        starts_s: predicted seconds until then; `ends_s` until its last one is done.
        oldest_s: how long its oldest one has waited.
        effective_priority: 0..100; 100 is next.
    """

    tenant: str
    klass: Klass
    weight: float
    items: int
    cost: float
    share: float
    ahead: float
    starts_s: float
    ends_s: float
    oldest_s: float
    effective_priority: float


@dataclass(frozen=True, slots=True)
class QueueReport:
    """What waits in one embedder replica: in all, and per tenant (bounded, largest first).

    `cost_s` is the predicted seconds of one unit of `cost`.
    """

    pool: str
    replica: str
    items: int
    cost: float
    cost_s: float
    tenants: int
    places: tuple[QueuePlace, ...] = ()


@dataclass(frozen=True, slots=True)
class Collection:
    """A tenant's named set of vectors of one model revision.

    `uuid` is what index namespaces, lanes and record ids contain: a recreated collection of
    the same name shares nothing with its predecessor.
    """

    uuid: str
    tenant: str
    name: str
    model: str
    revision: str
    dimensions: int
    created_at: float


@dataclass(frozen=True, slots=True)
class DocumentWrite:
    """A document about to be written: its id and into how many chunks it was cut.

    `sent_at` is when it was sent, in epoch seconds; None: now.
    """

    document: str
    chunks: int
    sent_at: float | None = None


@dataclass(frozen=True, slots=True)
class DocumentVersion:
    """What the Store granted for one write of a document.

    `chunks_max` bounds the ordinals that may exist in the index from any earlier generation.
    """

    document: str
    generation: int
    chunks_max: int
    existed: bool = True


@dataclass(frozen=True, slots=True)
class Record:
    """One vector on its way into the index, and back.

    `metadata` is the user's own; `text`, `start`, `end` and `ordinal` are the chunk's. `accepted_at` is
    when the Store accepted the write, in epoch seconds of its clock; 0: not known, or on the way back.
    `trace` is the span that writes it, see `serve.tracing`; no index keeps it.
    """

    id: str
    document: str
    generation: int
    ordinal: int
    vector: Vector
    text: str = ""
    start: int = 0
    end: int = 0
    metadata: Mapping[str, Any] = field(default_factory=dict)
    accepted_at: float = field(default=0.0, compare=False)
    trace: str = field(default="", compare=False)


@dataclass(frozen=True, slots=True)
class Tombstone:
    """Deletes the record `id` unless the index holds a generation above `generation`.

    `accepted_at` and `trace` as a record's.
    """

    id: str
    document: str
    generation: int
    accepted_at: float = field(default=0.0, compare=False)
    trace: str = field(default="", compare=False)


Write = Record | Tombstone


OutcomeWord = Literal["landed", "rejected", "superseded", "released"]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one offered write.

    landed: the index returned. rejected: the index refuses this record for good (`reason`).
    superseded: a newer accepted write of the document exists. released: given back unwritten
    (shutdown, fencing, deadline); the caller still owns it.

    `token` is set when it has landed in an index whose searches lag behind: its place in the log of
    the namespace's writes, which rises, or `freshness.UNPROVED`. None: searches see it.
    """

    word: OutcomeWord
    reason: str = ""
    token: int | None = None


@dataclass(frozen=True, slots=True)
class Condition:
    """`field op value` of a filter; `op` is one of the words of `serve.index.filters`."""

    field: str
    op: str
    value: Any


@dataclass(frozen=True, slots=True)
class Every:
    """All parts hold (`$and`)."""

    parts: tuple["Filter", ...]


@dataclass(frozen=True, slots=True)
class Some:
    """At least one part holds (`$or`)."""

    parts: tuple["Filter", ...]


Filter = Condition | Every | Some


@dataclass(frozen=True, slots=True)
class Hit:
    """A search result. `score` is the cosine similarity, -1..1, where vectors were compared."""

    record: Record
    score: float


@dataclass(frozen=True, slots=True)
class CollectionSpec:
    """What an index must know to make a namespace."""

    ns: str
    dimensions: int


def record_id(tenant: str, collection: str, document: str, ordinal: int, revision: str) -> str:
    """Deterministic id: the first 32 hex of SHA-256 over length-prefixed parts.

    A repeated write overwrites itself. 32 ASCII bytes satisfy the strictest index (64 bytes).
    Length prefixes keep ("a", "bc") and ("ab", "c") apart.
    """
    digest = hashlib.sha256()
    for part in (tenant, collection, document, str(ordinal), revision):
        raw = part.encode()
        digest.update(len(raw).to_bytes(4, "big") + raw)
    return digest.hexdigest()[:32]


def stack(vectors: Sequence[Vector], dimensions: int) -> Vector:
    """Rows into one contiguous float32 array of shape (len(vectors), dimensions)."""
    if not vectors:
        return np.zeros((0, dimensions), np.float32)
    return np.ascontiguousarray(np.stack(vectors), np.float32)
