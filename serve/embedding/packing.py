"""How a hand-out becomes batches, and how long a batch will take. Pure.

Sorting by length and counting the padding is the largest lever on a CPU: 49-52 texts/s against
18-19 in arrival order with a fixed size (256 mixed texts, MiniLM, 2 cores). A batch's `load` is its
padded tokens and its fixed time, counted in tokens too (`overhead`).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from serve.embedding.sharing import padded, share


PLAN_MAX = 64
"""Items that are planned one by one; of more, as many groups of neighbours in length: the time of
a plan grows with the square (0.3 ms for 64).
"""

LONG_ROWS = 1.03
"""A token in a row of 180 takes so much longer than in one of 96, because it attends to more (4 to 6 %
in float32; the whole batch of a hand-out is hardly ever in such rows).
"""

UNEVEN = 1.05
"""Rows that short inputs share are padded by a twentieth at most, but for the last few."""


def pack(tokens: Sequence[int], *, tokens_max: int, items_max: int) -> list[list[int]]:
    """Cut items into batches of at most `tokens_max` padded tokens and `items_max` items.

    Returns indices, each exactly once, longest first. The padded size of a batch is its longest
    item times its count. An item above `tokens_max` goes alone.
    """
    order = sorted(range(len(tokens)), key=tokens.__getitem__, reverse=True)
    batches: list[list[int]] = []
    room = 0
    for index in order:
        if room == 0:
            batches.append([])
            room = min(items_max, max(1, tokens_max // max(tokens[index], 1)))
        batches[-1].append(index)
        room -= 1
    return batches


def plan(
    tokens: Sequence[int],
    *,
    overhead: float,
    tokens_max: int,
    items_max: int,
    row_tokens: int = 0,
) -> list[list[int]]:
    """Cut items into the batches of least load, within the bounds of `pack`.

    Returns indices, each exactly once, longest first. Where a batch costs little beside its
    tokens, short items are not padded to long ones; where it costs much, they are. Items that may
    share rows are planned row by row: short ones in rows of `row_tokens`, or all of them in rows as long
    as the longest item, where that saves batches.
    """
    bounds = {"tokens_max": tokens_max, "items_max": items_max}
    apart = _grouped(tokens, _units(tokens, row_tokens), overhead, **bounds)
    if not row_tokens or len(apart) <= 1:
        return apart
    together = _grouped(tokens, share(tokens, row_tokens), overhead, **bounds)
    loads = [
        sum(overhead + padded([tokens[item] for item in batch], row_tokens) for batch in batches)
        for batches in (apart, together)
    ]
    return together if LONG_ROWS * loads[1] < loads[0] else apart


def _grouped(
    tokens: Sequence[int],
    units: Sequence[Sequence[int]],
    overhead: float,
    *,
    tokens_max: int,
    items_max: int,
) -> list[list[int]]:
    """The items of what is planned as one."""
    sizes = [sum(tokens[item] for item in unit) for unit in units]
    return [
        [item for unit in batch for item in units[unit]]
        for batch in _plan(sizes, overhead=overhead, tokens_max=tokens_max, items_max=items_max)
    ]


def _units(tokens: Sequence[int], row_tokens: int) -> list[list[int]]:
    """Rows of short items, and each other item by itself."""
    if not row_tokens:
        return [[item] for item in range(len(tokens))]
    short = [item for item, count in enumerate(tokens) if count <= row_tokens // 2]
    rows = share([tokens[item] for item in short], row_tokens)
    alone = [[item] for item, count in enumerate(tokens) if count > row_tokens // 2]
    return alone + [[short[at] for at in row] for row in rows]


def _plan(
    tokens: Sequence[int], *, overhead: float, tokens_max: int, items_max: int
) -> list[list[int]]:
    order = sorted(range(len(tokens)), key=tokens.__getitem__, reverse=True)
    count = len(order)
    marks = [*range(0, count, max(1, -(-count // PLAN_MAX))), count]
    best, begins, sizes = [0.0, *[math.inf] * count], [0] * (count + 1), [1] * (count + 1)
    for i, begin in enumerate(marks[:-1]):
        longest = max(tokens[order[begin]], 1)
        size = min(items_max, max(1, tokens_max // longest))
        for j in range(i + 1, len(marks)):
            items = marks[j] - begin
            if items > size and j > i + 1:
                break
            load = best[i] + overhead + longest * items
            if load < best[j]:
                best[j], begins[j], sizes[j] = load, i, size
    batches: list[list[int]] = []
    j = len(marks) - 1
    while marks[j]:
        part, size = order[marks[begins[j]] : marks[j]], sizes[j]
        batches[:0] = [part[at : at + size] for at in range(0, len(part), size)]
        j = begins[j]
    return batches


class Room:
    """What a hand-out may still take in: what brings it nearer to a load, and so many items.

    The first call is always admitted. `load_aim` is what the batches shall come to that `plan` will make
    of it: long texts are coarse (one of 200 tokens takes half of 50 ms), and were the aim a bound,
    hand-outs would come to two thirds of it. So the last one may lead beyond it, by less than half of
    its own load. A guess that is hardly ever too low (each newcomer in a batch of its own, or in the one
    that pads it least; among those that share rows) is kept up, and replaced by a plan only when it
    exceeds the aim.
    """

    def __init__(
        self,
        *,
        overhead: float,
        load_aim: float,
        tokens_max: int,
        items_max: int,
        row_tokens: int = 0,
    ) -> None:
        self._overhead = overhead
        self._load_aim = load_aim
        self._tokens_max = tokens_max
        self._items_max = items_max
        self._row_tokens = row_tokens
        self._tokens: list[int] = []
        self._batches: list[tuple[int, int]] = []
        self._load = 0.0

    def admits(self, tokens: Sequence[int]) -> bool:
        """Take these items in, if they fit; after a refusal it is of no further use.

        Together they must be within a batch's bounds.
        """
        first, before = not self._tokens, self._load
        self._tokens += tokens
        if 0 < max(tokens) <= self._row_tokens // 2:
            self._load += UNEVEN * sum(tokens) + (0 if self._load else self._overhead)
        else:
            self._guess(max(tokens), len(tokens))
        if first:
            return True
        if len(self._tokens) > self._items_max:
            return False
        if self._load > self._load_aim:
            self._plan()
        beyond = self._load - self._load_aim
        return beyond <= 0 or beyond < self._load_aim - before

    def _guess(self, longest: int, count: int) -> None:
        """Put like items into a batch."""
        best, load = None, self._overhead + longest * count
        for at, (size, items) in enumerate(self._batches):
            fits = (items + count) * size <= self._tokens_max
            if size >= longest and fits and size * count <= load:
                best, load = at, size * count
        self._load += load
        if best is None:
            self._batches.append((longest, count))
        else:
            size, items = self._batches[best]
            self._batches[best] = size, items + count

    def _plan(self) -> None:
        batches = plan(
            self._tokens,
            overhead=self._overhead,
            tokens_max=self._tokens_max,
            items_max=self._items_max,
            row_tokens=self._row_tokens,
        )
        sizes = [[self._tokens[item] for item in batch] for batch in batches]
        loads = [padded(size, self._row_tokens) for size in sizes]
        self._batches = [
            (max(size), load // max(size)) for size, load in zip(sizes, loads, strict=True)
        ]
        self._load = sum(loads) + self._overhead * len(loads)


@dataclass(slots=True)
class Pace:
    """Predicted seconds of a batch: `scale * (overhead_s + tokens * token_s)`.

    The two terms are fitted at warm-up; `scale` follows what is seen later (a throttled card, a
    busy neighbour). One outlier moves it by at most 40 %, all of them within a factor of 1,000.
    """

    overhead_s: float
    token_s: float
    scale: float = 1.0

    @classmethod
    def fit(cls, times: Sequence[tuple[int, float]]) -> "Pace":
        """From (padded tokens, seconds) of the shortest and the longest warm-up batch.

        Raises ValueError when there is none.
        """
        (short, short_s), (long, long_s) = min(times), max(times)
        token_s = (long_s - short_s) / (long - short) if long > short else long_s / max(long, 1)
        token_s = max(token_s, long_s / max(long, 1) / 10, 1e-9)
        return cls(overhead_s=max(short_s - short * token_s, 0.0), token_s=token_s)

    def seconds(self, tokens: float) -> float:
        """Predicted time of one batch of that many padded tokens."""
        return self.scale * (self.overhead_s + tokens * self.token_s)

    @property
    def overhead(self) -> float:
        """The fixed time of a batch, in padded tokens."""
        return self.overhead_s / self.token_s

    def load_in(self, seconds: float) -> float:
        """The load of batches that take so long together."""
        return seconds / self.scale / self.token_s

    def learn(self, tokens: float, seconds: float) -> None:
        """Take in what a batch really took."""
        ratio = seconds / max(self.seconds(tokens), 1e-9)
        scale = self.scale * (1 + 0.1 * (min(max(ratio, 0.2), 5.0) - 1))
        self.scale = min(max(scale, 1e-3), 1e3)
