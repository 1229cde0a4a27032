"""When the work of those who wait will have its turn, as a replica reports it. Pure."""

from serve.admission.fairness import FairQueue
from serve.admission.outlook import places
from serve.flows.pending import Slice
from serve.records import QueuePlace


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
