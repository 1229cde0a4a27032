"""Collects writes and says when which of them go out as one bulk upsert. Sans I/O: no clock, no
sockets, no callbacks. `serve.index.writer` drives it: `offer`, `due`, `ack` or `nack`, `finished`.

`schedule` decides which lane goes when, `stock` what there is room for.

Its memory is a cache: whoever offered a write owns it until the outcome is there. Each write gets
a ticket, and each ticket exactly one outcome:

    landed      the index returned (a bulk upsert or delete that held it)
    rejected    the index refuses it for good, alone in its batch
    superseded  a write of higher generation on the same id is here, or the Store knows of one
    released    given back: its deadline passed while it was not in flight, shutdown, drop
"""

import random
from collections.abc import Iterable, Sequence
from dataclasses import replace
from heapq import heapify, heappop, heappush
from typing import Any

from serve.capabilities import Capabilities
from serve.config import Buffer as BufferSettings
from serve.errors import Overloaded
from serve.index.errors import (
    BatchTooLarge,
    IndexFault,
    IndexOffline,
    IndexRetryable,
    RecordsRejected,
)
from serve.index.lanes import Batch, Entry, Lane, Part, size_bytes
from serve.index.probes import token_of
from serve.index.schedule import Schedule
from serve.index.stock import RETRY_AFTER_S_MIN, RETRY_AFTER_S_UNKNOWN, Stock
from serve.ports import Landed
from serve.pressure import Pressure, Sender
from serve.records import Outcome, Write


AGE_FACTOR = 1.5
FILL_HIGH = 0.5
FILL_LOW = 0.1
BACKOFF_S = 0.2
TRIES_COUNTED = 16
PROBE_S = 0.5
"""How long whoever asks should stay away while it shows whether the index is back."""

SUPERSEDED = Outcome("superseded")
RELEASED = Outcome("released")


class Buffer:
    """Lanes of writes, one lane per namespace. Bounds: writes and bytes, in all and of each tenant,
    lanes, flights (settings).
    """

    def __init__(self, settings: BufferSettings, caps: Capabilities, rng: random.Random) -> None:
        most = settings.flush_writes_max or caps.max_items
        caps = replace(caps, max_items=min(most, caps.max_items))
        self._settings = settings
        self._caps = caps
        self._rng = rng
        self._stock = Stock(settings)
        self._schedule = Schedule(settings, caps)
        self._lanes: dict[str, Lane] = {}
        self._open: dict[int, tuple[Lane, Entry]] = {}
        self._finished: list[tuple[int, Outcome]] = []
        self._deadlines: list[tuple[float, int, int]] = []
        self._next_ticket = 0
        self._offline = False
        self._counts = dict.fromkeys(
            ("flushes", "retried", "landed", "rejected", "superseded", "released"), 0
        )

    @property
    def depth(self) -> int:
        """Tickets without an outcome."""
        return len(self._open)

    def offer(
        self, sender: Sender, ns: str, writes: Sequence[Write], now: float, deadline: float
    ) -> range:
        """Take writes in; their tickets, in order.

        Raises Overloaded (nothing was taken) past a bound, TooLarge when they could never fit.
        """
        sizes = [size_bytes(write) for write in writes]
        self._check_room(sender, ns, sizes, now)
        first = self._next_ticket
        self._next_ticket += len(sizes)
        tickets = range(first, self._next_ticket)
        if not tickets:
            return tickets
        lane = self._lanes.get(ns)
        if lane is None:
            lane = self._lanes[ns] = Lane(ns, sender, self._settings.age_s_start)
        lane.weight = sender.weight
        for ticket, write, size in zip(tickets, writes, sizes, strict=True):
            if lane.closing:
                self._finish(ticket, RELEASED)
            else:
                self._put(lane, Entry(write, size, now, ticket, {ticket: deadline}), ticket)
        heappush(self._deadlines, (deadline, first, self._next_ticket))
        self._stock.weigh(sender)
        self._touch(lane)
        return tickets

    def due(self, now: float) -> list[Batch]:
        """Batches to flush now; each is in flight until `ack` or `nack`."""
        self._expire(now)
        batches: list[Batch] = []
        while (batch := self._schedule.take(now)) is not None:
            batches.append(batch)
        return batches

    def next_due(self, now: float) -> float | None:
        """When to call `due` again at the latest; None: not before the next offer, ack or nack."""
        times = [self._deadlines[0][0]] if self._deadlines else []
        due = self._schedule.next_due(now)
        if due is not None:
            times.append(due)
        return max(min(times), now) if times else None

    def supersede(self, batch: Batch, ids: Iterable[str]) -> Batch:
        """Answer writes of a batch in flight as superseded; what is left of it to be flushed."""
        lane = self._lanes.get(batch.ns)
        part = lane.flying if lane is not None and lane.number == batch.number else None
        gone = set(ids)
        if lane is not None and part is not None:
            for entry in part.entries:
                if entry.write.id in gone:
                    self._answer(lane, entry, SUPERSEDED)
            part.entries = [entry for entry in part.entries if entry.tickets]
        left = tuple(write for write in batch.writes if write.id not in gone)
        return replace(batch, writes=left)

    def ack(self, batch: Batch, landed: Landed, now: float) -> None:
        """The index returned: all of the batch landed but what it rejected."""
        lane, part = self._land(batch, well=True)
        if lane is None or part is None:
            return
        self._counts["flushes"] += 1
        if part.entries:
            self._offline = False
            self._learn(lane, part, now)
        reasons = dict(landed.rejected)
        took = Outcome("landed", token=token_of(self._caps, landed))
        for entry in part.entries:
            reason = reasons.get(entry.write.id)
            outcome = took if reason is None else Outcome("rejected", reason)
            self._answer(lane, entry, outcome)
        self._touch(lane)

    def nack(self, batch: Batch, error: IndexFault, now: float) -> None:
        """The index did not take it: retry, bisect, or pause, as the error says."""
        if isinstance(error, RecordsRejected) and error.pairs is not None:
            self.ack(batch, Landed(rejected=error.pairs), now)
            return
        lane, part = self._land(batch, well=False)
        if lane is None or part is None:
            return
        self._heed(batch, error, now)
        for entry in part.entries:
            self._release_late(lane, entry, now)
        part.entries = [entry for entry in part.entries if entry.tickets]
        if lane.closing:
            self._release(lane)
        elif isinstance(error, RecordsRejected | BatchTooLarge):
            reason = str(error) or type(error).__name__
            share, pause_s = self._settings.poison_share_max, self._settings.pause_s
            lane.bisect(part, reason, now, share_max=share, pause_s=pause_s)
        else:
            self._retry(lane, part, error, now)
        self._touch(lane)

    def finished(self) -> list[tuple[int, Outcome]]:
        """Outcomes since the last call."""
        finished, self._finished = self._finished, []
        return finished

    def drop(self, ns: str) -> None:
        """Release the lane of a namespace. What is in flight is answered when it returns."""
        lane = self._lanes.get(ns)
        if lane is not None:
            lane.closing = True
            self._release(lane)
            self._touch(lane)

    def is_flying(self, ns: str) -> bool:
        """Whether a batch of the namespace is in flight."""
        lane = self._lanes.get(ns)
        return lane is not None and lane.flying is not None

    def hurry(self) -> None:
        """From now on every lane is due at once: shutdown."""
        self._schedule.hurry()
        for lane in list(self._lanes.values()):
            self._touch(lane)

    def release_all(self) -> None:
        """Give everything back, also what is in flight: its late `ack` or `nack` is ignored."""
        for lane in list(self._lanes.values()):
            for entry in lane.entries():
                self._answer(lane, entry, RELEASED)
        self._lanes.clear()
        self._schedule.clear()
        self._deadlines.clear()

    def pressure(self, now: float) -> Pressure:
        """Whether to bring more: not while the index is paused or has not shown since that it is
        back, nor past a soft bound.
        """
        paused_s = self._schedule.paused_s(now)
        if self._offline and self.depth:
            paused_s = max(paused_s, PROBE_S)
        crowded_s = self._stock.crowded_s()
        return Pressure(max(paused_s, crowded_s), paused_s > 0, self._stock.crowded())

    def stats(self, now: float) -> dict[str, Any]:
        """Gauges (depth, bytes, oldest_age_s, lanes, tenants, in_flight, window, paused) and counters."""
        oldest = [since for lane in self._lanes.values() if (since := lane.oldest()) is not None]
        return {
            "depth": self.depth,
            "bytes": self._stock.bytes,
            "oldest_age_s": max(0.0, now - min(oldest)) if oldest else 0.0,
            "lanes": len(self._lanes),
            "tenants": self._stock.tenants,
            "in_flight": self._schedule.flights,
            "window": self._schedule.window,
            "paused": self._schedule.paused_s(now) > 0,
            **self._counts,
        }

    # Taking in

    def _check_room(self, sender: Sender, ns: str, sizes: Sequence[int], now: float) -> None:
        paused_s = self._schedule.paused_s(now)
        self._stock.check(sender, len(sizes), sum(sizes), max(paused_s, RETRY_AFTER_S_MIN))
        if ns not in self._lanes and len(self._lanes) >= self._settings.lanes_max:
            wait_s = max(paused_s, RETRY_AFTER_S_UNKNOWN)
            message = "The write buffer is full: buffer.lanes_max."
            raise Overloaded(message, retry_after_s=wait_s)

    def _put(self, lane: Lane, entry: Entry, ticket: int) -> None:
        before = lane.bytes_held
        home, losers = lane.put(entry)
        writes = (home is not None) - len(losers)
        self._stock.add(lane.tenant, writes, lane.bytes_held - before)
        for loser in losers:
            del self._open[loser]
            self._finish(loser, SUPERSEDED)
        if home is None:
            self._finish(ticket, SUPERSEDED)
        else:
            self._open[ticket] = (lane, home)

    def _touch(self, lane: Lane) -> None:
        """After any change of a lane: give the verdicts it withheld, schedule or forget it."""
        for entry, reason in lane.verdicts():
            self._answer(lane, entry, Outcome("rejected", reason))
        if lane.empty and lane.flying is None:
            self._lanes.pop(lane.ns, None)
            self._schedule.forget(lane)
        else:
            self._schedule.plan(lane)

    # Coming back

    def _land(self, batch: Batch, *, well: bool) -> tuple[Lane | None, Part | None]:
        lane = self._lanes.get(batch.ns)
        part = lane.land(batch.number) if lane is not None else None
        if part is not None:
            self._schedule.land(well=well and bool(part.entries))
        return lane, part

    def _learn(self, lane: Lane, part: Part, now: float) -> None:
        size = sum(entry.bytes for entry in part.entries)
        fill = max(len(part.entries) / self._caps.max_items, size / self._caps.max_bytes)
        if fill > FILL_HIGH:
            self._age(lane, AGE_FACTOR)
        elif fill < FILL_LOW:
            self._age(lane, 1 / AGE_FACTOR)
        took_s = max(now - lane.sent_at, 0.001)
        self._stock.learn(len(part.entries), size, took_s / self._schedule.window)

    def _heed(self, batch: Batch, error: IndexFault, now: float) -> None:
        """What an error says of the index as a whole."""
        if isinstance(error, IndexOffline):
            self._offline = True
            self._schedule.pause(now)
        elif not isinstance(error, IndexRetryable):
            self._offline = False
        elif error.busy:
            self._schedule.slow_down(batch)

    def _age(self, lane: Lane, factor: float) -> None:
        settings = self._settings
        lane.age_s = min(settings.age_s_max, max(settings.age_s_min, lane.age_s * factor))

    def _retry(
        self, lane: Lane, part: Part, error: IndexRetryable | IndexOffline, now: float
    ) -> None:
        """The batch stays a batch: one by one would turn minutes into an hour."""
        settings = self._settings
        self._counts["retried"] += 1
        if isinstance(error, IndexOffline):
            part.due = now
        else:
            part.tries = min(part.tries + 1, TRIES_COUNTED)
            wait_s_max = min(settings.retry_s_max, BACKOFF_S * 2**part.tries)
            part.due = now + max(error.retry_after_s, self._rng.uniform(0, wait_s_max))
            self._age(lane, AGE_FACTOR)
        lane.parts.appendleft(part)

    # Outcomes

    def _finish(self, ticket: int, outcome: Outcome) -> None:
        self._counts[outcome.word] += 1
        self._finished.append((ticket, outcome))

    def _answer(self, lane: Lane, entry: Entry, outcome: Outcome) -> None:
        """The outcome of an entry, to every ticket on it."""
        for ticket in entry.tickets:
            del self._open[ticket]
            self._finish(ticket, outcome)
        writes = len(entry.tickets)
        entry.tickets = {}
        before = lane.bytes_held
        lane.discard(entry)
        self._stock.add(lane.tenant, -writes, lane.bytes_held - before)

    def _release(self, lane: Lane) -> None:
        for entry in lane.entries():
            if not entry.flying:
                self._answer(lane, entry, RELEASED)

    def _release_late(self, lane: Lane, entry: Entry, now: float) -> None:
        for ticket in [t for t, deadline in entry.tickets.items() if deadline <= now]:
            self._release_ticket(lane, entry, ticket)

    def _release_ticket(self, lane: Lane, entry: Entry, ticket: int) -> None:
        if len(entry.tickets) == 1:
            self._answer(lane, entry, RELEASED)
            return
        del entry.tickets[ticket], self._open[ticket]
        self._stock.add(lane.tenant, -1, 0)
        self._finish(ticket, RELEASED)

    def _expire(self, now: float) -> None:
        """Release what is too late and not in flight; what is, is looked at when it returns."""
        while self._deadlines and self._deadlines[0][0] <= now:
            _, first, stop = heappop(self._deadlines)
            for ticket in range(first, stop):
                lane, entry = self._open.get(ticket, (None, None))
                if lane is not None and entry is not None and not entry.flying:
                    self._release_ticket(lane, entry, ticket)
                    self._touch(lane)
        # Offers that were answered long before their deadline leave ranges behind.
        if len(self._deadlines) > 2 * self.depth + 64:
            self._deadlines = [
                (deadline, first, stop)
                for deadline, first, stop in self._deadlines
                if any(ticket in self._open for ticket in range(first, stop))
            ]
            heapify(self._deadlines)
