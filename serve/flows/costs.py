"""What work costs: seconds of each model, and cost in tokens, which makes models comparable.

The unit of cost is a token of the pool's first model whose pace is known. A model that was never
measured counts like that one until it is loaded.
"""

from collections.abc import Sequence

from serve.embedding.packing import Pace


PROFILE_TOKENS = 1000
"""Models are compared, and the queue's pace is told, by a batch of this many padded tokens."""

GUESS = Pace(overhead_s=0.0, token_s=1 / 5000)
"""Before anything was measured: MiniLM on two cores."""


class Costs:
    """Paces of models in one slot, and the pace of the queue (`rate`, in cost), which learns on its own:
    that of all slots together.
    """

    def __init__(self, models: Sequence[str], *, item_overhead_tokens: int, slots: int = 1) -> None:
        self._models = models
        self._slots = slots
        self._overhead = item_overhead_tokens
        self._seconds: dict[str, float] = {}
        self._unit: str | None = None
        self.paces: dict[str, Pace] = {}
        self.rate = Pace(0.0, GUESS.token_s)

    def fit(self, model: str, pace: Pace) -> None:
        """A model was measured; should the unit be another's from now on, the queue's pace is too."""
        self.paces[model] = pace
        self._seconds[model] = pace.seconds(PROFILE_TOKENS)
        unit = next((one for one in self._models if one in self._seconds), model)
        if unit != self._unit:
            self._unit = unit
            self.rate = Pace(0.0, self._seconds[unit] / PROFILE_TOKENS / self._slots)

    def cost(self, model: str, tokens: int, inputs: int = 1) -> float:
        """Tokens and a fixed part per input, in the unit's device time."""
        own = self._seconds.get(model)
        dearness = 1.0 if own is None or self._unit is None else own / self._seconds[self._unit]
        return dearness * max(tokens + self._overhead * inputs, 1)
