"""Chunks of any text, by a real tokenizer and by one token per byte."""

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serve.config import Chunking, Model, Settings
from serve.content.chunking import CHARS_PER_TOKEN_MAX, chunk
from serve.embedding.tokenizer import Tokenizer


TOKENIZERS = {
    "minilm": Tokenizer.open(Settings().pools[0].models[0]),
    "bytes": Tokenizer.open(Model(id="fake", engine="fake", dimensions=8, tokens_max=64)),
}

anything = st.text(max_size=600)
prose = st.lists(
    st.sampled_from(
        ["water ", "turbine", ", ", ". ", "\n", "\n\n", "Überlandleitung ", "春天", "👍🏽", "\u200b",
         "e\u0301", "x" * 130, " " * 40, "3.14 ", "“so.” ", "\r\n", "\x00", "don't "]
    ),
    max_size=250,
).map("".join)  # fmt: skip
sizes = st.integers(16, 64).flatmap(
    lambda tokens: st.builds(Chunking, tokens=st.just(tokens), overlap=st.integers(0, tokens // 2))
)


@pytest.mark.parametrize("name", TOKENIZERS)
@given(text=anything | prose, sizes=sizes)
@settings(max_examples=150, deadline=None)
def test_chunks(name: str, text: str, sizes: Chunking) -> None:
    tokenizer = TOKENIZERS[name]
    chunks = chunk(text, tokenizer, sizes)

    assert [piece.ordinal for piece in chunks] == list(range(len(chunks)))
    assert chunk(text, tokenizer, sizes) == chunks
    end, start = 0, -1
    for piece in chunks:
        assert piece.text == text[piece.start : piece.end]
        assert piece.text == piece.text.strip() != ""
        assert tokenizer.count(piece.text) <= sizes.tokens
        assert len(piece.text) <= sizes.tokens * CHARS_PER_TOKEN_MAX
        assert start < piece.start
        assert end < piece.end
        missing = text[end : piece.start]
        assert not missing.strip() or tokenizer.count(missing) == 0
        if sizes.overlap == 0:
            assert piece.start >= end
        start, end = piece.start, piece.end
    assert not text[end:].strip() or tokenizer.count(text[end:]) == 0


@given(
    words=st.lists(st.sampled_from(["water", "turbine", "flows", "evenly."]), max_size=300),
    sizes=sizes,
)
@settings(max_examples=60, deadline=None)
def test_chunks_of_whole_words_repeat_no_more_than_the_overlap(
    words: list[str], sizes: Chunking
) -> None:
    text, tokenizer = " ".join(words), TOKENIZERS["minilm"]
    chunks = chunk(text, tokenizer, sizes)
    for left, right in pairwise(chunks):
        assert tokenizer.count(text[right.start : left.end]) <= sizes.overlap
        assert tokenizer.count(left.text) >= 0.6 * sizes.tokens - 1
