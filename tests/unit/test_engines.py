"""Which engine runs a model: the table of the pool, and when a graph runs in bfloat16."""

import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from serve.config import Model, Settings
from serve.config import Pool as PoolSettings
from serve.embedding import cpu, engines
from serve.embedding.engines import BUILDERS, import_runtime, slots_of
from serve.errors import ModelUnavailable


[MINILM] = Settings().pools[0].models


class Turned:
    """An engine of two dimensions whose vectors lie at an angle to the first axis."""

    def __init__(self, angle: float) -> None:
        self.row = np.array([np.cos(angle), np.sin(angle)], np.float32)
        self.closed = False

    def forward(self, batch):
        return np.tile(self.row, (len(batch), 1))

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def made(monkeypatch):
    """Engines without their libraries: `exact`, and `ours` at the angle that a test sets."""
    found = SimpleNamespace(exact=Turned(0.0), ours=Turned(0.001), threads=[])

    def onnx(_model, _graph, *, threads):
        found.threads.append(threads)
        return found.exact

    def openvino(_model, _graph, *, threads):
        found.threads.append(threads)
        if isinstance(found.ours, Exception):
            raise found.ours
        return found.ours

    monkeypatch.setitem(
        sys.modules, "serve.embedding.onnx", SimpleNamespace(OnnxEngine=onnx, open_run=None)
    )
    monkeypatch.setitem(
        sys.modules, "serve.embedding.openvino", SimpleNamespace(OpenVinoEngine=openvino)
    )
    monkeypatch.setattr(engines.Graphs, "take", lambda *_, **__: None)
    monkeypatch.setattr(engines.cpu, "has_bfloat16", lambda: True)
    monkeypatch.setattr(engines, "find_spec", lambda _: True)
    return found


def build(**fields) -> object:
    model = MINILM.model_copy(update=fields)
    return BUILDERS["onnx"](model, PoolSettings(models=(model,), cpus=2))


def test_a_graph_runs_in_bfloat16_where_the_cpu_knows_it(made) -> None:
    assert build() is made.ours
    assert made.exact.closed
    assert not made.ours.closed
    assert set(made.threads) == {2}


@pytest.mark.parametrize("precision", ["float32", "int8"])
def test_but_not_where_the_settings_say_otherwise(made, precision) -> None:
    assert build(precision=precision) is made.exact


def test_nor_by_itself_on_other_cpus_or_without_the_library(made, monkeypatch) -> None:
    monkeypatch.setattr(engines, "find_spec", lambda _: None)
    assert build() is made.exact
    monkeypatch.setattr(engines, "find_spec", lambda _: True)
    monkeypatch.setattr(engines.cpu, "has_bfloat16", lambda: False)
    assert build() is made.exact
    assert build(precision="bfloat16") is made.ours


@pytest.mark.parametrize("angle", [0.02, float("nan")])
def test_vectors_that_are_not_the_models_are_not_served(made, caplog, angle) -> None:
    made.ours = Turned(angle)
    assert build() is made.exact
    assert made.ours.closed
    assert "all-MiniLM-L6-v2 is served in float32" in caplog.text
    assert "bfloat16 loses too much" in caplog.text
    with pytest.raises(ModelUnavailable, match="bfloat16 loses too much"):
        build(precision="bfloat16")


def test_what_openvino_cannot_load_runs_in_float32_unless_it_must_not(made, caplog) -> None:
    made.ours = ModelUnavailable("no such operation")
    assert build() is made.exact
    assert "no such operation" in caplog.text
    with pytest.raises(ModelUnavailable, match="no such operation"):
        build(precision="bfloat16")


def test_what_fails_in_bfloat16_runs_in_float32(made, monkeypatch, caplog) -> None:
    monkeypatch.setattr(made.ours, "forward", lambda _: 1 / 0, raising=False)
    assert build() is made.exact
    assert made.ours.closed
    assert "bfloat16 fails" in caplog.text


def test_a_missing_library_is_named_with_its_extra(made, monkeypatch) -> None:
    monkeypatch.delitem(sys.modules, "serve.embedding.openvino")
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(ModelUnavailable, match=r"openvino is not installed.*headrace\[openvino\]"):
        build(precision="bfloat16")


def test_the_runtimes_of_a_model_are_imported_before_it_is_measured(made, monkeypatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr(engines, "import_module", asked.append)
    import_runtime(BUILDERS["onnx"], MINILM)
    import_runtime(BUILDERS["onnx"], MINILM.model_copy(update={"precision": "int8"}))
    import_runtime(BUILDERS["fake"], Model(id="f", engine="fake", dimensions=2, tokens_max=8))
    onnx, openvino = "serve.embedding.onnx", "serve.embedding.openvino"
    assert asked == [onnx, openvino, onnx]


def test_a_missing_runtime_is_left_to_the_builder(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "serve.embedding.sentence_transformers", None)
    import_runtime(BUILDERS["sentence_transformers"], MINILM)


@pytest.mark.parametrize(
    ("words", "fields", "slots"),
    [
        (("onnx",), {"cpus": 4}, 4),
        (("onnx", "onnx"), {"cpus": 2}, 2),
        (("onnx",), {"cpus": 0.5}, 1),
        (("onnx", "fake"), {"cpus": 2}, 1),
        (("sentence_transformers",), {"cpus": 2}, 1),
        (("sentence_transformers",), {"cpus": 2, "gpus": 1}, 1),
    ],
)
def test_graphs_have_a_slot_for_each_thread_and_others_one(words, fields, slots) -> None:
    models = tuple(
        MINILM.model_copy(update={"id": f"m{at}", "engine": word}) for at, word in enumerate(words)
    )
    assert slots_of(PoolSettings(models=models, **fields)) == slots


# --- the processor --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "found"),
    [
        ("fpu amx_bf16 avx512_vnni amx_tile", True),
        ("fpu avx512_bf16 amx_tile", True),
        ("fpu avx512_vnni amx_tile", False),
        ("fpu xamx_bf16", False),
    ],
)
def test_bfloat16_is_read_from_the_processors_flags(
    tmp_path: Path, monkeypatch, flags, found
) -> None:
    path = tmp_path / "cpuinfo"
    path.write_text(f"processor : 0\nvmx flags\t: amx_bf16\nflags\t\t: {flags}\n")
    monkeypatch.setattr(cpu, "CPUINFO", path)
    assert cpu.has_bfloat16() is found


def test_no_bfloat16_where_the_system_tells_nothing(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(cpu, "CPUINFO", tmp_path / "none")
    assert not cpu.has_bfloat16()
