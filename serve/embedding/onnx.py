"""The default engine on a CPU: a graph in ONNX Runtime. The only door to that library.

One short text takes a third of torch's time, and a replica that runs a graph imports no torch,
which is 10 s of its start and 400 MB.
"""

from collections.abc import Sequence

import numpy as np
import onnxruntime

from serve.config import Model
from serve.embedding.graphs import Graph
from serve.embedding.rows import Rows
from serve.errors import ModelUnavailable
from serve.records import Input, InputKind, Vector


IDS, MASK, VECTORS = "input_ids", "attention_mask", "vectors"
"""Names inside a graph: ids and mask in, float32 rows of unit length out."""

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
        try:
            self._session = onnxruntime.InferenceSession(
                graph.path, _options(threads), providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # the C++ library raises nothing narrower
            raise ModelUnavailable(f"Model {model.id}: its graph cannot be loaded: {error}") from (
                error
            )

    def forward(self, batch: Sequence[Input]) -> Vector:
        """See `ports.Engine.forward`. Raises BadInput for what the model cannot read."""
        if not batch:
            return np.zeros((0, self.dimensions), np.float32)
        ids, mask = self._rows.padded(batch)
        vectors: Vector
        [vectors] = self._session.run([VECTORS], {IDS: ids, MASK: mask})
        return vectors

    def close(self) -> None:
        """Drop the weights."""
        del self._session


def _options(threads: int) -> onnxruntime.SessionOptions:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = ERRORS_ONLY
    # Threads that spin while they wait take their cores from other processes: with others at work
    # batches cost 25 % more CPU and took longer, for 0.6 ms less of a single text on an idle machine.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    # Plans are kept for each shape, and every batch has another: after 120 batches 172 MB are held
    # without these two, 225 MB with them, at the same speed.
    options.enable_mem_pattern = False
    options.enable_cpu_mem_arena = False
    return options
