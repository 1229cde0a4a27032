"""A limit grants what it promises: never above burst + rate * T over any window, never less."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serve.admission.bank import Bank
from serve.admission.gcra import Gcra
from serve.grants import Draw, Grant, Limit, Line, Return


INTERVALS_S = (0.01, 0.25, 1.0, 3.0)
MONTH = "2026-11"

acts = st.lists(
    st.tuples(
        st.sampled_from(["ask", "ask", "block", "refund", "part", "less", "more"]),
        st.floats(0, 12, width=32),  # seconds since the act before
        st.integers(1, 12),  # units
        st.integers(0, 10**6),  # which of the grants, for what is given back
    ),
    max_size=40,
)


def new_bank() -> Bank:
    return Bank(keys_max=10, lease_s=60)


def rate(name: str, interval_s: float, burst: float) -> Limit:
    return Limit("t/ann", name, "rate", "tokens", burst, interval_s)


def draw(bank: Bank, now: float, *lines: Line) -> Grant:
    (grant,) = bank.exchange("a", (), [Draw(lines)], now=now, month=MONTH)
    return grant


def free(bank: Bank, limit: Limit, now: float) -> float:
    left = bank.free(limit, now=now, month=MONTH)
    return limit.burst if left is None else left


def worst_excess(grants: list[tuple[float, float]], interval_s: float) -> float:
    """The largest of (units granted - rate * T) over all windows that start and end at a grant.

    Below the burst by promise. `grants` are (time, units), in order of time.
    """
    worst = best = 0.0
    total = 0.0
    for at, units in grants:
        best = max(best, at / interval_s - total)  # a window that starts right before this grant
        total += units
        worst = max(worst, total - at / interval_s + best)
    return worst


@settings(max_examples=200, deadline=None)
@given(acts=acts, interval_s=st.sampled_from(INTERVALS_S), burst=st.integers(1, 30))
def test_no_window_gets_more_than_burst_and_rate(acts, interval_s, burst):
    """Net of what is given back, however late, in whatever order and in however many parts."""
    bank, limit = new_bank(), rate("tokens", interval_s, burst)
    now, grants, left = 0.0, [], []
    for act, wait_s, units, which in acts:
        now += wait_s * interval_s
        if act in ("ask", "block"):
            want = units * 4 if act == "block" else units
            grant = draw(bank, now, Line(limit, units, want))
            if grant.refused is None:
                left.append([len(grants), grant.units[0], grant.marks[0]])
                grants.append((now, grant.units[0]))
        elif left:
            one = left[which % len(left)]
            place, rest, mark = one
            back = {"refund": rest, "part": rest // 3, "less": rest // 2, "more": -units}[act]
            bank.exchange("a", [Return(limit, back, mark)], (), now=now, month=MONTH)
            one[1] -= max(back, 0)
            if back > 0:  # what turns out to be more was used, but not granted
                at, granted = grants[place]
                grants[place] = (at, granted - back)
    assert worst_excess(grants, interval_s) <= burst + 1e-6


@settings(max_examples=150, deadline=None)
@given(asks=st.lists(st.tuples(st.floats(0, 12, width=32), st.integers(1, 10)), max_size=40))
def test_what_is_refused_is_beyond_the_limit_and_the_wait_is_exact(asks):
    """A token bucket, counted the slow way, refuses exactly the same."""
    bank, limit = new_bank(), rate("tokens", 0.5, 10)
    now, bucket, at = 0.0, 10.0, 0.0
    for wait_s, units in asks:
        now += wait_s
        bucket, at = min(10.0, bucket + (now - at) / 0.5), now
        grant = draw(bank, now, Line(limit, units, units))
        if units > bucket + 1e-6:
            assert grant.refused == 0
            assert grant.wait_s == pytest.approx((units - bucket) * 0.5, abs=1e-6)
            early = draw(bank, now + grant.wait_s - 1e-3, Line(limit, units, units))
            assert early.refused == 0
        elif units < bucket - 1e-6:
            assert grant.refused is None
        if grant.refused is None:
            bucket -= units


@settings(max_examples=100, deadline=None)
@given(
    asks=st.lists(
        st.tuples(st.floats(0, 5, width=32), st.integers(0, 12), st.integers(0, 12)), max_size=30
    )
)
def test_a_refusal_charges_no_limit(asks):
    bank = new_bank()
    limits = rate("one", 1.0, 10), Limit("t/ann", "two", "level", "requests", 25)
    now = 0.0
    for wait_s, one, two in asks:
        now += wait_s
        before = [free(bank, limit, now) for limit in limits]
        lines = [Line(limit, need, need) for limit, need in zip(limits, (one, two), strict=True)]
        grant = draw(bank, now, *lines)
        after = [free(bank, limit, now) for limit in limits]
        spent = [0, 0] if grant.refused is not None else [one, two]
        assert before == pytest.approx([a + s for a, s in zip(after, spent, strict=True)])


@settings(max_examples=100, deadline=None)
@given(
    before=st.lists(st.integers(1, 5), max_size=8),
    units=st.integers(1, 10),
    after=st.lists(st.integers(1, 5), max_size=8),
)
def test_a_prompt_refund_leaves_no_trace(before, units, after):
    """While nothing has been refilled a refund is exact, whatever was charged in between."""
    with_it, without = Gcra(1.0, 5, 5), Gcra(1.0, 5, 5)
    for cost in before:
        with_it.charge(cost, 5.0)
        without.charge(cost, 5.0)
    mark = with_it.charge(units, 5.0)
    for cost in after:
        with_it.charge(cost, 5.0)
        without.charge(cost, 5.0)
    with_it.give_back(units, mark)
    assert with_it.free(1000, 5.0) == without.free(1000, 5.0)
