"""Hierarchical start-time fair queueing, in cost (tokens): who is next.

Goyal, Vin, Cheng: "Start-time Fair Queuing" (SIGCOMM 1996), once over the classes and once,
inside a class, over its tenants. Pure: no clock, no asyncio. Used by `serve.flows.batching`.

    push:  S = max(V, F[tenant]);  F[tenant] = S + cost / weight
    take:  the busy class with the least root time; the least S in it;  V = S;
           root[class] += cost / share
    A class that becomes busy starts at the current root time: idle earns no credit.
    A class that becomes empty forgets its F: a new busy period starts level.

Two tenants that are always waiting never differ by more than one largest item each in service
divided by weight; the wait of an item depends on its own tenant's backlog, never on another's,
so nothing starves and nothing needs ageing.
"""

import heapq
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from serve.records import Klass


T = TypeVar("T")


@dataclass(slots=True, eq=False)
class Entry(Generic[T]):
    """One waiting item: what `push` returns and `cancel` takes."""

    klass: Klass
    tenant: str
    weight: float
    cost: float
    item: T
    waiting: bool = True


@dataclass(slots=True)
class Backlog:
    """What one tenant has waiting in one class."""

    weight: float
    cost: float = 0.0
    items: int = 0


@dataclass(slots=True)
class ClassQueue(Generic[T]):
    """The waiting items of one class, and its virtual clock."""

    heap: list[tuple[float, int, Entry[T]]] = field(default_factory=list)
    finish: dict[str, float] = field(default_factory=dict)
    backlog: dict[str, Backlog] = field(default_factory=dict)
    weight: float = 0.0
    v: float = 0.0
    root: float = 0.0
    dead: int = 0

    def add(self, entry: Entry[T]) -> None:
        """Count an entry that starts to wait."""
        own = self.backlog.get(entry.tenant)
        if own is None:
            own = self.backlog[entry.tenant] = Backlog(entry.weight)
            self.weight += entry.weight
        own.cost += entry.cost
        own.items += 1

    def remove(self, entry: Entry[T]) -> None:
        """Count an entry that waits no longer."""
        own = self.backlog[entry.tenant]
        own.cost -= entry.cost
        own.items -= 1
        if own.items == 0:
            del self.backlog[entry.tenant]
            self.weight -= own.weight

    def rest(self) -> None:
        """Nothing waits: forget the tenants' finish times and start the next period level."""
        if not self.backlog:
            self.heap.clear()
            self.dead = 0
            self.weight = 0.0
            if self.finish:
                self.v = max(self.v, *self.finish.values())
                self.finish.clear()


class FairQueue(Generic[T]):
    """A queue between tenants of two classes; see the module's text for the rule.

    `shares` are positive and divide the service between classes that are both waiting. The
    queue itself is unbounded: its owner asks `cost`, `items` and `backlog` before it pushes.
    """

    def __init__(self, shares: Mapping[Klass, float]) -> None:
        self._shares = dict(shares)
        self._classes: dict[Klass, ClassQueue[T]] = {klass: ClassQueue() for klass in shares}
        self._v = 0.0
        self._seq = 0
        self.cost = 0.0
        self.items = 0

    def push(self, klass: Klass, tenant: str, *, weight: float, cost: float, item: T) -> Entry[T]:
        """Let an item wait; `cost` and `weight` are positive. O(log items)."""
        q = self._classes[klass]
        if not q.backlog:
            q.root = max(q.root, self._v)
        entry = Entry(klass, tenant, weight, cost, item)
        start = max(q.v, q.finish.get(tenant, 0.0))
        q.finish[tenant] = start + cost / weight
        if len(q.finish) > 2 * len(q.backlog) + 1024:  # F <= V means the same as no entry
            q.finish = {t: f for t, f in q.finish.items() if f > q.v or t in q.backlog}
        self._seq += 1
        heapq.heappush(q.heap, (start, self._seq, entry))
        q.add(entry)
        self.cost += cost
        self.items += 1
        return entry

    def take(self, admits: Callable[[T], bool], live: Callable[[T], bool]) -> list[T]:
        """Hand out items in fair order while `admits` says so.

        An item that is not `live` any more is dropped and refunded. The first live item that
        `admits` refuses ends the hand-out: nobody overtakes it.
        """
        out: list[T] = []
        while (q := self._busiest()) is not None:
            entry = q.heap[0][2]
            if not live(entry.item):
                self.cancel(entry)
                continue
            if not admits(entry.item):
                break
            out.append(self._pop(q))
        return out

    def cancel(self, entry: Entry[T]) -> None:
        """Drop a waiting item and give its cost back to its tenant; a no-op once it is out."""
        if not entry.waiting:
            return
        q = self._classes[entry.klass]
        self._leave(q, entry)
        refunded = q.finish.get(entry.tenant, 0.0) - entry.cost / entry.weight
        if entry.tenant in q.finish:
            q.finish[entry.tenant] = max(q.v, refunded)
        q.dead += 1
        if q.dead * 2 > len(q.heap):  # at most half of the heap is dead, at O(1) amortised
            q.heap = [row for row in q.heap if row[2].waiting]
            heapq.heapify(q.heap)
            q.dead = 0
        q.rest()

    def settle(self, klass: Klass, tenant: str, *, weight: float, diff: float) -> None:
        """Charge `diff` (true cost less charged cost, may be negative) to later items."""
        q = self._classes[klass]
        if tenant in q.finish:
            q.finish[tenant] = max(q.v, q.finish[tenant] + diff / weight)

    def backlog(self, tenant: str, klass: Klass | None = None) -> float:
        """Cost that a tenant has waiting, in one class or in all."""
        queues = self._classes.values() if klass is None else (self._classes[klass],)
        return sum(q.backlog[tenant].cost for q in queues if tenant in q.backlog)

    def share(self, klass: Klass, tenant: str, weight: float) -> float:
        """The part of the service (0..1] the tenant gets if everyone now waiting keeps waiting."""
        q = self._classes[klass]
        weights = q.weight if tenant in q.backlog else q.weight + weight
        shares = sum(
            self._shares[k] for k, other in self._classes.items() if other.backlog or k == klass
        )
        return self._shares[klass] / shares * weight / weights

    def ahead(self, klass: Klass, tenant: str, *, weight: float, cost: float = 0.0) -> float:
        """Service that passes before a new item of this cost is done, in cost units.

        Its own tenant's backlog at the tenant's share, and never more than all that waits.
        """
        own = (self.backlog(tenant, klass) + cost) / self.share(klass, tenant, weight)
        return min(own, self.cost + cost)

    def _busiest(self) -> ClassQueue[T] | None:
        """The waiting class with the least root time, its dead heads removed."""
        busy = [q for q in self._classes.values() if q.backlog]
        if not busy:
            return None
        q = min(busy, key=lambda queue: queue.root)
        while not q.heap[0][2].waiting:
            heapq.heappop(q.heap)
            q.dead -= 1
        return q

    def _pop(self, q: ClassQueue[T]) -> T:
        start, _, entry = heapq.heappop(q.heap)
        q.v, self._v = start, q.root
        q.root += entry.cost / self._shares[entry.klass]
        self._leave(q, entry)
        q.rest()
        return entry.item

    def _leave(self, q: ClassQueue[T], entry: Entry[T]) -> None:
        entry.waiting = False
        q.remove(entry)
        self.cost = max(0.0, self.cost - entry.cost) if self.items > 1 else 0.0
        self.items -= 1
