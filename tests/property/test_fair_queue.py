"""What the fair queue guarantees, each guarantee by name. See also test_fair_queue_machine."""

import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serve.admission.fairness import SLACK
from serve.records import Klass
from tests.property.fair import (
    BULK,
    INTERACTIVE,
    SHARES,
    new_queue,
    pop,
    push,
    spread,
    weights,
)


costs = st.lists(st.integers(1, 500), min_size=5, max_size=40)
klasses = st.sampled_from([INTERACTIVE, BULK])


# --- shares -----------------------------------------------------------------------------------


@settings(max_examples=80, deadline=None)
@given(seed=st.integers(0), f_costs=costs, g_costs=costs, w_f=weights, w_g=weights)
def test_two_backlogged_tenants_never_differ_by_more_than_one_item_each(
    seed, f_costs, g_costs, w_f, w_g
):
    """Over any interval, whatever happens meanwhile: others arrive, leave, cancel, change their
    weight, are charged more or work in the other class, and the two have priorities.
    """
    rng = random.Random(seed)  # noqa: S311 - not a secret
    queue = new_queue()
    entries = []
    for step in range(rng.randint(0, 15)):
        push(queue, f"early{step % 3}", rng.randint(1, 500))
        if step % 2:
            pop(queue)
    for tenant, weight, own in (("f", w_f, f_costs), ("g", w_g, g_costs)):
        for cost in own:
            priority = rng.choice([0, 0, 50, 100])
            entries.append(push(queue, tenant, cost, weight=weight, priority=priority))
    served = []
    while queue.backlog("f") and queue.backlog("g"):
        act = rng.choice(["pop", "pop", "pop", "other", "bulk", "cancel", "reweigh", "settle"])
        if act == "pop":
            served.append(pop(queue))
        elif act == "cancel":
            queue.cancel(rng.choice(entries))
        elif act == "reweigh":
            queue.reweigh("other", rng.choice([1, 4, 16]))
        elif act == "settle":
            queue.settle(INTERACTIVE, "other", rng.randint(-500, 500))
        else:
            klass = INTERACTIVE if act == "other" else BULK
            push(queue, act, rng.randint(1, 500), weight=16, klass=klass)
    bound = max(f_costs) / w_f + max(g_costs) / w_g
    assert spread(served, ("f", w_f), ("g", w_g)) <= bound + 1e-6


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0), c_max=st.integers(1, 500))
def test_tiers_share_one_to_four_to_sixteen(seed, c_max):
    rng = random.Random(seed)  # noqa: S311 - not a secret
    queue = new_queue()
    tiers = {"free": 1.0, "premium": 4.0, "enterprise": 16.0}
    served: Counter[str] = Counter()
    for _ in range(300):
        for tenant, weight in tiers.items():  # nobody ever runs dry
            while queue.backlog(tenant) < 2 * c_max:
                push(queue, tenant, rng.randint(1, c_max), weight=weight)
        name, cost = pop(queue)
        served[name] += cost
        level = [served[tenant] / weight for tenant, weight in tiers.items()]
        # every tenant's next start is within one own item of the virtual time
        assert max(level) - min(level) <= c_max * (1 + 1 / 4)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0), c_max=st.integers(1, 500))
def test_classes_share_nine_to_one(seed, c_max):
    rng = random.Random(seed)  # noqa: S311 - not a secret
    sizes = [rng.randint(1, c_max) for _ in range(200)]
    queue = new_queue()
    for cost in sizes:
        for klass in SHARES:
            queue.push(klass, "one tenant", weight=1, cost=cost, item=(klass, cost))
    served = []
    while queue.backlog("one tenant", INTERACTIVE) and queue.backlog("one tenant", BULK):
        served.append(pop(queue))
    bound = max(sizes) / 9 + max(sizes)
    assert spread(served, (INTERACTIVE, 9), (BULK, 1)) <= bound + 1e-6
    counts = Counter(klass for klass, _ in served)
    assert counts[BULK] >= 1


def test_equal_items_are_shared_exactly():
    queue = new_queue()
    for _ in range(2000):
        for tenant, weight in (("free", 1), ("premium", 4), ("enterprise", 16)):
            push(queue, tenant, 10, weight=weight)
        push(queue, "batch", 10, klass=BULK)
    counts = Counter(pop(queue)[0] for _ in range(2100))
    expected = {"free": 90, "premium": 360, "enterprise": 1440, "batch": 210}
    assert all(abs(counts[name] - wanted) <= 1 for name, wanted in expected.items())


def test_a_tenants_bulk_work_does_not_stand_before_its_interactive_work():
    queue = new_queue()
    for _ in range(1000):
        push(queue, "a", 10, klass=BULK)
    for _ in range(5):
        pop(queue)
    push(queue, "a", 7)
    assert ("a", 7) in [pop(queue), pop(queue)]


# --- idle, cancelled, changed -----------------------------------------------------------------


def test_an_idle_tenant_earns_no_credit():
    queue = new_queue()
    for _ in range(300):
        push(queue, "steady", 10)
    for _ in range(100):
        pop(queue)
    for _ in range(100):
        push(queue, "late", 10)
    counts = Counter(pop(queue)[0] for _ in range(100))
    assert abs(counts["late"] - 50) <= 1


def test_an_idle_class_earns_no_credit():
    queue = new_queue()
    for _ in range(300):
        push(queue, "b", 10, klass=BULK)
    for _ in range(100):
        pop(queue)
    for _ in range(200):
        push(queue, "a", 10)
    counts = Counter(pop(queue)[0] for _ in range(100))
    assert abs(counts["b"] - 10) <= 1


def test_a_new_busy_period_starts_level():
    queue = new_queue()
    for _ in range(100):
        push(queue, "was busy", 10)
    while queue.items:
        pop(queue)
    for _ in range(10):
        push(queue, "was busy", 10)
        push(queue, "new", 10)
    assert Counter(pop(queue)[0] for _ in range(10)) == {"was busy": 5, "new": 5}


@pytest.mark.parametrize("keep_one", [False, True])
def test_who_cancels_does_not_pay_for_it(keep_one):
    queue = new_queue()
    for _ in range(50):
        push(queue, "other", 10)
    entries = [push(queue, "fickle", 10) for _ in range(50)]
    for entry in entries[: 49 if keep_one else 50]:
        queue.cancel(entry)
    for _ in range(50 - keep_one):
        push(queue, "fickle", 10)
    counts = Counter(pop(queue)[0] for _ in range(40))
    assert abs(counts["fickle"] - 20) <= 1


def test_who_cancels_gains_nothing_either():
    queue = new_queue()
    for _ in range(100):
        push(queue, "other", 10)
    push(queue, "fickle", 10)
    counts: Counter[str] = Counter()
    for _ in range(80):
        counts[pop(queue)[0]] += 1
        queue.cancel(push(queue, "fickle", 10))
        push(queue, "fickle", 10)
    assert abs(counts["fickle"] - 40) <= 1


def test_a_cancelled_item_counts_once():
    queue = new_queue()
    entry = push(queue, "a", 10)
    push(queue, "b", 5)
    for _ in range(3):
        queue.cancel(entry)
    assert (queue.cost, queue.items, queue.backlog("a"), queue.backlog("b")) == (5, 1, 0, 5)
    assert pop(queue) == ("b", 5)
    queue.cancel(entry)
    assert (queue.cost, queue.items) == (0, 0)


def test_an_item_that_is_out_cannot_be_cancelled():
    queue = new_queue()
    entry = push(queue, "a", 10)
    push(queue, "a", 10)
    pop(queue)
    queue.cancel(entry)
    assert (queue.cost, queue.items) == (10, 1)


# --- nobody starves ---------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0), tenants=st.integers(1, 8), weight=weights)
def test_a_newcomer_waits_for_at_most_one_item_of_each_other_tenant(seed, tenants, weight):
    rng = random.Random(seed)  # noqa: S311 - not a secret
    queue = new_queue()
    names = [f"flood{i}" for i in range(tenants)]

    def flood():
        for name in names:
            while queue.backlog(name) < 1000:
                push(queue, name, rng.randint(1, 500), weight=16)

    for _ in range(rng.randint(0, 30)):
        flood()
        pop(queue)
    flood()
    push(queue, "newcomer", rng.randint(1, 500), weight=weight)
    before = []
    while (out := pop(queue)[0]) != "newcomer":
        before.append(out)
        flood()
    assert max(Counter(before).values(), default=0) <= 1


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0), own=st.lists(st.integers(1, 500), min_size=1, max_size=6), klass=klasses
)
def test_the_wait_of_an_item_depends_on_its_own_tenants_work_only(seed, own, klass):
    """`(Q + cost) / share`, and an item of each other tenant, however much others keep waiting."""
    rng = random.Random(seed)  # noqa: S311 - not a secret
    queue = new_queue()
    weight_of = {name: rng.choice([0.5, 1, 3, 4, 16]) for name in "fghi"}
    others = [(one, name) for name in "ghi" for one in SHARES]

    def refill():
        for one, name in others:
            while queue.backlog(name, one) < 600:
                push(queue, name, rng.randint(1, 500), weight=weight_of[name], klass=one)

    for _ in range(rng.randint(0, 6)):
        refill()
        pop(queue)
    refill()
    entries = [push(queue, "f", cost, weight=weight_of["f"], klass=klass) for cost in own]
    share = queue.share(klass, "f", weight_of["f"])
    passed = 0
    while entries[-1].waiting:
        passed += pop(queue)[1]
        refill()
    whole = sum(SHARES.values()) / SHARES[klass]  # what all classes get while this one gets 1
    assert passed <= sum(own) / share + whole * 500 * 3 + 500 * (1 + whole) + 1e-6


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0))
def test_the_predicted_wait_holds_when_nobody_else_comes(seed):
    """`ahead` is what passes first, up to one item of every other tenant and class."""
    rng = random.Random(seed)  # noqa: S311 - not a secret
    queue = new_queue()
    largest: dict[tuple[Klass, str], int] = {}
    weight_of = {name: rng.choice([0.5, 1, 3, 4, 16]) for name in "fgh"}
    for _ in range(rng.randint(0, 40)):
        klass, tenant, cost = rng.choice(list(SHARES)), rng.choice("fgh"), rng.randint(1, 500)
        queue.push(klass, tenant, weight=weight_of[tenant], cost=cost, item="other")
        largest[klass, tenant] = max(largest.get((klass, tenant), 0), cost)
    klass, weight, cost = rng.choice(list(SHARES)), weight_of["f"], rng.randint(1, 500)
    predicted = queue.ahead(klass, "f", weight=weight, cost=cost)
    total = queue.cost
    assert queue.backlog("f", klass) + cost <= predicted + 1e-6
    assert predicted <= total + cost

    slack = sum(c for (k, tenant), c in largest.items() if k == klass and tenant != "f")
    slack *= 10 / SHARES[klass]
    slack += max((c for (k, _), c in largest.items() if k != klass), default=0)
    queue.push(klass, "f", weight=weight, cost=cost, item="mine")
    while pop(queue) != "mine":
        pass
    passed = total + cost - queue.cost
    assert passed <= predicted + slack + 1e-6


def test_the_predicted_wait_ignores_the_backlog_of_others():
    queue = new_queue()
    for _ in range(1000):
        push(queue, "flood", 100)
    assert queue.ahead(INTERACTIVE, "small", weight=1, cost=100) == pytest.approx(200)
    assert queue.ahead(INTERACTIVE, "flood", weight=1) == pytest.approx(100_000)
    assert queue.share(INTERACTIVE, "small", 4) == pytest.approx(0.8)
    assert queue.share(BULK, "small", 4) == pytest.approx(0.1)
    assert new_queue().share(BULK, "small", 4) == 1


# --- taking -----------------------------------------------------------------------------------


def test_nobody_overtakes_what_does_not_fit():
    queue = new_queue()
    for tenant, cost in (("a", 10), ("b", 500), ("c", 10)):
        push(queue, tenant, cost)
    out = queue.take(admits=lambda item: item[1] < 100, live=lambda _: True)
    assert out == [("a", 10)]
    assert pop(queue) == ("b", 500)


def test_what_is_not_live_is_dropped():
    queue = new_queue()
    for _ in range(10):
        push(queue, "gone", 10)
        push(queue, "here", 10)
    out = queue.take(admits=lambda _: True, live=lambda item: item[0] == "here")
    assert out == [("here", 10)] * 10
    assert (queue.cost, queue.items) == (0, 0)


def test_what_is_not_live_costs_its_tenant_nothing():
    queue = new_queue()
    for _ in range(50):
        push(queue, "part gone", 11)
    for _ in range(50):
        push(queue, "part gone", 10)
        push(queue, "here", 10)
    left = [20]
    out = queue.take(
        admits=lambda _: left[0] > 0 and (left.append(left.pop() - 1) or True),
        live=lambda item: item[1] == 10,
    )
    assert Counter(name for name, _ in out) == {"part gone": 10, "here": 10}


WRONG = [{"weight": 0}, {"weight": -1}, {"cost": 0}, {"count": 0}, {"priority": -1}]


@pytest.mark.parametrize("wrong", [*WRONG, {"priority": 101}])
def test_what_has_no_meaning_is_refused(wrong):
    queue = new_queue()
    values = {"weight": 1, "cost": 1, "count": 1} | wrong
    with pytest.raises(ValueError, match=r"must be positive|is not in 0\.\.100"):
        queue.push(INTERACTIVE, "a", item=("a", 1), **values)
    assert (queue.items, pop(queue)) == (0, None)


def test_memory_follows_the_tenants_that_wait_not_those_that_came():
    queue = new_queue()
    push(queue, "stays", 10)
    for number in range(5 * SLACK):
        queue.cancel(push(queue, f"passes{number}", 10))
    inner = queue._classes[INTERACTIVE]
    assert len(inner.heap) <= SLACK + 3
    assert len(inner.rested) <= 2 * SLACK
    assert len(inner.flows) == 1


def test_memory_is_freed_when_everyone_leaves():
    queue = new_queue()
    for number in range(100):
        queue.cancel(push(queue, f"passes{number}", 10))
    inner = queue._classes[INTERACTIVE]
    assert (inner.heap, inner.rested, inner.flows) == ([], {}, {})


def test_a_sweep_forgets_neither_who_waits_nor_who_is_ahead_of_its_share():
    queue = new_queue()
    push(queue, "debtor", 1000)
    for number in range(2 * SLACK):
        push(queue, f"waits{number}", 10)
    assert pop(queue) == ("debtor", 1000)
    for number in range(3 * SLACK):
        queue.cancel(push(queue, f"passes{number}", 10))
    push(queue, "debtor", 10)
    for number in range(5):
        push(queue, f"later{number}", 10)
    served = [name for name, _ in iter(lambda: pop(queue), None)]
    assert len(served) == 2 * SLACK + 6
    assert served[-1] == "debtor"


def test_memory_is_freed_of_tenants_that_were_served():
    queue = new_queue()
    for number in range(5 * SLACK):
        push(queue, "stays", 10)
        push(queue, "stays", 10)
        push(queue, f"passes{number}", 10)
        pop(queue)
        pop(queue)
    inner = queue._classes[INTERACTIVE]
    assert len(inner.rested) <= 2 * SLACK + 3
    while pop(queue):
        pass
    assert (inner.heap, inner.rested, inner.flows) == ([], {}, {})
