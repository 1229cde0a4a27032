"""Hierarchical start-time fair queueing, in cost (tokens): who is next.

Goyal, Vin, Cheng: "Start-time Fair Queuing" (SIGCOMM 1996), once over the classes and once,
inside a class, over its tenants. Pure: no clock, no asyncio. Used by `serve.flows.batching`.

    A tenant's next item gets its tag when the one before it went out:  S = max(V, F[tenant])
    take:    the waiting class with the least root time; the least S in it;  V = S;
             F[tenant] = S + cost / weight;  root[class] += cost / share
    settle:  F[tenant] += diff / weight;  root[class] += diff / share;  neither falls below V
    reweigh: what a tenant is ahead by, S - V, shrinks or grows by old weight / new weight
    A class that starts to wait does so at the current root time: idle earns no credit.
    A class in which nothing waits forgets its F: a new busy period starts level.

Only what is handed out is charged, at the weight of that moment: a cancelled item costs its
tenant nothing. Two tenants that are always waiting never differ by more than one largest item
each in service divided by weight; the wait of an item depends on its own tenant's backlog, never
on another's, so nothing starves and nothing needs ageing. Priority chooses which of a tenant's
own items its tag stands for, so it never moves work past another tenant.
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

PRIORITY_MAX = 100


@dataclass(slots=True, eq=False)
class Entry(Generic[T]):
    """One waiting item: what `push` returns and `cancel` takes. `number` counts arrivals."""

    klass: Klass
    tenant: str
    cost: float
    item: T
    count: int = 1
    priority: int = 0
    number: int = 0
    waiting: bool = True


@dataclass(slots=True, eq=False)
class Flow(Generic[T]):
    """What one tenant has waiting in one class; `lanes` hold each priority's, oldest first.

    `start` is the tag S of its next item while it waits, and its F when nothing of it does.
    `turn` is the number of its row in the heap, 0 when nothing waits.
    """

    weight: float
    start: float = 0.0
    turn: int = 0
    cost: float = 0.0
    items: int = 0
    lanes: dict[int, OrderedDict[Entry[T], None]] = field(default_factory=dict)

    def first(self) -> Entry[T]:
        """The next one to go out: highest priority, then oldest."""
        return next(iter(self.lanes[max(self.lanes)]))

    def oldest(self) -> Entry[T]:
        """The one that has waited longest."""
        return min((next(iter(one)) for one in self.lanes.values()), key=lambda one: one.number)

    def add(self, entry: Entry[T]) -> None:
        """Let an entry wait behind those of its priority."""
        self.lanes.setdefault(entry.priority, OrderedDict())[entry] = None
        self.cost += entry.cost
        self.items += entry.count

    def remove(self, entry: Entry[T]) -> None:
        """Forget an entry."""
        lane = self.lanes[entry.priority]
        del lane[entry]
        if not lane:
            del self.lanes[entry.priority]
        self.items -= entry.count
        self.cost = self.cost - entry.cost if self.items else 0.0


@dataclass(slots=True)
class ClassQueue(Generic[T]):
    """The tenants of one class, and its virtual clock.

    `flows` wait; `rested` do not, and are ahead of V. `heap` holds one row (S, turn, flow) for
    each waiting flow, and stale rows.
    """

    share: float
    flows: dict[str, Flow[T]] = field(default_factory=dict)
    rested: dict[str, Flow[T]] = field(default_factory=dict)
    heap: list[tuple[float, int, Flow[T]]] = field(default_factory=list)
    rested_max: int = SLACK
    weight: float = 0.0
    cost: float = 0.0
    v: float = 0.0
    root: float = 0.0
    turns: int = 0

    def add(self, entry: Entry[T], weight: float) -> None:
        """Let an entry wait behind its tenant's others; the flow must have its weight already."""
        flow = self.flows.get(entry.tenant)
        if flow is None:
            flow = self.rested.pop(entry.tenant, None) or Flow(weight)
            self.flows[entry.tenant] = flow
            self.weight += weight
            self._tag(flow)
        flow.add(entry)
        self.cost += entry.cost

    def first(self) -> Entry[T]:
        """The entry with the least start. Something must wait."""
        while self.heap[0][1] != self.heap[0][2].turn:
            heapq.heappop(self.heap)
        return self.heap[0][2].first()

    def pop(self, entry: Entry[T]) -> None:
        """Hand out what `first` has just told, and charge its tenant."""
        self.v, _, flow = heapq.heappop(self.heap)
        self.root += entry.cost / self.share
        flow.start += entry.cost / flow.weight
        self.remove(entry)
        if flow.items:
            self._tag(flow)

    def remove(self, entry: Entry[T]) -> None:
        """Forget a waiting entry."""
        flow = self.flows[entry.tenant]
        flow.remove(entry)
        self.cost -= entry.cost
        if not flow.items:
            flow.turn = 0
            self.weight -= flow.weight
            del self.flows[entry.tenant]
            if flow.start > self.v:
                self.rested[entry.tenant] = flow
        if not self.flows:
            self._rest()
        else:
            self._sweep()

    def settle(self, tenant: str, diff: float) -> None:
        """Move a tenant's F; one that is forgotten has neither debts nor credit."""
        flow = self.flows.get(tenant) or self.rested.get(tenant)
        if flow is not None:
            self._move(flow, flow.start + diff / flow.weight)

    def reweigh(self, tenant: str, weight: float) -> None:
        """Charge a tenant at another weight from now on, also for what it is ahead by."""
        flow = self.flows.get(tenant) or self.rested.get(tenant)
        if flow is not None and flow.weight != weight:
            scale = flow.weight / weight
            if flow.items:
                self.weight += weight - flow.weight
            flow.weight = weight
            self._move(flow, self.v + (flow.start - self.v) * scale)

    def _move(self, flow: Flow[T], start: float) -> None:
        moved, flow.start = start != flow.start, start
        if moved and flow.items:
            self._tag(flow)

    def _tag(self, flow: Flow[T]) -> None:
        """Give the next item of a flow its start; equal starts go by turns."""
        flow.start = max(self.v, flow.start)
        self.turns += 1
        flow.turn = self.turns
        heapq.heappush(self.heap, (flow.start, flow.turn, flow))

    def _rest(self) -> None:
        """Nothing waits: the next busy period starts level."""
        self.heap.clear()
        self.rested.clear()
        self.rested_max = SLACK
        self.weight = self.cost = self.v = 0.0

    def _sweep(self) -> None:
        """Keep memory in proportion to the tenants that wait, at O(1) amortised."""
        if len(self.heap) > 2 * len(self.flows) + SLACK:
            self.heap = [row for row in self.heap if row[1] == row[2].turn]
            heapq.heapify(self.heap)
        if len(self.rested) > self.rested_max:  # F <= V means the same as no entry
            self.rested = {t: flow for t, flow in self.rested.items() if flow.start > self.v}
            self.rested_max = 2 * len(self.rested) + SLACK


class FairQueue(Generic[T]):
    """A queue between tenants of two classes; see the module's text for the rule.

    `shares` are positive and divide the service between classes that are both waiting. The
    queue itself is unbounded: its owner asks `cost`, `items`, `backlog` and `backlog_items`
    before it pushes. `items` is the sum of the entries' `count`.
    """

    def __init__(self, shares: Mapping[Klass, float]) -> None:
        self._classes = {klass: ClassQueue[T](share) for klass, share in shares.items()}
        self._v = 0.0
        self._number = 0
        self.cost = 0.0
        self.items = 0

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
        """Let an item wait, and charge all of its tenant's at `weight` from now on.

        O(log tenants). Raises ValueError unless `weight`, `cost` and `count` are positive and
        `priority` (higher goes first among the tenant's own of the class) is 0..100.
        """
        if not (weight > 0 and cost > 0 and count > 0):
            raise ValueError(f"weight {weight}, cost {cost} and count {count} must be positive")
        if not 0 <= priority <= PRIORITY_MAX:
            raise ValueError(f"priority {priority} is not in 0..{PRIORITY_MAX}")
        if not self.items:  # the classes start level, too
            self._v = max(q.root for q in self._classes.values())
        self.reweigh(tenant, weight)
        q = self._classes[klass]
        if not q.flows:
            q.root = max(q.root, self._v)
        self._number += 1
        entry = Entry(klass, tenant, cost, item, count, priority, self._number)
        q.add(entry, weight)
        self.cost += cost
        self.items += count
        return entry

    def take(self, admits: Callable[[T], bool], live: Callable[[T], bool]) -> list[T]:
        """Hand out items in fair order while `admits` says so.

        An item that is not `live` any more is dropped at no cost to its tenant. The first live
        item that `admits` refuses ends the hand-out: nobody overtakes it.
        """
        out: list[T] = []
        while (q := self._next_class()) is not None:
            entry = q.first()
            if not live(entry.item):
                self.cancel(entry)
                continue
            if not admits(entry.item):
                break
            self._v = q.root
            q.pop(entry)
            self._count_out(entry)
            out.append(entry.item)
        return out

    def cancel(self, entry: Entry[T]) -> None:
        """Drop a waiting item, which then costs its tenant nothing; a no-op once it is out."""
        if entry.waiting:
            self._classes[entry.klass].remove(entry)
            self._count_out(entry)

    def reweigh(self, tenant: str, weight: float) -> None:
        """Give a tenant another weight, at once for everything of it that waits."""
        for q in self._classes.values():
            q.reweigh(tenant, weight)

    def settle(self, klass: Klass, tenant: str, diff: float) -> None:
        """Charge `diff`, an item's true cost less the charged one; it may be negative.

        Nobody is moved before what is going out now, so at most what the tenant is ahead by
        comes back.
        """
        q = self._classes[klass]
        q.root = max(q.root + diff / q.share, self._v)
        q.settle(tenant, diff)

    def backlog(self, tenant: str, klass: Klass | None = None) -> float:
        """Cost that a tenant has waiting, in one class or in all."""
        queues = self._classes.values() if klass is None else (self._classes[klass],)
        return sum(q.flows[tenant].cost for q in queues if tenant in q.flows)

    def backlog_items(self, tenant: str) -> int:
        """Items that a tenant has waiting, by `count`."""
        queues = self._classes.values()
        return sum(q.flows[tenant].items for q in queues if tenant in q.flows)

    def share(self, klass: Klass, tenant: str, weight: float) -> float:
        """The part of the service (0..1] the tenant gets if everyone now waiting keeps waiting."""
        q = self._classes[klass]
        own = q.flows[tenant].weight if tenant in q.flows else 0.0
        others = max(q.weight - own, 0.0)
        shares = sum(one.share for one in self._classes.values() if one.flows or one is q)
        return q.share / shares * weight / (others + weight)

    def ahead(self, klass: Klass, tenant: str, *, weight: float, cost: float = 0.0) -> float:
        """Service that passes before a new item of this cost is done, in cost units.

        Its own tenant's backlog at the tenant's share, and never more than all that waits; of
        every other tenant one more item may come before it.
        """
        own = (self.backlog(tenant, klass) + cost) / self.share(klass, tenant, weight)
        return min(own, self.cost + cost)

    @property
    def classes(self) -> Mapping[Klass, ClassQueue[T]]:
        """To look at, for `serve.admission.outlook`."""
        return self._classes

    def _next_class(self) -> ClassQueue[T] | None:
        """The waiting class with the least root time; the first one of equals."""
        least: ClassQueue[T] | None = None
        for q in self._classes.values():
            if q.flows and (least is None or q.root < least.root):
                least = q
        return least

    def _count_out(self, entry: Entry[T]) -> None:
        entry.waiting = False
        self.items -= entry.count
        self.cost = max(0.0, self.cost - entry.cost) if self.items else 0.0
