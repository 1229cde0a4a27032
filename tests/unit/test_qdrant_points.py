"""serve.index.qdrant_points: ids, vectors, payloads, sizes."""

import json
from dataclasses import replace

import numpy as np
import pytest
from qdrant_client import models

from serve.index.qdrant_points import direction, from_point, numbers, parts, point_id, to_point
from serve.records import Record


RECORD = Record(
    "a-b_1",
    "doc/ü",
    7,
    3,
    np.array([3.0, 4.0], np.float32),
    "text \x00 🎉",
    1,
    2,
    {"n": 2**70, "\ud800": "\udc00", "l": [True, 0.1]},
)


def test_ids_never_change():
    assert point_id("a-b_1") == "c4471c20-1176-5f15-b7e3-c5a60a54cd62"


def test_a_record_comes_back_and_fits_its_size():
    made = to_point(RECORD)
    sent = models.PointStruct.model_validate_json(made.point.model_dump_json())
    assert len(made.point.model_dump_json()) + len(made.point.id) < made.size_bytes
    back = from_point(models.Record(id=sent.id, payload=sent.payload, vector=sent.vector))
    assert np.array_equal(back.vector, RECORD.vector)
    assert replace(back, vector=RECORD.vector) == RECORD


def test_what_is_not_json_is_refused():
    for metadata in ({"a": float("nan")}, {"a": object()}):
        with pytest.raises((ValueError, TypeError)):
            to_point(replace(RECORD, metadata=metadata))


@pytest.mark.parametrize("scale", [1e-18, 1e-5, 0.5, 1.0, 3.0, 1e18])
def test_vectors_are_sent_at_length_one(scale, rng):
    vector = np.array([rng.gauss() for _ in range(64)], np.float32)
    vector = (vector / np.linalg.norm(vector) * scale).astype(np.float32)
    unit, norm = direction(vector)
    assert unit.dtype == np.float32
    assert np.linalg.norm(unit.astype(np.float64)) == pytest.approx(1, abs=2e-6)
    assert np.allclose(unit * norm, vector, rtol=1e-6)
    if scale == 1.0:
        assert norm == 1.0
        assert np.array_equal(unit, vector)


def test_numbers_are_short_and_exact():
    vector = np.array([0.1, -1e-30, 1 / 3], np.float32)
    assert numbers(vector) == b"[0.1,-1e-30,0.33333334]"
    assert np.array_equal(np.array(json.loads(numbers(vector)), np.float32), vector)
    assert numbers(np.arange(6, dtype=np.float32)[::2]) == b"[0.0,2.0,4.0]"


def test_parts_keep_the_bound_and_the_order():
    points = [replace(to_point(RECORD), size_bytes=size) for size in (4, 4, 3, 9, 1, 1)]
    made = [[point.size_bytes for point in part] for part in parts(points, 8)]
    assert made == [[4, 4], [3], [9], [1, 1]]
    assert list(parts([], 8)) == []
