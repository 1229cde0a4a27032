"""How many hand-outs are at the model, and when the next of them ends."""

from itertools import count


class Slots:
    """As many hand-outs at once as there are slots; each says when it will probably end.

    A CPU has a slot for each thread, a GPU one: `serve.embedding.engines.slots_of`. Beside another
    hand-out only one of `beside_min` cost begins: a few short texts are better off in a batch
    with those that come while they wait.
    """

    def __init__(self, number: int, *, beside_min: float) -> None:
        self.number = number
        self._beside_min = beside_min
        self._visits = count()
        self._until: dict[int, float] = {}

    @property
    def busy(self) -> int:
        """Hand-outs at the model."""
        return len(self._until)

    def takes(self, cost: float) -> bool:
        """Whether a slot that is free should begin with so much."""
        return not self._until or cost >= self._beside_min

    def enter(self, until: float) -> int:
        """A hand-out begins; what to `leave` with."""
        visit = next(self._visits)
        self._until[visit] = until
        return visit

    def leave(self, visit: int) -> None:
        """It has ended."""
        del self._until[visit]

    def busy_s(self, now: float, cost: float) -> float:
        """Predicted seconds until a slot takes what waits, of so much cost; 0 where one would now."""
        if len(self._until) < self.number and self.takes(cost):
            return 0.0
        return max(min(self._until.values()) - now, 0.0)
