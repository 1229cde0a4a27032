"""Why is mine waiting: where every tenant stands in a `FairQueue`. Pure."""

import heapq
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Generic, TypeVar

from serve.admission.fairness import ClassQueue, FairQueue, Flow
from serve.records import Klass


T = TypeVar("T")


@dataclass(slots=True)
class Place(Generic[T]):
    """What one tenant has waiting in one class.

    Attributes:
        items: by `count`; `cost` is theirs.
        share: the part of the service it gets while everyone now waiting keeps waiting, 0..1.
        ahead: service that passes before its next item starts, in cost, if nobody else comes:
            at most this, and less by no more than one item of each other tenant.
        lead: S - V, how far its tag is ahead of the virtual time.
        oldest: its item that has waited longest.
    """

    klass: Klass
    tenant: str
    weight: float
    items: int
    cost: float
    share: float
    ahead: float
    lead: float
    oldest: T


def tenants_waiting(queue: FairQueue[T]) -> int:
    """How many tenants have something waiting. O(waiting tenants)."""
    return len(set().union(*(q.flows for q in queue.classes.values())))


def places(queue: FairQueue[T], places_max: int) -> list[Place[T]]:
    """The places of those who have most waiting, largest first.

    O(n log n) in waiting tenants: 1 ms for 100, 15 ms for 1,000, 0.1 s for 10,000.
    """
    waiting = [
        (flow.cost, flow.turn, klass, tenant, flow)
        for klass, q in queue.classes.items()
        for tenant, flow in q.flows.items()
    ]
    busy = {klass: q for klass, q in queue.classes.items() if q.flows}
    outlooks = {klass: _Outlook(q, list(busy.values())) for klass, q in busy.items()}
    return [
        outlooks[klass].place(klass, tenant, flow)
        for _, _, klass, tenant, flow in heapq.nlargest(places_max, waiting)
    ]


class _Outlook(Generic[T]):
    """What one class, and the others meanwhile, give out before a given start.

    A flow of weight w and start s gives what it has, but until S no more than w * (S - s) and its
    next item: a sum of broken lines, kept as sums over the flows sorted by where theirs begin and
    end.
    """

    def __init__(self, q: ClassQueue[T], busy: Sequence[ClassQueue[T]]) -> None:
        self._q = q
        self._others = [(other, other.first().cost) for other in busy if other is not q]
        self._share = q.share / sum(other.share for other in busy) / q.weight
        rows = [
            (flow.start - q.v, flow.turn, flow.weight, flow.first().cost, flow.cost)
            for flow in q.flows.values()
        ]
        rows.sort()
        ends = [(s + (cost - head) / w, w) for s, _, w, head, cost in rows]
        ends.sort()
        self._starts = [row[:2] for row in rows]
        self._ends = [s for s, _ in ends]
        self._weights = _sums([w for _, _, w, _, _ in rows])
        self._offsets = _sums([w * s - head for s, _, w, head, _ in rows])
        self._ended = _sums([w for _, w in ends])
        self._ended_at = _sums([w * s for s, w in ends])

    def place(self, klass: Klass, tenant: str, flow: Flow[T]) -> Place[T]:
        lead = flow.start - self._q.v
        return Place(
            klass,
            tenant,
            flow.weight,
            flow.items,
            flow.cost,
            self._share * flow.weight,
            self._ahead(lead, flow.turn),
            lead,
            flow.oldest().item,
        )

    def _ahead(self, lead: float, turn: int) -> float:
        begun = bisect_left(self._starts, (lead, turn))
        ended = bisect_left(self._ends, lead)
        given = self._weights[begun] * lead - self._offsets[begun]
        given = max(given - (self._ended[ended] * lead - self._ended_at[ended]), 0.0)
        until = self._q.root + given / self._q.share
        for other, head in self._others:
            if other.root <= until:
                given += min(other.cost, (until - other.root) * other.share + head)
        return given


def _sums(values: list[float]) -> list[float]:
    return list(accumulate(values, initial=0.0))
