"""Fair queue: bounded unfairness, exact shares, no starvation, and gauges that tell the truth."""

import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
)

from serve.admission.fairness import SLACK, Entry, FairQueue
from serve.records import Klass


SHARES: dict[Klass, float] = {"interactive": 9, "bulk": 1}
INTERACTIVE: Klass = "interactive"
BULK: Klass = "bulk"

costs = st.lists(st.integers(1, 500), min_size=5, max_size=40)
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


def push(queue, tenant, cost, *, weight=1.0, klass=INTERACTIVE):
    return queue.push(klass, tenant, weight=weight, cost=cost, item=(tenant, cost))


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


# --- shares -----------------------------------------------------------------------------------


@settings(max_examples=80, deadline=None)
@given(data=st.data(), f_costs=costs, g_costs=costs, w_f=weights, w_g=weights)
def test_two_backlogged_tenants_never_differ_by_more_than_one_item_each(
    data, f_costs, g_costs, w_f, w_g
):
    """Whatever others do meanwhile: arrive, leave, or work in the other class."""
    queue = new_queue()
    entries = []
    for step in range(data.draw(st.integers(0, 15), label="before they come")):
        push(queue, f"early{step % 3}", data.draw(st.integers(1, 500)))
        if step % 2:
            pop(queue)
    for tenant, weight, own in (("f", w_f, f_costs), ("g", w_g, g_costs)):
        entries += [push(queue, tenant, cost, weight=weight) for cost in own]
    served = []
    while queue.backlog("f") and queue.backlog("g"):
        act = data.draw(st.sampled_from(["pop", "pop", "pop", "other", "bulk", "cancel"]))
        if act == "pop":
            served.append(pop(queue))
        elif act == "cancel":
            queue.cancel(data.draw(st.sampled_from(entries)))
        else:
            klass = INTERACTIVE if act == "other" else BULK
            push(queue, act, data.draw(st.integers(1, 500)), weight=16, klass=klass)
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


@settings(max_examples=50, deadline=None)
@given(sizes=st.lists(st.integers(1, 500), min_size=200, max_size=200))
def test_classes_share_nine_to_one(sizes):
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


def test_a_new_weight_counts_for_what_waits_behind():
    """A tenant that buys a better tier does not sit out the tags of its old one."""
    queue = new_queue()
    for _ in range(200):
        push(queue, "other", 10, weight=1)
        push(queue, "upgraded", 10, weight=1)
    assert queue.share(INTERACTIVE, "upgraded", 4) == pytest.approx(0.8)
    for _ in range(100):
        push(queue, "upgraded", 10, weight=4)
    assert queue.share(INTERACTIVE, "other", 1) == pytest.approx(0.2)


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
            queue.settle(INTERACTIVE, "a", weight=1, diff=true_cost - 10)
    assert abs(counts["a"] - of_sixty) <= 2


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


@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_the_predicted_wait_holds_when_nobody_else_comes(data):
    """`ahead` is what passes first, up to one item of every other tenant and class."""
    queue = new_queue()
    largest: dict[tuple[Klass, str], int] = {}
    weight_of: dict[str, float] = {}
    for _ in range(data.draw(st.integers(0, 40))):
        klass = data.draw(st.sampled_from([INTERACTIVE, BULK]))
        tenant, cost = data.draw(st.sampled_from("fgh")), data.draw(st.integers(1, 500))
        weight = weight_of.setdefault(tenant, data.draw(weights))
        queue.push(klass, tenant, weight=weight, cost=cost, item="other")
        largest[klass, tenant] = max(largest.get((klass, tenant), 0), cost)
    klass = data.draw(st.sampled_from([INTERACTIVE, BULK]))
    weight, cost = weight_of.get("f", 1.0), data.draw(st.integers(1, 500))
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


@pytest.mark.parametrize("wrong", [{"weight": 0}, {"weight": -1}, {"cost": 0}, {"count": 0}])
def test_what_would_divide_by_zero_or_last_for_ever_is_refused(wrong):
    queue = new_queue()
    values = {"weight": 1, "cost": 1, "count": 1} | wrong
    with pytest.raises(ValueError, match="positive"):
        queue.push(INTERACTIVE, "a", item=("a", 1), **values)
    assert (queue.items, pop(queue)) == (0, None)


def test_memory_follows_the_tenants_that_wait_not_those_that_came():
    queue = new_queue()
    push(queue, "stays", 10)
    for number in range(5 * SLACK):
        queue.cancel(push(queue, f"passes{number}", 10))
    inner = queue._classes[INTERACTIVE]
    assert len(inner.heap) <= SLACK + 3
    assert len(inner.finish) <= 2 * SLACK
    assert len(inner.flows) == 1


def test_memory_is_freed_when_everyone_leaves():
    queue = new_queue()
    for number in range(100):
        queue.cancel(push(queue, f"passes{number}", 10))
    inner = queue._classes[INTERACTIVE]
    assert (inner.heap, inner.finish, inner.flows) == ([], {}, {})


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
    assert len(inner.finish) <= 2 * SLACK + 3
    while pop(queue):
        pass
    assert (inner.heap, inner.finish, inner.flows) == ([], {}, {})


# --- random use -------------------------------------------------------------------------------


class AnyUse(RuleBasedStateMachine):
    """Random push, take and cancel against a list of what waits."""

    entries = Bundle("entries")

    def __init__(self):
        super().__init__()
        self.queue: FairQueue[int] = FairQueue(SHARES)
        self.waiting: list[Entry[int]] = []
        self.dead: set[int] = set()
        self.latest: dict[tuple[Klass, str], float] = {}
        self.number = 0

    @rule(
        target=entries,
        klass=st.sampled_from([INTERACTIVE, BULK]),
        tenant=st.sampled_from("abc"),
        weight=weights,
        cost=st.integers(1, 100),
        count=st.integers(1, 3),
    )
    def push(self, klass, tenant, weight, cost, count):
        self.number += 1
        entry = self.queue.push(
            klass, tenant, weight=weight, cost=cost, item=self.number, count=count
        )
        self.waiting.append(entry)
        self.latest[klass, tenant] = weight
        return entry

    @rule(entry=entries)
    def cancel(self, entry):
        """Also what was cancelled or handed out before."""
        self.queue.cancel(entry)
        if entry in self.waiting:
            self.waiting.remove(entry)

    @rule(entry=entries)
    def depart(self, entry):
        """The caller left, and only `live` will tell."""
        self.dead.add(entry.item)

    @precondition(lambda self: self.waiting)
    @rule(room=st.integers(1, 300))
    def take(self, room):
        left = room
        refused = []
        cost_of = {entry.item: entry.cost for entry in self.waiting}

        def admits(item):
            nonlocal left
            if cost_of[item] > left:
                refused.append(item)
                return False
            left -= cost_of[item]
            return True

        out = self.queue.take(admits, lambda item: item not in self.dead)
        alive = [entry for entry in self.waiting if entry.item not in self.dead]
        assert out or refused or not alive, "something waited and nothing was handed out"
        assert not self.dead & set(out)
        by_item = {entry.item: entry for entry in self.waiting}
        taken = [by_item[item] for item in out]  # KeyError: cancelled, or handed out twice
        for flow in {(entry.klass, entry.tenant) for entry in taken}:
            own = [entry for entry in taken if (entry.klass, entry.tenant) == flow]
            first = [entry for entry in alive if (entry.klass, entry.tenant) == flow][: len(own)]
            assert own == first, "a tenant's items keep their order"
        self.waiting = [entry for entry in self.waiting if entry.waiting]
        assert {entry.item for entry in self.waiting} <= set(by_item) - set(out)
        assert {entry.item for entry in alive} <= {e.item for e in self.waiting} | set(out)

    @invariant()
    def gauges_tell_the_truth(self):
        queue, waiting = self.queue, self.waiting
        assert queue.items == sum(entry.count for entry in waiting)
        assert queue.cost == pytest.approx(sum(entry.cost for entry in waiting))
        for klass, share in SHARES.items():
            mine = [entry for entry in waiting if entry.klass == klass]
            busy = {entry.klass for entry in waiting} | {klass}
            of_class = share / sum(SHARES[one] for one in busy)
            for tenant in "abc":
                cost = sum(entry.cost for entry in mine if entry.tenant == tenant)
                assert queue.backlog(tenant, klass) == pytest.approx(cost)
                names = {entry.tenant for entry in mine} - {tenant}
                others = sum(self.latest[klass, name] for name in names)
                expected = of_class * 2 / (2 + others)
                assert queue.share(klass, tenant, 2) == pytest.approx(expected)

    @invariant()
    def every_waiting_flow_has_one_row(self):
        for q in self.queue._classes.values():
            rows = [row[2] for row in q.heap if row[2].entries]
            assert len(rows) == len(q.flows)
            assert all(row[0] >= q.v for row in q.heap if row[2].entries)


AnyUse.TestCase.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)
TestAnyUse = AnyUse.TestCase
