"""The default engine on a CPU: a graph in ONNX Runtime. The only door to that library.

One short text takes a third of torch's time, and a replica that runs a graph imports no torch,
which is 10 s of its start and 400 MB.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import onnxruntime

from serve.config import Model
from serve.embedding.graphs import Graph
from serve.embedding.packing import shares
from serve.embedding.rows import Rows
from serve.errors import ModelUnavailable
from serve.records import Input, InputKind, Vector


IDS, MASK, VECTORS = "input_ids", "attention_mask", "vectors"
"""Names inside a graph: ids and mask in, float32 rows of unit length out."""

PART_ROWS_MIN = 2
"""Inputs that a thread takes by itself, at least."""

ERRORS_ONLY = 3
"""ONNX Runtime's level of logging."""


class OnnxEngine:
    """Implements `ports.Engine` over a checked graph: the model's own vectors (cosine > 0.9999)."""

    accepts: frozenset[InputKind] = frozenset({"ids"})

    def __init__(self, model: Model, graph: Graph, *, threads: int) -> None:
        """Raises ModelUnavailable when the graph cannot be loaded."""
        self.dimensions = model.dimensions
        self._rows = Rows(
            model, vocab_size=graph.vocab_size, pad_id=graph.pad_id, pad_left=graph.pad_left
        )
        self._threads = threads
        self._parts = ThreadPoolExecutor(threads, "graph")
        try:
            self._wide = _session(graph, threads)
            self._narrow = self._wide if threads == 1 else _session(graph, 1)
        except Exception as error:  # the C++ library raises nothing narrower
            raise ModelUnavailable(f"Model {model.id}: its graph cannot be loaded: {error}") from (
                error
            )

    def forward(self, batch: Sequence[Input]) -> Vector:
        """See `ports.Engine.forward`. Raises BadInput for what the model cannot read.

        A few inputs have all threads for each operation. Of more, each thread takes a part through
        the whole graph: threads that need not meet at every operation take a fifth to a quarter less
        for 16 or 32 short texts, and as long for passages.
        """
        vectors = np.zeros((len(batch), self.dimensions), np.float32)
        if len(batch) < PART_ROWS_MIN * self._threads or self._threads == 1:
            return self._run(self._wide, batch) if batch else vectors
        parts = shares([len(one.ids) if one.ids is not None else 0 for one in batch], self._threads)
        rows = [[batch[at] for at in part] for part in parts]
        for part, found in zip(parts, self._parts.map(self._run_narrow, rows), strict=True):
            vectors[part] = found
        return vectors

    def close(self) -> None:
        """Drop the weights."""
        self._parts.shutdown()
        del self._wide, self._narrow

    def _run_narrow(self, batch: Sequence[Input]) -> Vector:
        return self._run(self._narrow, batch)

    def _run(self, session: onnxruntime.InferenceSession, batch: Sequence[Input]) -> Vector:
        ids, mask = self._rows.padded(batch)
        vectors: Vector
        [vectors] = session.run([VECTORS], {IDS: ids, MASK: mask})
        return vectors


def _session(graph: Graph, threads: int) -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(
        graph.path, _options(threads), providers=["CPUExecutionProvider"]
    )


def _options(threads: int) -> onnxruntime.SessionOptions:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = ERRORS_ONLY
    # Threads that spin while they wait take their cores from other processes: with others at work
    # batches cost 25 % more CPU and took longer, for 0.6 ms less of a single text on an idle machine.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    # Plans are kept for each shape, and every batch has another. The arena stays on: it holds 38 MB
    # after batches of 1,024 tokens, and without it each of them takes 2,600 page faults, 7 % of its CPU.
    options.enable_mem_pattern = False
    return options
