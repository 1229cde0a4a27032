"""When the lanes of a buffer go, and in which order. No I/O, no clock.

A lane becomes due by itself (`lanes`), waits its tenant's turn (`turns`) for a place among the flights
(`window`), and goes when the rates allow it (`pace`). What waits for a rate of its namespace leaves the
order meanwhile: it holds up nobody and takes no place.
"""

from collections.abc import Mapping
from heapq import heappop, heappush
from itertools import count

from serve.capabilities import Capabilities
from serve.config import Buffer as BufferSettings
from serve.index.lanes import Batch, Lane
from serve.index.pace import Pace
from serve.index.turns import Turns
from serve.index.window import Window
from serve.records import Record, Tombstone, Write


PACED_MAX = 10_000
"""Namespaces whose rates are remembered: who is forgotten was idle while so many others were written."""

INDEX = ""
"""The key of the whole index in its pace."""


class Schedule:
    """Bounds: one timer or one place in the order for each lane, and stale timers until they fire."""

    def __init__(self, settings: BufferSettings, caps: Capabilities) -> None:
        self._settings = settings
        self._caps = caps
        self._turns = Turns()
        self._window = Window(settings.flushes_max)
        self._pace = Pace(settings.flushes_s, settings.bytes_s, 1)
        self._paces: Mapping[type[Write], Pace] = {
            kind: Pace(rates.requests_s, rates.bytes_s, PACED_MAX)
            for kind, rates in ((Record, caps.upserts), (Tombstone, caps.deletes))
        }
        self._timers: list[tuple[float, int, Lane]] = []
        self._numbers = count(1)
        self._newest = 0
        self._paused_until = 0.0
        self._paced_until = 0.0
        self._hurry = False
        self.flights = 0

    @property
    def window(self) -> int:
        """Flights that may be under way at once."""
        return self._window.size

    def hurry(self) -> None:
        """From now on every lane is due at once; `plan` each."""
        self._hurry = True

    def plan(self, lane: Lane) -> None:
        """Look at a lane again: something of it has changed."""
        if self._turns.holds(lane):
            return
        due = self._due_at(lane)
        if due is not None and (lane.scheduled is None or due < lane.scheduled):
            lane.scheduled = due
            heappush(self._timers, (due, next(self._numbers), lane))

    def forget(self, lane: Lane) -> None:
        """The lane is empty, and nobody knows it any more."""
        self._turns.cancel(lane)
        lane.scheduled = None

    def clear(self) -> None:
        """Forget all lanes, and what is in flight."""
        self._turns.clear()
        self._timers.clear()
        self.flights = 0

    def take(self, now: float) -> Batch | None:
        """The next batch, in flight until `land`; None: nothing may go now."""
        self._ripen(now)
        if self.flights >= self.window or now < self._opens_at:
            return None
        lane = self._next(now)
        if lane is None:
            return None
        self._newest = next(self._numbers)
        self.flights += 1
        batch = lane.take(
            now, self._newest, items_max=self._caps.max_items, bytes_max=self._bytes_full
        )
        self._turns.take(lane, batch.bytes)
        self._paces[type(batch.writes[0])].take(lane.ns, batch.bytes, now)
        self._pace.take(INDEX, batch.bytes, now)
        return batch

    def next_due(self, now: float) -> float | None:
        """When to `take` again; None: not before something lands or changes."""
        if self.flights >= self.window or not (self._turns.lanes or self._timers):
            return None
        ripe = now if self._turns.lanes else self._timers[0][0]
        return max(ripe, self._opens_at)

    def land(self, *, well: bool) -> None:
        """A flight is over; `well`: the index took it."""
        if well:
            self._window.grow(self.flights)
        self.flights -= 1

    def slow_down(self, batch: Batch) -> None:
        """The index was too busy for this batch."""
        self._window.cut(batch.number, self._newest)

    def pause(self, now: float) -> None:
        """The index as a whole cannot be written."""
        self._paused_until = max(self._paused_until, now + self._settings.pause_s)

    def paused_s(self, now: float) -> float:
        """For how long it is left alone."""
        return max(0.0, self._paused_until - now)

    @property
    def _opens_at(self) -> float:
        return max(self._paused_until, self._paced_until)

    @property
    def _bytes_full(self) -> int:
        return int(self._settings.bytes_fill * self._caps.max_bytes)

    def _due_at(self, lane: Lane) -> float | None:
        return lane.due_at(
            count=max(1, int(self._settings.count_fill * self._caps.max_items)),
            size_bytes=self._bytes_full,
            hurry=self._hurry,
        )

    def _ripen(self, now: float) -> None:
        """Let every lane that is due wait its turn."""
        while self._timers and self._timers[0][0] <= now:
            due, _, lane = heappop(self._timers)
            if lane.scheduled != due:
                continue  # it was scheduled anew since, or forgotten
            lane.scheduled = None
            ready_at = self._due_at(lane)
            if ready_at is not None and ready_at <= now:
                self._turns.add(lane)
            else:
                self.plan(lane)

    def _next(self, now: float) -> Lane | None:
        """The lane that goes now, still in the order; those before it that cannot have left."""
        while (lane := self._turns.first()) is not None:
            ready_at = self._due_at(lane)
            if ready_at is not None and ready_at <= now:
                kind, size = lane.ahead(self._bytes_full)
                starts_at = now + self._paces[kind].wait_s(lane.ns, size, now)
                if starts_at <= now:
                    self._paced_until = now + self._pace.wait_s(INDEX, size, now)
                    return lane if self._paced_until <= now else None
                lane.paused_until = starts_at
            self._turns.cancel(lane)
            self.plan(lane)
        return None
