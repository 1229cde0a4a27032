"""English to embed: real sentences and passages, the same in every run.

They come from the texts of Python's own `help()`, which every Python carries. Short texts have 5
to 15 tokens of MiniLM's vocabulary (one in 200: up to 29) and passages 100 to 256, its maximum, special
tokens included.
"""

import random
import re
from collections.abc import Iterator
from itertools import cycle, islice
from pydoc_data import topics


SEED = 20260101
SHORT_WORDS = (3, 9)
PASSAGE_WORDS = (95, 190)
"""A plain word comes to about 1.15 tokens."""

_WORD = re.compile(r"[A-Za-z]{1,11}[,.;]?")


def shorts(count: int) -> list[str]:
    """Runs of a few words: titles and queries."""
    return _cut(count, *SHORT_WORDS)


def passages(count: int) -> list[str]:
    """Runs of about a paragraph: chunks of documents."""
    return _cut(count, *PASSAGE_WORDS)


def mixed(count: int) -> list[str]:
    """Shorts and passages in equal parts, in no order: what batches by length gain from."""
    both = shorts(count - count // 2) + passages(count // 2)
    random.Random(SEED).shuffle(both)
    return both


def _cut(count: int, shortest: int, longest: int) -> list[str]:
    rng = random.Random(SEED)
    words = cycle(_words())
    return [" ".join(islice(words, rng.randint(shortest, longest))) for _ in range(count)]


def _words() -> Iterator[str]:
    """The words of the running text; markup, code and numbers are left out."""
    for name in sorted(topics.topics):
        for line in topics.topics[name].splitlines():
            if line and not line.startswith("      "):  # deeper lines are code
                yield from _WORD.findall(" ".join(filter(_WORD.fullmatch, line.split())))
