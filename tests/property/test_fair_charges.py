"""What the fair queue charges: priorities, new weights, true costs. See test_fair_queue."""

import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serve.admission.fairness import FairQueue
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


# --- priority ---------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(items=st.lists(st.tuples(st.integers(0, 100), st.integers(1, 500)), max_size=40))
def test_a_tenants_items_go_by_priority_and_equal_ones_in_their_order(items):
    queue = new_queue()
    for number, (priority, cost) in enumerate(items):
        queue.push(
            INTERACTIVE, "f", weight=4, cost=cost, item=(-priority, number), priority=priority
        )
        push(queue, "other", cost)
    own = [item for item in iter(lambda: pop(queue), None) if item[0] != "other"]
    assert own == sorted(own)
    assert len(own) == len(items)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0))
def test_priority_never_moves_work_past_another_tenant(seed):
    """The same pushes with and without priorities: tenants and classes go out in the same order."""
    rng = random.Random(seed)  # noqa: S311 - not a secret
    cost_of = {tenant: rng.randint(1, 500) for tenant in "fgh"}
    weight_of = {tenant: rng.choice([0.5, 1, 3, 4, 16]) for tenant in "fgh"}
    plain, ranked = new_queue(), new_queue()
    for _ in range(100):
        if rng.randrange(4) == 0:
            assert pop(plain) == pop(ranked)
            continue
        tenant, klass = rng.choice("fgh"), rng.choice(list(SHARES))
        work = {"cost": cost_of[tenant], "weight": weight_of[tenant], "item": (klass, tenant)}
        plain.push(klass, tenant, **work)
        ranked.push(klass, tenant, **work, priority=rng.randint(0, 100))
    while plain.items:
        assert pop(plain) == pop(ranked)
    assert pop(ranked) is None


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0))
def test_a_tenants_priorities_do_not_change_the_order_of_others(seed):
    """Also when its own items differ in size."""
    rng = random.Random(seed)  # noqa: S311 - not a secret
    plain, ranked = new_queue(), new_queue()
    for _ in range(60):
        tenant, cost = rng.choice("fgh"), rng.randint(1, 500)
        push(plain, tenant, cost)
        push(ranked, tenant, cost, priority=rng.randint(0, 100) if tenant == "f" else 0)
    plain_order, ranked_order = (
        [one for one in iter(lambda q=q: pop(q), None) if one[0] != "f"] for q in (plain, ranked)
    )
    assert plain_order == ranked_order


# --- another weight ---------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0), w_old=weights, w_new=weights, w_g=weights)
def test_a_new_weight_divides_the_service_from_that_moment_on(seed, w_old, w_new, w_g):
    """What waits is charged at it as well, and so is what the tenant was ahead by."""
    rng = random.Random(seed)  # noqa: S311 - not a secret
    queue = new_queue()
    f_costs, g_costs = ([rng.randint(1, 500) for _ in range(40)] for _ in range(2))
    for tenant, weight, own in (("f", w_old, f_costs), ("g", w_g, g_costs)):
        for cost in own:
            push(queue, tenant, cost, weight=weight)
    for _ in range(rng.randint(0, 4)):
        pop(queue)
    if rng.random() < 0.5:  # by a push
        f_costs.append(rng.randint(1, 500))
        push(queue, "f", f_costs[-1], weight=w_new)
    else:
        queue.reweigh("f", w_new)
    served = []
    while queue.backlog("f") and queue.backlog("g"):
        served.append(pop(queue))
    bound = max(f_costs) / w_new + max(g_costs) / w_g
    assert spread(served, ("f", w_new), ("g", w_g)) <= bound + 1e-6


@pytest.mark.parametrize("waits", [True, False])
@pytest.mark.parametrize(("weight", "passes_s"), [(4, 250), (1, 1000), (0.5, 2000)])
def test_a_better_tier_shortens_the_wait_that_is_left(weight, passes_s, waits):
    """`tag = V + (tag - V) * w_old / w_new`, of what waits and of what has just been served."""
    queue = new_queue()
    push(queue, "f", 1000)
    if waits:
        push(queue, "f", 10)
    for _ in range(300):
        push(queue, "g", 10)
    assert pop(queue) == ("f", 1000)
    if not waits:
        push(queue, "f", 10, weight=weight)
    queue.reweigh("f", weight)
    passed = 0
    while (out := pop(queue))[0] != "f":
        passed += out[1]
    assert passed == pytest.approx(passes_s, abs=10)


def test_a_new_weight_holds_in_both_classes():
    queue = new_queue()
    for tenant in ("upgraded", "other"):
        push(queue, tenant, 10, klass=BULK)
    push(queue, "upgraded", 10, weight=4)
    assert queue.share(BULK, "other", 1) == pytest.approx(0.1 * 0.2)
    assert queue.share(BULK, "upgraded", 4) == pytest.approx(0.1 * 0.8)


# --- the true cost ----------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0))
def test_a_settled_cost_counts_as_if_it_had_been_known(seed):
    """For tenants and for classes. Shares and weights are powers of two: no rounding differs."""
    rng = random.Random(seed)  # noqa: S311 - not a secret
    told, settled = (FairQueue({INTERACTIVE: 8, BULK: 1}) for _ in range(2))
    owed = {}
    for item in range(100):
        if rng.random() < 0.6:
            klass, tenant = rng.choice(list(SHARES)), rng.choice("fg")
            first, true, weight = rng.randint(1, 500), rng.randint(1, 500), {"f": 1, "g": 4}[tenant]
            owed[item] = klass, tenant, true - first
            told.push(klass, tenant, weight=weight, cost=true, item=item)
            settled.push(klass, tenant, weight=weight, cost=first, item=item)
        elif (out := pop(told)) is not None:
            assert pop(settled) == out
            settled.settle(*owed[out])
    while (out := pop(told)) is not None:
        assert pop(settled) == out
        settled.settle(*owed[out])


@pytest.mark.parametrize(("true_cost", "of_sixty"), [(20, 20), (5, 40), (10, 30)])
def test_the_true_cost_is_settled_on_later_items(true_cost, of_sixty):
    queue = new_queue()
    for _ in range(100):
        push(queue, "a", 10)
        push(queue, "b", 10)
    counts: Counter[str] = Counter()
    for _ in range(60):
        name = pop(queue)[0]
        counts[name] += 1
        if name == "a":
            queue.settle(INTERACTIVE, "a", true_cost - 10)
    assert abs(counts["a"] - of_sixty) <= 2


@pytest.mark.parametrize("klass", [INTERACTIVE, BULK])
def test_a_refund_never_puts_anyone_before_what_goes_out_now(klass):
    """Nor a class: `f` and `b` were charged 20, and are given back as if it had been millions."""
    queue = new_queue()
    for _ in range(200):
        for tenant, one in (("f", klass), ("g", INTERACTIVE), ("b", BULK)):
            push(queue, tenant, 10, klass=one)
    for _ in range(60):
        pop(queue)
    queue.settle(klass, "f", -1e6)
    counts = Counter(pop(queue)[0] for _ in range(60))
    expected = {"f": 27, "g": 27, "b": 6} if klass == INTERACTIVE else {"f": 3, "g": 54, "b": 3}
    assert all(abs(counts[name] - wanted) <= 1 for name, wanted in expected.items())


def test_who_is_forgotten_has_neither_debts_nor_credit():
    queue = new_queue()
    for diff in (-100, 100):
        queue.settle(INTERACTIVE, "f", diff)
        for _ in range(20):
            push(queue, "f", 10)
            push(queue, "g", 10)
        assert Counter(pop(queue)[0] for _ in range(20)) == {"f": 10, "g": 10}
        while queue.items:
            pop(queue)
