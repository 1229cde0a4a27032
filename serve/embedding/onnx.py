"""The default engine on a CPU: a graph in ONNX Runtime. The only door to that library.

One short text takes a third of torch's time, and a replica that runs a graph imports no torch,
which is 10 s of its start and 400 MB.
"""

import onnxruntime

from serve.config import Model
from serve.embedding.denormals import flushed
from serve.embedding.graph_engine import VECTORS, Feed, GraphEngine, Run
from serve.embedding.graphs import Graph
from serve.errors import ModelUnavailable
from serve.records import Vector


WIDE_INPUTS = 1
"""Up to so many inputs for each thread, all threads together are quicker than one."""

ERRORS_ONLY = 3
"""ONNX Runtime's level of logging."""


class OnnxEngine(GraphEngine):
    """Over a checked graph: the model's own vectors (cosine > 0.9999)."""

    def __init__(self, model: Model, graph: Graph, *, threads: int) -> None:
        """Raises ModelUnavailable when the graph cannot be loaded."""
        wide = open_run(model, graph, threads)
        narrow = wide if threads == 1 else open_run(model, graph, 1)

        def small(inputs: int, _tokens: int) -> bool:
            return inputs <= WIDE_INPUTS * threads

        super().__init__(model, graph, wide=wide, narrow=narrow, small=small)


def open_run(model: Model, graph: Graph, threads: int) -> Run:
    """A session with so many threads. Raises ModelUnavailable when the graph cannot be loaded."""
    try:
        with flushed():  # the first session of a process sets its thread for good
            session = onnxruntime.InferenceSession(
                graph.path, _options(threads), providers=["CPUExecutionProvider"]
            )
    except Exception as error:  # the C++ library raises nothing narrower
        raise ModelUnavailable(f"Model {model.id}: its graph cannot be loaded: {error}") from error

    def run(feed: Feed) -> Vector:
        vectors: Vector
        with flushed():
            [vectors] = session.run([VECTORS], feed)
        return vectors

    return run


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
    # Of its own threads: see `denormals`.
    options.add_session_config_entry("session.set_denormal_as_zero", "1")
    return options
