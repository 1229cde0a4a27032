"""What is known of when searches see a write. A write of an index whose searches lag behind has a token:
its place in the log of its namespace's writes, which rises. Without a token, searches see it at once.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal


Level = Literal["accepted", "indexed", "searchable"]
"""How far a write has come. accepted: it is in the Store. indexed: all of it has ended, what could be
written is in the index. searchable: searches see that.
"""

UNPROVED = 2**63 - 1
"""The token of a write for which the index gave none: the highest that a column of SQL holds, so no search
is ever known to come so far, and the highest token of several writes is that of all."""


def latest(tokens: Iterable[int | None]) -> int | None:
    """The token that stands for all of these writes; None: searches see them all."""
    return max((token for token in tokens if token is not None), default=None)


@dataclass(frozen=True, slots=True)
class Spread:
    """Median and 95th percentile of some times, in seconds."""

    p50_s: float
    p95_s: float


@dataclass(frozen=True, slots=True)
class Lag:
    """How long the last `landings` took from when they were accepted: until the index had them, and until
    searches saw them. None: nothing of that kind is known.
    """

    landings: int = 0
    indexed: Spread | None = None
    searchable: Spread | None = None
