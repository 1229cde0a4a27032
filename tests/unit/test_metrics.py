"""deployments.metrics: readings on their way to Ray, without Ray behind it."""

import asyncio
from typing import Any

import pytest

from deployments import metrics
from deployments.metrics import Sink
from serve.telemetry import METRICS, Reading


class Kept:
    """In place of Ray's Counter, Gauge and Histogram."""

    made: dict[str, "Kept"]

    def __init__(self, name: str, text: str, boundaries=(), tag_keys=()) -> None:
        self.values: dict[tuple[str, ...], Any] = {}
        self.bounds = boundaries
        self._keys = tag_keys
        assert text == METRICS[name].text
        assert name not in self.made
        self.made[name] = self

    def inc(self, value: float, tags: dict[str, str]) -> None:
        assert value > 0  # Ray's refuses others
        key = tuple(tags[name] for name in self._keys)
        self.values[key] = self.values.get(key, 0) + value

    def set(self, value: float, tags: dict[str, str]) -> None:
        self.values[tuple(tags[name] for name in self._keys)] = value

    def observe(self, value: float, tags: dict[str, str]) -> None:
        self.values.setdefault(tuple(tags[name] for name in self._keys), []).append(value)


@pytest.fixture
def made(monkeypatch) -> dict[str, Kept]:
    kept: dict[str, Kept] = {}
    monkeypatch.setattr(Kept, "made", kept, raising=False)
    for name in ("Counter", "Gauge", "Histogram"):
        monkeypatch.setattr(metrics, name, Kept)
    return kept


def take(sink: Sink, *readings: Reading) -> None:
    for reading in readings:
        sink.take(reading)


def test_counters_follow_what_was_counted_by_label(made):
    sink = Sink()
    name = "headrace_quota_refused"
    take(sink, Reading(name, 0, ("tenant_tokens_per_minute",)))
    assert made[name].values == {}  # nothing yet: Ray takes no 0
    take(
        sink,
        Reading(name, 3, ("tenant_tokens_per_minute",)),
        Reading(name, 3, ("tenant_tokens_per_minute",)),
        Reading(name, 1, ("key_requests_per_minute",)),
        Reading(name, 5, ("tenant_tokens_per_minute",)),
    )
    assert made[name].values == {
        ("tenant_tokens_per_minute",): 5,
        ("key_requests_per_minute",): 1,
    }


def test_gauges_are_set_and_histograms_take_every_value(made):
    sink = Sink()
    take(sink, Reading("headrace_cache_bytes", 7), Reading("headrace_cache_bytes", 4))
    assert made["headrace_cache_bytes"].values == {(): 4}
    name = "headrace_item_seconds"
    take(sink, Reading(name, 1.5, ("document",)), Reading(name, 1.5, ("document",)))
    assert made[name].values == {("document",): [1.5, 1.5]}
    assert made[name].bounds == list(METRICS[name].bounds)


def test_what_the_table_does_not_have_is_refused(made):
    with pytest.raises(KeyError):
        Sink().take(Reading("headrace_invented", 1))
    with pytest.raises(ValueError, match="zip"):
        Sink().take(Reading("headrace_model_bytes", 1))


async def test_a_source_that_fails_does_not_stop_the_others(made, caplog):
    def fails():
        raise RuntimeError("no figures")

    task = asyncio.create_task(metrics.publish(fails, lambda: [Reading("headrace_flushes", 2)]))
    await asyncio.sleep(0)  # one round
    task.cancel()
    assert made["headrace_flushes"].values == {(): 2}
    assert "no figures" in caplog.text
