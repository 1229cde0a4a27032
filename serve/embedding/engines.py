"""Which engine runs a model, and what has to be imported for it: the table of `Pool`.

torch and sentence-transformers are imported only when a model needs them, since that takes about 10 s.
"""

import logging
from collections.abc import Callable, Mapping
from contextlib import suppress
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from serve.config import Model
from serve.config import Pool as PoolSettings
from serve.embedding import cpu, memory
from serve.embedding.fake import FakeEngine
from serve.embedding.files import model_folder
from serve.embedding.graphs import Graph, Graphs
from serve.embedding.likeness import checks, cosine_min
from serve.errors import ModelUnavailable
from serve.ports import Engine


log = logging.getLogger("headrace.pool")

Builder = Callable[[Model, PoolSettings], Engine]

BFLOAT16 = "bfloat16"

COSINE_MIN = 0.9999
"""Of bfloat16 to float32, as between a graph and torch: MiniLM keeps 0.99996."""


def threads_of(settings: PoolSettings) -> int:
    """CPU threads of a replica."""
    return max(1, int(settings.cpus))


def slots_of(settings: PoolSettings) -> int:
    """How many hand-outs work at once: one for each CPU thread where all models run as graphs.

    Threads that share a batch wait for each other at every operation, or for the one with the larger
    part: three texts cannot be halved. A GPU, and torch, take one batch at a time.
    """
    graphs = settings.gpus == 0 and all(model.engine == "onnx" for model in settings.models)
    return threads_of(settings) if graphs else 1


def in_bfloat16(model: Model) -> bool:
    """Whether a graph is to run in bfloat16: asked for, or of use here and possible."""
    if model.precision == "auto":
        return cpu.has_bfloat16() and find_spec("openvino") is not None
    return model.precision == BFLOAT16


def _fake(model: Model, _: PoolSettings) -> Engine:
    return FakeEngine(model)


def _sentence_transformers(model: Model, settings: PoolSettings) -> Engine:
    from serve.embedding.cross_encoder import (  # noqa: PLC0415  10 s to import
        CrossEncoderEngine,
    )
    from serve.embedding.sentence_transformers import (  # noqa: PLC0415
        SentenceTransformersEngine,
    )

    made = CrossEncoderEngine if model.kind == "reranker" else SentenceTransformersEngine
    return made(
        model,
        model_folder(model),
        device="cuda" if settings.gpus > 0 else "cpu",
        threads=threads_of(settings),
    )


def _onnx(model: Model, settings: PoolSettings) -> Engine:
    try:
        from serve.embedding.onnx import OnnxEngine  # noqa: PLC0415  headrace[onnx]
    except ImportError as error:
        raise _missing(model, error, "onnx") from error
    threads = threads_of(settings)
    graph = Graphs(Path(settings.graphs)).take(model, threads=threads)
    if in_bfloat16(model):
        try:
            return _in_bfloat16(model, graph, threads)
        except ModelUnavailable as error:
            if model.precision == BFLOAT16:
                raise
            log.warning("%s is served in float32: %s", model.id, error.message)
    return OnnxEngine(model, graph, threads=threads)


def _in_bfloat16(model: Model, graph: Graph, threads: int) -> Engine:
    """The graph in bfloat16, compared with itself in float32 on this very CPU (0.3 to 0.4 s).

    Raises ModelUnavailable when it cannot be had, or its vectors are not the model's.
    """
    from serve.embedding.onnx import OnnxEngine  # noqa: PLC0415

    try:
        from serve.embedding.openvino import OpenVinoEngine  # noqa: PLC0415  headrace[openvino]
    except ImportError as error:
        raise _missing(model, error, "openvino") from error
    ours = OpenVinoEngine(model, graph, threads=threads)
    exact = OnnxEngine(model, graph, threads=threads)
    try:
        cosine = float(np.min([cosine_min(exact, ours, batch) for batch in checks(model)]))
    except Exception as error:  # the C++ libraries raise nothing narrower
        ours.close()
        raise ModelUnavailable(f"Model {model.id}: bfloat16 fails: {error}") from error
    finally:
        exact.close()
        memory.give_back()
    if not cosine >= COSINE_MIN:  # NaN compares as false
        ours.close()
        raise ModelUnavailable(
            f"Model {model.id}: bfloat16 loses too much: cosine {cosine:.5f} to float32, at least "
            f"{COSINE_MIN} is needed."
        )
    return ours


def _missing(model: Model, error: ImportError, extra: str) -> ModelUnavailable:
    return ModelUnavailable(
        f"Model {model.id}: {error.name} is not installed; it comes with headrace[{extra}]."
    )


BUILDERS: Mapping[str, Builder] = {
    "fake": _fake,
    "onnx": _onnx,
    "sentence_transformers": _sentence_transformers,
}
"""By the word that stands in `Model.engine`."""


def import_runtime(builder: Builder, model: Model) -> None:
    """What a builder imports stays when models leave, so it has to be in memory before one is
    measured: 400 MB with torch.
    """
    names = []
    if builder is _sentence_transformers:
        names.append("serve.embedding.cross_encoder")
    elif builder is _onnx:
        names.append("serve.embedding.onnx")
        if in_bfloat16(model):
            names.append("serve.embedding.openvino")
    for name in names:
        with suppress(ImportError):  # the builder says what is missing
            import_module(name)
