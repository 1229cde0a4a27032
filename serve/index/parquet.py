"""Records as a Parquet file, made a row group at a time. pyarrow is imported with the first of them."""

import io
import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from serve.errors import BadInput
from serve.records import Record, stack


COMPRESSION = "zstd"


class ParquetFile:
    """Gives the file's bytes as they come; all of it is only the footer, about 1 KB a row group.

    Columns: `id`, `chunk`, `vector` (a fixed-size list of float32), `text`, `start`, `end`, `metadata`
    (JSON), `generation`. Slow: for a thread, one call at a time.
    """

    def __init__(self, dimensions: int) -> None:
        """Raises BadInput where pyarrow is not installed: it comes with the `lancedb` backend."""
        try:
            import pyarrow as pa  # noqa: PLC0415
            from pyarrow import parquet  # noqa: PLC0415
        except ImportError:
            raise BadInput(
                "This service cannot write Parquet: pyarrow is not installed.", param="format"
            ) from None
        self._arrow: Any = pa
        self._dimensions = dimensions
        self._schema = self._schema_of(dimensions)
        self._sink = _Sink()
        # Vectors hardly ever repeat: a dictionary of them would cost time and save nothing.
        self._writer: Any = parquet.ParquetWriter(
            self._sink, self._schema, compression=COMPRESSION, use_dictionary=["metadata"]
        )

    def add(self, records: Sequence[Record]) -> bytes:
        """A row group; returns what there is of the file since the last call."""
        self._writer.write_table(self._table(records))
        return self._sink.taken()

    def end(self) -> bytes:
        """The rest of the file. Nothing is added afterwards."""
        self._writer.close()
        return self._sink.taken()

    def _schema_of(self, dimensions: int) -> Any:
        arrow = self._arrow
        kinds = {
            "id": arrow.string(),
            "chunk": arrow.int32(),
            "vector": arrow.list_(arrow.float32(), dimensions),
            "text": arrow.string(),
            "start": arrow.int64(),
            "end": arrow.int64(),
            "metadata": arrow.string(),
            "generation": arrow.int64(),
        }
        fields = [arrow.field(name, kind, nullable=False) for name, kind in kinds.items()]
        return arrow.schema(fields)

    def _table(self, records: Sequence[Record]) -> Any:
        arrow = self._arrow
        rows = stack([record.vector for record in records], self._dimensions)
        columns = {
            "id": [record.document for record in records],
            "chunk": [record.ordinal for record in records],
            "vector": arrow.FixedSizeListArray.from_arrays(
                arrow.array(np.ravel(rows)), self._dimensions
            ),
            "text": [record.text for record in records],
            "start": [record.start for record in records],
            "end": [record.end for record in records],
            "metadata": [
                json.dumps(dict(record.metadata), ensure_ascii=False) for record in records
            ],
            "generation": [record.generation for record in records],
        }
        return arrow.table(columns, schema=self._schema)


class _Sink(io.RawIOBase):
    """Keeps what is written until it is taken."""

    def __init__(self) -> None:
        super().__init__()
        self._pieces: list[bytes] = []
        self._size = 0

    def writable(self) -> bool:
        return True

    def write(self, piece: Any) -> int:
        raw = bytes(piece)
        self._pieces.append(raw)
        self._size += len(raw)
        return len(raw)

    def tell(self) -> int:
        return self._size

    def taken(self) -> bytes:
        raw = b"".join(self._pieces)
        self._pieces.clear()
        return raw
