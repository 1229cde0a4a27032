"""The fair order of claims, as stored tags: shares by weight, and nobody moved by another's priority."""

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count, pairwise

import pytest
import sqlalchemy as sa
from hypothesis import given, settings
from hypothesis import strategies as st

from serve.items import NewItem
from serve.jobs import handed, schema, submit
from tests.property.handed import ROOM, SHARES, claim, new_job


@pytest.fixture(scope="module")
def engine() -> Iterator[sa.Engine]:
    made = sa.create_engine("sqlite://")
    with made.begin() as conn:
        schema.create(conn, 0.0)
    yield made
    made.dispose()


@contextmanager
def fresh(engine: sa.Engine) -> Iterator[sa.Connection]:
    with engine.connect() as conn, conn.begin() as transaction:
        yield conn
        transaction.rollback()


numbers = count()


def hand_over(conn: sa.Connection, tenant: str, costs: list[float], **fields: object) -> str:
    job = new_job(next(numbers), tenant, **fields)
    new = [NewItem(tenant, "request", "embed", cost, {}) for cost in costs]
    submit.submit(conn, job, new, None, room=ROOM, now=1.0)
    return job.id


def tenant_of(claimed, item) -> str:
    return claimed.jobs[item.job].tenant


COSTS = st.lists(st.sampled_from([1.0, 3.0, 10.0]), min_size=1, max_size=25)
WEIGHTS = st.sampled_from([1.0, 4.0, 16.0])


@settings(max_examples=25, deadline=None)
@given(
    backlogs=st.lists(st.tuples(WEIGHTS, COSTS), min_size=2, max_size=4),
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=20),
)
def test_backlogged_tenants_share_by_weight(engine: sa.Engine, backlogs, sizes):
    """Two that wait never differ by more than one largest item each, in service by weight."""
    with fresh(engine) as conn:
        left, weight, largest = {}, {}, {}
        for number, (own, costs) in enumerate(backlogs):
            name = f"t{number}"
            hand_over(conn, name, costs, weight=own)
            left[name], weight[name], largest[name] = len(costs), own, max(costs)
        served = dict.fromkeys(left, 0.0)
        for most in sizes:
            for _ in range(most):  # one at a time is the same order as all at once
                claimed = claim(conn, "w", "embed", 1, now=1.0)
                for item in claimed.items:
                    tenant = tenant_of(claimed, item)
                    served[tenant] += item.cost / weight[tenant]
                    left[tenant] -= 1
            waiting = [name for name in left if left[name]]
            for a, b in pairwise(waiting):
                bound = largest[a] / weight[a] + largest[b] / weight[b]
                assert abs(served[a] - served[b]) <= bound + 1e-6


@settings(max_examples=25, deadline=None)
@given(
    mine=st.lists(st.tuples(st.sampled_from([10, 50, 90]), COSTS), min_size=1, max_size=5),
    theirs=COSTS,
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=6),
)
def test_priorities_order_ones_own_items_only(engine: sa.Engine, mine, theirs, sizes):
    """The other tenant gets its items as if there were no priorities."""

    def play(*, priorities: bool) -> tuple[list[float], list[int]]:
        """What the one had been given before each item of the other; its own priorities."""
        with fresh(engine) as conn:
            hand_over(conn, "b", theirs)
            for priority, costs in mine:
                hand_over(conn, "a", costs, priority=priority if priorities else 50)
            before, own, given_a = [], [], 0.0
            for most in [*sizes, 1000]:
                claimed = claim(conn, "w", "embed", min(most, 500), now=1.0)
                for item in claimed.items:
                    if tenant_of(claimed, item) == "a":
                        given_a += item.cost
                        own.append(claimed.jobs[item.job].priority)
                    else:
                        before.append(given_a)
            return before, own

    plain, _ = play(priorities=False)
    ordered, own = play(priorities=True)
    assert own == sorted(own, reverse=True)
    largest = max(cost for _, costs in mine for cost in costs)
    for one, other in zip(plain, ordered, strict=True):
        assert abs(one - other) <= largest  # what is handed out cannot be cut


@settings(max_examples=25, deadline=None)
@given(costs=st.tuples(COSTS, COSTS, COSTS, COSTS), how=st.sampled_from(["cancel", "pause"]))
def test_what_is_withdrawn_was_never_there(engine: sa.Engine, costs, how):
    """The order of the rest is that of a tenant who never handed it over."""
    first, gone, later, theirs = costs

    def play(*, with_it: bool) -> list[tuple[str, float]]:
        with fresh(engine) as conn:
            hand_over(conn, "b", theirs)
            hand_over(conn, "a", first)
            withdrawn = hand_over(conn, "a", gone) if with_it else None
            hand_over(conn, "a", later)
            if withdrawn:
                handed.change(conn, "a", withdrawn, how, 2.0)
            hand_over(conn, "a", [1.0])
            claimed = claim(conn, "w", "embed", 500, now=3.0)
            return [(tenant_of(claimed, item), item.cost) for item in claimed.items]

    def of(order: list[tuple[str, float]], tenant: str) -> list[tuple[float, float]]:
        """Each item's cost, and what its tenant and the other had got before."""
        got: defaultdict[str, float] = defaultdict(float)
        places = []
        for name, cost in order:
            if name == tenant:
                places.append((cost, sum(got.values()) - got[name]))
            got[name] += cost
        return places

    plain, closed = play(with_it=False), play(with_it=True)
    largest = max(cost for some in costs for cost in some)
    for tenant in "ab":
        for one, other in zip(of(plain, tenant), of(closed, tenant), strict=True):
            assert one[0] == other[0]
            assert abs(one[1] - other[1]) <= largest


@settings(max_examples=15, deadline=None)
@given(cost=st.sampled_from([1.0, 7.0]), sizes=st.lists(st.integers(1, 20), max_size=30))
def test_backlogged_classes_share_by_their_shares(engine: sa.Engine, cost, sizes):
    """Within one claim each."""
    with fresh(engine) as conn:
        for klass in SHARES:
            hand_over(conn, "a", [cost] * 600, klass=klass)
        served = dict.fromkeys(SHARES, 0.0)
        for most in sizes:
            claimed = claim(conn, "w", "embed", most, now=1.0)
            for item in claimed.items:
                klass = claimed.jobs[item.job].klass
                served[klass] += item.cost / SHARES[klass]
            largest = max(sizes) * cost
            bound = sum(largest / share for share in SHARES.values())
            assert abs(served["interactive"] - served["bulk"]) <= bound
