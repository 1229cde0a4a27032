"""serve.flows.embed: what length vectors may have, and how they are cut to it (Matryoshka)."""

from types import SimpleNamespace

import numpy as np
import pytest

from serve.config import Model
from serve.errors import BadInput, PoisonInput
from serve.flows.embed import EmbedRequest, cut, size_of


def size(dimensions=None, dtype="float", *, matryoshka=True):
    model = Model(id="m", engine="fake", dimensions=32, tokens_max=64, matryoshka=matryoshka)
    wanted = EmbedRequest("m", texts=["x"], dimensions=dimensions, dtype=dtype)
    return size_of(SimpleNamespace(model=model), wanted)


def test_a_model_that_was_trained_for_it_may_be_cut():
    assert [size(wanted) for wanted in (None, 1, 31, 32)] == [32, 1, 31, 32]
    with pytest.raises(BadInput, match="between 1 and 32") as caught:
        size(33)
    assert caught.value.param == "dimensions"


def test_any_other_has_its_own_length_only():
    assert [size(wanted, matryoshka=False) for wanted in (None, 32)] == [32, 32]
    for wanted in (1, 31, 33):
        with pytest.raises(BadInput) as caught:
            size(wanted, matryoshka=False)
        assert (caught.value.param, caught.value.code) == ("dimensions", "dimensions_not_supported")


@pytest.mark.parametrize("dtype", ["binary", "ubinary"])
def test_bits_need_whole_bytes(dtype):
    assert [size(wanted, dtype) for wanted in (None, 8, 24)] == [32, 8, 24]
    with pytest.raises(BadInput, match="9 is no multiple of 8") as caught:
        size(9, dtype)
    assert caught.value.param == "output_dtype"


def test_bytes_take_any_length():
    assert [size(9, dtype) for dtype in ("int8", "uint8")] == [9, 9]


def test_what_was_cut_is_of_unit_length_again():
    rows = np.array([[0.6, 0.8, 0, 0], [0.1, 0.1, 0.7, 0.7]], np.float32)
    made = cut(rows, 2)
    assert made.dtype == np.float32
    assert np.allclose(made, [[0.6, 0.8], [np.sqrt(0.5), np.sqrt(0.5)]])
    assert cut(rows, 4) is rows


def test_nothing_is_divided_by_zero():
    rows = np.array([[0.6, 0.8, 0, 0], [0, 0, 0.6, 0.8]], np.float32)
    with pytest.raises(PoisonInput, match="zero in the dimensions") as caught:
        cut(rows, 2)
    assert caught.value.param == "dimensions"
