"""Records as Parquet: what pyarrow reads again, and that the file comes bit by bit."""

import io
import sys

import numpy as np
import pytest

from serve.errors import BadInput
from serve.index.parquet import ParquetFile
from serve.records import Record


parquet = pytest.importorskip("pyarrow.parquet")


def record(number: int) -> Record:
    vector = np.array([number, -0.5, 3e38], np.float32)
    metadata = {"tags": ["x", "\u00e9"], "n": number, "ok": True}
    return Record(f"{number:032x}", f"d\u00e4{number}", 7, 2, vector, "text\x00", 3, 8, metadata)


def test_a_file_is_read_as_it_was_written():
    file = ParquetFile(3)
    pieces = [file.add([record(1), record(2)]), file.add([record(3)]), file.end()]
    assert all(pieces)
    table = parquet.read_table(io.BytesIO(b"".join(pieces)))
    assert table.num_rows == 3
    assert table.schema.field("vector").type.list_size == 3
    assert table.to_pylist()[2] == {
        "id": "d\u00e43",
        "chunk": 2,
        "vector": record(3).vector.tolist(),
        "text": "text\x00",
        "start": 3,
        "end": 8,
        "metadata": '{"tags": ["x", "\u00e9"], "n": 3, "ok": true}',
        "generation": 7,
    }


def test_an_empty_file_is_one_too():
    file = ParquetFile(3)
    table = parquet.read_table(io.BytesIO(file.end()))
    assert (table.num_rows, table.schema.field("vector").type.list_size) == (0, 3)


def test_a_file_that_was_cut_off_is_none():
    file = ParquetFile(3)
    with pytest.raises(Exception, match="footer"):
        parquet.read_table(io.BytesIO(file.add([record(1)]) + file.add([record(2)])))


def test_without_pyarrow_the_format_is_refused(monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(BadInput) as caught:
        ParquetFile(3)
    assert caught.value.param == "format"
