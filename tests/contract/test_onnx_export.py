"""The exporter's own check, over simulated engines: a graph that differs is never handed out."""

from pathlib import Path

import numpy as np
import pytest

from serve.config import Model
from serve.embedding.fake import FakeEngine
from serve.embedding.graphs import FACTS, GRAPH, Graph
from serve.embedding.rows import Rows
from serve.embedding.sharing import ROW_TOKENS
from serve.errors import ModelUnavailable


MODEL = Model(id="fake", engine="fake", dimensions=16, tokens_max=64)


class Original(FakeEngine):
    composed = "padded"

    def in_rows(self):
        return "shared"

    rows = Rows(MODEL, vocab_size=258, pad_id=3, pad_left=True)


class Tilted(FakeEngine):
    """Differs in the longest input only."""

    def forward(self, batch):
        vectors = super().forward(batch)
        if len(batch[0].ids) == MODEL.tokens_max:
            vectors[0] = vectors[0][::-1]
        return vectors


class Lost(FakeEngine):
    """The longest input comes to no number."""

    def forward(self, batch):
        vectors = super().forward(batch)
        if len(batch[0].ids) == MODEL.tokens_max:
            vectors[0] = np.nan
        return vectors


@pytest.fixture
def exporting(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    from serve.embedding import onnx_export  # noqa: PLC0415  it imports torch

    def export(ours: type[FakeEngine], shared: type[FakeEngine] | None = None) -> Graph:
        monkeypatch.setattr(
            onnx_export, "SentenceTransformersEngine", lambda model, *_, **__: Original(model)
        )
        ways = {0: ours, ROW_TOKENS: shared or ours}
        monkeypatch.setattr(
            onnx_export, "OnnxEngine", lambda model, graph, **_: ways[graph.row_tokens](model)
        )
        monkeypatch.setattr(onnx_export, "model_folder", lambda _: tmp_path)
        monkeypatch.setattr(onnx_export, "_save", lambda form, path: path.write_text(form))
        return onnx_export.export(MODEL, tmp_path, threads=1)

    return export


def test_a_graph_that_equals_torch_is_written_down(exporting, tmp_path):
    made = exporting(FakeEngine)
    assert made == Graph.read(tmp_path)
    assert (made.vocab_size, made.pad_id, made.pad_left) == (258, 3, True)
    assert made.cosine_min == pytest.approx(1)
    assert made.files.keys() == {GRAPH}
    assert (made.row_tokens, made.path.read_text()) == (ROW_TOKENS, "shared")


def test_where_inputs_that_share_rows_change_each_has_its_own(exporting, tmp_path, caplog):
    made = exporting(FakeEngine, shared=Tilted)
    assert made == Graph.read(tmp_path)
    assert (made.row_tokens, made.path.read_text()) == (0, "padded")
    assert "inputs of fake get rows of their own: " in caplog.text


@pytest.mark.parametrize("ours", [Tilted, Lost])
def test_a_graph_that_differs_in_one_row_is_refused(exporting, tmp_path, ours):
    with pytest.raises(ModelUnavailable, match="differs from torch: cosine"):
        exporting(ours)
    assert not (tmp_path / FACTS).exists()
