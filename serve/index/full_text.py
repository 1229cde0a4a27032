"""Full text: what a word is, and BM25 (Robertson and Zaragoza 2009), by which hits are ranked.

A word is a run of letters and digits, in lower case. There are no stems and no stop words, since the
language is not known: words that stand everywhere count for nearly nothing by themselves. A text
without spaces between its words, as Chinese, has none that could be asked for; vectors find it.

A query is a set of words of which any may match. It is never parsed as a query language.
"""

import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence

from serve.errors import BadInput
from serve.records import Filter, Hit


WORD_BYTES_MAX = 64
"""Longer runs are no words: hashes and encoded data, of which each would be kept once."""

K1, B = 1.2, 0.75
"""How soon a repeated word stops counting, and how much a long text is held against it."""

_RUN = re.compile(r"[^\W_]+")


def words(text: str) -> list[str]:
    """The words of a text, in order."""
    found = (run.lower() for run in _RUN.findall(text))
    return [word for word in found if len(word.encode("utf-8", "ignore")) < WORD_BYTES_MAX]


def bm25(texts: Sequence[Sequence[str]], query: Iterable[str]) -> list[float]:
    """The score of each text, given as its words; 0 where it has no word of the query."""
    counts = [Counter(text) for text in texts]
    length = sum(map(len, texts)) / max(1, len(texts))
    scores = [0.0] * len(texts)
    for word in set(query):
        held = sum(word in count for count in counts)
        rarity = math.log(1 + (len(texts) - held + 0.5) / (held + 0.5))
        for at, count in enumerate(counts):
            if times := count[word]:
                damping = K1 * (1 - B + B * len(texts[at]) / length)
                scores[at] += rarity * times * (K1 + 1) / (times + damping)
    return scores


def unsupported() -> BadInput:
    """A mode of search that the index does not have."""
    return BadInput(
        "This service's index ranks by vectors only: mode must be `vector`.",
        param="mode",
        code="mode_unsupported",
    )


class VectorsOnly:
    """`match` of an index without full text (`caps.full_text` is false)."""

    async def match(
        self, _ns: str, _text: str, _top_k: int, _where: Filter | None = None, /
    ) -> Sequence[Hit]:
        """Raises BadInput (mode)."""
        raise unsupported()
