"""A simulated device: arithmetic instead of a model, for tests and benchmarks of everything else.

It measures nothing about real models. Its vectors are hashed trigrams of token ids, so texts that
share words are nearer to each other than texts that do not, which is all that its "meaning" is. As a
reranker it says how many of the query's trigrams the text has.
"""

import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from serve.config import Model
from serve.errors import BadInput
from serve.records import Input, InputKind, TokenIds, Vector


# Odd 64-bit constants (multiply-xorshift hashing); their values only have to stay the same.
MULTIPLIERS = np.array([0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9], np.uint64)
MIXER = np.uint64(0xFF51AFD7ED558CCD)
PAIR_END = 257
"""What ends the query of a pair, and the pair: the second special token of `Tokenizer`."""

TINT = 0.05
"""Weight of the part that is unique to an input: no two texts are equal, none is zero."""


@dataclass(frozen=True, slots=True)
class Faults:
    """What goes wrong, for tests. Inputs are named by their exact ids."""

    poison: frozenset[tuple[int, ...]] = frozenset()
    not_finite: frozenset[tuple[int, ...]] = frozenset()
    oom_above_tokens: int | None = None
    rows_lost: int = 0


class FakeEngine:
    """Implements `ports.Engine` without a model; the same input gives bit-identical rows.

    `fake_ms_per_batch` and `fake_ms_per_token` (padded tokens) of the settings are slept away, and
    `fake_bytes` are held.
    `poison` raises ValueError, `oom_above_tokens` raises MemoryError, above that padded size.
    """

    accepts: frozenset[InputKind] = frozenset({"ids"})
    row_tokens = 0

    def __init__(
        self,
        model: Model,
        *,
        sleep: Callable[[float], None] = time.sleep,  # noqa: TID251  it stands in for a device
        faults: Faults | None = None,
    ) -> None:
        self.dimensions = model.dimensions
        self._model = model
        self._sleep = sleep
        self._faults = faults or Faults()
        self._ballast = np.ones(model.fake_bytes, np.uint8)  # zeros would take no memory

    def forward(self, batch: Sequence[Input]) -> Vector:
        """See `ports.Engine.forward`. Raises BadInput for other kinds and too long inputs."""
        rows = [_ids(self._model, one) for one in batch]
        padded = len(rows) * max(map(len, rows), default=0)
        self._work(padded)
        self._fail(rows, padded)
        vectors = np.zeros((len(rows), self.dimensions), np.float32)
        for position, ids in enumerate(rows):
            vectors[position] = self._row(ids)
            if self._faults.not_finite and tuple(ids.tolist()) in self._faults.not_finite:
                vectors[position, 0] = np.nan
        return vectors[: len(rows) - self._faults.rows_lost]

    def close(self) -> None:
        """Give the simulated weights back."""
        self._ballast = np.ones(0, np.uint8)

    def _row(self, ids: TokenIds) -> Vector | float:
        if self._model.kind == "reranker":
            return _relevance(ids)
        return _embed(ids.astype("<i4").tobytes(), self.dimensions)

    def _work(self, padded: int) -> None:
        busy_ms = self._model.fake_ms_per_batch + self._model.fake_ms_per_token * padded
        if busy_ms > 0 and padded > 0:
            self._sleep(busy_ms / 1e3)

    def _fail(self, rows: Sequence[TokenIds], padded: int) -> None:
        limit = self._faults.oom_above_tokens
        if limit is not None and padded > limit:
            raise MemoryError(f"simulated: {padded} padded tokens")
        if self._faults.poison and any(tuple(row.tolist()) in self._faults.poison for row in rows):
            raise ValueError("simulated: a poisonous input")


def _ids(model: Model, one: Input) -> TokenIds:
    if one.ids is None:
        raise BadInput(f"The model {model.id} takes token ids, not {one.kind}.")
    if len(one.ids) > model.tokens_max:
        raise BadInput(f"{len(one.ids)} tokens; the model {model.id} takes {model.tokens_max}.")
    return one.ids


@lru_cache(256)  # warming up asks for the same rows again and again: 30 ms of each start in tests
def _embed(raw: bytes, dimensions: int) -> Vector:
    """Signed feature hashing of trigrams of little-endian int32 ids, plus the tint; unit length."""
    ids = np.frombuffer(raw, "<i4")
    digest = hashlib.blake2b(raw).digest()
    tint = np.resize(np.frombuffer(digest, np.uint8), dimensions) / 127.5 - 1.0
    vector = TINT * tint / np.linalg.norm(tint)
    hashed = _trigrams(ids)
    if hashed.size:
        places = (hashed % np.uint64(dimensions)).astype(np.intp)
        signs = np.where(hashed >> np.uint64(63), 1.0, -1.0)
        counts = np.bincount(places, weights=signs, minlength=dimensions)
        vector += counts / max(float(np.linalg.norm(counts)), 1.0)
    unit: Vector = (vector / np.linalg.norm(vector)).astype(np.float32)
    return unit


def _relevance(ids: TokenIds) -> float:
    """The share of the query's trigrams that stand in the text, too; 0 where it has none."""
    ends = np.flatnonzero(ids == PAIR_END)
    middle = int(ends[0]) if ends.size else len(ids)
    asked = set(_trigrams(ids[1:middle]).tolist())
    held = set(_trigrams(ids[middle + 1 : -1]).tolist())
    return len(asked & held) / max(1, len(asked))


def _trigrams(ids: TokenIds) -> NDArray[np.uint64]:
    if len(ids) < 3:  # noqa: PLR2004  a trigram
        return np.empty(0, np.uint64)
    wide = ids.astype(np.uint64) + np.uint64(1)
    mixed = wide[:-2] * MULTIPLIERS[0] ^ wide[1:-1] * MULTIPLIERS[1] ^ wide[2:] * MULTIPLIERS[2]
    mixed = (mixed ^ mixed >> np.uint64(33)) * MIXER
    hashed: NDArray[np.uint64] = mixed ^ mixed >> np.uint64(29)
    return hashed
