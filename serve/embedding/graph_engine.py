"""What the engines over a graph have in common: rows into arrays, and a batch shared out over threads."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray

from serve.config import Model
from serve.embedding.graphs import Graph
from serve.embedding.packing import shares
from serve.embedding.rows import Rows
from serve.records import Input, InputKind, Vector


IDS, MASK, VECTORS = "input_ids", "attention_mask", "vectors"
"""Names inside a graph: ids and mask in, float32 rows of unit length out."""

Run = Callable[[NDArray[np.int64], NDArray[np.int64]], Vector]
"""Ids and mask of a batch, both (inputs, tokens), through the graph."""


class GraphEngine:
    """Implements `ports.Engine` over two ways through a graph.

    `wide` uses every thread for one batch; `narrow` uses the thread that calls it, and as many may
    call it at once as there are threads. `parts` says of the tokens of each input into how many parts a
    batch is cut, each of which one thread takes through the whole graph; 0 is the wide way.
    """

    accepts: frozenset[InputKind] = frozenset({"ids"})

    def __init__(
        self,
        model: Model,
        graph: Graph,
        *,
        wide: Run,
        narrow: Run,
        threads: int,
        parts: Callable[[Sequence[int]], int],
    ) -> None:
        self.dimensions = model.dimensions
        self._rows = Rows(
            model, vocab_size=graph.vocab_size, pad_id=graph.pad_id, pad_left=graph.pad_left
        )
        self._wide, self._narrow = wide, narrow
        self._parts = parts
        self._threads = ThreadPoolExecutor(threads, "graph")

    def forward(self, batch: Sequence[Input]) -> Vector:
        """See `ports.Engine.forward`. Raises BadInput for what the model cannot read."""
        vectors = np.zeros((len(batch), self.dimensions), np.float32)
        if not batch:
            return vectors
        tokens = [len(one.ids) if one.ids is not None else 0 for one in batch]
        count = min(self._parts(tokens), len(batch))
        if count <= 1:
            run = self._narrow if count else self._wide
            return run(*self._rows.padded(batch))
        parts = shares(tokens, count)
        rows = [[batch[at] for at in part] for part in parts]
        for part, found in zip(parts, self._threads.map(self._part, rows), strict=True):
            vectors[part] = found
        return vectors

    def close(self) -> None:
        """Drop the weights."""
        self._threads.shutdown()
        del self._wide, self._narrow

    def _part(self, batch: Sequence[Input]) -> Vector:
        return self._narrow(*self._rows.padded(batch))
