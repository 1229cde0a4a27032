"""What an ingress replica does with quotas and with repeated inputs, and how soon the writer's writes are
found, as metrics on Ray's Prometheus port.

They are exported as `ray_<name>`, counters with `_total`. No tenant is a label: there is no bound
to their number.
"""

import asyncio
from collections import Counter as Counts

from ray.util.metrics import Counter, Gauge, Histogram

from serve.admission.quotas import Quotas
from serve.flows.reuse import Reuse
from serve.index.lags import Lags


PUBLISH_EVERY_S = 5.0
"""Ray itself exports every 10 s."""

LAG_S = [0.05, 0.1, 0.25, 0.5, 1.0, 1.5, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0, 1800.0, 7200.0]
"""A trickle takes half a second, a large import hours."""


class Rising:
    """A counter that follows a figure which only grows; by the values of `label`, if it has one."""

    def __init__(self, name: str, description: str, label: str = "") -> None:
        self._label = label
        self._counter = Counter(name, description, tag_keys=(label,) if label else ())
        self._told: Counts[str] = Counts()

    def follow(self, count: int, value: str = "") -> None:
        """Add what came since the last time."""
        if count > self._told[value]:
            tags = {self._label: value} if self._label else {}
            self._counter.inc(count - self._told[value], tags=tags)
            self._told[value] = count


class QuotaMetrics:
    """Counters that follow a replica's tally, and whether its Ledger is away."""

    def __init__(self) -> None:
        self._refused = Rising(
            "headrace_quota_refused", "Requests refused, by the name of the limit.", "limit"
        )
        self._exchanges = Rising(
            "headrace_quota_exchanges", "Exchanges that the Ledger (or Redis) answered."
        )
        self._failures = Rising(
            "headrace_quota_exchange_failures", "Exchanges that it did not answer."
        )
        self._local = Rising(
            "headrace_quota_local_grants",
            "Requests admitted by the replica's own share while it was away.",
        )
        self._away = Gauge("headrace_quota_ledger_away", "1 while the Ledger (or Redis) is away.")

    def update(self, quotas: Quotas) -> None:
        """Add what happened since the last time."""
        tally = quotas.tally
        self._exchanges.follow(tally.exchanges)
        self._failures.follow(tally.failures)
        self._local.follow(tally.local_grants)
        for limit, count in tally.refused.items():
            self._refused.follow(count, limit)
        self._away.set(float(quotas.away))


class CacheMetrics:
    """How many inputs needed no model, and the memory that this takes."""

    def __init__(self) -> None:
        self._hits = Rising("headrace_cache_hits", "Inputs whose vectors were kept.")
        self._misses = Rising("headrace_cache_misses", "Inputs whose vectors were not.")
        self._shared = Rising(
            "headrace_cache_shared",
            "Of the misses, those that stood twice in a request or were just being computed.",
        )
        self._evicted = Rising("headrace_cache_evicted", "Vectors that made place for others.")
        self._bytes = Gauge("headrace_cache_bytes", "Memory of the vectors that are kept.")

    def update(self, reuse: Reuse) -> None:
        """Add what happened since the last time."""
        self._hits.follow(reuse.tally.hits)
        self._misses.follow(reuse.tally.misses)
        self._shared.follow(reuse.tally.shared)
        self._evicted.follow(reuse.cache.evicted)
        self._bytes.set(float(reuse.cache.size_bytes))


class LagMetrics:
    """How long writes took from accepted: until the index had them, until searches saw them."""

    def __init__(self) -> None:
        self._histograms = {
            "indexed": Histogram(
                "headrace_lag_indexed_seconds",
                "From accepted to indexed, by landing.",
                boundaries=LAG_S,
            ),
            "searchable": Histogram(
                "headrace_lag_searchable_seconds",
                "From accepted to searchable, by landing.",
                boundaries=LAG_S,
            ),
        }

    def update(self, lags: Lags) -> None:
        """Count what came since the last time."""
        for reached, seconds in lags.take():
            self._histograms[reached].observe(seconds)


async def publish_lags(lags: Lags) -> None:
    """Keep the histograms up to date until cancelled."""
    metrics = LagMetrics()
    while True:
        metrics.update(lags)
        await asyncio.sleep(PUBLISH_EVERY_S)


async def publish(quotas: Quotas, reuse: Reuse | None) -> None:
    """Keep the metrics up to date until cancelled; `reuse` is None where nothing is kept or shared."""
    ours, cache = QuotaMetrics(), CacheMetrics()
    while True:
        ours.update(quotas)
        if reuse is not None:
            cache.update(reuse)
        await asyncio.sleep(PUBLISH_EVERY_S)
