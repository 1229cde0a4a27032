"""How long a request waits so that a key (a namespace, an index) stays within rates. No I/O, no clock."""

import math
from collections import OrderedDict


BURST_S = 1.0
"""Vendors count by the second: what a second allows may go out at once."""


class Pace:
    """Two token buckets per key: requests, and what they carry (bytes, ids).

    A request is granted at once and told when to start; so it keeps its place, and never starves. Who
    would rather not wait asks first, and takes when there is nothing to wait for.
    Bounds: `keys_max` keys. The least recently used is forgotten, its buckets full again.
    """

    def __init__(self, requests_s: float, units_s: float, keys_max: int) -> None:
        """Rates; infinite: no limit."""
        self._rates = (requests_s, units_s)
        self._keys_max = keys_max
        self._full_at: OrderedDict[str, tuple[float, ...]] = OrderedDict()

    def wait_s(self, key: str, units: float, now: float) -> float:
        """Seconds until a request of `units` may start.

        A request larger than a bucket waits for a full one.
        """
        return self._after(key, units, now)[1]

    def take(self, key: str, units: float, now: float) -> float:
        """Take one request of `units` out of the key's buckets; seconds to wait before it starts."""
        full_at, wait_s = self._after(key, units, now)
        if any(at > now for at in full_at):
            self._full_at[key] = full_at
            self._full_at.move_to_end(key)
        while len(self._full_at) > self._keys_max:
            self._full_at.popitem(last=False)
        return wait_s

    def _after(self, key: str, units: float, now: float) -> tuple[tuple[float, ...], float]:
        """When the buckets would be full again, and the wait."""
        held = self._full_at.get(key, (now, now))
        wait_s = 0.0
        full_at = []
        for rate, amount, at in zip(self._rates, (1.0, units), held, strict=True):
            cost_s = 0.0 if math.isinf(rate) else amount / rate
            later = max(at, now) + cost_s
            full_at.append(later)
            # Of one bucket's worth nothing waits; what is taken beyond refills first.
            wait_s = max(wait_s, later - now - max(BURST_S, cost_s))
        return tuple(full_at), wait_s
