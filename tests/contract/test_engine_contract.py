"""What every engine promises (`ports.Engine`), over the simulated and the real ones."""

import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from serve.config import Model, Settings
from serve.embedding.fake import FakeEngine
from serve.embedding.files import model_folder
from serve.embedding.graphs import Graphs
from serve.embedding.guard import checked
from serve.embedding.sharing import ROW_TOKENS
from serve.embedding.tokenizer import Tokenizer
from serve.errors import BadInput, ModelUnavailable
from serve.ports import Engine
from serve.records import Input


pytestmark = pytest.mark.timeout(400)  # the first run of all makes a graph

ROOT = Path(__file__).parents[2]
GRAPHS = ROOT / "data" / "graphs"
MINILM = Settings().pools[0].models[0]
INT8 = MINILM.model_copy(update={"precision": "int8"})
FAKE = Model(id="fake", engine="fake", dimensions=64, tokens_max=256)

TEXTS = [
    "How do I reset my password?",
    "A headrace is the channel that holds water back and feeds it evenly to the turbines.",
    "x",
    "Der Fluss führt im Frühling mehr Wasser als im Sommer.",
    "春天的河水比夏天多。",
    "👍🏽 emoji, punctuation -- and numbers 3.14159!",
    "The quick brown fox jumps over the lazy dog. " * 18,
    "How can I change my password?",
]


class Subject:
    """An engine with what a test must know of it.

    `likeness` is the least cosine of an input to itself in other company: int8 has one scale for all
    of a batch.
    """

    def __init__(self, model: Model, engine: Engine) -> None:
        self.model = model
        self.likeness = 0.97 if model.precision == "int8" else 0.9999
        self.engine = engine
        self.tokenizer = Tokenizer.open(model)

    def inputs(self, texts: list[str]) -> list[Input]:
        limit = self.model.tokens_max
        rows = self.tokenizer.encode(texts)
        return [Input(ids=self.tokenizer.truncate(row, limit)) for row in rows]


@pytest.fixture(
    scope="module",
    params=["fake", "onnx", "onnx_int8", "onnx_bfloat16", "sentence_transformers"],
)
def subject(request: pytest.FixtureRequest) -> Iterator[Subject]:
    if request.param == "fake":
        found = Subject(FAKE, FakeEngine(FAKE))
    else:
        model = INT8 if request.param == "onnx_int8" else MINILM
        found = Subject(model, MINILMS[request.param](model))
    yield found
    found.engine.close()


@pytest.fixture(scope="module", params=["onnx", "onnx_bfloat16", "sentence_transformers"])
def minilm(request: pytest.FixtureRequest) -> Iterator[Subject]:
    found = Subject(MINILM, MINILMS[request.param](MINILM))
    yield found
    found.engine.close()


def _torch(model: Model) -> Engine:
    from serve.embedding.sentence_transformers import SentenceTransformersEngine  # noqa: PLC0415

    return SentenceTransformersEngine(model, model_folder(MINILM), device="cpu", threads=1)


def _onnx(model: Model) -> Engine:
    from serve.embedding.onnx import OnnxEngine  # noqa: PLC0415

    kept = INT8 if model.precision == "int8" else MINILM
    return OnnxEngine(model, Graphs(GRAPHS).take(kept, threads=2), threads=1)


def _bfloat16(model: Model) -> Engine:
    from serve.embedding.openvino import OpenVinoEngine  # noqa: PLC0415

    graph = Graphs(GRAPHS).take(MINILM, threads=2)
    try:
        return OpenVinoEngine(model, graph, threads=2)
    except ModelUnavailable as error:
        if "does not compute in bfloat16" not in error.message:
            raise
        pytest.skip(error.message)


MINILMS = {
    "onnx": _onnx,
    "onnx_int8": _onnx,
    "onnx_bfloat16": _bfloat16,
    "sentence_transformers": _torch,
}


def test_short_inputs_share_rows_of_a_graph() -> None:
    assert _onnx(MINILM).row_tokens == _onnx(INT8).row_tokens == ROW_TOKENS


def test_rows_are_unit_float32_in_one_piece(subject: Subject) -> None:
    vectors = subject.engine.forward(subject.inputs(TEXTS))
    assert vectors.dtype == np.float32
    assert vectors.shape == (len(TEXTS), subject.model.dimensions)
    assert vectors.flags.c_contiguous
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    assert checked(subject.engine, subject.inputs(TEXTS))[1] == frozenset()


def test_an_input_alone_equals_itself_in_a_mixed_batch(subject: Subject) -> None:
    together = subject.engine.forward(subject.inputs(TEXTS))
    for row, one in enumerate(subject.inputs(TEXTS)):
        alone = subject.engine.forward([one])[0]
        assert float(alone @ together[row]) > subject.likeness


def test_rows_are_in_the_order_of_the_inputs(subject: Subject) -> None:
    there = subject.engine.forward(subject.inputs(TEXTS))
    back = subject.engine.forward(subject.inputs(TEXTS[::-1]))
    similar = there @ back[::-1].T
    assert similar.argmax(axis=1).tolist() == list(range(len(TEXTS)))
    assert similar.diagonal().min() > subject.likeness


def test_texts_that_share_words_are_nearer(subject: Subject) -> None:
    vectors = subject.engine.forward(subject.inputs(TEXTS))
    assert vectors[0] @ vectors[7] > vectors[0] @ vectors[1] + 0.2


def test_an_empty_batch_gives_no_rows(subject: Subject) -> None:
    vectors = subject.engine.forward([])
    assert vectors.shape == (0, subject.model.dimensions)
    assert vectors.dtype == np.float32


def test_the_longest_input_is_read_to_its_end(subject: Subject) -> None:
    limit = subject.model.tokens_max
    first, second = subject.inputs(["word " * 400, "word " * 400])
    assert first.ids is not None
    assert second.ids is not None
    assert len(first.ids) == limit
    second.ids[limit - 2] = second.ids[limit - 3] + 1
    vectors = subject.engine.forward([first, second])
    assert not np.array_equal(vectors[0], vectors[1])


def test_an_input_beyond_the_limit_is_refused_not_cut(subject: Subject) -> None:
    ids = np.ones(subject.model.tokens_max + 1, np.int32)
    with pytest.raises(BadInput, match="257 tokens"):
        subject.engine.forward([Input(ids=ids)])


def test_an_input_of_another_kind_is_refused(subject: Subject) -> None:
    assert subject.engine.accepts == {"ids"}
    with pytest.raises(BadInput, match="not text"):
        subject.engine.forward([Input(text="hello")])


def test_it_works_in_a_thread_that_is_not_the_one_that_made_it(subject: Subject) -> None:
    here = subject.engine.forward(subject.inputs(TEXTS[:2]))
    found: list[np.ndarray] = []
    thread = threading.Thread(
        target=lambda: found.append(subject.engine.forward(subject.inputs(TEXTS[:2])))
    )
    thread.start()
    thread.join()
    np.testing.assert_allclose(found[0], here, atol=1e-6)


# --- only MiniLM ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def reference() -> np.ndarray:
    from sentence_transformers import SentenceTransformer  # noqa: PLC0415

    model = SentenceTransformer(str(model_folder(MINILM)), device="cpu", local_files_only=True)
    return np.asarray(model.encode(TEXTS, batch_size=3, normalize_embeddings=True))


def test_minilm_equals_sentence_transformers_encode(minilm: Subject, reference: np.ndarray) -> None:
    vectors = minilm.engine.forward(minilm.inputs(TEXTS))
    assert (vectors * reference).sum(axis=1).min() > 0.9999


def test_minilm_refuses_ids_beyond_its_table(minilm: Subject) -> None:
    with pytest.raises(BadInput, match="30522"):
        minilm.engine.forward([Input(ids=np.array([101, 30522, 102], np.int32))])


def test_a_graph_equals_torch_in_batches_of_every_shape() -> None:
    graph, torch = _onnx(MINILM), _torch(MINILM)
    rng = np.random.default_rng(7)
    for longest, inputs in [(1, 1), (2, 64), (256, 4), (31, 2), (255, 1)]:
        lengths = [longest, *rng.integers(1, longest + 1, inputs - 1)]
        batch = [Input(ids=rng.integers(999, 30522, n).astype(np.int32)) for n in lengths]
        cosines = (graph.forward(batch) * torch.forward(batch)).sum(axis=1)
        assert cosines.min() > 0.9999


def test_a_graph_in_int8_says_what_it_costs_and_is_as_readable_as_its_original() -> None:
    exact = Graphs(GRAPHS).take(MINILM, threads=2)
    coarse = Graphs(GRAPHS).take(INT8, threads=2)
    assert exact.cosine_min > 0.9999
    assert exact.loss == {}
    assert coarse.files.keys() == exact.files.keys() == {"graph.onnx", "graph.onnx.data"}
    modes = [
        (graph.folder / name).stat().st_mode for graph in (exact, coarse) for name in exact.files
    ]
    assert len(set(modes)) == 1
    assert (
        0.95 < coarse.cosine_min <= coarse.loss["cosine_min"] < coarse.loss["cosine_mean"] < 0.999
    )
    assert coarse.loss["top10_overlap"] > 0.8
    assert coarse.loss["texts"] == 400


def test_int8_is_near_float32_and_not_the_same() -> None:
    exact, coarse = Subject(MINILM, _onnx(MINILM)), Subject(INT8, _onnx(INT8))
    cosines = (
        exact.engine.forward(exact.inputs(TEXTS)) * coarse.engine.forward(coarse.inputs(TEXTS))
    ).sum(axis=1)
    assert 0.95 < cosines.min() < 0.9999


def test_a_graph_that_is_kept_is_served_without_torch() -> None:
    """Importing torch takes ten seconds and 300 MB; its import here is what fails this test."""
    Graphs(GRAPHS).take(MINILM, threads=2)
    code = (
        "import sys, time\n"
        "from pathlib import Path\n"
        "from serve.config import Settings\n"
        "from serve.embedding.pool import Pool\n"
        f"[settings] = Settings().under(Path({str(GRAPHS.parent)!r})).pools\n"
        "pool = Pool(settings, clock=time.monotonic)\n"
        "pool.load()\n"
        "names = ('torch', 'transformers', 'sentence_transformers', 'onnx', 'onnxscript')\n"
        "print([n for n in names if n in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


def test_a_graph_that_cannot_be_loaded_is_unavailable(tmp_path: Path) -> None:
    from serve.embedding.onnx import OnnxEngine  # noqa: PLC0415

    (tmp_path / "graph.onnx").write_bytes(b"no graph")
    graph = replace(Graphs(GRAPHS).take(MINILM, threads=2), folder=tmp_path)
    with pytest.raises(ModelUnavailable, match="cannot be loaded"):
        OnnxEngine(MINILM, graph, threads=1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dimensions": 512}, "384 dimensions, the settings say 512"),
        ({"tokens_max": 512}, "reads 256 tokens, the settings say 512"),
    ],
)
def test_settings_that_are_not_the_models_are_refused(change: dict[str, int], message: str) -> None:
    with pytest.raises(ModelUnavailable, match=message):
        _torch(MINILM.model_copy(update=change))


def test_a_folder_without_a_model_is_unavailable(tmp_path) -> None:
    from serve.embedding.sentence_transformers import SentenceTransformersEngine  # noqa: PLC0415

    with pytest.raises(ModelUnavailable, match="loading failed"):
        SentenceTransformersEngine(MINILM, tmp_path, device="cpu", threads=1)
