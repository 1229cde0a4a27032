"""Rules every backend checks before it writes: most poison never enters an index."""

import re
from collections.abc import Iterable, Sequence
from typing import TypeVar

import numpy as np

from serve.errors import BadInput
from serve.index.filters import as_number
from serve.records import Record, Tombstone, Vector


SQUARES_MIN, SQUARES_MAX = 1e-36, 1e37
"""Norm squared. Indexes compute it in float32, where 1e-45 is zero and 1e39 infinite."""

W = TypeVar("W", Record, Tombstone)

NAMESPACE = re.compile(r"[0-9a-f]{32}")
RECORD_ID = re.compile(r"[0-9A-Za-z_-]{1,64}")
"""64 bytes of ASCII is the strictest rule among the indexes we know."""


def check_namespace(ns: str) -> None:
    """Raises BadInput unless `ns` is a collection's uuid (32 hex): it becomes a folder's name."""
    if not NAMESPACE.fullmatch(ns):
        raise BadInput("A namespace must be 32 hex digits.", param="ns")


def check_query(vector: Vector, dimensions: int) -> None:
    """Raises BadInput when a query vector has no direction in this space."""
    if (problem := vector_problem(vector, dimensions)) is not None:
        raise BadInput(f"The query vector {problem}.", param="vector")


def refuse(records: Iterable[Record], dimensions: int) -> tuple[tuple[str, str], ...]:
    """(id, reason) of the records that no backend should be given."""
    pairs = ((record.id, _problem(record, dimensions)) for record in records)
    return tuple((record_id, reason) for record_id, reason in pairs if reason is not None)


def newest(writes: Sequence[W]) -> list[W]:
    """One write per id: the highest generation, among equals the last."""
    kept: dict[str, W] = {}
    for write in writes:
        if write.id not in kept or kept[write.id].generation <= write.generation:
            kept[write.id] = write
    return list(kept.values())


def vector_problem(vector: Vector, dimensions: int) -> str | None:
    """Why no index could compare this vector with others of so many dimensions; None: it can."""
    if vector.shape != (dimensions,):
        return f"has shape {vector.shape}, not ({dimensions},)"
    wide = vector.astype(np.float64)
    squares = float(np.dot(wide, wide))
    if not np.isfinite(squares):
        return "holds a value that is not finite"
    if squares == 0:
        return "has norm zero"
    return None if SQUARES_MIN <= squares <= SQUARES_MAX else "has a norm beyond float32"


def _problem(record: Record, dimensions: int) -> str | None:
    if not RECORD_ID.fullmatch(record.id):
        return "id must be 1 to 64 letters, digits, '-' or '_'"
    if (problem := vector_problem(record.vector, dimensions)) is not None:
        return f"vector {problem}"
    if not (_is_unicode(record.document) and _is_unicode(record.text)):
        return "document and text must be valid Unicode"
    for key, value in record.metadata.items():
        if not _is_value(value):
            return f"metadata.{key} must be a string, a finite number, a bool or a list of them"
    return None


def _is_unicode(text: str) -> bool:
    return text.isascii() or not any("\ud800" <= char <= "\udfff" for char in text)


def _is_value(value: object) -> bool:
    if isinstance(value, list | tuple):
        return all(_is_scalar(item) for item in value)
    return _is_scalar(value)


def _is_scalar(value: object) -> bool:
    return isinstance(value, str | bool) or as_number(value) is not None
