"""How many padded tokens a batch may have: found at warm-up, halved when memory runs out. Pure."""

from collections.abc import Sequence


GAIN_MIN = 1.03
"""A larger batch must be better by more than the noise of a shared machine to be chosen."""

FULL = 0.8
"""A batch that tells whether the budget holds: at least this part of it."""

GROW_AFTER, GROWTH = 16, 1.1
"""So many full batches in a row that went well let the budget grow by so much."""

NEAR = 0.9
"""Of a size that ran out of memory: the budget stays below until that is long ago."""


def choose(times: Sequence[tuple[int, float]], *, least: int) -> int:
    """The budget of best throughput among (padded tokens, seconds), of two alike the smaller.

    Sizes below `least` are not chosen, unless all are. Where no time passed (a simulated device) the
    largest is. Raises ValueError when there is none.
    """
    largest = max(size for size, _ in times)
    sizes = sorted((size, took_s) for size, took_s in times if size >= min(least, largest))
    best, best_s = sizes[0]
    for size, took_s in sizes:
        if took_s <= 0 or best_s <= 0:
            return largest
        if size / took_s > GAIN_MIN * best / best_s:
            best, best_s = size, took_s
    return best


class Budget:
    """The padded tokens of one model's batches, between `least` and `most`.

    After a batch ran out of memory it is half of that batch at most. It grows back slowly, and for
    `forget_s` it stays below 90 % of the size that failed, so that it does not swing.
    """

    def __init__(self, *, least: int, most: int, forget_s: float) -> None:
        self._least = min(least, most)
        self._most = most
        self._forget_s = forget_s
        self._failed: int | None = None
        self._failed_at = 0.0
        self._good = 0
        self.tokens = most

    def shrink(self, tokens: int, now: float) -> None:
        """A batch of that many padded tokens ran out of memory."""
        self._failed = tokens if self._failed is None else min(self._failed, tokens)
        self._failed_at = now
        self._good = 0
        self.tokens = max(self._least, min(self.tokens, tokens) // 2)

    def fits(self, tokens: int, now: float) -> None:
        """A batch of that many padded tokens went well."""
        if self.tokens >= self._most or tokens < FULL * self.tokens:
            return
        self._good += 1
        if self._good >= GROW_AFTER:
            self._good = 0
            grown = max(int(self.tokens * GROWTH), self.tokens + 1)
            self.tokens = max(self.tokens, min(grown, self._ceiling(now)))

    def limit(self, most: int) -> None:
        """The warm-up found another upper bound; what was learnt of memory stays."""
        self._least, self._most = min(self._least, most), most
        self.tokens = min(self.tokens, most) if self._failed is not None else most

    def _ceiling(self, now: float) -> int:
        if self._failed is not None and now - self._failed_at >= self._forget_s:
            self._failed = None
        return self._most if self._failed is None else min(self._most, int(NEAR * self._failed))
