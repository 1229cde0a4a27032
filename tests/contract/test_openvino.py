"""The graph in bfloat16: only what is its own; the rest is the engines' contract."""

import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from serve.config import Settings
from serve.embedding.graphs import Graphs
from serve.errors import ModelUnavailable
from serve.records import Input


openvino = pytest.importorskip("openvino", reason="needs headrace[openvino]")

from serve.embedding import openvino as door  # noqa: E402  it imports the library
from serve.embedding.onnx import OnnxEngine  # noqa: E402
from serve.embedding.openvino import OpenVinoEngine, rounded  # noqa: E402


pytestmark = pytest.mark.timeout(400)  # the first run of all makes a graph

GRAPHS = Path(__file__).parents[2] / "data" / "graphs"
MINILM = Settings().pools[0].models[0]


@pytest.mark.parametrize(
    ("tokens", "longest", "padded"),
    [(1, 256, 4), (4, 256, 4), (9, 256, 12), (32, 256, 32), (33, 256, 40), (255, 256, 256)],
)
def test_lengths_are_rounded_up(tokens: int, longest: int, padded: int) -> None:
    assert rounded(tokens, longest) == padded


def test_but_never_beyond_what_the_model_reads() -> None:
    assert rounded(509, 510) == 510
    assert {rounded(n, 512) for n in range(1, 513)} == {*range(4, 33, 4), *range(40, 513, 8)}


def test_a_cpu_without_bfloat16_is_refused(monkeypatch) -> None:
    class Core:
        def get_property(self, *_: str) -> list[str]:
            return ["FP32", "INT8"]

    monkeypatch.setattr(door.openvino, "Core", Core)
    graph = Graphs(GRAPHS).take(MINILM, threads=2)
    with pytest.raises(ModelUnavailable, match="does not compute in bfloat16"):
        OpenVinoEngine(MINILM, graph, threads=1)


def test_it_tells_its_makers_nothing() -> None:
    """The library's own import sends an event unless it cannot; ours does not let it."""
    code = (
        "import sys\n"
        "import serve.embedding.openvino\n"
        "print([name for name in sys.modules if name.startswith('openvino_telemetry')],"
        " sys.modules['openvino_telemetry'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "['openvino_telemetry'] None"


in_bfloat16 = pytest.mark.skipif(
    "BF16" not in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"),
    reason="this CPU does not compute in bfloat16",
)


@in_bfloat16
def test_few_tokens_are_in_float32_and_more_in_bfloat16() -> None:
    graph = Graphs(GRAPHS).take(MINILM, threads=2)
    ours, exact = (kind(MINILM, graph, threads=2) for kind in (OpenVinoEngine, OnnxEngine))
    few = [Input(ids=np.arange(1000, 1016, dtype=np.int32))] * 2
    np.testing.assert_array_equal(ours.forward(few), exact.forward(few))
    many = [Input(ids=np.arange(1000, 1016, dtype=np.int32))] * 3
    cosines = (ours.forward(many) * exact.forward(many)).sum(axis=1)
    assert cosines.min() > 0.9999
    assert not np.array_equal(ours.forward(many), exact.forward(many))


@in_bfloat16
def test_many_threads_share_few_requests() -> None:
    graph = Graphs(GRAPHS).take(MINILM, threads=2)
    engine = OpenVinoEngine(MINILM, graph, threads=2)
    rng = np.random.default_rng(3)
    batches = [
        [Input(ids=rng.integers(999, 30522, 5 + at).astype(np.int32)) for _ in range(1 + at % 4)]
        for at in range(12)
    ]
    alone = [engine.forward(batch) for batch in batches]
    found: dict[int, np.ndarray] = {}
    threads = [
        threading.Thread(target=lambda at=at: found.update({at: engine.forward(batches[at])}))
        for at in range(len(batches))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for at, vectors in enumerate(alone):
        assert (found[at] * vectors).sum(axis=1).min() > 0.9999
    engine.close()
