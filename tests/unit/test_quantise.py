"""serve.embedding.quantise: bytes and bits of unit vectors."""

import numpy as np
import pytest

from serve.embedding.quantise import quantise, reach


def unit(count: int = 50, size: int = 64) -> np.ndarray:
    rows = np.random.default_rng(1).normal(size=(count, size))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def test_float_is_left_alone():
    rows = unit()
    assert quantise(rows, "float", 4) is rows


def test_int8_is_linear_up_to_its_reach_and_clipped_beyond():
    size = 64  # a component is 1/8 in the mean, so the reach is 1/2
    row = np.zeros((1, size), np.float32)
    row[0, :6] = [0.5, -0.5, 0.25, 0.9, -0.9, 0.5 / 127]
    made = quantise(row, "int8", 4)
    assert made.dtype == np.int8
    assert made[0, :7].tolist() == [127, -127, 64, 127, -127, 1, 0]


def test_uint8_is_int8_plus_128():
    rows = unit()
    small = quantise(rows, "int8", 4)
    large = quantise(rows, "uint8", 4)
    assert large.dtype == np.uint8
    assert np.array_equal(large.astype(int), small.astype(int) + 128)
    assert np.abs(small).max() > 60


@pytest.mark.parametrize(
    ("dimensions", "spread", "expected"), [(64, 4, 0.5), (4, 4, 1), (16, 2, 0.5)]
)
def test_the_reach_follows_from_the_dimensions(dimensions, spread, expected):
    assert reach(dimensions, spread) == expected


def test_bits_are_signs_the_first_one_highest():
    row = np.array([[0.3, -0.1, 0, 0.2, -1, -1, -1, 0.1], [-1, 1, 1, 1, 1, 1, 1, 1]], np.float32)
    bits = quantise(row, "ubinary", 4)
    assert (bits.dtype, bits.tolist()) == (np.uint8, [[0b10010001], [0b01111111]])
    signed = quantise(row, "binary", 4)
    assert (signed.dtype, signed.tolist()) == (np.int8, [[0b10010001 - 128], [-1]])


@pytest.mark.parametrize("dtype", ["int8", "uint8", "binary", "ubinary"])
def test_a_row_does_not_depend_on_its_neighbours(dtype):
    rows = unit()
    alone = np.concatenate([quantise(rows[at : at + 1], dtype, 4) for at in range(len(rows))])
    assert np.array_equal(quantise(rows, dtype, 4), alone)


def test_int8_keeps_the_direction():
    rows = unit(size=384)
    made = quantise(rows, "int8", 4).astype(np.float32)
    cosines = np.sum(rows * made, axis=1) / np.linalg.norm(made, axis=1)
    assert cosines.min() > 0.999
