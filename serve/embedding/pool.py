"""The engines of one embedder replica: checked, loaded, warmed up, measured, closed.

`engines` makes them. Which models are loaded when is decided by `holdings`; what their warm-up finds
is kept by `profiles`.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import numpy as np

from serve.config import Model
from serve.config import Pool as PoolSettings
from serve.embedding import memory
from serve.embedding.budget import choose
from serve.embedding.cpu import cpu_name
from serve.embedding.engines import BUILDERS, Builder, import_runtime, slots_of, threads_of
from serve.embedding.files import verify, weights_bytes
from serve.embedding.guard import checked, out_of_memory
from serve.embedding.holdings import Holdings
from serve.embedding.packing import Pace
from serve.embedding.profiles import Place, Profile, Profiles
from serve.errors import ModelUnavailable, NotFound
from serve.ports import Engine
from serve.records import Input


log = logging.getLogger("headrace.pool")

SHORT_TOKENS = 3
"""One word between two special tokens."""

PROBE_S_MAX = 0.7
"""Of a first start, for what it does not need: sizes in between, and third passes against noise."""


class Pool:
    """Holds the engines of one pool. Everything but `engine` and `profile` is called from threads, never
    from an event loop: loads, unloads and `close` from one at a time, `probe` and `relieve` also beside
    them. `holdings` belongs to whoever runs the pool; `slots` threads may call an engine at once.

    `builders` is for tests: engines by the word that stands in `Model.engine`. So is `held`: the
    memory of this process, of which a model's is the difference that its load makes.
    """

    def __init__(
        self,
        settings: PoolSettings,
        *,
        clock: Callable[[], float],
        builders: Mapping[str, Builder] = BUILDERS,
        held: Callable[[], int] | None = None,
    ) -> None:
        self.holdings = Holdings(settings)
        self.slots = slots_of(settings)
        self._settings = settings
        self._clock = clock
        self._builders = builders
        self._held = held or memory.resident_bytes
        self._engines: dict[str, Engine] = {}
        self._known: dict[str, Profile] = {}  # as first measured, here or before
        self._latest: dict[str, Profile] = {}  # as of the last load
        self._profiles: Profiles | None = None

    def load(self) -> None:
        """Load every pinned model; leaves nothing loaded when one of them fails.

        Raises ModelUnavailable (files, checksum, what the settings say of the model, vectors, memory).
        """
        self._find_device()
        try:
            for model in self._settings.models:
                if model.pinned:
                    size_bytes = self.load_one(model.id).bytes
                    self._refuse_excess(model, size_bytes)
                    self.holdings.loaded(model.id, size_bytes, self._clock())
                else:
                    self.holdings.expect(model.id, self._likely_bytes(model))
        except BaseException:
            self.close()
            raise

    def load_one(self, model_id: str) -> Profile:
        """Verify, load and warm up one model; what was measured. Leaves nothing when it fails.

        Raises NotFound, ModelUnavailable, and what a runtime raises.
        """
        model = self._model(model_id)
        verify(model)
        engine, before = self._build(model)
        try:
            profile = self._warm_up(model, engine, before)
        except BaseException:
            engine.close()
            raise
        self._latest[model_id] = profile
        self._engines[model_id] = engine
        return profile

    def unload(self, model_id: str) -> None:
        """Close a model's engine and give its memory back; a no-op when it is not loaded."""
        engine = self._engines.pop(model_id, None)
        if engine is not None:
            engine.close()
        del engine
        memory.give_back()
        self.relieve()

    def engine(self, model_id: str) -> Engine:
        """The loaded engine. Raises NotFound for a model that this pool does not have."""
        self._model(model_id)
        if model_id not in self._engines:
            raise ModelUnavailable(f"Model {model_id} is not loaded.", retry_after_s=5)
        return self._engines[model_id]

    def profile(self, model_id: str) -> Profile | None:
        """What is known of a model, by this load or an earlier one. Raises NotFound."""
        self._model(model_id)
        return self._latest.get(model_id) or self._known.get(model_id)

    def probe(self, model_id: str) -> None:
        """One forward pass on a known good input. Raises what the engine raises, ModelUnavailable
        when its vector is not usable.
        """
        _forward(self._model(model_id), self.engine(model_id), (1, SHORT_TOKENS))

    def relieve(self) -> None:
        """Free what a GPU's allocator keeps for later; nothing on a CPU."""
        if self._on_cuda():
            from serve.embedding import cuda  # noqa: PLC0415  torch

            cuda.give_back()

    def card_bytes(self) -> tuple[int, int] | None:
        """Of the GPU: what is taken, by whomever, and all of it; None without one."""
        if not self._on_cuda():
            return None
        from serve.embedding import cuda  # noqa: PLC0415  torch

        return cuda.card_bytes()

    def close(self) -> None:
        """Free every engine; a second call does nothing."""
        self._known.clear()
        self._latest.clear()
        while self._engines:
            self._engines.popitem()[1].close()

    def _find_device(self) -> None:
        """Know the device, how its memory is counted, and how much of it there is for us."""
        device = cpu_name()
        if self._on_cuda():
            from serve.embedding import cuda  # noqa: PLC0415  torch

            device, self._held = cuda.device_name(), cuda.held_bytes
            if self._settings.gpus < 1:
                bound = cuda.reserve(self._settings.gpus)
                self.holdings.bytes_max = min(bound, self.holdings.bytes_max or bound)
        place = Place(device, threads_of(self._settings), self._settings.batch)
        self._profiles = Profiles(Path(self._settings.profiles), place)

    def _on_cuda(self) -> bool:
        real = any(model.engine != "fake" for model in self._settings.models)
        return real and self._settings.gpus > 0

    def _refuse_excess(self, model: Model, size_bytes: int) -> None:
        most, held = self.holdings.bytes_max, self.holdings.bytes
        if most is not None and held + size_bytes > most:
            raise ModelUnavailable(
                f"Model {model.id} takes {size_bytes} bytes beside {held} of other pinned models; "
                f"pool {self._settings.name} has {most}."
            )

    def _build(self, model: Model) -> tuple[Engine, int]:
        """By the settings' word; torch where a graph cannot be had, which makes the same vectors.

        Also the memory that was held before the engine was made, but after its runtime was imported.
        """
        try:
            return self._made_by(model.engine, model)
        except ModelUnavailable as error:
            if not model.torch_may_serve:
                raise
            log.warning("torch serves %s instead of ONNX Runtime: %s", model.id, error.message)
            return self._made_by("sentence_transformers", model)

    def _made_by(self, word: str, model: Model) -> tuple[Engine, int]:
        builder = self._builders[word]
        import_runtime(builder, model)
        before = self._held()
        return builder(model, self._settings), before

    def _model(self, model_id: str) -> Model:
        for model in self._settings.models:
            if model.id == model_id:
                return model
        raise NotFound(
            f"The model {model_id!r} is not in pool {self._settings.name}.",
            param="model",
            code="model_not_found",
        )

    def _likely_bytes(self, model: Model) -> int:
        """As measured before, else the size of its weights. Also makes what was measured known."""
        kept = self._kept(model)
        if kept is None:
            return model.fake_bytes if model.engine == "fake" else weights_bytes(model)
        self._known[model.id] = kept
        return kept.bytes

    def _kept(self, model: Model) -> Profile | None:
        if model.engine == "fake" or self._profiles is None:
            return None
        return self._profiles.find(model)

    def _warm_up(self, model: Model, engine: Engine, before: int) -> Profile:
        """Two passes show that it works; at a first start more find its pace and budget.

        Replicas that start together take turns at that, and the later ones take what the first found.
        """
        kept = self._of_engine(engine, self._known.get(model.id) or self._kept(model))
        if kept is None:
            with self._turn(model):
                kept = self._of_engine(engine, self._kept(model))
                if kept is None:
                    return self._first(model, engine, before)
        return self._as_before(model, engine, before, kept)

    @staticmethod
    def _of_engine(engine: Engine, profile: Profile | None) -> Profile | None:
        same = profile is not None and profile.engine == type(engine).__name__
        return profile if same else None

    def _turn(self, model: Model) -> AbstractContextManager[None]:
        if model.engine == "fake" or self._profiles is None:
            return nullcontext()
        return self._profiles.turn()

    def _as_before(self, model: Model, engine: Engine, before: int, kept: Profile) -> Profile:
        """A model is said to take no less than at its first load: the next one may get pages that this
        process has already. Where memory is too short for its budget now, the next load tries it again.
        """
        self._known[model.id] = kept
        proved = self._prove(model, engine, kept.budget_tokens)
        size_bytes = max(self._held() - before, kept.bytes)
        budget = kept.budget_tokens if proved else self._least()
        return kept.model_copy(update={"bytes": size_bytes, "budget_tokens": budget})

    def _first(self, model: Model, engine: Engine, before: int) -> Profile:
        times = self._measure(model, engine, _shapes(model, self._settings))
        pace = Pace.fit(times)
        profile = Profile(
            overhead_s=pace.overhead_s,
            token_s=pace.token_s,
            budget_tokens=self._budget(model, times),
            bytes=max(self._held() - before, 0),
            engine=type(engine).__name__,
            made_of={} if self._profiles is None else self._profiles.made_of(model),
        )
        if model.engine != "fake" and self._profiles is not None:
            self._profiles.keep(model, profile)
        self._known[model.id] = profile
        return profile

    def _least(self) -> int:
        return min(self._settings.batch.tokens_min, self._settings.batch.tokens_max)

    def _budget(self, model: Model, times: Sequence[tuple[int, float]]) -> int:
        """The best that was measured; all that is allowed where that is the largest batch there was."""
        best, largest = choose(times, least=self._least()), max(times)[0]
        complete = largest == max(
            inputs * tokens for inputs, tokens in _shapes(model, self._settings)
        )
        return self._settings.batch.tokens_max if best == largest and complete else best

    def _measure(
        self, model: Model, engine: Engine, shapes: Sequence[tuple[int, int]]
    ) -> list[tuple[int, float]]:
        """(padded tokens, seconds) of each shape, shortest first; those that memory allows.

        The shortest, one longest and a full batch are needed, twice: the first pass of a shape
        allocates. More is done as long as it is predicted to end within `PROBE_S_MAX`.
        """
        times: list[tuple[int, float]] = []
        spare_s = PROBE_S_MAX
        for inputs, tokens in shapes:
            size = inputs * tokens
            likely_s = times[-1][1] * size / times[-1][0] if times else 0.0
            needed = inputs == 1 or (inputs, tokens) == shapes[-1]
            extra = 1 if needed else 3
            if extra * likely_s <= spare_s:
                spare_s -= extra * likely_s
                passes = 3
            elif needed:
                passes = 2
            else:
                continue
            if not self._fits(model, engine, (inputs, tokens)):
                break
            took_s = [self._timed(model, engine, (inputs, tokens)) for _ in range(passes - 1)]
            times.append((size, min(took_s)))
        return times

    def _prove(self, model: Model, engine: Engine, budget_tokens: int) -> bool:
        """Two passes of a model that was measured before; whether its budget is still possible."""
        _forward(model, engine, (1, SHORT_TOKENS))
        return self._fits(model, engine, _shape(model, self._settings, budget_tokens))

    def _fits(self, model: Model, engine: Engine, shape: tuple[int, int]) -> bool:
        """One pass; False when several inputs are too much for the memory there is."""
        try:
            _forward(model, engine, shape)
        except Exception as error:
            if shape[0] == 1 or not out_of_memory(error):
                raise
            log.warning("%s: %d inputs of %d tokens are too much memory", model.id, *shape)
            self.relieve()
            return False
        return True

    def _timed(self, model: Model, engine: Engine, shape: tuple[int, int]) -> float:
        began = self._clock()
        _forward(model, engine, shape)
        return self._clock() - began


def _shape(model: Model, settings: PoolSettings, tokens: int) -> tuple[int, int]:
    """(inputs, tokens each): a batch of the longest inputs, of so many padded tokens or one input."""
    inputs = min(tokens // model.tokens_max, settings.batch.items_max)
    return max(inputs, 1), model.tokens_max


def _shapes(model: Model, settings: PoolSettings) -> list[tuple[int, int]]:
    """The shortest input, then 1, 2, 4, ... of the longest up to a full batch."""
    full, longest = _shape(model, settings, settings.batch.tokens_max)
    sizes = {full, *(2**power for power in range(full.bit_length()))}
    return sorted({(1, SHORT_TOKENS), *((size, longest) for size in sizes)})


def _forward(model: Model, engine: Engine, shape: tuple[int, int]) -> None:
    """One pass over inputs of token 1, which every vocabulary has; the vectors must be usable."""
    inputs, tokens = shape
    batch = [Input(ids=np.ones(tokens, np.int32))] * inputs
    _, bad = checked(engine, batch)
    if bad:
        raise ModelUnavailable(f"Model {model.id}: its vectors are not finite.")
