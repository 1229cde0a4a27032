"""Records as Pinecone's JSON: sizes to the byte, and back without a loss."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import orjson
import pytest

from serve.index.pinecone_wire import BODY_BYTES, fit, parts, to_records, to_sized, to_values
from serve.records import Record


def record(**changes: Any) -> Record:
    values: dict[str, Any] = {
        "id": "a" * 32,
        "document": "d",
        "generation": 1,
        "ordinal": 0,
        "vector": np.array([0.1, -1e-20, 3.4e38], np.float32),
    }
    return Record(**values | changes)


def back(one: Record) -> Record:
    """As it returns: JSON, with every number of the metadata a float."""
    sent = orjson.loads(orjson.dumps(to_sized(one).vector))
    kept = {
        key: float(value) if isinstance(value, int) else value
        for key, value in sent["metadata"].items()
    }
    [found] = to_records([SimpleNamespace(id=sent["id"], values=sent["values"], metadata=kept)])
    return found


def test_values_are_as_short_as_a_float32_is():
    rows = np.random.default_rng(0).normal(size=(50, 384)).astype(np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    for row in rows:
        values, size = to_values(row)
        written = orjson.dumps(values)
        assert len(written) == size
        assert size < 13 * len(row)
        assert (np.asarray(orjson.loads(written), np.float32) == row).all()
        assert len(orjson.dumps(row.tolist())) > 1.5 * size


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"generation": 2**62, "ordinal": 7, "start": 3, "end": 9},
        {"text": "Straße \x00 'q' \"q\" \\ \n 🎉", "document": "größe/1"},
        {"metadata": {"n": 2**60 + 1, "f": -0.1, "z": -0.0, "b": True, "i": 1}},
        {"metadata": {"l": ["x", 1, 2.5, False], "e": [], "": "k", "$x": "y", "a.b": "c"}},
        {"metadata": {"\ud800": "\udc00", "k" * 300: "v"}},
        {"metadata": {"record": "mine", "terms": ["mine"]}},
    ],
)
def test_a_record_returns_as_it_was(changes):
    one = record(**changes)
    found = back(one)
    assert repr(found.metadata) == repr(dict(one.metadata))  # types, too
    assert (found.vector == one.vector).all()
    fields = ("id", "document", "generation", "ordinal", "text", "start", "end")
    assert [getattr(found, name) for name in fields] == [getattr(one, name) for name in fields]


def test_sizes_are_those_of_the_request():
    rows = [
        to_sized(record(id=f"r{number}", text="ü" * number, metadata={"s": "x" * 50, "n": number}))
        for number in range(40)
    ]
    vectors = [row.vector for row in rows]
    body = orjson.dumps({"vectors": vectors, "namespace": "0" * 32})
    estimate = BODY_BYTES + sum(row.bytes for row in rows)
    assert len(body) <= estimate <= len(body) + BODY_BYTES
    assert [row.metadata_bytes for row in rows] == [
        len(orjson.dumps(vector["metadata"])) for vector in vectors
    ]


def test_parts_are_full_and_hold_everything_in_order():
    rows = [to_sized(record(id=f"r{number}", text="x" * 100 * number)) for number in range(30)]
    cut = list(parts(rows, items_max=8, bytes_max=9000))
    assert [row.id for part in cut for row in part] == [row.id for row in rows]
    for part, following in zip(cut, [*cut[1:], None], strict=True):
        size = BODY_BYTES + sum(row.bytes for row in part)
        assert len(part) <= 8
        assert size <= 9000
        if following is not None:
            assert len(part) == 8 or size + following[0].bytes > 9000
    assert list(parts([], items_max=8, bytes_max=9000)) == []


def test_what_no_request_holds_is_named_with_its_size():
    light, heavy = fit(
        [record(id="a", text="x" * 1000), record(id="b"), record(id="c", text="x" * 1500)],
        bytes_max=1200,
        metadata_bytes_max=1400,
    )
    assert [row.id for row in light] == ["b"]
    assert [record_id for record_id, _ in heavy] == ["a", "c"]
    assert "a request 1200" in heavy[0][1]
    assert "metadata take 15" in heavy[1][1]


def test_what_is_not_ours_is_left_out():
    others = [None, {}, {"text": "x"}]
    found = [SimpleNamespace(id="a", values=[1.0], metadata=metadata) for metadata in others]
    assert to_records(found) == []
