"""Packing loses nothing, keeps its bounds and wastes little; the pace stays sane."""

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serve.embedding.packing import Pace, pack, padded


lengths = st.lists(st.integers(0, 600), max_size=80)
bounds = {"tokens_max": st.integers(1, 1200), "items_max": st.integers(1, 20)}

warm_times = st.lists(
    st.tuples(st.integers(1, 20_000), st.floats(0, 10, allow_nan=False)), min_size=1, max_size=5
)
paces = st.builds(
    Pace, overhead_s=st.floats(0, 1), token_s=st.floats(1e-7, 1e-2), scale=st.floats(0.01, 100)
)


# --- pack -------------------------------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(tokens=lengths, **bounds)
def test_every_item_is_in_exactly_one_batch(tokens, tokens_max, items_max):
    """Unpacking by index therefore gives the items back in their order."""
    batches = pack(tokens, tokens_max=tokens_max, items_max=items_max)
    assert all(batches)
    unpacked: list[int | None] = [None] * len(tokens)
    for batch in batches:
        for index in batch:
            assert unpacked[index] is None
            unpacked[index] = tokens[index]
    assert unpacked == tokens


@settings(max_examples=200, deadline=None)
@given(tokens=lengths, **bounds)
def test_no_batch_exceeds_its_bounds(tokens, tokens_max, items_max):
    for batch in pack(tokens, tokens_max=tokens_max, items_max=items_max):
        sizes = [tokens[index] for index in batch]
        assert len(batch) <= items_max
        assert padded(sizes) <= tokens_max or len(batch) == 1


@settings(max_examples=200, deadline=None)
@given(tokens=lengths, **bounds)
def test_neighbours_are_of_like_length(tokens, tokens_max, items_max):
    """Longest first over all batches, and equal ones in order of arrival."""
    flat = [i for batch in pack(tokens, tokens_max=tokens_max, items_max=items_max) for i in batch]
    assert flat == sorted(flat, key=lambda index: (-tokens[index], index))


@settings(max_examples=100, deadline=None)
@given(tokens=st.lists(st.integers(1, 600), min_size=1, max_size=80), **bounds)
def test_no_batch_could_take_its_successor(tokens, tokens_max, items_max):
    batches = pack(tokens, tokens_max=tokens_max, items_max=items_max)
    for batch, following in pairwise(batches):
        longer = [tokens[index] for index in (*batch, following[0])]
        assert padded(longer) > tokens_max or len(batch) == items_max


def test_padding_counts():
    assert pack([1, 100, 1, 100, 50], tokens_max=200, items_max=64) == [[1, 3], [4, 0, 2]]
    assert pack([300, 2, 2], tokens_max=200, items_max=64) == [[0], [1, 2]]
    assert pack([2, 2, 2], tokens_max=200, items_max=2) == [[0, 1], [2]]
    assert (padded([1, 100]), padded([]), padded([7])) == (200, 0, 7)


# --- pace -------------------------------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(times=warm_times)
def test_a_fitted_pace_is_positive_and_grows_with_the_batch(times):
    pace = Pace.fit(times)
    assert pace.overhead_s >= 0
    assert pace.token_s > 0
    predicted = [pace.seconds(tokens) for tokens in (1, 10, 1000, 100_000)]
    assert predicted[0] > 0
    assert predicted == sorted(set(predicted))


def test_a_fit_finds_the_line_it_was_measured_on():
    pace = Pace.fit([(3, 0.0103), (256, 0.0356), (1024, 0.1124)])
    assert pace.overhead_s == pytest.approx(0.01)
    assert pace.token_s == pytest.approx(1e-4)
    assert pace.tokens_in(0.05) == pytest.approx(400, abs=1)


def test_a_long_batch_that_was_quicker_than_a_short_one_is_noise():
    pace = Pace.fit([(3, 0.5), (1000, 0.1)])
    assert pace.token_s == pytest.approx(1e-5)
    assert pace.seconds(3) == pytest.approx(0.5, rel=0.01)


def test_nothing_measured_is_refused():
    with pytest.raises(ValueError, match="empty"):
        Pace.fit([])


@settings(max_examples=200, deadline=None)
@given(pace=paces, seconds=st.floats(0, 100))
def test_what_fits_into_a_time_is_predicted_to_take_no_longer(pace, seconds):
    tokens = pace.tokens_in(seconds)
    assert tokens >= 0
    if tokens:
        assert pace.seconds(tokens) <= seconds * (1 + 1e-6)
    assert pace.seconds(tokens + 1 + tokens * 1e-6) >= seconds * (1 - 1e-6)


@settings(max_examples=200, deadline=None)
@given(pace=paces, tokens=st.integers(1, 10_000), seconds=st.floats(0, 1e6))
def test_one_outlier_moves_it_by_at_most_forty_percent(pace, tokens, seconds):
    before = pace.scale
    expected = pace.seconds(tokens)
    pace.learn(tokens, seconds)
    assert before * 0.91 <= pace.scale <= before * 1.41
    if seconds > expected * 1.001:
        assert pace.scale > before
    if seconds < expected * 0.999:
        assert pace.scale < before


@settings(max_examples=50, deadline=None)
@given(factor=st.floats(0.05, 20))
def test_it_follows_a_device_that_changed(factor):
    pace = Pace(overhead_s=0.01, token_s=1e-4)
    truth = Pace(overhead_s=0.01, token_s=1e-4, scale=factor)
    for _ in range(150):
        pace.learn(500, truth.seconds(500))
    assert pace.seconds(500) == pytest.approx(truth.seconds(500), rel=0.05)


@pytest.mark.parametrize("seconds", [0.0, 1e9])
def test_it_stays_usable_after_any_number_of_absurd_batches(seconds):
    """A clock that stood still ten thousand times must not lead to a division by zero."""
    pace = Pace(overhead_s=0.0, token_s=1e-4)
    for _ in range(20_000):
        pace.learn(100, seconds)
    assert 1e-3 <= pace.scale <= 1e3
    assert pace.seconds(100) > 0
    assert pace.tokens_in(0.05) >= 0
