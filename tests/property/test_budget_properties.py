"""Budgets of batches, for whatever times and failures."""

from hypothesis import given
from hypothesis import strategies as st

from serve.embedding.budget import GAIN_MIN, NEAR, Budget, choose


SIZES = st.integers(1, 10**6)
TIMES = st.lists(
    st.tuples(SIZES, st.floats(1e-6, 100)), min_size=1, max_size=12, unique_by=lambda one: one[0]
)


@given(TIMES, SIZES)
def test_no_other_size_is_clearly_better_than_the_chosen_one(
    times: list[tuple[int, float]], least: int
) -> None:
    chosen = choose(times, least=least)
    took = dict(times)
    largest = max(took)
    assert chosen in took
    assert chosen >= min(least, largest)
    for size, took_s in times:
        if size >= min(least, largest):
            gain = size / took_s / (chosen / took[chosen])
            assert gain <= GAIN_MIN * (1 + 1e-9)


@given(
    st.integers(1, 2000),
    st.integers(1, 2000),
    st.lists(st.tuples(st.sampled_from(["fits", "shrink"]), st.floats(0, 1), st.floats(0, 50))),
)
def test_a_budget_keeps_its_bounds_and_does_not_come_near_what_failed_lately(
    least: int, most: int, acts: list[tuple[str, float, float]]
) -> None:
    budget, now, failed = Budget(least=least, most=most, forget_s=100), 0.0, []
    for act, part, seconds in acts:
        now += seconds
        tokens = max(1, round(part * budget.tokens)) if act == "shrink" else budget.tokens
        before = budget.tokens
        for _ in range(1 if act == "shrink" else 20):
            getattr(budget, act)(tokens, now)
        if act == "shrink":
            failed.append((now, tokens))
            assert budget.tokens <= before
        recent = [size for at, size in failed if now - at < 100]
        assert min(least, most) <= budget.tokens <= most
        if recent and budget.tokens > before:
            assert budget.tokens <= NEAR * min(recent)
