"""The same graph in bfloat16, by OpenVINO, on CPUs that multiply that. The only door to that library.

A batch takes a third of ONNX Runtime's time in float32 where a core has AMX, half where it has AVX-512
of bfloat16. ONNX Runtime itself has no such kernels on x86 (onnxruntime#19937).
"""

import sys
from functools import partial
from queue import LifoQueue
from typing import TYPE_CHECKING

from serve.config import Model
from serve.embedding.graph_engine import VECTORS, Feed, GraphEngine
from serve.embedding.graphs import Graph
from serve.embedding.onnx import open_run
from serve.errors import ModelUnavailable
from serve.records import Vector


# By itself it reports each import to its makers, over the network. Without this module it cannot.
sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]

import openvino  # noqa: E402


if TYPE_CHECKING:
    Free = LifoQueue[openvino.InferRequest]

DEVICE = "CPU"

FEW_TOKENS = 32
"""Up to here ONNX Runtime is quicker with all threads: 4.5 ms for a short text, against 5.5 to 9."""

FINE, FINE_UP_TO, COARSE = 4, 32, 8
"""Lengths are rounded up to a multiple of 4, above 32 tokens of 8. OpenVINO makes kernels for each
number of tokens in a batch that it has not seen, 13 ms in the median: this bounds how often.
"""


class OpenVinoEngine(GraphEngine):
    """Over a checked graph: the model's own vectors but for bfloat16's rounding. Whoever makes one
    compares it (`engines`). A few tokens that come alone go through ONNX Runtime in float32.
    """

    def __init__(self, model: Model, graph: Graph, *, threads: int) -> None:
        """Raises ModelUnavailable when the graph cannot be loaded, or this CPU has no bfloat16."""
        try:
            compiled = _compile(graph, threads)
        except Exception as error:  # the C++ library raises nothing narrower
            raise ModelUnavailable(f"Model {model.id}: its graph cannot be loaded: {error}") from (
                error
            )

        def small(_inputs: int, tokens: int) -> bool:
            return tokens <= FEW_TOKENS

        super().__init__(
            model,
            graph,
            wide=open_run(model, graph, threads),
            narrow=_Requests(compiled, threads).run,
            small=small,
            rounded=partial(rounded, tokens_max=model.tokens_max),
        )


class _Requests:
    """As many requests as threads; each serves one caller at a time."""

    def __init__(self, compiled: openvino.CompiledModel, threads: int) -> None:
        self._free: Free = LifoQueue()  # the one whose memory is warm comes first
        for _ in range(threads):
            self._free.put(compiled.create_infer_request())

    def run(self, feed: Feed) -> Vector:
        request = self._free.get()
        try:
            vectors: Vector = request.infer(feed, share_inputs=True)[VECTORS]
        finally:
            self._free.put(request)
        return vectors


def rounded(tokens: int, tokens_max: int) -> int:
    """The length that a row of so many tokens is padded to."""
    step = FINE if tokens <= FINE_UP_TO else COARSE
    return min(-(-tokens // step) * step, max(tokens, tokens_max))


def _compile(graph: Graph, threads: int) -> openvino.CompiledModel:
    """Raises ValueError when the CPU has no bfloat16, else what the library raises."""
    core = openvino.Core()
    if "BF16" not in core.get_property(DEVICE, "OPTIMIZATION_CAPABILITIES"):
        message = "this CPU does not compute in bfloat16"
        raise ValueError(message)
    options = {
        "INFERENCE_PRECISION_HINT": "bf16",
        # One stream a thread: streams never wait for each other, which halves the CPU of a batch.
        "NUM_STREAMS": threads,
        "INFERENCE_NUM_THREADS": threads,
        "ENABLE_CPU_PINNING": False,  # replicas of one machine would pin themselves to the same cores
    }
    return core.compile_model(core.read_model(graph.path), DEVICE, options)
