"""Records as rows of a Lance table, and back. The table's columns are defined here only.

pyarrow is imported by who opened the database: see `serve.index.lancedb`.
"""

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from serve.index.terms import encode
from serve.records import Record, stack


if TYPE_CHECKING:
    import pyarrow as pa

COLUMNS = ("id", "document", "generation", "ordinal", "vector", "text", "start", "end", "metadata")
"""What makes a record; `terms` is there for filters only."""

KEY = {"lance-schema:unenforced-primary-key": "true"}
"""Of the field `id`: Lance then compares the ids that two commits insert, and does the later one again.
Without it two writers leave the same new id twice. A table keeps what it was made with."""


def schema_of(dimensions: int) -> "pa.Schema":
    """The table's schema: vectors are fixed-size lists of float32."""
    import pyarrow as pa  # noqa: PLC0415

    text, integer = pa.string(), pa.int64()
    kinds = {
        "id": text,
        "document": text,
        "generation": integer,
        "ordinal": integer,
        "vector": pa.list_(pa.float32(), dimensions),
        "text": text,
        "start": integer,
        "end": integer,
        "metadata": text,
        "terms": text,
    }
    return pa.schema(
        [
            pa.field(name, kind, nullable=False, metadata=KEY if name == "id" else None)
            for name, kind in kinds.items()
        ]
    )


def to_arrow(records: Sequence[Record], dimensions: int) -> "pa.Table":
    """Records that passed `checks.refuse`. Raises ValueError for what is not JSON."""
    import pyarrow as pa  # noqa: PLC0415

    rows = pa.array(stack([record.vector for record in records], dimensions).ravel())
    columns = {
        "id": [record.id for record in records],
        "document": [record.document for record in records],
        "generation": [record.generation for record in records],
        "ordinal": [record.ordinal for record in records],
        "vector": pa.FixedSizeListArray.from_arrays(rows, dimensions),
        "text": [record.text for record in records],
        "start": [record.start for record in records],
        "end": [record.end for record in records],
        "metadata": [json.dumps(dict(record.metadata), allow_nan=False) for record in records],
        "terms": [encode(record.metadata) for record in records],
    }
    return pa.table(columns, schema=schema_of(dimensions))


def from_batch(part: "pa.RecordBatch") -> list[Record]:
    """The records of a part of a result, in its order."""
    import pyarrow as pa  # noqa: PLC0415

    return from_arrow(pa.Table.from_batches([part]))


def from_arrow(found: "pa.Table") -> list[Record]:
    """The records of a result, in its order."""
    if not found.num_rows:
        return []
    flat = found["vector"].combine_chunks().flatten().to_numpy(zero_copy_only=False)
    rows = flat.reshape(found.num_rows, -1).astype(np.float32)
    columns = [found[name].to_pylist() for name in COLUMNS if name != "vector"]
    return [
        Record(record_id, document, generation, ordinal, vector, text, start, end, json.loads(meta))
        for vector, (record_id, document, generation, ordinal, text, start, end, meta) in zip(
            rows, zip(*columns, strict=True), strict=True
        )
    ]
