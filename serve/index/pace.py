"""How long a request waits so that a namespace stays within the vendor's rates. No I/O, no clock."""

from collections import OrderedDict


BURST_S = 1.0
"""Vendors count by the second: what a second allows may go out at once."""


class Pace:
    """Two token buckets per key: requests, and what they carry (bytes, ids).

    A request is granted at once and told when to start; so it keeps its place, and never starves.
    Bounds: `keys_max` keys. The least recently used is forgotten, its buckets full again.
    """

    def __init__(self, requests_s: float, units_s: float, keys_max: int) -> None:
        self._rates = (requests_s, units_s)
        self._keys_max = keys_max
        self._full_at: OrderedDict[str, tuple[float, ...]] = OrderedDict()

    def wait_s(self, key: str, units: float, now: float) -> float:
        """Take one request of `units` out of the key's buckets; seconds to wait before it starts.

        A request larger than a bucket waits for a full one.
        """
        held = self._full_at.pop(key, (now, now))
        wait_s = 0.0
        full_at = []
        for rate, amount, at in zip(self._rates, (1.0, units), held, strict=True):
            cost_s = amount / rate
            later = max(at, now) + cost_s
            full_at.append(later)
            # Of one bucket's worth nothing waits; what is taken beyond refills first.
            wait_s = max(wait_s, later - now - max(BURST_S, cost_s))
        self._full_at[key] = tuple(full_at)
        while len(self._full_at) > self._keys_max:
            self._full_at.popitem(last=False)
        return wait_s
