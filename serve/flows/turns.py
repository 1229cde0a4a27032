"""What waits in a replica, and when it will have its turn, as the replica reports it. Pure."""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

from serve.admission.fairness import FairQueue
from serve.admission.outlook import places
from serve.flows.parking import Parked
from serve.flows.pending import Slice
from serve.records import Klass, QueuePlace
from serve.telemetry import NONE


Rank = tuple[Klass, str]
"""A class, and the name of a tier."""


@dataclass(slots=True)
class Waiting:
    """Inputs that wait, their cost in tokens corrected per model, and the seconds since the oldest of
    their calls arrived.
    """

    inputs: int = 0
    tokens: float = 0.0
    oldest_s: float = 0.0

    def add(self, inputs: int, tokens: float, age_s: float) -> None:
        """Some more."""
        self.inputs += inputs
        self.tokens += tokens
        self.oldest_s = max(self.oldest_s, age_s)


def waiting(queue: FairQueue[Slice], parked: Parked, now: float) -> Mapping[Rank, Waiting]:
    """All that waits, in the queue and for a model. O(waiting tenants and parked calls).

    A tenant counts to the tier that its oldest call has: a change of tier is rare.
    """
    found: defaultdict[Rank, Waiting] = defaultdict(Waiting)
    for klass, q in queue.classes.items():
        for flow in q.flows.values():
            oldest = flow.oldest().item.pending
            rank = klass, oldest.call.tier or NONE
            found[rank].add(flow.items, flow.cost, now - oldest.arrived)
    for pending, cost in parked.calls():
        call = pending.call
        found[call.klass, call.tier or NONE].add(len(call.inputs), cost, now - pending.arrived)
    return found


def outlook(
    queue: FairQueue[Slice], *, pace_s: float, busy_s: float, places_max: int, now: float
) -> tuple[QueuePlace, ...]:
    """Of the tenants that have most waiting: where they stand, and when it begins and ends.

    `pace_s` is what one unit of cost takes, `busy_s` how long no slot takes it.
    """
    second = 1 / pace_s
    found = []
    for place in places(queue, places_max):
        done = min(place.cost / place.share, queue.cost)
        found.append(
            QueuePlace(
                place.tenant,
                place.klass,
                place.weight,
                place.items,
                place.cost,
                place.share,
                place.ahead,
                busy_s + place.ahead / second,
                busy_s + max(done, place.ahead + place.cost) / second,
                now - place.oldest.pending.arrived,
                100 * second / (place.lead + second),
            )
        )
    return tuple(found)
