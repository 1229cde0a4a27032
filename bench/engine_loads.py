"""What `bench.engine` embeds, and how it is cut into batches. Pure, but for reading the tokenizer."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from bench import texts
from serve import config
from serve.embedding.packing import Pace, Room, pack, plan
from serve.embedding.sharing import padded
from serve.embedding.tokenizer import Tokenizer
from serve.records import Input


FIXED = 32
"""Texts of a batch in order of arrival; also what `encode` takes unless told otherwise."""
REQUEST = 8
"""Texts of one request in the load `requests`."""
LONGEST = 512
"""Tokens of the load `longest`, where the model takes so many."""


def longest(count: int) -> list[str]:
    """As long as any model reads."""
    every = texts.passages(4 * count)
    return [" ".join(part) for part in zip(*[iter(every)] * 4, strict=True)]


LOADS: Mapping[str, tuple[Callable[[int], list[str]], int]] = {
    "short": (texts.shorts, 128),
    "passages": (texts.passages, 32),
    "mixed": (texts.mixed, 128),
    "requests": (texts.mixed, 128),
    "longest": (longest, 16),
}


@dataclass(frozen=True, slots=True)
class Load:
    """Texts with their ids, as the model takes them.

    `calls` are what is asked for at once, by index: all of it, or requests that wait together.
    """

    name: str
    texts: Sequence[str]
    inputs: Sequence[Input]
    tokens: Sequence[int]
    calls: Sequence[Sequence[int]]

    def arrival(self) -> list[list[int]]:
        """Batches of a fixed size in order of arrival, none over two calls."""
        return [list(part) for call in self.calls for part in _cut(call)]

    def by_length(self) -> list[list[int]]:
        """Batches as `encode` makes them of each call: sorted by characters, of a fixed size."""
        orders = (sorted(call, key=lambda at: -len(self.texts[at])) for call in self.calls)
        return [list(part) for order in orders for part in _cut(order)]

    def planned(self, pace: Pace, batch: config.Batch, row_tokens: int = 0) -> list[list[int]]:
        """Batches as the service makes them: of each hand-out, or of the only call."""
        many = len(self.calls) > 1
        hand_outs = self.hand_outs(pace, batch, row_tokens) if many else self.calls
        return [
            one for members in hand_outs for one in self._plan(members, pace, batch, row_tokens)
        ]

    def _plan(
        self, members: Sequence[int], pace: Pace, batch: config.Batch, row_tokens: int
    ) -> Iterator[list[int]]:
        parts = plan(
            [self.tokens[at] for at in members],
            overhead=pace.overhead,
            tokens_max=batch.tokens_max,
            items_max=batch.items_max,
            row_tokens=row_tokens,
        )
        return ([members[at] for at in part] for part in parts)

    def hand_outs(self, pace: Pace, batch: config.Batch, row_tokens: int = 0) -> list[list[int]]:
        """What the service's queue gives at once while all calls of one tenant wait, in order."""
        found: list[list[int]] = []
        room: Room | None = None
        for part in self._slices(batch):
            tokens = [self.tokens[at] for at in part]
            if room is None or not room.admits(tokens):
                room = _room(pace, batch, row_tokens)
                room.admits(tokens)
                found.append([])
            found[-1] += part
        return found

    def _slices(self, batch: config.Batch) -> list[list[int]]:
        """Calls as they stand in the queue."""
        tokens_max = min(batch.tokens_min, batch.tokens_max)
        return [
            [call[at] for at in part]
            for call in self.calls
            for part in pack(
                [self.tokens[at] for at in call], tokens_max=tokens_max, items_max=batch.items_max
            )
        ]

    def waste(self, batches: Sequence[Sequence[int]], row_tokens: int = 0) -> float:
        """The share of what the model reads that is padding."""
        sizes = (padded([self.tokens[at] for at in one], row_tokens) for one in batches)
        return 1 - sum(self.tokens) / sum(sizes)


def _room(pace: Pace, batch: config.Batch, row_tokens: int) -> Room:
    """As `serve.flows.batching` bounds a hand-out."""
    return Room(
        overhead=pace.overhead,
        load_aim=max(pace.load_in(batch.target_ms / 1e3), pace.overhead + batch.tokens_min),
        tokens_max=batch.tokens_max,
        items_max=batch.items_max,
        row_tokens=row_tokens,
    )


def _cut(order: Sequence[int]) -> Sequence[Sequence[int]]:
    return [order[at : at + FIXED] for at in range(0, len(order), FIXED)]


def loads(model: config.Model, shrink: int, times: int) -> list[Load]:
    """Every load, `times` as large as written above, or a `shrink`th of that."""
    tokenizer = Tokenizer.open(model)
    made = []
    for name, (make, count) in LOADS.items():
        lines = make(max(count * times // shrink, 2 * REQUEST))
        limit = min(model.tokens_max, LONGEST)
        rows = [tokenizer.truncate(row, limit) for row in tokenizer.encode(lines)]
        every = list(range(len(lines)))
        size = REQUEST if name == "requests" else len(lines)
        calls = [every[at : at + size] for at in range(0, len(every), size)]
        inputs = [Input(ids=row) for row in rows]
        made.append(Load(name, lines, inputs, [len(row) for row in rows], calls))
    return made
