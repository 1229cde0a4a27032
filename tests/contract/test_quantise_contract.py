"""Our bits are those of sentence-transformers, so that its users can compare and search them."""

import numpy as np
import pytest

from serve.embedding.quantise import quantise


@pytest.mark.parametrize("dtype", ["binary", "ubinary"])
def test_bits_are_those_of_sentence_transformers(dtype):
    from sentence_transformers.util.quantization import quantize_embeddings  # noqa: PLC0415  slow

    rows = np.random.default_rng(3).normal(size=(40, 384)).astype(np.float32)
    rows[::7, ::5] = 0
    theirs = quantize_embeddings(rows, precision=dtype)
    ours = quantise(rows, dtype, 4)
    assert ours.dtype == theirs.dtype
    assert np.array_equal(ours, theirs)
