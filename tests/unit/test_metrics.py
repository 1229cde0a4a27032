"""deployments.metrics: a replica's tallies as counters, without Ray behind them."""

from types import SimpleNamespace

import pytest

from deployments import metrics
from serve.admission.quotas import Tally
from serve.flows import reuse


class Kept:
    """In place of Ray's Counter and Gauge."""

    made: dict[str, "Kept"]

    def __init__(self, name: str, _description: str, tag_keys: tuple[str, ...] = ()) -> None:
        self.values: dict[tuple[str, ...], float] = {}
        self._keys = tag_keys
        self.made[name.removeprefix("headrace_").removeprefix("quota_")] = self

    def inc(self, value: float, tags: dict[str, str]) -> None:
        assert value > 0  # Ray's refuses others
        key = tuple(tags[name] for name in self._keys)
        self.values[key] = self.values.get(key, 0) + value

    def set(self, value: float) -> None:
        self.values[()] = value


class Histogram(Kept):
    """In place of Ray's."""

    def __init__(self, name: str, description: str, boundaries: list[float]) -> None:
        super().__init__(name, description)
        assert boundaries == sorted(boundaries)
        self.observed: list[float] = []

    def observe(self, value: float) -> None:
        self.observed.append(value)


@pytest.fixture
def made(monkeypatch) -> dict[str, Kept]:
    kept: dict[str, Kept] = {}
    monkeypatch.setattr(Kept, "made", kept, raising=False)
    monkeypatch.setattr(metrics, "Counter", Kept)
    monkeypatch.setattr(metrics, "Gauge", Kept)
    monkeypatch.setattr(metrics, "Histogram", Histogram)
    return kept


def test_counters_follow_the_tally(made):
    quotas = SimpleNamespace(tally=Tally(), away=False)
    told = metrics.QuotaMetrics()
    told.update(quotas)
    assert [name for name, one in made.items() if one.values] == ["ledger_away"]
    quotas.tally.exchanges, quotas.tally.failures, quotas.tally.local_grants = 5, 1, 2
    quotas.tally.refused.update(["tenant_tokens_per_minute"] * 3)
    quotas.away = True
    told.update(quotas)
    quotas.tally.exchanges += 2
    quotas.tally.refused["key_requests_per_minute"] += 1
    told.update(quotas)
    assert {name: one.values for name, one in made.items()} == {
        "exchanges": {(): 7},
        "exchange_failures": {(): 1},
        "local_grants": {(): 2},
        "refused": {("tenant_tokens_per_minute",): 3, ("key_requests_per_minute",): 1},
        "ledger_away": {(): 1},
    }


def test_counters_follow_what_was_kept_and_shared(made):
    cache = SimpleNamespace(evicted=0, size_bytes=0)
    seen = SimpleNamespace(tally=reuse.Tally(), cache=cache)
    told = metrics.CacheMetrics()
    told.update(seen)
    assert [name for name, one in made.items() if one.values] == ["cache_bytes"]
    seen.tally.hits, seen.tally.misses, seen.tally.shared = 5, 7, 2
    cache.evicted, cache.size_bytes = 1, 4096
    told.update(seen)
    seen.tally.hits += 1
    cache.size_bytes = 2048
    told.update(seen)
    assert {name: one.values for name, one in made.items()} == {
        "cache_hits": {(): 6},
        "cache_misses": {(): 7},
        "cache_shared": {(): 2},
        "cache_evicted": {(): 1},
        "cache_bytes": {(): 2048},
    }


def test_each_lag_is_counted_once(made):
    untold = [[("indexed", 0.2), ("searchable", 0.7), ("indexed", 0.3)], []]
    lags = SimpleNamespace(take=lambda: untold.pop(0))
    told = metrics.LagMetrics()
    told.update(lags)
    told.update(lags)
    assert {name: one.observed for name, one in made.items()} == {
        "lag_indexed_seconds": [0.2, 0.3],
        "lag_searchable_seconds": [0.7],
    }
