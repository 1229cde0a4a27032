"""Documents into pieces that the model reads whole: by its own tokens, with exact offsets.

One pass of the tokenizer over the document gives every place where it may be cut; a piece ends at
the best of them near its limit. Why not a library: `docs/adr/0005-chunking.md`.
"""

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from serve.config import Chunking
from serve.records import Chunk


CHARS_PER_TOKEN_MAX = 16
"""Bound on a chunk's characters, per token of its limit. Text has 2 to 6; but a word of a million
letters may be one unknown token, and invisible characters none at all.
"""

TOKENS_PER_CHAR_MAX = 4
"""A byte-level tokenizer makes this many of one character; none makes more of ordinary text."""

FILL_MIN = 0.6
"""A cut is looked for in the last 40 %: lower finds more paragraph ends, and makes more chunks."""

PARAGRAPH, LINE, SENTENCE, SPACE, INSIDE = 4, 3, 2, 1, 0
SENTENCE_ENDS = frozenset(".!?\u2026\u3002\uff01\uff1f")
CLOSERS = "\"')]}\u201d\u2019\u300d\u300f\uff09"
LOOK_CHARS = 64
"""How far white space is followed around a cut."""

Ints = NDArray[np.int64]


class Tokens(Protocol):
    """What chunking asks of the model's tokenizer. Special tokens are not counted."""

    def spans(self, text: str) -> Ints:
        """Start and end of each token, in characters: shape (tokens, 2)."""
        ...

    def count(self, text: str) -> int:
        """Tokens of a text."""
        ...


def chunk(text: str, tokens: Tokens, settings: Chunking) -> list[Chunk]:
    """Cut a document into chunks of at most `settings.tokens` tokens, in order.

    `chunk.text == text[chunk.start:chunk.end]`, without white space at either end, and at most
    `CHARS_PER_TOKEN_MAX` times as many characters. Together they cover all that is a token and not
    white space; each repeats about `settings.overlap` tokens of its predecessor, and none lies
    inside another. Empty when the tokenizer finds nothing in the text. Takes linear time.
    """
    cutter = _Cutter(text, tokens, settings)
    chunks: list[Chunk] = []
    first = reached = 0
    while reached < cutter.size:
        stop, count = cutter.stop(first, reached)
        if stop <= reached:  # what is repeated leaves no room for more: begin without it
            first = reached
            continue
        start, end = cutter.characters(first, stop)
        is_new = end > (chunks[-1].end if chunks else start)  # not if only white space was added
        if count and is_new:
            chunks.append(Chunk(len(chunks), text[start:end], start, end))
        first, reached = cutter.restart(start, stop), stop
    return chunks


class _Cutter:
    """The document as units: the smallest pieces that may stand apart, most often one token.

    Unit `i` begins at character `starts[i]`; all before it cost `costs[i]`. A unit costs its tokens
    or its characters over `CHARS_PER_TOKEN_MAX`, whichever is more, in sixteenths of a token.
    """

    def __init__(self, text: str, tokens: Tokens, settings: Chunking) -> None:
        self._text = text
        self._tokens = tokens
        self._limit = settings.tokens
        self._budget = settings.tokens * CHARS_PER_TOKEN_MAX
        self._overlap = settings.overlap * CHARS_PER_TOKEN_MAX
        self._starts, self._costs = _units(tokens.spans(text), len(text), settings.tokens)
        self.size = len(self._starts) - 1

    def stop(self, first: int, reached: int) -> tuple[int, int]:
        """Where the chunk that begins at unit `first` ends (exclusive), and its tokens.

        At or before `reached` when the chunk cannot get beyond it.
        """
        spent = self._costs[first]
        furthest = int(np.searchsorted(self._costs, spent + self._budget, "right")) - 1
        stop = furthest = max(furthest, first + 1)
        if furthest < self.size:
            filled = int(np.searchsorted(self._costs, spent + int(self._budget * FILL_MIN)))
            least = max(min(filled, furthest), reached + 1)
            choices = range(least, furthest + 1)
            stop = max(choices, key=lambda unit: (self._rank(unit), unit), default=furthest)
        return self._fitted(first, stop)

    def restart(self, start: int, stop: int) -> int:
        """Where the chunk after the one from character `start` to unit `stop` begins: the best
        place within the overlap, among equals the earliest.
        """
        if stop == self.size or self._overlap == 0:
            return stop
        least = int(np.searchsorted(self._costs, self._costs[stop] - self._overlap))
        later = int(np.searchsorted(self._starts, start, "right"))
        choices = range(max(least, later), stop)
        return max(choices, key=lambda unit: (self._rank(unit), -unit), default=stop)

    def characters(self, first: int, stop: int) -> tuple[int, int]:
        """The characters of a range of units, without the white space around them."""
        start, end = int(self._starts[first]), int(self._starts[stop])
        piece = self._text[start:end]
        return start + len(piece) - len(piece.lstrip()), start + len(piece.rstrip())

    def _fitted(self, first: int, stop: int) -> tuple[int, int]:
        """Give back units until the piece alone keeps to the limit; then its end and tokens.

        A cut inside a word makes the tokenizer read both halves anew. One unit is never cut.
        """
        while True:
            start, end = self.characters(first, stop)
            count = self._tokens.count(self._text[start:end])
            if count <= self._limit or stop == first + 1:
                return stop, count
            stop = max(first + 1, min(stop - 1, first + (stop - first) * self._limit // count))

    def _rank(self, unit: int) -> int:
        """How good a place the beginning of `unit` is to cut at.

        Some tokenizers give the space before a word to the word: white space counts on both sides.
        """
        place = int(self._starts[unit])
        head = self._text[max(0, place - LOOK_CHARS) : place]
        tail = self._text[place : place + LOOK_CHARS]
        bare = head.rstrip()
        gap = head[len(bare) :] + tail[: len(tail) - len(tail.lstrip())]
        if "\n" in gap:
            return PARAGRAPH if gap.count("\n") > 1 else LINE
        ending = bare.rstrip(CLOSERS)[-1:]
        if ending in SENTENCE_ENDS and (gap or not ending.isascii()):
            return SENTENCE
        return SPACE if gap else INSIDE


def _units(spans: Ints, length: int, limit: int) -> tuple[Ints, Ints]:
    """Starts of the units and what all before each cost; both end with the end of the text.

    Tokens that share a character (bytes of an emoji) are one unit, which reaches to the next one.
    A unit of more than `limit` characters is cut so finely that no piece exceeds `limit` tokens.
    """
    starts, ends = spans[:, 0], np.maximum.accumulate(spans[:, 1])
    apart = np.ones(len(starts), bool)
    apart[1:] = (starts[1:] >= ends[:-1]) & (starts[1:] > starts[:-1])
    first_tokens = np.flatnonzero(apart)
    starts = starts[first_tokens]
    widths = np.diff(starts, append=length)
    piece_chars = limit // TOKENS_PER_CHAR_MAX
    pieces = np.where(widths > limit, -(-widths // piece_chars), 1)
    tokens = -(-np.diff(first_tokens, append=len(spans)) // pieces)
    steps = np.arange(pieces.sum()) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    starts = np.repeat(starts, pieces) + steps * piece_chars
    widths = np.diff(starts, append=length)
    costs = np.maximum(np.repeat(tokens, pieces) * CHARS_PER_TOKEN_MAX, widths)
    return np.append(starts, length), np.append(0, np.cumsum(costs))
