"""What the engines over a graph have in common: rows into arrays, and which way they go."""

import threading
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from serve.config import Model
from serve.embedding.graphs import Graph
from serve.embedding.rows import Rows, as_it_is
from serve.records import Input, InputKind, Vector


IDS, MASK, VECTORS = "input_ids", "attention_mask", "vectors"
"""Names inside a graph: ids and mask in, float32 rows of unit length out."""

POSITIONS, MEMBERS, PLACES = "positions", "members", "places"
"""What one reads besides where inputs share rows: `rows.Shared` tells their shapes."""

Feed = Mapping[str, NDArray[np.int64]]
"""A batch as a graph reads it, by name."""

Run = Callable[[Feed], Vector]
"""A batch through the graph."""


class GraphEngine:
    """Implements `ports.Engine` over two ways through a graph.

    `narrow` uses the thread that calls it. `wide` uses all of them for one batch, and is taken by a
    batch that is alone, if it is `small`: (inputs, their tokens with padding) -> bool. `rounded` is the
    length that a row of so many tokens is padded to.
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
        rounded: Callable[[int], int] = as_it_is,
    ) -> None:
        self.dimensions = model.dimensions
        self._rows = Rows(
            model, vocab_size=graph.vocab_size, pad_id=graph.pad_id, pad_left=graph.pad_left
        )
        self.row_tokens = graph.row_tokens
        self._wide, self._narrow, self._small, self._rounded = wide, narrow, small, rounded
        self._under_way = 0
        self._counting = threading.Lock()

    def forward(self, batch: Sequence[Input]) -> Vector:
        """See `ports.Engine.forward`. Raises BadInput for what the model cannot read."""
        if not batch:
            return np.zeros((0, self.dimensions), np.float32)
        feed = self._feed(batch)
        with self._counting:
            alone = not self._under_way
            self._under_way += 1
        try:
            way = self._wide if alone and self._small(len(batch), feed[IDS].size) else self._narrow
            return way(feed)
        finally:
            with self._counting:
                self._under_way -= 1

    def _feed(self, batch: Sequence[Input]) -> Feed:
        if not self.row_tokens:
            ids, mask = self._rows.padded(batch, self._rounded)
            return {IDS: ids, MASK: mask}
        shared = self._rows.shared(batch, self.row_tokens, self._rounded)
        return {
            IDS: shared.ids,
            POSITIONS: shared.positions,
            MEMBERS: shared.members,
            PLACES: shared.places,
            MASK: shared.mask,
        }

    def close(self) -> None:
        """Drop the weights."""
        del self._wide, self._narrow
