import numpy as np
import pytest

from serve.config import Model
from serve.embedding.rows import Rows
from serve.errors import BadInput
from serve.records import Input


MODEL = Model(id="m", engine="fake", dimensions=4, tokens_max=8)
BATCH = [Input(ids=np.array(row, np.int32)) for row in ([101, 7, 102], [5])]


@pytest.mark.parametrize(
    ("left", "ids", "mask"),
    [
        (False, [[101, 7, 102], [5, 9, 9]], [[1, 1, 1], [1, 0, 0]]),
        (True, [[101, 7, 102], [9, 9, 5]], [[1, 1, 1], [0, 0, 1]]),
    ],
)
def test_padding_goes_to_the_side_the_model_was_trained_with(left, ids, mask):
    rows = Rows(MODEL, vocab_size=200, pad_id=9, pad_left=left)
    found = rows.padded(BATCH)
    assert [part.tolist() for part in found] == [ids, mask]
    assert {part.dtype for part in found} == {np.dtype(np.int64)}


def test_without_padding_every_token_knows_its_input_and_its_place():
    flat = Rows(MODEL, vocab_size=200, pad_id=9, pad_left=False).flat([*BATCH, *BATCH])
    assert flat.ids.tolist() == [[101, 7, 102, 5, 101, 7, 102, 5]]
    assert flat.positions.tolist() == [[0, 1, 2, 0, 0, 1, 2, 0]]
    assert flat.members.tolist() == [[0, 0, 0, 1, 2, 2, 2, 3]]
    assert flat.starts.tolist() == [0, 3, 4, 7, 8]
    assert flat.longest == 3
    kinds = [part.dtype for part in (flat.ids, flat.positions, flat.members, flat.starts)]
    assert kinds == [np.int64, np.int64, np.int32, np.int32]


@pytest.mark.parametrize("left", [False, True])
def test_in_shared_rows_every_token_knows_its_input_and_inputs_know_their_tokens(left):
    rows = Rows(MODEL, vocab_size=200, pad_id=9, pad_left=left)
    lines = ([101, 7, 8, 102], [5], [101, 102], [1, 2, 3], [6, 4])
    batch = [Input(ids=np.array(line, np.int32)) for line in lines]
    found = rows.shared(batch, 6)
    assert found.ids.shape == found.positions.shape == found.members.shape == (2, 6)
    for number, line in enumerate(lines):
        where = found.members == number
        assert found.ids[where].tolist() == line
        assert found.positions[where].tolist() == list(range(len(line)))
        kept = found.mask[number].astype(bool)
        assert found.ids.reshape(-1)[found.places[number][kept]].tolist() == line
        assert kept.tolist() == sorted(kept.tolist(), reverse=not left)
    assert sum((found.members == number).sum() for number in range(5)) == 12
    kinds = {part.dtype for part in (found.ids, found.positions, found.members, found.places)}
    assert kinds | {found.mask.dtype} == {np.dtype(np.int64)}


def test_lengths_are_rounded_up_with_padding_that_belongs_to_nobody():
    rows = Rows(MODEL, vocab_size=200, pad_id=9, pad_left=False)
    ids, mask = rows.padded(BATCH, lambda tokens: tokens + 2)
    assert ids.tolist() == [[101, 7, 102, 9, 9], [5, 9, 9, 9, 9]]
    assert mask.sum(axis=1).tolist() == [3, 1]
    found = rows.shared(BATCH, 8, lambda tokens: -(-tokens // 5) * 5)
    assert found.ids.tolist() == [[101, 7, 102, 5, 9]]
    assert found.members.tolist() == [[0, 0, 0, 1, -1]]
    assert found.mask.tolist() == [[1, 1, 1, 0, 0], [1, 0, 0, 0, 0]]


@pytest.mark.parametrize(
    ("one", "message"),
    [
        (Input(ids=np.array([3, 200], np.int32)), "knows token ids below 200"),
        (Input(ids=np.array([3, -1], np.int32)), "knows token ids below 200"),
        (Input(ids=np.array([], np.int32)), "0 tokens"),
        (Input(ids=np.ones(9, np.int32)), "9 tokens; the model m takes 1 to 8"),
        (Input(text="x"), "takes token ids, not text"),
    ],
)
def test_what_a_model_cannot_read_is_refused(one, message):
    rows = Rows(MODEL, vocab_size=200, pad_id=0, pad_left=False)
    for read in (rows.padded, rows.flat, lambda batch: rows.shared(batch, 8)):
        with pytest.raises(BadInput, match=message):
            read([*BATCH, one])
