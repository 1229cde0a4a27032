"""How many flushes may be in flight at once: additive increase, multiplicative decrease. Pure."""


class Window:
    """Between 1 and `most`. It begins at `most`: should that be too many, a few flights show it."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._size = float(most)
        self._cut_at = 0

    @property
    def size(self) -> int:
        """Flushes that may be in flight."""
        return int(self._size)

    def grow(self, flights: int) -> None:
        """A flush landed, of `flights` in flight: one more per round of them, where all were used."""
        if flights >= self.size:
            self._size = min(float(self._most), self._size + 1 / self._size)

    def cut(self, number: int, newest: int) -> None:
        """Flush `number` found the index too busy, when `newest` was the last to start.

        Halved once for all that were in flight together: they tell of one moment.
        """
        if number > self._cut_at:
            self._size = max(1.0, self._size / 2)
            self._cut_at = newest
