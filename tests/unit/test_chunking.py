import numpy as np
import pytest

from serve.config import Chunking, Model, Settings
from serve.content.chunking import CHARS_PER_TOKEN_MAX, chunk
from serve.embedding.tokenizer import Tokenizer


FAKE = Model(id="fake", engine="fake", dimensions=8, tokens_max=64)
ZERO_WIDTH = "\u200b"


class Words:
    """A tokenizer for reading tests by eye: one token per word."""

    def spans(self, text: str) -> np.ndarray:
        found, place = [], 0
        for word in text.split():
            start = text.index(word, place)
            place = start + len(word)
            found.append((start, place))
        return np.array(found, np.int64).reshape(-1, 2)

    def count(self, text: str) -> int:
        return len(text.split())


class Counting:
    """Notes how many characters the tokenizer was given."""

    def __init__(self, inner: Tokenizer) -> None:
        self.inner = inner
        self.chars = 0

    def spans(self, text: str) -> np.ndarray:
        self.chars += len(text)
        return self.inner.spans(text)

    def count(self, text: str) -> int:
        self.chars += len(text)
        return self.inner.count(text)


@pytest.fixture(scope="module")
def minilm() -> Tokenizer:
    return Tokenizer.open(Settings().pools[0].models[0])


def numbered(count: int, *, gap: str = " ") -> str:
    return gap.join(f"w{n}" for n in range(count))


def test_a_short_document_is_one_chunk_without_its_edges() -> None:
    (only,) = chunk("  two words \n", Words(), Chunking(tokens=16, overlap=0))
    assert (only.ordinal, only.text, only.start, only.end) == (0, "two words", 2, 11)


@pytest.mark.parametrize("text", ["", "   ", " \n\t \n"])
def test_nothing_gives_no_chunks(text: str) -> None:
    assert chunk(text, Words(), Chunking()) == []


def test_what_the_tokenizer_does_not_see_gives_no_chunks(minilm: Tokenizer) -> None:
    assert chunk(ZERO_WIDTH * 10_000, minilm, Chunking()) == []


def test_without_better_places_chunks_are_full_and_overlap_in_full() -> None:
    chunks = chunk(numbered(40), Words(), Chunking(tokens=16, overlap=4))
    assert [(piece.text.split()[0], piece.text.split()[-1]) for piece in chunks] == [
        ("w0", "w15"),
        ("w12", "w27"),
        ("w24", "w39"),
    ]
    assert [piece.ordinal for piece in chunks] == [0, 1, 2]


@pytest.mark.parametrize(
    ("separator", "worse"),
    [("\n\n", "\n"), ("\n", ". "), (". ", " "), ('." ', " "), ("。", " "), ("?\u201d ", ", ")],
)
def test_the_better_separator_near_the_limit_wins(separator: str, worse: str) -> None:
    words = [f"w{n}" for n in range(30)]
    text = " ".join(words).replace("w11 ", "w11" + separator).replace("w13 ", "w13" + worse)
    first = chunk(text, _Pieces(), Chunking(tokens=16, overlap=0))[0]
    assert "w11" in first.text
    assert "w12" not in first.text


class _Pieces(Words):
    """One token per run of letters and digits: separators are none."""

    def spans(self, text: str) -> np.ndarray:
        return super().spans("".join(char if char.isalnum() else " " for char in text))


def test_a_separator_too_early_does_not_make_a_tiny_chunk() -> None:
    text = "w0 w1\n\n" + numbered(38)
    first = chunk(text, Words(), Chunking(tokens=16, overlap=0))[0]
    assert len(first.text.split()) == 16


def test_the_overlap_begins_at_a_sentence_when_there_is_one() -> None:
    text = numbered(30).replace("w15 ", "w15\n\n").replace("w12 ", "w12. ")
    first, second = chunk(text, Words(), Chunking(tokens=16, overlap=6))[:2]
    assert first.text.endswith(" w15")
    assert second.text.startswith("w13 ")


def test_no_overlap_when_it_is_off() -> None:
    chunks = chunk(numbered(64), Words(), Chunking(tokens=16, overlap=0))
    assert " ".join(piece.text for piece in chunks) == numbered(64)


def test_a_chunk_that_would_add_only_white_space_is_left_out() -> None:
    text = "aaaaaaa\naaaaaaa" + " " * 40 + "b"
    chunks = chunk(text, Tokenizer.open(FAKE), Chunking(tokens=16, overlap=8))
    assert [piece.text for piece in chunks] == ["aaaaaaa\naaaaaaa", "b"]


def test_tokens_that_share_characters_stay_together() -> None:
    class Sharing(Words):
        def spans(self, text: str) -> np.ndarray:
            return np.array([(n, n - n % 2 + 2) for n in range(len(text))])

    chunks = chunk("ab" * 24, Sharing(), Chunking(tokens=17, overlap=0))
    assert [len(piece.text) for piece in chunks] == [16, 16, 16]


def test_an_emoji_of_many_tokens_is_never_cut() -> None:
    text = "👍🏽" * 50
    chunks = chunk(text, Tokenizer.open(FAKE), Chunking(tokens=18, overlap=0))
    assert "".join(piece.text for piece in chunks) == text
    assert {len(piece.text.encode()) for piece in chunks} == {16}


PATHOLOGICAL = {
    "one word of a million letters": "abcdef" * 160_000,
    "base64": "".join(chr(65 + (n * n * 7919 + n // 3) % 58) for n in range(120_000)),
    "chinese": "".join(chr(0x4E00 + n * 31 % 20_000) for n in range(60_000)),
    "emoji": "😀👍🏽👨‍👩‍👧" * 8_000,
    "zero-width in front": ZERO_WIDTH * 500_000 + "end",
    "zero-width between": "start " + ZERO_WIDTH * 500_000 + " end",
    "punctuation": "." * 60_000,
    "white space between": ("word" + " " * 5_000) * 60,
    "long words": ("a" * 300 + " ") * 500,
}


@pytest.mark.parametrize("name", PATHOLOGICAL)
def test_pathological_documents(minilm: Tokenizer, name: str) -> None:
    text = PATHOLOGICAL[name]
    settings = Chunking()
    tokens = Counting(minilm)
    chunks = chunk(text, tokens, settings)
    assert tokens.chars < 5 * len(text)  # linear: the document, its chunks, a few tries
    end = 0
    for piece in chunks:
        assert piece.text == text[piece.start : piece.end]
        assert 1 <= minilm.count(piece.text) <= settings.tokens
        assert len(piece.text) <= settings.tokens * CHARS_PER_TOKEN_MAX
        assert piece.start <= end or minilm.count(text[end : piece.start]) == 0
        assert piece.end > end
        end = piece.end
    assert minilm.count(text[end:]) == 0
