"""Where everyone stands in the queue: what is told is what then happens, within an item each."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serve.admission.fairness import FairQueue
from serve.admission.outlook import places, tenants_waiting
from serve.records import Klass


SHARES: dict[Klass, float] = {"interactive": 9, "bulk": 1}
COST_MAX = 300


def pop(queue):
    left = [True]
    [item] = queue.take(lambda _: bool(left and left.pop()), lambda _: True)
    return item


def crowd(rng, tenants):
    """A queue in the midst of things, with two priorities."""
    queue: FairQueue[tuple[Klass, str, int, float]] = FairQueue(SHARES)
    weight_of = {number: rng.choice([1, 4, 16]) for number in range(tenants)}
    for number in range(rng.randint(1, 8 * tenants)):
        klass, tenant = rng.choice(list(SHARES)), rng.randrange(tenants)
        cost = rng.randint(1, COST_MAX)
        queue.push(
            klass,
            f"t{tenant}",
            weight=weight_of[tenant],
            cost=cost,
            item=(klass, f"t{tenant}", number, cost),
            count=rng.randint(1, 3),
            priority=rng.choice([0, 9]),
        )
    for _ in range(rng.randrange(queue.items)):
        if queue.items:
            pop(queue)
    return queue


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0), tenants=st.integers(1, 6))
def test_what_is_ahead_passes_first(seed, tenants):
    """Never more than told, and less by at most an item of each tenant; nobody else comes."""
    queue = crowd(random.Random(seed), tenants)  # noqa: S311 - not a secret
    told = {(place.klass, place.tenant): place for place in places(queue, 100)}
    passed, starts = 0.0, {}
    while queue.items:
        klass, tenant, _, cost = pop(queue)
        starts.setdefault((klass, tenant), passed)
        passed += cost
    assert starts.keys() == told.keys()
    for flow, place in told.items():
        whole = sum(SHARES.values()) / SHARES[flow[0]]  # a class's item delays it by the other's
        slack = COST_MAX * (tenants * whole + 1)
        assert starts[flow] <= place.ahead + COST_MAX * whole + 1e-6
        assert starts[flow] >= place.ahead - slack


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0), tenants=st.integers(1, 8), places_max=st.integers(1, 20))
def test_places_tell_what_waits_largest_first_and_no_more_than_asked(seed, tenants, places_max):
    queue = crowd(random.Random(seed), tenants)  # noqa: S311 - not a secret
    every = places(queue, 100)
    assert sum(place.items for place in every) == queue.items
    assert sum(place.cost for place in every) == pytest.approx(queue.cost)
    assert len({place.tenant for place in every}) == tenants_waiting(queue)
    if every:
        assert sum(place.share for place in every) == pytest.approx(1)
    assert every == sorted(every, key=lambda place: -place.cost)
    assert [p.cost for p in places(queue, places_max)] == [p.cost for p in every[:places_max]]
    for place in every:
        weight = place.weight
        assert place.cost == queue.backlog(place.tenant, place.klass)
        assert place.share == pytest.approx(queue.share(place.klass, place.tenant, weight))
        assert place.lead >= 0
        assert place.oldest[:2] == (place.klass, place.tenant)
    oldest = {(place.klass, place.tenant): place.oldest[2] for place in every}
    while queue.items:
        klass, tenant, number, _ = pop(queue)
        assert number >= oldest[klass, tenant]


def test_nothing_waits_nobody_stands():
    queue: FairQueue[int] = FairQueue(SHARES)
    assert (places(queue, 10), tenants_waiting(queue)) == ([], 0)


def test_a_newcomer_stands_before_a_flood_of_a_greater_weight():
    queue: FairQueue[str] = FairQueue(SHARES)
    for _ in range(100):
        queue.push("interactive", "flood", weight=16, cost=160, item="flood")
    for _ in range(10):
        pop(queue)
    for _ in range(2):
        queue.push("interactive", "light", weight=1, cost=50, item="light")
    flood, light = places(queue, 10)
    # until its start at 10 the light one has 10, and an item
    assert (flood.lead, flood.ahead) == (10, 10 + 50)
    assert (light.lead, light.ahead, light.share) == (0, 0, pytest.approx(1 / 17))
    pop(queue)
    flood, light = places(queue, 10)
    # until its start at 50 the flood, from 10 on, has 16 * 40, and an item
    assert (light.lead, light.ahead) == (50, 16 * 40 + 160)


def test_what_another_class_gets_meanwhile_is_ahead_as_well():
    queue: FairQueue[str] = FairQueue(SHARES)
    for _ in range(10):
        queue.push("interactive", "a", weight=1, cost=90, item="a")
        queue.push("bulk", "b", weight=1, cost=30, item="b")
    for _ in range(4):  # a, b, a, a: the classes' root times are 30 and 30
        pop(queue)
    ahead = {place.tenant: place.ahead for place in places(queue, 10)}
    assert ahead == {"a": 30, "b": 90}
    pop(queue)
    # b's next goes at 30, a's at 40: nothing is before b's, and b's item before a's
    assert {place.tenant: place.ahead for place in places(queue, 10)} == {"a": 10 + 30, "b": 0}
