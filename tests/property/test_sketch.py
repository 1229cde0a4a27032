"""serve.sketch: quantiles within 2 % of a true value, however the values were spread over processes."""

import math

from hypothesis import given
from hypothesis import strategies as st

from serve.sketch import ACCURACY, LEAST, Sketch


VALUES = st.lists(st.floats(1e-8, 1e5), min_size=1, max_size=200)


def sketch(values) -> Sketch:
    made = Sketch()
    for value in values:
        made.add(value)
    return made


@given(VALUES, st.floats(0, 1))
def test_a_quantile_is_near_the_value_of_that_rank(values, share):
    true = sorted(values)[math.floor(share * (len(values) - 1))]
    assert math.isclose(sketch(values).quantile(share), true, rel_tol=ACCURACY * 1.0001)


@given(VALUES, VALUES)
def test_what_was_counted_apart_is_the_same_together(first, second):
    merged = sketch(first)
    merged.merge(sketch(second))
    whole = sketch([*first, *second])
    assert merged.buckets == whole.buckets
    assert (merged.count, merged.low, merged.high) == (whole.count, whole.low, whole.high)
    assert math.isclose(merged.total, whole.total)


@given(VALUES)
def test_the_ends_are_exact(values):
    made = sketch(values)
    assert made.quantile(1) == made.high == max(values)
    assert made.low == min(values)
    assert math.isclose(made.mean, sum(values) / len(values))


def test_of_nothing_there_is_nothing_to_say():
    assert Sketch().quantile(0.5) is Sketch().quantile(1) is Sketch().mean is None


def test_zero_and_what_is_absurd_have_a_bucket_too():
    made = sketch([0.0, LEAST / 10, 1e12])
    assert made.quantile(0) <= LEAST * (1 + ACCURACY)
    assert made.quantile(1) == 1e12
    assert len(made.buckets) == 2
