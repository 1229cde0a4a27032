"""What the engines over a graph have in common: rows into arrays, and which way they go."""

import threading
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from serve.config import Model
from serve.embedding.graphs import Graph
from serve.embedding.rows import Rows
from serve.records import Input, InputKind, Vector


IDS, MASK, VECTORS = "input_ids", "attention_mask", "vectors"
"""Names inside a graph: ids and mask in, float32 rows of unit length out."""

Run = Callable[[NDArray[np.int64], NDArray[np.int64]], Vector]
"""Ids and mask of a batch, both (inputs, tokens), through the graph."""


class GraphEngine:
    """Implements `ports.Engine` over two ways through a graph.

    `narrow` uses the thread that calls it. `wide` uses all of them for one batch, and is taken by a
    batch that is alone, if it is `small`: (inputs, tokens padded) -> bool.
    """

    accepts: frozenset[InputKind] = frozenset({"ids"})

    def __init__(
        self,
        model: Model,
        graph: Graph,
        *,
        wide: Run,
        narrow: Run,
        small: Callable[[int, int], bool],
    ) -> None:
        self.dimensions = model.dimensions
        self._rows = Rows(
            model, vocab_size=graph.vocab_size, pad_id=graph.pad_id, pad_left=graph.pad_left
        )
        self._wide, self._narrow, self._small = wide, narrow, small
        self._under_way = 0
        self._counting = threading.Lock()

    def forward(self, batch: Sequence[Input]) -> Vector:
        """See `ports.Engine.forward`. Raises BadInput for what the model cannot read."""
        if not batch:
            return np.zeros((0, self.dimensions), np.float32)
        ids, mask = self._rows.padded(batch)
        with self._counting:
            alone = not self._under_way
            self._under_way += 1
        try:
            return (
                self._wide(ids, mask)
                if alone and self._small(*ids.shape)
                else self._narrow(ids, mask)
            )
        finally:
            with self._counting:
                self._under_way -= 1

    def close(self) -> None:
        """Drop the weights."""
        del self._wide, self._narrow
