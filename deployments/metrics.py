"""What a process tells of itself, on Ray's Prometheus port: readings of `serve.flows.readings` on their way
to Ray, by the table of `serve.telemetry`.

They are exported as `ray_<name>`, counters with `_total`.
"""

import asyncio
import logging
from collections.abc import Callable, Iterable
from typing import Any

from ray.util.metrics import Counter, Gauge, Histogram

from serve.telemetry import METRICS, Labels, Metric, Reading


PUBLISH_EVERY_S = 5.0
"""Ray itself exports every 10 s."""

log = logging.getLogger("headrace.metrics")

Source = Callable[[], Iterable[Reading]]


class Sink:
    """Ray's instruments, each made at its first reading."""

    def __init__(self) -> None:
        self._made: dict[str, Any] = {}
        self._told: dict[tuple[str, Labels], float] = {}

    def take(self, reading: Reading) -> None:
        """Hand it to Ray. Raises KeyError for a name, ValueError for labels, that the table does not have."""
        metric = METRICS[reading.name]
        if metric.name not in self._made:
            self._made[metric.name] = _make(metric)
        made = self._made[metric.name]
        tags = dict(zip(metric.labels, reading.labels, strict=True))
        value = float(reading.value)
        if metric.kind == "gauge":
            made.set(value, tags=tags)
        elif metric.kind == "histogram":
            made.observe(value, tags=tags)
        else:
            place = metric.name, reading.labels
            came = value - self._told.get(place, 0.0)
            if came > 0:
                made.inc(came, tags=tags)
                self._told[place] = value


def _make(metric: Metric) -> Any:
    if metric.kind == "histogram":
        return Histogram(metric.name, metric.text, list(metric.bounds), metric.labels)
    kind = Counter if metric.kind == "counter" else Gauge
    return kind(metric.name, metric.text, tag_keys=metric.labels)


async def publish(*sources: Source) -> None:
    """Keep the metrics up to date until cancelled."""
    sink = Sink()
    while True:
        for source in sources:
            try:
                for reading in source():
                    sink.take(reading)
            except Exception:  # a named rim: no process is replaced because of a statistic
                log.exception("figures could not be told")
        await asyncio.sleep(PUBLISH_EVERY_S)
