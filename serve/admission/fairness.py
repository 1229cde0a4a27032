"""Hierarchical start-time fair queueing, in cost (tokens): who is next.

Goyal, Vin, Cheng: "Start-time Fair Queuing" (SIGCOMM 1996), once over the classes and once,
inside a class, over its tenants. Pure: no clock, no asyncio. Used by `serve.flows.batching`.

    A tenant's oldest item gets its tag when it becomes the oldest:  S = max(V, F[tenant])
    take:  the waiting class with the least root time; the least S in it;  V = S;
           F[tenant] = S + cost / weight;  root[class] += cost / share
    A class that starts to wait does so at the current root time: idle earns no credit.
    A class in which nothing waits forgets its F: a new busy period starts level.

Only what is handed out is charged, so a cancelled item costs its tenant nothing and a tenant's
new weight counts from its next item on. Two tenants that are always waiting never differ by more
than one largest item each in service divided by weight; the wait of an item depends on its own
tenant's backlog, never on another's, so nothing starves and nothing needs ageing.
"""

import heapq
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from serve.records import Klass


T = TypeVar("T")

SLACK = 1024
"""Stale rows and finish times that may stand about before they are swept out."""


@dataclass(slots=True, eq=False)
class Entry(Generic[T]):
    """One waiting item: what `push` returns and `cancel` takes."""

    klass: Klass
    tenant: str
    weight: float
    cost: float
    item: T
    count: int = 1
    waiting: bool = True


@dataclass(slots=True, eq=False)
class Flow(Generic[T]):
    """What one tenant has waiting in one class, oldest first; `weight` is the latest one."""

    weight: float = 0.0
    cost: float = 0.0
    entries: OrderedDict[Entry[T], None] = field(default_factory=OrderedDict)


@dataclass(slots=True)
class ClassQueue(Generic[T]):
    """The waiting tenants of one class, and its virtual clock.

    `heap` holds one row (S, number, flow) for each waiting flow, and rows of emptied flows.
    """

    heap: list[tuple[float, int, Flow[T]]] = field(default_factory=list)
    flows: dict[str, Flow[T]] = field(default_factory=dict)
    finish: dict[str, float] = field(default_factory=dict)
    finish_max: int = SLACK
    weight: float = 0.0
    v: float = 0.0
    root: float = 0.0
    rows: int = 0

    def add(self, entry: Entry[T]) -> None:
        """Let an entry wait behind its tenant's others."""
        flow = self.flows.get(entry.tenant)
        if flow is None:
            flow = self.flows[entry.tenant] = Flow()
            self.tag(entry.tenant, flow)
        flow.entries[entry] = None
        flow.cost += entry.cost
        self.weight += entry.weight - flow.weight
        flow.weight = entry.weight

    def tag(self, tenant: str, flow: Flow[T]) -> None:
        """Give the oldest item of a flow its start."""
        start = self.finish[tenant] = max(self.v, self.finish.get(tenant, 0.0))
        self.rows += 1  # equal starts go by turns
        heapq.heappush(self.heap, (start, self.rows, flow))

    def first(self) -> Entry[T]:
        """The entry with the least start. Something must wait."""
        while not self.heap[0][2].entries:
            heapq.heappop(self.heap)
        return next(iter(self.heap[0][2].entries))

    def pop(self) -> Entry[T]:
        """Hand out `first` and charge its tenant."""
        entry = self.first()
        self.v, _, flow = heapq.heappop(self.heap)
        self.finish[entry.tenant] += entry.cost / entry.weight
        self.remove(entry)
        if flow.entries:
            self.tag(entry.tenant, flow)
        return entry

    def remove(self, entry: Entry[T]) -> None:
        """Forget a waiting entry."""
        flow = self.flows[entry.tenant]
        del flow.entries[entry]
        flow.cost -= entry.cost
        if not flow.entries:
            del self.flows[entry.tenant]
            self.weight -= flow.weight
        if not self.flows:
            self._rest()
        else:
            self._sweep()

    def _rest(self) -> None:
        """Nothing waits: the next busy period starts level."""
        self.heap.clear()
        self.finish.clear()
        self.finish_max = SLACK
        self.weight = self.v = 0.0

    def _sweep(self) -> None:
        """Keep memory in proportion to the tenants that wait, at O(1) amortised."""
        if len(self.heap) > 2 * len(self.flows) + SLACK:
            self.heap = [row for row in self.heap if row[2].entries]
            heapq.heapify(self.heap)
        if len(self.finish) > self.finish_max:  # F <= V means the same as no entry
            self.finish = {t: f for t, f in self.finish.items() if f > self.v or t in self.flows}
            self.finish_max = 2 * len(self.finish) + SLACK


class FairQueue(Generic[T]):
    """A queue between tenants of two classes; see the module's text for the rule.

    `shares` are positive and divide the service between classes that are both waiting. The
    queue itself is unbounded: its owner asks `cost`, `items` and `backlog` before it pushes.
    `items` is the sum of the entries' `count`.
    """

    def __init__(self, shares: Mapping[Klass, float]) -> None:
        self._shares = dict(shares)
        self._classes: dict[Klass, ClassQueue[T]] = {klass: ClassQueue() for klass in shares}
        self._v = 0.0
        self.cost = 0.0
        self.items = 0

    def push(
        self, klass: Klass, tenant: str, *, weight: float, cost: float, item: T, count: int = 1
    ) -> Entry[T]:
        """Let an item wait. O(log tenants).

        Raises ValueError unless `weight`, `cost` and `count` are positive.
        """
        if not (weight > 0 and cost > 0 and count > 0):
            raise ValueError(f"weight {weight}, cost {cost} and count {count} must be positive")
        q = self._classes[klass]
        if not q.flows:
            q.root = max(q.root, self._v)
        entry = Entry(klass, tenant, weight, cost, item, count)
        q.add(entry)
        self.cost += cost
        self.items += count
        return entry

    def take(self, admits: Callable[[T], bool], live: Callable[[T], bool]) -> list[T]:
        """Hand out items in fair order while `admits` says so.

        An item that is not `live` any more is dropped at no cost to its tenant. The first live
        item that `admits` refuses ends the hand-out: nobody overtakes it.
        """
        out: list[T] = []
        while (klass := self._next_class()) is not None:
            q = self._classes[klass]
            entry = q.first()
            if not live(entry.item):
                self.cancel(entry)
                continue
            if not admits(entry.item):
                break
            self._v = q.root
            q.root += entry.cost / self._shares[klass]
            self._count_out(q.pop())
            out.append(entry.item)
        return out

    def cancel(self, entry: Entry[T]) -> None:
        """Drop a waiting item, which then costs its tenant nothing; a no-op once it is out."""
        if entry.waiting:
            self._classes[entry.klass].remove(entry)
            self._count_out(entry)

    def settle(self, klass: Klass, tenant: str, *, weight: float, diff: float) -> None:
        """Charge `diff` (true cost less charged cost, may be negative) to the items after next."""
        q = self._classes[klass]
        if tenant in q.finish:
            q.finish[tenant] += diff / weight

    def backlog(self, tenant: str, klass: Klass | None = None) -> float:
        """Cost that a tenant has waiting, in one class or in all."""
        queues = self._classes.values() if klass is None else (self._classes[klass],)
        return sum(q.flows[tenant].cost for q in queues if tenant in q.flows)

    def share(self, klass: Klass, tenant: str, weight: float) -> float:
        """The part of the service (0..1] the tenant gets if everyone now waiting keeps waiting."""
        q = self._classes[klass]
        own = q.flows[tenant].weight if tenant in q.flows else 0.0
        others = max(q.weight - own, 0.0)
        shares = sum(
            self._shares[k] for k, other in self._classes.items() if other.flows or k == klass
        )
        return self._shares[klass] / shares * weight / (others + weight)

    def ahead(self, klass: Klass, tenant: str, *, weight: float, cost: float = 0.0) -> float:
        """Service that passes before a new item of this cost is done, in cost units.

        Its own tenant's backlog at the tenant's share, and never more than all that waits; of
        every other tenant one more item may come before it.
        """
        own = (self.backlog(tenant, klass) + cost) / self.share(klass, tenant, weight)
        return min(own, self.cost + cost)

    def _next_class(self) -> Klass | None:
        """The waiting class with the least root time."""
        waiting = [klass for klass, q in self._classes.items() if q.flows]
        return min(waiting, key=lambda klass: self._classes[klass].root, default=None)

    def _count_out(self, entry: Entry[T]) -> None:
        entry.waiting = False
        self.items -= entry.count
        self.cost = max(0.0, self.cost - entry.cost) if self.items else 0.0
