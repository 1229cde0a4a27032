"""Replies as OpenAPI shows them. The routes write plain objects; tests hold the two together."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field


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
    """One vector: numbers, or the base64 of little-endian float32."""

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
    """What became of one document; `error` when its status is `failed`."""

    id: str
    status: Literal["indexed", "superseded", "failed", "deleted", "absent"]
    generation: int
    chunks: int
    error: Problem | None = None


class IngestUsage(Shape):
    """Tokens of the documents that were embedded."""

    total_tokens: int


class DocumentsWritten(Shape):
    """One result a document, in their order; `failed` counts those that failed."""

    object: Literal["list"]
    data: list[DocumentShown]
    failed: int
    usage: IngestUsage


class DocumentsDeleted(Shape):
    """One result an id, in their order."""

    object: Literal["list"]
    data: list[DocumentShown]


class SearchHit(Shape):
    """A chunk; `text == document[start:end]`, `score` is the cosine similarity."""

    document: str
    score: float
    chunk: int
    text: str
    start: int
    end: int
    metadata: dict[str, Any]


class SearchList(Shape):
    """The nearest chunks, best first."""

    object: Literal["list"]
    data: list[SearchHit]
    usage: Usage


class Health(Shape):
    """`parts` is there for readiness: name -> usable."""

    status: Literal["alive", "ready", "not_ready"]
    parts: dict[str, bool] | None = None
