"""Smaller outputs: unit vectors as bytes or as bits. Pure.

A vector comes out the same whatever stands beside it: nothing is taken from the batch.
"""

import math
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from serve.records import Vector


Dtype = Literal["float", "int8", "uint8", "binary", "ubinary"]
"""As Voyage and Cohere call them."""

BITS: frozenset[Dtype] = frozenset({"binary", "ubinary"})
LEVELS = 127
MIDDLE = 128
"""What lies between the signed and the unsigned form of a byte."""


def quantise(vectors: Vector, dtype: Dtype, spread: float) -> NDArray[np.generic]:
    """Rows of unit length as `dtype`; `binary` and `ubinary` need a multiple of 8 dimensions.

    int8 is linear, -127 to 127, and reaches to `spread` times 1/sqrt(dimensions), what a component is
    in the (quadratic) mean; beyond it is clipped. uint8 is the same plus 128. Bits are the signs,
    positive is 1, the first dimension is the highest bit; `binary` is `ubinary` minus 128.
    """
    if dtype == "float":
        return vectors
    if dtype in BITS:
        packed: NDArray[np.uint8] = np.packbits(vectors > 0, axis=1)
        return packed if dtype == "ubinary" else _signed(packed)
    scale = np.float32(LEVELS / reach(vectors.shape[1], spread))
    levels: NDArray[np.int8] = np.clip(np.rint(vectors * scale), -LEVELS, LEVELS).astype(np.int8)
    return levels if dtype == "int8" else (levels.astype(np.int16) + MIDDLE).astype(np.uint8)


def reach(dimensions: int, spread: float) -> float:
    """The component that becomes 127; no component of a unit vector exceeds 1."""
    return min(1.0, spread / math.sqrt(dimensions))


def _signed(packed: NDArray[np.uint8]) -> NDArray[np.int8]:
    return (packed.astype(np.int16) - MIDDLE).astype(np.int8)
