"""Packing loses nothing, keeps its bounds and wastes little; the pace stays sane."""

import random
from itertools import pairwise, product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serve.embedding.packing import PLAN_MAX, Pace, Room, pack, plan
from serve.embedding.sharing import padded


lengths = st.lists(st.integers(0, 600), max_size=80)
bounds = {"tokens_max": st.integers(1, 1200), "items_max": st.integers(1, 20)}

warm_times = st.lists(
    st.tuples(st.integers(1, 20_000), st.floats(0, 10, allow_nan=False)), min_size=1, max_size=5
)
paces = st.builds(
    Pace, overhead_s=st.floats(0, 1), token_s=st.floats(1e-7, 1e-2), scale=st.floats(0.01, 100)
)


# --- pack -------------------------------------------------------------------------------------


@settings(max_examples=50, deadline=None)
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


@settings(max_examples=50, deadline=None)
@given(tokens=lengths, **bounds)
def test_no_batch_exceeds_its_bounds(tokens, tokens_max, items_max):
    for batch in pack(tokens, tokens_max=tokens_max, items_max=items_max):
        sizes = [tokens[index] for index in batch]
        assert len(batch) <= items_max
        assert padded(sizes) <= tokens_max or len(batch) == 1


@settings(max_examples=50, deadline=None)
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


# --- plan -------------------------------------------------------------------------------------


def load_of(tokens, batches, overhead):
    return sum(overhead + padded([tokens[index] for index in batch]) for batch in batches)


@settings(max_examples=80, deadline=None)
@given(
    seed=st.integers(0), count=st.integers(0, 3 * PLAN_MAX), overhead=st.floats(0, 500), **bounds
)
def test_a_plan_holds_every_item_once_longest_first_within_the_bounds(
    seed, count, overhead, tokens_max, items_max
):
    rng = random.Random(seed)  # noqa: S311 - not a secret
    tokens = [rng.choice([0, 1, rng.randint(1, 30), rng.randint(1, 600)]) for _ in range(count)]
    size = {"tokens_max": tokens_max, "items_max": items_max}
    batches = plan(tokens, overhead=overhead, **size)
    assert all(batches)
    flat = [index for batch in batches for index in batch]
    assert flat == sorted(range(count), key=lambda index: (-tokens[index], index))
    for batch in batches:
        assert len(batch) <= items_max
        assert padded([tokens[index] for index in batch]) <= tokens_max or len(batch) == 1
    if count <= PLAN_MAX:
        packed = load_of(tokens, pack(tokens, **size), overhead)
        assert load_of(tokens, batches, overhead) <= packed + count + 1e-6  # an empty one counts 1


@settings(max_examples=60, deadline=None)
@given(
    tokens=st.lists(st.integers(1, 60), min_size=1, max_size=8),
    overhead=st.integers(0, 80),
    tokens_max=st.integers(60, 200),
    items_max=st.integers(1, 8),
)
def test_no_plan_has_less_load(tokens, overhead, tokens_max, items_max):
    """Of all ways to cut the items, sorted by length, into batches within the bounds."""
    batches = plan(tokens, overhead=overhead, tokens_max=tokens_max, items_max=items_max)
    falling = sorted(tokens, reverse=True)
    least = float("inf")
    for cuts in product([False, True], repeat=len(tokens) - 1):
        marks = [0, *(at for at, cut in enumerate(cuts, 1) if cut), len(tokens)]
        parts = [falling[start:stop] for start, stop in pairwise(marks)]
        if all(padded(part) <= tokens_max and len(part) <= items_max for part in parts):
            least = min(least, sum(overhead + padded(part) for part in parts))
    assert load_of(tokens, batches, overhead) == least


def test_short_items_are_padded_only_where_a_batch_costs_more():
    tokens = [10, 200, 190, 12]
    size = {"tokens_max": 1000, "items_max": 64}
    assert plan(tokens, overhead=45, **size) == [[1, 2], [3, 0]]
    assert plan(tokens, overhead=5, **size) == [[1], [2], [3, 0]]
    assert plan(tokens, overhead=400, **size) == [[1, 2, 3, 0]]
    assert plan([], overhead=5, **size) == []


# --- room -------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0), overhead=st.floats(0, 400), load_aim=st.floats(1, 3000))
def test_a_hand_out_has_room_for_what_brings_it_nearer_to_its_load(seed, overhead, load_aim):
    rng = random.Random(seed)  # noqa: S311 - not a secret
    bound = {"tokens_max": rng.choice([320, 1024]), "items_max": rng.choice([8, 64])}
    size = {"overhead": overhead, **bound}
    room = Room(load_aim=load_aim, **size)
    taken: list[int] = []
    while True:
        longest = rng.choice([12, 12, 300])
        count = rng.randint(1, max(1, min(4, bound["tokens_max"] // longest)))
        part = [rng.randint(longest // 2, longest) for _ in range(count)]
        load = load_of([*taken, *part], plan([*taken, *part], **size), overhead)
        if not room.admits(part):
            assert taken, "the first is always admitted"
            assert load > load_aim or len(taken) + len(part) > size["items_max"]
            break
        before = load_of(taken, plan(taken, **size), overhead)
        assert not taken or load - load_aim <= max(load_aim - before, 0) + 1e-6
        assert not taken or len(taken) + len(part) <= size["items_max"]
        taken += part


# --- pace -------------------------------------------------------------------------------------


@settings(max_examples=80, deadline=None)
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
    assert pace.overhead == pytest.approx(100)
    assert pace.load_in(0.05) == pytest.approx(500)


def test_a_long_batch_that_was_quicker_than_a_short_one_is_noise():
    pace = Pace.fit([(3, 0.5), (1000, 0.1)])
    assert pace.token_s == pytest.approx(1e-5)
    assert pace.seconds(3) == pytest.approx(0.5, rel=0.01)


def test_nothing_measured_is_refused():
    with pytest.raises(ValueError, match="empty"):
        Pace.fit([])


@settings(max_examples=60, deadline=None)
@given(pace=paces, sizes=st.lists(st.integers(1, 2000), min_size=1, max_size=5))
def test_batches_of_a_load_take_its_time(pace, sizes):
    load = sum(pace.overhead + size for size in sizes)
    assert pace.load_in(sum(map(pace.seconds, sizes))) == pytest.approx(load)


@settings(max_examples=80, deadline=None)
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
    assert pace.load_in(0.05) > 0
