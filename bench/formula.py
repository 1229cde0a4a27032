"""The priority formula that the fair queue replaces, and strict priority, for `bench.fairness` only.

`P = base * multiplier - a * usage + b * age`, of every tenant's oldest item, computed anew at each
pick: linear age keeps the order inside a tenant. It knows no classes. Its figures are for minutes
(1 point for 20,000 tokens in a decayed 60 s, 1 point a second); here time runs `SPEED` times
faster, so that a phase of ten seconds shows what it does in two minutes.
"""

import math
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import TypeVar

from serve.admission.fairness import Entry, FairQueue
from serve.records import Klass


T = TypeVar("T")

SPEED = 10
BASE = 10.0
MULTIPLIERS: Mapping[float, float] = {1: 1, 4: 4, 16: 10}
"""By the weight of the tier."""
TOKENS_PER_POINT = 20_000 / SPEED
PENALTY_MAX = 50.0
WINDOW_S = 60 / SPEED
POINTS_PER_S = 1.0 * SPEED
HEAD_START_S = 1e6
"""Of a tier over the next lower one, in strict priority: nobody waits that long."""


class FormulaQueue(FairQueue[T]):
    """Takes the place of a batcher's `FairQueue`; predicts no waits, so nothing is refused."""

    def __init__(self, clock: Callable[[], float]) -> None:
        super().__init__({})
        self._clock = clock
        self._waiting: dict[str, OrderedDict[Entry[T], float]] = {}
        self._weights: dict[str, float] = {}
        self._usage: dict[str, tuple[float, float]] = {}

    def push(
        self,
        klass: Klass,
        tenant: str,
        *,
        weight: float,
        cost: float,
        item: T,
        count: int = 1,
        priority: int = 0,
    ) -> Entry[T]:
        """Let an item wait."""
        entry = Entry(klass, tenant, cost, item, count, priority)
        self._weights[tenant] = weight
        self._waiting.setdefault(tenant, OrderedDict())[entry] = self._clock()
        self.cost += cost
        self.items += count
        return entry

    def take(self, admits: Callable[[T], bool], live: Callable[[T], bool]) -> list[T]:
        """Hand out the highest priority first, while `admits` says so."""
        out: list[T] = []
        while self._waiting:
            now = self._clock()
            tenant = max(self._waiting, key=lambda one: self._priority(one, now))
            entry = next(iter(self._waiting[tenant]))
            if live(entry.item):
                if not admits(entry.item):
                    break
                self._usage[tenant] = (self._used(tenant, now) + entry.cost, now)
                out.append(entry.item)
            self.cancel(entry)
        return out

    def cancel(self, entry: Entry[T]) -> None:
        """Drop a waiting item."""
        if entry.waiting:
            del self._waiting[entry.tenant][entry]
            if not self._waiting[entry.tenant]:
                del self._waiting[entry.tenant]
            entry.waiting = False
            self.cost -= entry.cost
            self.items -= entry.count

    def settle(self, klass: Klass, tenant: str, diff: float) -> None:
        """It charges what was asked for, not what it cost."""

    def backlog(self, tenant: str, klass: Klass | None = None) -> float:  # noqa: ARG002
        """Not counted here."""
        return 0.0

    def share(self, klass: Klass, tenant: str, weight: float) -> float:  # noqa: ARG002
        """Nobody has one."""
        return 1.0

    def ahead(self, klass: Klass, tenant: str, *, weight: float, cost: float = 0.0) -> float:  # noqa: ARG002
        """Cannot be told: it depends on who else comes."""
        return 0.0

    def _priority(self, tenant: str, now: float) -> float:
        arrived = next(iter(self._waiting[tenant].values()))
        penalty = min(self._used(tenant, now) / TOKENS_PER_POINT, PENALTY_MAX)
        return BASE * MULTIPLIERS[self._weights[tenant]] - penalty + POINTS_PER_S * (now - arrived)

    def _used(self, tenant: str, now: float) -> float:
        used, at = self._usage.get(tenant, (0.0, now))
        return used * math.exp((at - now) / WINDOW_S)


class StrictQueue(FormulaQueue[T]):
    """The highest tier first, inside it whoever has waited longest."""

    def _priority(self, tenant: str, now: float) -> float:
        arrived = next(iter(self._waiting[tenant].values()))
        return self._weights[tenant] * HEAD_START_S + now - arrived
