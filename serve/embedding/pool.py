"""The engines of one embedder replica: checked, loaded, warmed up, measured.

Engines are chosen by `Model.engine` from one table; torch and sentence-transformers are imported
only when a model needs them, since that takes about 10 s.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from serve.config import Model
from serve.config import Pool as PoolSettings
from serve.embedding.fake import FakeEngine
from serve.embedding.files import model_folder, verify
from serve.embedding.graphs import Graphs
from serve.embedding.guard import checked
from serve.errors import ModelUnavailable, NotFound
from serve.ports import Engine
from serve.records import Input


log = logging.getLogger("headrace.pool")

Builder = Callable[[Model, PoolSettings], Engine]

SHORT_TOKENS = 3
"""One word between two special tokens."""


def _fake(model: Model, _: PoolSettings) -> Engine:
    return FakeEngine(model)


def _sentence_transformers(model: Model, settings: PoolSettings) -> Engine:
    from serve.embedding.sentence_transformers import (  # noqa: PLC0415  10 s to import
        SentenceTransformersEngine,
    )

    return SentenceTransformersEngine(
        model,
        model_folder(model),
        device="cuda" if settings.gpus > 0 else "cpu",
        threads=_threads(settings),
    )


def _onnx(model: Model, settings: PoolSettings) -> Engine:
    try:
        from serve.embedding.onnx import OnnxEngine  # noqa: PLC0415  headrace[onnx]
    except ImportError as error:
        raise ModelUnavailable(
            f"Model {model.id}: {error.name} is not installed; it comes with headrace[onnx]."
        ) from error
    graph = Graphs(Path(settings.graphs)).take(model, threads=_threads(settings))
    return OnnxEngine(model, graph, threads=_threads(settings))


def _threads(settings: PoolSettings) -> int:
    return max(1, int(settings.cpus))


BUILDERS: Mapping[str, Builder] = {
    "fake": _fake,
    "onnx": _onnx,
    "sentence_transformers": _sentence_transformers,
}


class Pool:
    """Holds the engines of one pool. Used from one thread at a time, never from an event loop.

    `builders` is for tests: engines by the word that stands in `Model.engine`.
    """

    def __init__(
        self,
        settings: PoolSettings,
        *,
        clock: Callable[[], float],
        builders: Mapping[str, Builder] = BUILDERS,
    ) -> None:
        self._settings = settings
        self._clock = clock
        self._builders = builders
        self._engines: dict[str, Engine] = {}
        self._warm_times: dict[str, list[tuple[int, float]]] = {}

    def load(self) -> None:
        """Verify, load and warm up every model; leaves nothing loaded when one of them fails.

        Raises ModelUnavailable (files, checksum, what the settings say of the model, vectors).
        """
        try:
            for model in self._settings.models:
                verify(model)
                engine = self._build(model)
                self._engines[model.id] = engine
                self._warm_times[model.id] = self._warm_up(model, engine)
        except BaseException:
            self.close()
            raise

    def engine(self, model_id: str) -> Engine:
        """The loaded engine. Raises NotFound for a model that this pool does not hold."""
        self._model(model_id)
        if model_id not in self._engines:
            raise ModelUnavailable(f"Model {model_id} is not loaded.", retry_after_s=5)
        return self._engines[model_id]

    def warm_times(self, model_id: str) -> Sequence[tuple[int, float]]:
        """(padded tokens, seconds) of the warm-up batches, shortest first. Raises NotFound."""
        self.engine(model_id)
        return tuple(self._warm_times[model_id])

    def probe(self, model_id: str) -> None:
        """One forward pass on a known good input. Raises what the engine raises, ModelUnavailable
        when its vector is not usable.
        """
        _forward(self._model(model_id), self.engine(model_id), (1, SHORT_TOKENS))

    def close(self) -> None:
        """Free every engine; a second call does nothing."""
        self._warm_times.clear()
        while self._engines:
            self._engines.popitem()[1].close()

    def _build(self, model: Model) -> Engine:
        """By the settings' word; torch where a graph cannot be had, which makes the same vectors."""
        try:
            return self._builders[model.engine](model, self._settings)
        except ModelUnavailable as error:
            if not model.torch_may_serve:
                raise
            log.warning("torch serves %s instead of ONNX Runtime: %s", model.id, error.message)
            return self._builders["sentence_transformers"](model, self._settings)

    def _model(self, model_id: str) -> Model:
        for model in self._settings.models:
            if model.id == model_id:
                return model
        raise NotFound(
            f"The model {model_id!r} is not in pool {self._settings.name}.",
            param="model",
            code="model_not_found",
        )

    def _warm_up(self, model: Model, engine: Engine) -> list[tuple[int, float]]:
        """Each shape twice: the first pass of a shape allocates and is not measured."""
        times: list[tuple[int, float]] = []
        for shape in _shapes(model, self._settings):
            _forward(model, engine, shape)
            began = self._clock()
            _forward(model, engine, shape)
            times.append((shape[0] * shape[1], self._clock() - began))
        return times


def _shapes(model: Model, settings: PoolSettings) -> list[tuple[int, int]]:
    """(inputs, tokens each): the shortest input, the longest, and a full batch of the longest."""
    longest = model.tokens_max
    full = min(settings.batch.tokens_max // longest, settings.batch.items_max)
    return sorted({(1, SHORT_TOKENS), (1, longest), (max(full, 1), longest)})


def _forward(model: Model, engine: Engine, shape: tuple[int, int]) -> None:
    """One pass over inputs of token 1, which every vocabulary has; the vectors must be usable."""
    inputs, tokens = shape
    batch = [Input(ids=np.ones(tokens, np.int32))] * inputs
    _, bad = checked(engine, batch)
    if bad:
        raise ModelUnavailable(f"Model {model.id}: its vectors are not finite.")
