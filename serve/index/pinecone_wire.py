"""Records as Pinecone's JSON, in requests of bounded size. Imports nothing of Pinecone.

All but id and vector is one JSON string of the metadata, `record`: so types, big integers and odd
keys come back as they were. Beside it stand the fields of `serve.index.pinecone_filters`.
"""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import orjson

from serve.index.pinecone_filters import to_fields
from serve.records import Record, Vector


RECORD = "record"

FRAME_BYTES = len(b'{"id":"","values":,"metadata":},')
BODY_BYTES = 128
"""Of a request, beside its records."""


@dataclass(frozen=True, slots=True)
class Sized:
    """A record as the SDK takes it, and its bytes as JSON: in all, and of its metadata."""

    id: str
    generation: int
    vector: dict[str, Any]
    bytes: int
    metadata_bytes: int


def to_sized(record: Record) -> Sized:
    """A record that passed `checks.refuse`."""
    metadata = {RECORD: _whole(record), **to_fields(record.metadata)}
    metadata_bytes = len(orjson.dumps(metadata))
    values, values_bytes = to_values(record.vector)
    size = FRAME_BYTES + len(record.id) + values_bytes + metadata_bytes
    vector = {"id": record.id, "values": values, "metadata": metadata}
    return Sized(record.id, record.generation, vector, size, metadata_bytes)


def to_values(vector: Vector) -> tuple[list[float], int]:
    """Numbers whose shortest form is that of the float32, and the bytes they take as JSON.

    `tolist` would write each float32 with the digits of a float64: 8.0 KB for 384 instead of 4.7.
    """
    row = np.ascontiguousarray(vector, np.float32)
    values: list[float] = orjson.loads(orjson.dumps(row, option=orjson.OPT_SERIALIZE_NUMPY))
    # Written again: of 384 some take another form as a float64 (6e-6 for 0.000006).
    return values, len(orjson.dumps(values))


def fit(
    records: Iterable[Record], bytes_max: int, metadata_bytes_max: int
) -> tuple[list[Sized], list[tuple[str, str]]]:
    """Those that a request can hold; (id, reason) of those that none can."""
    light: list[Sized] = []
    heavy: list[tuple[str, str]] = []
    for sized in map(to_sized, records):
        if sized.metadata_bytes > metadata_bytes_max:
            took = f"text and metadata take {sized.metadata_bytes} bytes in Pinecone"
            heavy.append((sized.id, f"{took}, which allows {metadata_bytes_max}"))
        elif BODY_BYTES + sized.bytes > bytes_max:
            heavy.append((sized.id, f"it takes {sized.bytes} bytes, and a request {bytes_max}"))
        else:
            light.append(sized)
    return light, heavy


def parts(rows: Iterable[Sized], items_max: int, bytes_max: int) -> Iterator[list[Sized]]:
    """Requests of rows that `fit` let through."""
    part: list[Sized] = []
    size = BODY_BYTES
    for row in rows:
        if part and (len(part) >= items_max or size + row.bytes > bytes_max):
            yield part
            part, size = [], BODY_BYTES
        part.append(row)
        size += row.bytes
    if part:
        yield part


class Stored(Protocol):
    """What the SDK gives back, of a fetch or a query."""

    id: str
    values: list[float]
    metadata: dict[str, Any] | None


def to_records(found: Iterable[Stored]) -> list[Record]:
    """Records as they were; what is not one of ours is left out."""
    records = []
    for one in found:
        if one.metadata is not None and RECORD in one.metadata:
            document, generation, ordinal, text, start, end, own = json.loads(one.metadata[RECORD])
            vector = np.asarray(one.values, np.float32)
            records.append(
                Record(one.id, document, generation, ordinal, vector, text, start, end, own)
            )
    return records


def _whole(record: Record) -> str:
    whole = [record.document, record.generation, record.ordinal]
    whole += [record.text, record.start, record.end, dict(record.metadata)]
    text = json.dumps(whole, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    try:
        text.encode()
    except UnicodeEncodeError:  # a lone surrogate in metadata has no UTF-8
        return json.dumps(whole, allow_nan=False, separators=(",", ":"))
    return text
