"""deployments.model_metrics: a pool's holdings as counters, without Ray behind them."""

import pytest

from deployments import model_metrics
from serve.config import Model, Pool
from serve.embedding.holdings import Holdings


class Kept:
    """In place of Ray's Counter and Gauge."""

    made: dict[str, "Kept"]

    def __init__(self, name: str, _description: str, tag_keys: tuple[str, ...] = ()) -> None:
        assert tag_keys == ("model",)
        self.values: dict[str, float] = {}
        self.made[name.removeprefix("headrace_model_")] = self

    def inc(self, value: float, tags: dict[str, str]) -> None:
        assert value > 0  # Ray's refuses others
        self.values[tags["model"]] = self.values.get(tags["model"], 0) + value

    def set(self, value: float, tags: dict[str, str]) -> None:
        self.values[tags["model"]] = value


@pytest.fixture
def made(monkeypatch) -> dict[str, Kept]:
    kept: dict[str, Kept] = {}
    monkeypatch.setattr(Kept, "made", kept, raising=False)
    monkeypatch.setattr(model_metrics, "Counter", Kept)
    monkeypatch.setattr(model_metrics, "Gauge", Kept)
    return kept


def test_metrics_follow_the_holdings(made) -> None:
    models = [
        Model(id=name, engine="fake", dimensions=8, tokens_max=64, pinned=name == "a")
        for name in "ab"
    ]
    holdings = Holdings(Pool(models=models))
    holdings.loaded("a", 70, 0)
    told = model_metrics.ModelMetrics()
    told.update(holdings)
    assert made["bytes"].values == {"a": 70, "b": 0}
    holdings.broke("a", 1)
    holdings.unloaded("a")
    holdings.failed("a", 1)
    told.update(holdings)
    holdings.loaded("a", 80, 2)
    holdings.loaded("b", 50, 2)
    holdings.unloaded("b")
    told.update(holdings)
    told.update(holdings)
    assert {name: one.values for name, one in made.items()} == {
        "loads": {"a": 2, "b": 1},
        "load_failures": {"a": 1},
        "breaks": {"a": 1},
        "evictions": {"b": 1},
        "bytes": {"a": 80, "b": 0},
    }
