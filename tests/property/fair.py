"""Short words about a fair queue, for its property tests."""

from hypothesis import strategies as st

from serve.admission.fairness import FairQueue
from serve.records import Klass


SHARES: dict[Klass, float] = {"interactive": 9, "bulk": 1}
INTERACTIVE: Klass = "interactive"
BULK: Klass = "bulk"

weights = st.sampled_from([0.5, 1, 3, 4, 16])


def new_queue() -> FairQueue[tuple[str, float]]:
    return FairQueue(SHARES)


def pop(queue: FairQueue):
    """One item, or None."""
    out = queue.take(admits=once(), live=lambda _: True)
    assert len(out) <= 1
    return out[0] if out else None


def once():
    left = [1]
    return lambda _: left[0] > 0 and (left.append(left.pop() - 1) or True)


def push(queue, tenant, cost, *, weight=1.0, klass=INTERACTIVE, priority=0):
    item = (tenant, cost)
    return queue.push(klass, tenant, weight=weight, cost=cost, item=item, priority=priority)


def spread(served, first, second):
    """Largest difference of normalised service over any interval of a hand-out sequence.

    It is max - min of the running difference, because an interval is a difference of prefixes.
    `first` and `second` are (name, weight).
    """
    running = [0.0]
    for name, cost in served:
        sign = {first[0]: 1 / first[1], second[0]: -1 / second[1]}.get(name, 0.0)
        running.append(running[-1] + sign * cost)
    return max(running) - min(running)
