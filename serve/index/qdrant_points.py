"""Records as Qdrant's points, and back. What a payload holds is defined here and in `qdrant_terms`.

qdrant_client is imported by who opened the connection: see `serve.index.qdrant`.
"""

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from uuid import UUID, uuid5

import numpy as np
import orjson

from serve.index.qdrant_terms import encode
from serve.records import Record, Tombstone, Vector


if TYPE_CHECKING:
    from qdrant_client import models

ID_SPACE = UUID("d4530412-cef4-54ae-a006-6d655a08578c")
"""Qdrant's ids are numbers or UUIDs, so ours are hashed in this space. It must never change."""

GENERATION = "generation"
SHOWN = (
    "id",
    "document",
    GENERATION,
    "ordinal",
    "text",
    "start",
    "end",
    "norm",
    "metadata",
)
"""What of a payload makes a record; the rest of it is for filters."""

UNIT_TOLERANCE = 1e-6
ENVELOPE_BYTES = 256
"""What a point takes in a request beside its vector and payload: its id, twice, and names."""


@dataclass(frozen=True, slots=True)
class Sized:
    """A record's point, and its bytes in a request."""

    record: Record
    point: "models.PointStruct"
    size_bytes: int


def point_id(record_id: str) -> str:
    """The point of a record; our own id stands in its payload."""
    return str(uuid5(ID_SPACE, record_id))


def direction(vector: Vector) -> tuple[Vector, float]:
    """A vector as length one, and its length.

    Qdrant's own cosine leaves a vector alone whose squares sum to less than 1.2e-7, and keeps no
    lengths; ours are compared by dot product. One of length one already stays as it is, bit by bit.
    """
    wide = vector.astype(np.float64)
    norm = math.sqrt(float(np.dot(wide, wide)))
    if abs(norm - 1.0) <= UNIT_TOLERANCE:
        return vector.astype(np.float32), 1.0
    return (wide / norm).astype(np.float32), norm


def numbers(vector: Vector) -> bytes:
    """A vector as JSON in float32's shortest digits: 4.7 KB for 384, 8.0 KB as float64."""
    return orjson.dumps(np.ascontiguousarray(vector), option=orjson.OPT_SERIALIZE_NUMPY)


def to_point(record: Record) -> Sized:
    """The point of a record that passed `checks.refuse`.

    Raises ValueError or TypeError for what is not JSON.
    """
    from qdrant_client import models  # noqa: PLC0415

    unit, norm = direction(record.vector)
    vector = numbers(unit)
    payload: dict[str, Any] = {
        "id": record.id,
        "document": record.document,
        GENERATION: record.generation,
        "ordinal": record.ordinal,
        "text": record.text,
        "start": record.start,
        "end": record.end,
        "norm": norm,
        # As text: Qdrant's JSON has no numbers beyond 64 bits, and its keys are paths.
        "metadata": json.dumps(dict(record.metadata), allow_nan=False),
        **encode(record.metadata),
    }
    size_bytes = len(vector) + len(orjson.dumps(payload)) + ENVELOPE_BYTES
    point = models.PointStruct(id=point_id(record.id), vector=orjson.loads(vector), payload=payload)
    return Sized(record, point, size_bytes)


def from_point(point: "models.Record | models.ScoredPoint") -> Record:
    """The record of a point that came with payload and vector."""
    held: dict[str, Any] = point.payload or {}
    vector = np.asarray(point.vector, np.float64) * held["norm"]
    return Record(
        held["id"],
        held["document"],
        held[GENERATION],
        held["ordinal"],
        vector.astype(np.float32),
        held["text"],
        held["start"],
        held["end"],
        json.loads(held["metadata"]),
    )


def not_newer(writes: Iterable[Record | Tombstone]) -> "models.Filter":
    """The points of these writes that are of at most the write's generation."""
    from qdrant_client import models  # noqa: PLC0415

    generations: dict[int, list[Any]] = {}
    for write in writes:
        generations.setdefault(int(write.generation), []).append(point_id(write.id))
    groups: list[Any] = []
    for generation, ids in generations.items():
        held = models.FieldCondition(key=GENERATION, range=models.Range(lte=generation))
        groups.append(models.Filter(must=[models.HasIdCondition(has_id=ids), held]))
    return models.Filter(should=groups)


def parts(points: Sequence[Sized], bytes_max: int) -> Iterator[Sequence[Sized]]:
    """Consecutive parts of at most `bytes_max`, of at least one point each."""
    start = total = 0
    for position, point in enumerate(points):
        if position > start and total + point.size_bytes > bytes_max:
            yield points[start:position]
            start, total = position, 0
        total += point.size_bytes
    if points:
        yield points[start:]
