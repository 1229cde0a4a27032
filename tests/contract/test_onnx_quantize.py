"""The quantizer's own check, over simulated engines: what loses too much is never handed out."""

from pathlib import Path

import numpy as np
import pytest

from serve.config import Model
from serve.embedding import onnx_quantize
from serve.embedding.fake import FakeEngine
from serve.embedding.graphs import FACTS, GRAPH, Graph, checksums
from serve.errors import ModelUnavailable


MODEL = Model(id="fake", engine="fake", dimensions=16, tokens_max=64)


class Noisy(FakeEngine):
    """Off by a known angle: cosine 1 / sqrt(1 + 4 * noise^2)."""

    noise = 0.0

    def forward(self, batch):
        vectors = super().forward(batch)
        turned = np.concatenate([vectors[:, 1::2], -vectors[:, ::2]], axis=1)
        turned -= (turned * vectors).sum(axis=1, keepdims=True) * vectors
        turned /= np.linalg.norm(turned, axis=1, keepdims=True)
        vectors = vectors + 2 * self.noise * turned
        return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


class Lost(FakeEngine):
    """The longest input comes to no number."""

    def forward(self, batch):
        vectors = super().forward(batch)
        if len(batch) == 1 and len(batch[0].ids) == MODEL.tokens_max:
            vectors[0] = np.nan
        return vectors


@pytest.fixture
def original(tmp_path: Path) -> Graph:
    folder = tmp_path / "float32"
    folder.mkdir()
    (folder / GRAPH).write_bytes(b"nodes")
    graph = Graph(folder, checksums(folder), 258, 3, True, 0, 0.99999, {"torch": "2"})
    graph.write()
    return graph


@pytest.fixture
def quantizing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, original: Graph):
    def quantize(ours: type[FakeEngine]) -> Graph:
        folder = tmp_path / "int8"
        folder.mkdir()
        engines = {original.folder: FakeEngine, folder: ours}
        monkeypatch.setattr(
            onnx_quantize, "OnnxEngine", lambda model, graph, **_: engines[graph.folder](model)
        )
        monkeypatch.setattr(onnx_quantize, "_quantize", lambda _, path: path.write_bytes(b"int8"))
        return onnx_quantize.quantize(MODEL, folder, original.folder, threads=1)

    return quantize


def test_what_int8_costs_is_written_down(quantizing, tmp_path, monkeypatch):
    monkeypatch.setattr(Noisy, "noise", 0.1)
    made = quantizing(Noisy)
    assert made == Graph.read(tmp_path / "int8")
    assert (made.vocab_size, made.pad_id, made.pad_left) == (258, 3, True)
    assert made.cosine_min == pytest.approx(1.04**-0.5, abs=1e-4)
    assert made.loss["cosine_mean"] == pytest.approx(1.04**-0.5, abs=1e-4)
    assert 0 < made.loss["top10_overlap"] < 1
    assert made.loss["cosine_alone_min"] == pytest.approx(1, abs=1e-5)


def test_too_much_loss_is_refused(quantizing, tmp_path, monkeypatch):
    monkeypatch.setattr(Noisy, "noise", 0.2)
    with pytest.raises(ModelUnavailable, match=r"int8 loses too much: cosine 0\.92"):
        quantizing(Noisy)
    assert not (tmp_path / "int8" / FACTS).exists()


def test_a_row_without_a_number_is_refused(quantizing):
    with pytest.raises(ModelUnavailable, match="loses too much: cosine nan"):
        quantizing(Lost)


def test_a_damaged_original_is_refused(quantizing, original):
    original.path.write_bytes(b"x")
    with pytest.raises(ModelUnavailable, match="float32 cannot be read"):
        quantizing(FakeEngine)
