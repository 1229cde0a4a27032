"""Replies about raw vectors, and about what a collection holds, as OpenAPI shows them."""

from typing import Any, Literal

from serve.api.shapes import Problem, Receipt, Shape


class VectorWritten(Shape):
    """What became of one vector; `error` when its status is `failed`.

    `id` is null where what was sent has none.
    """

    id: str | None
    status: Literal["indexed", "superseded", "failed"]
    generation: int
    error: Problem | None = None


class VectorsWritten(Shape):
    """One result a vector, in their order. `receipt` is null where none has landed."""

    object: Literal["list"]
    data: list[VectorWritten]
    failed: int
    receipt: Receipt | None


class VectorShown(Shape):
    """A vector as the index holds it: numbers, or the base64 of their little-endian float32 bytes.

    `chunk`, `start` and `end` are of documents.
    """

    id: str
    chunk: int
    vector: list[float] | str
    text: str
    start: int
    end: int
    metadata: dict[str, Any]
    generation: int


class VectorList(Shape):
    """Those of the ids that there are, in their order, and those that there are not."""

    object: Literal["list"]
    data: list[VectorShown]
    missing: list[str]


class CollectionStats(Shape):
    """What a collection holds: `records` are chunks of documents and raw vectors.

    `served_revision` is the one of its model that runs now; where it is another than `revision`, or
    null, only raw vectors are written and searched.
    """

    object: Literal["collection.stats"]
    name: str
    model: str
    revision: str
    served_revision: str | None
    dimensions: int
    records: int
    vector_bytes: int
