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
    for read in (rows.padded, rows.flat):
        with pytest.raises(BadInput, match=message):
            read([*BATCH, one])
