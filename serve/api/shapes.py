"""Replies as OpenAPI shows them. The routes write plain objects; tests hold the two together."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from serve.freshness import Level


class Shape(BaseModel):
    """A JSON object of exactly these fields; those with a default may be absent."""

    model_config = ConfigDict(extra="forbid")


class OpenAIErrorDetail(Shape):
    """OpenAI's error object."""

    message: str
    type: str
    param: str | None
    code: str | None


class OpenAIError(Shape):
    """An error on OpenAI's routes."""

    error: OpenAIErrorDetail


class Problem(Shape):
    """An error on our own routes: RFC 9457 problem details."""

    type: str
    title: str
    status: int
    detail: str
    code: str
    instance: str | None = None
    param: str | None = None
    violated_policies: list[str] | None = Field(None, alias="violated-policies")


class Usage(Shape):
    """Tokens that were paid for."""

    prompt_tokens: int
    total_tokens: int


class Embedding(Shape):
    """One vector: numbers, or the base64 of their bytes: little-endian float32 unless `output_dtype` says other."""

    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class Truncated(Shape):
    """An input that was cut at the caller's wish."""

    index: int
    tokens: int
    used: int


class EmbeddingList(Shape):
    """Vectors in input order. `truncated` is there when an input was cut."""

    object: Literal["list"]
    data: list[Embedding]
    model: str
    usage: Usage
    truncated: list[Truncated] | None = None


class ModelShown(Shape):
    """A served model: OpenAI's four fields, then ours."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    kind: Literal["embedding", "reranker"]
    dimensions: int
    max_tokens: int
    matryoshka: bool
    revision: str


class ModelList(Shape):
    """Every served model."""

    object: Literal["list"]
    data: list[ModelShown]


class CollectionShown(Shape):
    """A collection. `records` is there when one is asked for."""

    object: Literal["collection"]
    id: str
    name: str
    model: str
    revision: str
    dimensions: int
    created: int
    records: int | None = None


class CollectionList(Shape):
    """The caller's collections, by name."""

    object: Literal["list"]
    data: list[CollectionShown]


class CollectionDeleted(Shape):
    """A collection that is gone."""

    object: Literal["collection"]
    name: str
    deleted: Literal[True]


class DocumentShown(Shape):
    """What became of one document; `error` when its status is `failed`.

    `chunks` are those that this write put into the index.
    """

    id: str
    status: Literal[
        "indexed",
        "unchanged",
        "superseded",
        "deleted",
        "absent",
        "failed",
        "cancelled",
        "accepted",
    ]
    generation: int
    chunks: int
    error: Problem | None = None


class IngestUsage(Shape):
    """Tokens of the documents that were embedded."""

    total_tokens: int


class Receipt(Shape):
    """Proof of a write. accepted: it is durable. indexed: what could be written is in the index.
    searchable: searches see it. There is no job of raw vectors.
    """

    object: Literal["receipt"]
    id: str
    job: str | None
    level: Level
    documents: int
    status_url: str


class DocumentsWritten(Shape):
    """One result a document, in their order; `failed` counts those that failed or were cancelled.

    `has_more` is there after a delete by filter: whether more than these match.
    """

    object: Literal["list"]
    data: list[DocumentShown]
    failed: int
    usage: IngestUsage
    receipt: Receipt
    has_more: bool | None = None


class DocumentsAccepted(Receipt):
    """A write that goes on. `data` is there when its end was waited for, but did not come."""

    detail: str
    data: list[DocumentShown] | None = None
    has_more: bool | None = None


class UsageRowShown(Shape):
    """What one key's family used at one class: admitted and not refunded, and refused."""

    key: str
    klass: Literal["interactive", "bulk"] = Field(alias="class")
    requests: int
    tokens: int
    refused: int


class LimitShown(Shape):
    """A limit and what is left of it.

    A `rate` lets `limit` units come at once and `per_minute` more each minute; a `level` is held
    while work is under way; a `month` is a calendar month (UTC).
    """

    name: str
    kind: Literal["rate", "level", "month"]
    unit: Literal["requests", "tokens"]
    limit: int
    per_minute: float | None
    remaining: int
    reset_s: float | None


class LimitsShown(Shape):
    """Limits by class, the tenant's and the key's."""

    interactive: list[LimitShown]
    bulk: list[LimitShown]


class UsageShown(Shape):
    """The tenant's usage of a month by key and class, and its limits of now."""

    object: Literal["usage"]
    tenant: str
    tier: str
    weight: float
    month: str
    data: list[UsageRowShown]
    limits: LimitsShown


class WaitingShown(Shape):
    """What waits of a tenant: tokens are corrected per model, times are predictions."""

    items: int
    tokens: float
    share: float
    ahead_tokens: float
    starts_s: float
    ends_s: float
    oldest_s: float
    effective_priority: float


class ClassesWaiting(Shape):
    """By class; absent where nothing waits."""

    interactive: WaitingShown | None = None
    bulk: WaitingShown | None = None


class QueueShown(Shape):
    """What the tenant has waiting, and why. `waiting` is null when nothing does."""

    object: Literal["queue"]
    why: str
    waiting: WaitingShown | None
    classes: ClassesWaiting
    everyone_tokens: float


class KeyShown(Shape):
    """A key without its secret. Times are seconds since 1970."""

    object: Literal["key"]
    id: str
    family: str
    tenant: str
    tier: str
    role: Literal["user", "admin"]
    name: str
    limits: dict[str, Any]
    created: int
    expires: int | None


class KeyMade(KeyShown):
    """A new key with its secret, which is shown this once."""

    secret: str


class KeyList(Shape):
    """Live keys."""

    object: Literal["list"]
    data: list[KeyShown]


class KeyRevoked(Shape):
    """A key that is gone."""

    object: Literal["key"]
    id: str
    revoked: Literal[True]


class TenantShown(Shape):
    """A tenant, and what it has instead of its tier's limits."""

    object: Literal["tenant"]
    tenant: str
    tier: str
    limits: dict[str, Any]
    created: int


class TenantList(Shape):
    """Tenants, by name."""

    object: Literal["list"]
    data: list[TenantShown]


class Removed(Shape):
    """How much of each. `documents` and raw vectors that were not deleted before."""

    keys: int
    collections: int
    documents: int
    records: int
    jobs: int
    items: int
    files: int
    file_bytes: int
    webhooks: int


class TenantErased(Shape):
    """What is no longer kept of a tenant."""

    object: Literal["tenant.data"]
    tenant: str
    removed: Removed


class AuditShown(Shape):
    """One change: `detail` holds what is `new` and what was `old`."""

    number: int
    at: float
    by: str
    action: str
    tenant: str
    subject: str
    detail: dict[str, Any]


class AuditList(Shape):
    """Changes, newest first."""

    object: Literal["list"]
    data: list[AuditShown]


class ScalingShown(Shape):
    """A deployment: `wanted` replicas, `target` before that, `running`; nulls: nothing was decided."""

    object: Literal["autoscaling"]
    deployment: str
    fixed: bool
    min: int
    max: int
    wanted: int | None
    target: int | None
    running: int | None
    inputs: dict[str, float | None]
    reason: str
    at: float | None


class ScalingList(Shape):
    """Every deployment."""

    object: Literal["list"]
    data: list[ScalingShown]


class Health(Shape):
    """`parts` is there for readiness: name -> usable."""

    status: Literal["alive", "ready", "degraded", "not_ready"]
    parts: dict[str, bool] | None = None
