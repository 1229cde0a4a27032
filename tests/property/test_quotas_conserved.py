"""GCRA grants what it promises: never above burst + rate * T over any window, never less."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serve.admission.quotas import Dimension, Gcra


INTERVALS_S = (0.01, 0.25, 1.0, 3.0)

acts = st.lists(
    st.tuples(
        st.sampled_from(["ask", "ask", "ask", "refund", "less", "more"]),
        st.floats(0, 12, width=32),  # seconds since the act before
        st.integers(1, 12),  # units
        st.integers(0, 10**6),  # which of the grants, for what is given back
    ),
    max_size=40,
)


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
    """Net of what is given back, however late and in whatever order."""
    gcra, limit = Gcra(10), Dimension("tokens", interval_s, burst)
    now, grants, open_marks = 0.0, [], []
    for act, wait_s, units, which in acts:
        now += wait_s * interval_s
        if act == "ask":
            if gcra.charge("t", {limit: units}, now) is None:
                open_marks.append((len(grants), gcra.mark("t", limit)))
                grants.append((now, units))
        elif open_marks:
            place, mark = open_marks.pop(which % len(open_marks))
            at, charged = grants[place]
            true = {"refund": 0, "less": charged // 2, "more": charged + units}[act]
            gcra.give_back("t", limit, charged - true, mark=mark)
            if true <= charged:  # what turns out to be more was used, but not granted
                grants[place] = (at, true)
    assert worst_excess(grants, interval_s) <= burst + 1e-6


@settings(max_examples=200, deadline=None)
@given(asks=st.lists(st.tuples(st.floats(0, 12, width=32), st.integers(1, 12)), max_size=40))
def test_what_is_refused_is_beyond_the_limit_and_the_wait_is_exact(asks):
    """A token bucket, counted the slow way, refuses exactly the same."""
    gcra, limit = Gcra(10), Dimension("tokens", interval_s=0.5, burst=10)
    now, level, at = 0.0, 10.0, 0.0
    for wait_s, units in asks:
        now += wait_s
        level, at = min(10.0, level + (now - at) / 0.5), now
        refused = gcra.charge("t", {limit: units}, now)
        if units > level + 1e-6:
            assert refused is not None
            assert refused[1] == pytest.approx((units - level) * 0.5, abs=1e-6)
            assert (gcra.charge("t", {limit: units}, now + refused[1] - 1e-3)) is not None
        elif units < level - 1e-6:
            assert refused is None
        if refused is None:
            level -= units


@settings(max_examples=100, deadline=None)
@given(
    asks=st.lists(
        st.tuples(st.floats(0, 5, width=32), st.integers(0, 12), st.integers(0, 12)), max_size=30
    )
)
def test_a_refusal_charges_no_dimension(asks):
    gcra = Gcra(10)
    first, second = Dimension("a", 1.0, 10), Dimension("b", 0.3, 8)
    now = 0.0
    for wait_s, one, two in asks:
        now += wait_s
        before = [gcra.rate("t", limit, now) for limit in (first, second)]
        refused = gcra.charge("t", {first: one, second: two}, now)
        after = [gcra.rate("t", limit, now) for limit in (first, second)]
        if refused is None:
            spent = [a.reset_s - b.reset_s for a, b in zip(after, before, strict=True)]
            assert spent == [pytest.approx(one * 1.0), pytest.approx(two * 0.3)]
        else:
            assert after == before


@settings(max_examples=100, deadline=None)
@given(
    before=st.lists(st.integers(1, 5), max_size=8),
    units=st.integers(1, 10),
    after=st.lists(st.integers(1, 5), max_size=8),
)
def test_a_prompt_refund_leaves_no_trace(before, units, after):
    """While nothing has been refilled a refund is exact, whatever was charged in between."""
    limit = Dimension("tokens", 1.0, 1000)
    with_it, without = Gcra(10), Gcra(10)
    for cost in before:
        with_it.charge("t", {limit: cost}, 5.0)
        without.charge("t", {limit: cost}, 5.0)
    with_it.charge("t", {limit: units}, 5.0)
    mark = with_it.mark("t", limit)
    for cost in after:
        with_it.charge("t", {limit: cost}, 5.0)
        without.charge("t", {limit: cost}, 5.0)
    with_it.give_back("t", limit, units, mark=mark)
    assert with_it.rate("t", limit, 5.0) == without.rate("t", limit, 5.0)
