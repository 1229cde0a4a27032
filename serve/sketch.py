"""Quantiles that can be added up over processes: DDSketch (Masson, Rim, Lee: VLDB 2019).

A value falls into a bucket whose bounds are a constant ratio apart, so that a quantile is within `ACCURACY` of
a true value, whoever counted it.
"""

import math
from collections import Counter
from dataclasses import dataclass, field


ACCURACY = 0.02

LEAST, MOST = 1e-9, 1e6
"""What is outside counts as these: 865 buckets at most."""

_RATIO = (1 + ACCURACY) / (1 - ACCURACY)


@dataclass(slots=True)
class Sketch:
    """Values of at least 0: how many, their sum, the least and the largest, and how many in each bucket."""

    count: int = 0
    total: float = 0.0
    low: float = math.inf
    high: float = 0.0
    buckets: Counter[int] = field(default_factory=Counter)

    def add(self, value: float) -> None:
        """One more."""
        self.count += 1
        self.total += value
        self.low, self.high = min(self.low, value), max(self.high, value)
        self.buckets[math.ceil(math.log(min(max(value, LEAST), MOST), _RATIO))] += 1

    def merge(self, other: "Sketch") -> None:
        """Take in what another one has counted."""
        self.count += other.count
        self.total += other.total
        self.low, self.high = min(self.low, other.low), max(self.high, other.high)
        self.buckets.update(other.buckets)

    def quantile(self, share: float) -> float | None:
        """The value that `share` (0..1) of all are at most; None: there are none."""
        if share == 1 and self.count:
            return self.high
        rank = share * (self.count - 1)
        for bucket in sorted(self.buckets):
            rank -= self.buckets[bucket]
            if rank < 0:
                middle = 2 * _RATIO**bucket / (_RATIO + 1)
                return min(max(middle, self.low), self.high)
        return None

    @property
    def mean(self) -> float | None:
        """None: there are none."""
        return self.total / self.count if self.count else None
