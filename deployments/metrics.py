"""What the quotas of an ingress replica do, as metrics on Ray's Prometheus port.

They are exported as `ray_<name>`, counters with `_total`. No tenant is a label: there is no bound
to their number.
"""

import asyncio
from collections import Counter as Counts

from ray.util.metrics import Counter, Gauge

from serve.admission.quotas import Quotas


PUBLISH_EVERY_S = 5.0
"""Ray itself exports every 10 s."""


class QuotaMetrics:
    """Counters that follow a replica's tally, and whether its Ledger is away."""

    def __init__(self) -> None:
        self._refused = Counter(
            "headrace_quota_refused",
            "Requests refused, by the name of the limit.",
            tag_keys=("limit",),
        )
        self._exchanges = Counter(
            "headrace_quota_exchanges", "Exchanges that the Ledger (or Redis) answered."
        )
        self._failures = Counter(
            "headrace_quota_exchange_failures", "Exchanges that it did not answer."
        )
        self._local = Counter(
            "headrace_quota_local_grants",
            "Requests admitted by the replica's own share while it was away.",
        )
        self._away = Gauge("headrace_quota_ledger_away", "1 while the Ledger (or Redis) is away.")
        self._told: Counts[str] = Counts()

    def update(self, quotas: Quotas) -> None:
        """Add what happened since the last time."""
        tally = quotas.tally
        self._follow(self._exchanges, "exchanges", tally.exchanges)
        self._follow(self._failures, "failures", tally.failures)
        self._follow(self._local, "local", tally.local_grants)
        for limit, count in tally.refused.items():
            self._follow(self._refused, f"refused {limit}", count, {"limit": limit})
        self._away.set(float(quotas.away))

    def _follow(
        self, counter: Counter, name: str, count: int, tags: dict[str, str] | None = None
    ) -> None:
        if count > self._told[name]:
            counter.inc(count - self._told[name], tags=tags or {})
            self._told[name] = count


async def publish(quotas: Quotas) -> None:
    """Keep the metrics up to date until cancelled."""
    metrics = QuotaMetrics()
    while True:
        metrics.update(quotas)
        await asyncio.sleep(PUBLISH_EVERY_S)
