"""Rows that inputs share: nothing is lost, none is longer than it may be, little is padding."""

from hypothesis import example, given
from hypothesis import strategies as st

from serve.embedding.packing import Room, plan
from serve.embedding.sharing import ONE_ROW_TOKENS, ROW_TOKENS, padded, share


TOKENS = st.lists(st.integers(1, 256), max_size=60)
SHORT = st.lists(st.integers(3, ROW_TOKENS // 4), min_size=40, max_size=120)


def filled(tokens, rows):
    return [sum(tokens[index] for index in row) for row in rows]


@given(TOKENS, st.integers(1, 128))
def test_every_input_lies_in_one_row_none_longer_than_it_may_be(tokens, row_tokens):
    rows = share(tokens, row_tokens)
    assert sorted(index for row in rows for index in row) == list(range(len(tokens)))
    assert all(rows)
    assert len(rows) <= 1 or max(filled(tokens, rows)) <= max([row_tokens, *tokens])
    assert max(filled(tokens, rows), default=0) <= max([row_tokens, ONE_ROW_TOKENS, *tokens])


@given(TOKENS, st.integers(1, 128))
@example([2, 2, 2], 4)
@example([40, 40, 40], ROW_TOKENS)
def test_sharing_never_costs_more_than_rows_of_ones_own(tokens, row_tokens):
    assert sum(tokens) <= padded(tokens, row_tokens) <= padded(tokens)


@given(SHORT)
def test_hardly_anything_of_many_short_inputs_is_padding(tokens):
    assert padded(tokens, ROW_TOKENS) <= 1.12 * sum(tokens)


def test_what_fits_into_one_row_is_not_padded_at_all():
    assert share([5, 90, 1], ROW_TOKENS) == [[1, 0, 2]]
    assert padded([5, 90, 1], ROW_TOKENS) == 96
    assert (padded([], ROW_TOKENS), padded([1, 100]), padded([])) == (0, 200, 0)


def test_few_that_would_pad_each_other_much_are_one_row():
    assert share([8, 180, 40], ROW_TOKENS) == [[1, 2, 0]]
    assert share([90, 80], ROW_TOKENS) == [[0], [1]]
    assert share([8, 250], ROW_TOKENS) == [[1], [0]]


def test_a_stray_short_item_costs_no_batch_of_its_own():
    terms = {"overhead": 15.0, "tokens_max": 1024, "items_max": 64}
    assert len(plan([180, 8, 40], **terms)) == 3
    assert len(plan([180, 8, 40], **terms, row_tokens=ROW_TOKENS)) == 1
    assert len(plan([250, 250, 8, 40], **terms, row_tokens=ROW_TOKENS)) == 2


@given(TOKENS, st.floats(0, 200), st.integers(256, 2048))
@example([3] * 60, 6.0, 1024)
def test_a_plan_of_rows_holds_every_item_once_and_hardly_exceeds_its_bound(
    tokens, overhead, tokens_max
):
    batches = plan(
        tokens, overhead=overhead, tokens_max=tokens_max, items_max=64, row_tokens=ROW_TOKENS
    )
    assert sorted(index for batch in batches for index in batch) == list(range(len(tokens)))
    for batch in batches:
        sizes = [tokens[index] for index in batch]
        # Rows may come out otherwise than planned: best fit is within 11/9 of the least number.
        assert padded(sizes, ROW_TOKENS) <= 1.25 * tokens_max + max(sizes) + ROW_TOKENS


def test_short_items_are_one_batch_whatever_their_lengths():
    tokens = [5, 16, 7, 11, 9, 3, 14, 6]
    terms = {"overhead": 1.0, "tokens_max": 1024, "items_max": 64}
    assert len(plan(tokens, **terms)) > 1
    assert len(plan(tokens, **terms, row_tokens=ROW_TOKENS)) == 1


@given(SHORT, st.floats(100, 2000))
def test_a_hand_out_of_shared_rows_comes_near_its_load(tokens, load_aim):
    terms = {"overhead": 6.0, "tokens_max": 1024, "items_max": 512, "row_tokens": ROW_TOKENS}
    room = Room(load_aim=load_aim, **terms)
    taken = []
    for count in tokens:
        if not room.admits([count]):
            break
        taken.append(count)
    batches = plan(taken, **terms)
    load = sum(6.0 + padded([taken[index] for index in batch], ROW_TOKENS) for batch in batches)
    assert load <= 1.1 * load_aim + ROW_TOKENS / 4
    if len(taken) < len(tokens):
        assert load + 8 * ROW_TOKENS / 4 >= 0.8 * load_aim
