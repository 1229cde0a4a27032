"""What a warm-up measured is kept, found again, and never believed when it is of something else."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from serve.config import Batch, Settings
from serve.config import Pool as PoolSettings
from serve.embedding import cpu, profiles
from serve.embedding.cpu import cpu_name
from serve.embedding.fake import FakeEngine, Faults
from serve.embedding.pool import Pool
from serve.embedding.profiles import Place, Profile, Profiles


MINILM = Settings().pools[0].models[0]
PLACE = Place("a CPU", 2, Batch())


def profile(kept: Profiles, **fields) -> Profile:
    values = {
        "overhead_s": 0.004,
        "token_s": 0.0002,
        "budget_tokens": 512,
        "bytes": 90_000_000,
        "engine": "OnnxEngine",
        "made_of": kept.made_of(MINILM),
    }
    return Profile(**(values | fields))


@pytest.fixture
def kept(tmp_path: Path) -> Profiles:
    return Profiles(tmp_path / "data" / "profiles", PLACE)


def only_file(folder: Path) -> Path:
    [path] = folder.rglob("*.*")
    return path


def test_it_is_found_as_it_was_kept(kept: Profiles, tmp_path: Path) -> None:
    assert kept.find(MINILM) is None
    kept.keep(MINILM, profile(kept))
    assert kept.find(MINILM) == profile(kept)
    assert only_file(tmp_path).name.startswith("53aa51172d14-")
    assert profile(kept).pace.seconds(1000) == pytest.approx(0.204)


@pytest.mark.parametrize(
    "place",
    [
        Place("another", 2, Batch()),
        Place("a CPU", 4, Batch()),
        Place("a CPU", 2, Batch(tokens_max=64)),
    ],
)
def test_it_is_of_one_device_with_its_threads_and_bounds(kept, tmp_path, place: Place) -> None:
    kept.keep(MINILM, profile(kept))
    assert Profiles(tmp_path / "data" / "profiles", place).find(MINILM) is None


def test_it_is_of_one_model_and_engine_however_it_is_called(kept: Profiles) -> None:
    kept.keep(MINILM, profile(kept))
    for change in ({"sha256": "0" * 64}, {"engine": "sentence_transformers"}, {"tokens_max": 128}):
        assert kept.find(MINILM.model_copy(update=change)) is None
    for change in (
        {"id": "b"},
        {"pinned": False},
        {"query_prefix": "q"},
        {"source": "/elsewhere"},
        {"int8_spread": 9},
    ):
        assert kept.find(MINILM.model_copy(update=change)) is not None


def test_it_is_of_one_set_of_versions(kept: Profiles, monkeypatch) -> None:
    kept.keep(MINILM, profile(kept))
    monkeypatch.setattr(profiles, "versions", lambda: {"torch": "3"})
    assert kept.find(MINILM) is None


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[: len(text) // 2],
        lambda _: "",
        lambda _: "\0" * 100,
        lambda text: text.replace('"token_s": 0.0002', '"token_s": -1'),
        lambda text: text.replace('"token_s": 0.0002', '"token_s": NaN'),
        lambda text: text.replace('"bytes"', '"bits"'),
        lambda text: json.dumps(json.loads(text) | {"made_of": {"device": "another"}}),
    ],
)
def test_a_damaged_or_foreign_file_is_ignored_and_made_anew(kept, tmp_path, damage, caplog) -> None:
    kept.keep(MINILM, profile(kept))
    path = only_file(tmp_path)
    path.write_text(damage(path.read_text()))
    assert kept.find(MINILM) is None
    assert "measured again" in caplog.text
    kept.keep(MINILM, profile(kept))
    assert kept.find(MINILM) == profile(kept)


def test_a_folder_that_cannot_be_written_is_no_failure(tmp_path: Path, caplog) -> None:
    (tmp_path / "file").write_text("")
    kept = Profiles(tmp_path / "file" / "profiles", PLACE)
    kept.keep(MINILM, profile(kept))
    assert "cannot be written" in caplog.text
    assert kept.find(MINILM) is None


def test_the_cpu_has_a_name(monkeypatch, tmp_path) -> None:
    assert cpu_name()
    monkeypatch.setattr(cpu, "CPUINFO", tmp_path / "none")
    assert cpu_name()
    (tmp_path / "none").write_text(
        "processor : 0\nmodel name\t: Fast CPU @ 3GHz\nmodel name : other\n"
    )
    assert cpu_name() == "Fast CPU @ 3GHz"


# --- over starts of a pool --------------------------------------------------------------------


class Counted(FakeEngine):
    passes = 0

    def forward(self, batch):
        type(self).passes += 1
        return super().forward(batch)


class Other(Counted):
    """Stands for torch in a graph's place."""


SMALL = MINILM.model_copy(update={"tokens_max": 64})
ENGINE = SMALL.model_copy(update={"fake_ms_per_batch": 10, "fake_ms_per_token": 0.1})


def start(clock, folder: Path, engine=Counted, *, pinned: bool = True) -> Pool:
    model = SMALL.model_copy(update={"pinned": pinned})
    batch = Batch(tokens_min=128, tokens_max=256, items_max=16)
    settings = PoolSettings(models=(model,), profiles=str(folder), batch=batch)
    engine.passes = 0
    builders = {"onnx": lambda *_: engine(ENGINE, sleep=clock.advance)}
    pool = Pool(settings, clock=clock, builders=builders)
    pool.load()
    return pool


def test_the_next_start_needs_two_passes(clock, tmp_path: Path) -> None:
    first = start(clock, tmp_path).profile(MINILM.id)
    assert Counted.passes == 12
    assert first.pace.seconds(1000) == pytest.approx(0.11)
    again = start(clock, tmp_path).profile(MINILM.id)
    assert Counted.passes == 2
    assert again.model_copy(update={"bytes": 0}) == first.model_copy(update={"bytes": 0})


def test_one_that_waited_for_its_turn_takes_what_was_measured_meanwhile(
    clock, tmp_path: Path, monkeypatch
) -> None:
    @contextmanager
    def after_another(_: Profiles) -> Iterator[None]:
        monkeypatch.undo()
        found.append(start(clock, tmp_path).profile(MINILM.id))
        yield

    found: list[Profile] = []
    monkeypatch.setattr(Profiles, "turn", after_another)
    second = start(clock, tmp_path).profile(MINILM.id)
    assert Counted.passes == 12 + 2
    assert second.model_copy(update={"bytes": 0}) == found[0].model_copy(update={"bytes": 0})


def test_one_measures_at_a_time_but_nobody_waits_for_ever(
    clock, tmp_path: Path, monkeypatch, caplog
) -> None:
    monkeypatch.setattr(profiles, "TURN_S_MAX", 0.0)
    with Profiles(tmp_path, PLACE).turn():
        assert not caplog.messages
        start(clock, tmp_path)
    assert "no turn to measure" in caplog.text
    assert Counted.passes == 12
    caplog.clear()
    with Profiles(tmp_path, PLACE).turn():
        assert not caplog.messages


def test_a_model_that_is_not_loaded_is_known_by_its_profile(clock, tmp_path: Path) -> None:
    assert start(clock, tmp_path, pinned=False).profile(MINILM.id) is None
    start(clock, tmp_path)
    assert start(clock, tmp_path, pinned=False).profile(MINILM.id) is not None


def test_a_profile_of_another_engine_is_measured_anew(clock, tmp_path: Path) -> None:
    start(clock, tmp_path)
    start(clock, tmp_path, Other)
    assert Other.passes == 12
    start(clock, tmp_path, Other)
    assert Other.passes == 2


def test_a_budget_for_which_memory_was_short_once_is_tried_again_at_the_next_load(
    clock, tmp_path: Path
) -> None:
    pool = start(clock, tmp_path)
    assert pool.profile(MINILM.id).budget_tokens == 256
    for faults, budget in ((Faults(oom_above_tokens=200), 128), (Faults(), 256)):
        pool.unload(MINILM.id)
        engine = Counted(ENGINE, sleep=clock.advance, faults=faults)
        pool._builders = {"onnx": lambda *_, engine=engine: engine}
        assert pool.load_one(MINILM.id).budget_tokens == budget
        assert pool.profile(MINILM.id).budget_tokens == budget
