"""What an engine returned or raised, checked before anyone trusts it."""

from collections.abc import Sequence

import numpy as np

from serve.errors import Internal
from serve.ports import Engine
from serve.records import Input, Vector


NORM_ERROR_MAX = 1e-3
"""Float32 leaves about 1e-6; more means that the engine forgot to normalise."""


def checked(engine: Engine, batch: Sequence[Input]) -> tuple[Vector, frozenset[int]]:
    """Run a batch; the vectors, and the rows that hold no usable vector (zeroed).

    A row is unusable when it is not finite or, unless it is a score, not of unit length. Raises Internal when the engine
    broke its contract for the whole batch (rows, dimensions, dtype), and whatever it raises.
    """
    vectors = engine.forward(batch)
    wanted = (len(batch), engine.dimensions)
    if vectors.shape != wanted or vectors.dtype != np.float32:
        raise Internal(
            f"The engine returned {vectors.dtype} {vectors.shape} instead of float32 {wanted}."
        )
    if engine.dimensions == 1:
        bad = np.flatnonzero(~np.isfinite(vectors[:, 0]))
    else:
        norms = np.linalg.norm(vectors, axis=1)
        bad = np.flatnonzero(~(np.abs(norms - 1) <= NORM_ERROR_MAX))  # NaN compares as false
    if bad.size:
        vectors = vectors.copy()
        vectors[bad] = 0
    return vectors, frozenset(bad.tolist())


def out_of_memory(error: Exception) -> bool:
    """Also torch's own, which is not imported here."""
    return isinstance(error, MemoryError) or "OutOfMemory" in type(error).__name__
