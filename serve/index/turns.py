"""Whose lane is flushed next: start-time fair queueing between tenants, in bytes. No I/O, no clock.

The rule of the embedder's fair queue, without its classes:

    a tenant begins to wait:  S = max(V, F)
    take:  the waiting tenant with the least S, of its lanes the one that waits longest;
           V = S;  F = S + bytes / weight

While two tenants both have a lane that could go, what they were given differs by at most one largest
flush of each, in bytes divided by weight, however many lanes either has. A lane in flight does not
wait: a slot that nobody else can use goes to whoever can, and is charged like any other. When nothing
waits everybody starts level.
"""

from dataclasses import dataclass, field
from heapq import heapify, heappop, heappush

from serve.index.lanes import Lane


SLACK = 256
"""Stale rows and tenants that may stand about before they are swept out."""


@dataclass(slots=True, eq=False)
class _Turn:
    """One tenant's. `start` is S while a lane of it waits, else F; `row` is the number of its row in
    the heap, 0 when no lane waits.
    """

    weight: float
    start: float
    row: int = 0
    lanes: dict[Lane, None] = field(default_factory=dict)


class Turns:
    """Lanes that could go now; `lanes` counts them. Bounds: its owner's lanes, tenants ahead of V."""

    def __init__(self) -> None:
        self._tenants: dict[str, _Turn] = {}
        self._tenants_max = SLACK
        self._heap: list[tuple[float, int, _Turn]] = []
        self.lanes = 0
        self._v = 0.0
        self._rows = 0

    def holds(self, lane: Lane) -> bool:
        """Whether a lane waits."""
        turn = self._tenants.get(lane.tenant)
        return turn is not None and lane in turn.lanes

    def add(self, lane: Lane) -> None:
        """Let a lane wait, and charge its tenant at the lane's weight from now on."""
        turn = self._tenants.get(lane.tenant)
        if turn is None:
            turn = self._tenants[lane.tenant] = _Turn(lane.weight, self._v)
        elif turn.weight != lane.weight:  # what it is ahead by shrinks or grows with it
            turn.start = self._v + (turn.start - self._v) * turn.weight / lane.weight
            turn.weight, turn.row = lane.weight, 0
        turn.lanes[lane] = None
        self.lanes += 1
        if not turn.row:
            self._tag(turn)

    def first(self) -> Lane | None:
        """The lane that is next."""
        while self._heap and self._heap[0][1] != self._heap[0][2].row:
            heappop(self._heap)
        return next(iter(self._heap[0][2].lanes)) if self._heap else None

    def take(self, lane: Lane, size_bytes: int) -> None:
        """Hand out what `first` has told, and charge its tenant."""
        turn = self._tenants[lane.tenant]
        self._v = turn.start
        turn.start += size_bytes / turn.weight
        turn.row = 0
        self.cancel(lane)
        if turn.lanes:
            self._tag(turn)

    def cancel(self, lane: Lane) -> None:
        """Forget a lane, at no cost; a no-op when it does not wait."""
        if not self.holds(lane):
            return
        turn = self._tenants[lane.tenant]
        del turn.lanes[lane]
        self.lanes -= 1
        if not turn.lanes:
            turn.row = 0
        if not self.lanes:
            self.clear()

    def clear(self) -> None:
        """Nothing waits: all start level."""
        self._tenants.clear()
        self._tenants_max = SLACK
        self._heap.clear()
        self.lanes, self._v = 0, 0.0

    def _tag(self, turn: _Turn) -> None:
        """Of equal starts the first to get it goes first."""
        turn.start = max(self._v, turn.start)
        self._rows += 1
        turn.row = self._rows
        heappush(self._heap, (turn.start, turn.row, turn))
        self._sweep()

    def _sweep(self) -> None:
        """Keep memory in proportion to what waits, at O(1) amortised; F <= V means the same as none."""
        if len(self._tenants) > self._tenants_max:
            some = self._tenants.items()
            self._tenants = {t: one for t, one in some if one.lanes or one.start > self._v}
            self._tenants_max = 2 * len(self._tenants) + SLACK
        if len(self._heap) > 2 * self.lanes + SLACK:
            self._heap = [row for row in self._heap if row[1] == row[2].row]
            heapify(self._heap)
