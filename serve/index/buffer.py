"""Collects writes and says when which of them go out as one bulk upsert. Sans I/O: no clock, no
sockets, no callbacks. `serve.index.writer` drives it: `offer`, `due`, `ack` or `nack`, `finished`.

Its memory is a cache: whoever offered a write owns it until the outcome is there. Each write gets
a ticket, and each ticket exactly one outcome:

    landed      the index returned (a bulk upsert or delete that held it)
    rejected    the index refuses it for good, alone in its batch
    superseded  a write of higher generation on the same id is here, or the Store knows of one
    released    given back: its deadline passed while it was not in flight, shutdown, drop
"""

import random
from collections.abc import Iterable, Sequence
from heapq import heapify, heappop, heappush
from typing import Any

from serve.config import Buffer as BufferSettings
from serve.errors import Overloaded, TooLarge
from serve.index.errors import (
    BatchTooLarge,
    IndexFault,
    IndexOffline,
    IndexRetryable,
    RecordsRejected,
)
from serve.index.lanes import Batch, Entry, Lane, Part, size_bytes
from serve.index.probes import token_of
from serve.ports import Capabilities, Landed
from serve.records import Outcome, Write


AGE_FACTOR = 1.5
FILL_HIGH = 0.5
FILL_LOW = 0.1
BACKOFF_S = 0.2
TRIES_COUNTED = 16
RATE_WEIGHT = 0.2
RETRY_AFTER_S_MIN = 0.1
RETRY_AFTER_S_UNKNOWN = 1.0

SUPERSEDED = Outcome("superseded")
RELEASED = Outcome("released")


class Buffer:
    """Lanes of writes, one lane per namespace. Bounds: writes, bytes, lanes (settings)."""

    def __init__(self, settings: BufferSettings, caps: Capabilities, rng: random.Random) -> None:
        self._settings = settings
        self._caps = caps
        self._rng = rng
        self._lanes: dict[str, Lane] = {}
        self._open: dict[int, tuple[Lane, Entry]] = {}
        self._finished: list[tuple[int, Outcome]] = []
        self._due: list[tuple[float, int, str]] = []
        self._deadlines: list[tuple[float, int, int]] = []
        self._bytes = 0
        self._flights = 0
        self._next_ticket = 0
        self._next_number = 0
        self._paused_until = 0.0
        self._hurry = False
        self._writes_s = 0.0
        self._counts = dict.fromkeys(
            ("flushes", "retried", "landed", "rejected", "superseded", "released"), 0
        )

    @property
    def depth(self) -> int:
        """Tickets without an outcome."""
        return len(self._open)

    def offer(self, ns: str, writes: Sequence[Write], now: float, deadline: float) -> range:
        """Take writes in; their tickets, in order.

        Raises Overloaded (nothing was taken) past a bound, TooLarge when they could never fit.
        """
        sizes = [size_bytes(write) for write in writes]
        self._check_room(ns, len(sizes), sum(sizes), now)
        first = self._next_ticket
        self._next_ticket += len(sizes)
        tickets = range(first, self._next_ticket)
        if not tickets:
            return tickets
        lane = self._lanes.get(ns)
        if lane is None:
            lane = self._lanes[ns] = Lane(ns, self._settings.age_s_start)
        for ticket, write, size in zip(tickets, writes, sizes, strict=True):
            if lane.closing:
                self._finish(ticket, RELEASED)
            else:
                self._put(lane, Entry(write, size, now, ticket, {ticket: deadline}), ticket)
        heappush(self._deadlines, (deadline, first, self._next_ticket))
        self._touch(lane)
        return tickets

    def due(self, now: float) -> list[Batch]:
        """Batches to flush now; each is in flight until `ack` or `nack`."""
        self._expire(now)
        batches: list[Batch] = []
        while now >= self._paused_until and self._flights < self._settings.flushes_max:
            if not self._due or self._due[0][0] > now:
                break
            due, _, ns = heappop(self._due)
            lane = self._lanes.get(ns)
            if lane is None or lane.scheduled != due:
                continue  # the lane was scheduled anew since
            lane.scheduled = None
            ready_at = self._due_at(lane)
            if ready_at is not None and ready_at <= now:
                batches.append(self._take(lane, now))
            self._touch(lane)
        return batches

    def next_due(self, now: float) -> float | None:
        """When to call `due` again at the latest; None: not before the next offer, ack or nack."""
        times = [self._deadlines[0][0]] if self._deadlines else []
        if self._due and self._flights < self._settings.flushes_max:
            times.append(max(self._due[0][0], self._paused_until))
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
        return Batch(batch.number, batch.ns, left)

    def ack(self, batch: Batch, landed: Landed, now: float) -> None:
        """The index returned: all of the batch landed but what it rejected."""
        lane, part = self._land(batch)
        if lane is None or part is None:
            return
        self._counts["flushes"] += 1
        if part.entries:
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
        lane, part = self._land(batch)
        if lane is None or part is None:
            return
        for entry in part.entries:
            self._release_late(lane, entry, now)
        part.entries = [entry for entry in part.entries if entry.tickets]
        if lane.closing:
            self._release(lane)
        elif isinstance(error, RecordsRejected | BatchTooLarge):
            self._bisect(lane, part, str(error) or type(error).__name__, now)
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
        self._hurry = True
        for lane in list(self._lanes.values()):
            self._touch(lane)

    def release_all(self) -> None:
        """Give everything back, also what is in flight: its late `ack` or `nack` is ignored."""
        for lane in list(self._lanes.values()):
            for entry in lane.entries():
                self._answer(lane, entry, RELEASED)
        self._lanes.clear()
        self._due.clear()
        self._deadlines.clear()
        self._flights = 0

    def stats(self, now: float) -> dict[str, Any]:
        """Gauges (depth, bytes, oldest_age_s, lanes, in_flight, paused) and counters."""
        oldest = [since for lane in self._lanes.values() if (since := lane.oldest()) is not None]
        return {
            "depth": self.depth,
            "bytes": self._bytes,
            "oldest_age_s": max(0.0, now - min(oldest)) if oldest else 0.0,
            "lanes": len(self._lanes),
            "in_flight": self._flights,
            "paused": now < self._paused_until,
            **self._counts,
        }

    # Taking in

    def _check_room(self, ns: str, count: int, size: int, now: float) -> None:
        settings = self._settings
        if count > settings.writes_max or size > settings.bytes_max:
            raise TooLarge("These writes exceed the whole write buffer; offer them in parts.")
        new_lane = ns not in self._lanes
        if (
            self.depth + count > settings.writes_max
            or self._bytes + size > settings.bytes_max
            or (new_lane and len(self._lanes) >= settings.lanes_max)
        ):
            wait_s = self._wait_s(count, now)
            raise Overloaded("The write buffer is full.", retry_after_s=wait_s)

    def _wait_s(self, count: int, now: float) -> float:
        """How long it takes to land what stands in the way, at the rate seen lately."""
        excess = max(count, self.depth + count - self._settings.writes_max)
        known = self._writes_s > 0
        wait_s = excess / self._writes_s if known else RETRY_AFTER_S_UNKNOWN
        return max(wait_s, self._paused_until - now, RETRY_AFTER_S_MIN)

    def _put(self, lane: Lane, entry: Entry, ticket: int) -> None:
        before = lane.bytes_held
        home, losers = lane.put(entry)
        self._bytes += lane.bytes_held - before
        for loser in losers:
            del self._open[loser]
            self._finish(loser, SUPERSEDED)
        if home is None:
            self._finish(ticket, SUPERSEDED)
        else:
            self._open[ticket] = (lane, home)

    # Sending

    def _due_at(self, lane: Lane) -> float | None:
        return lane.due_at(
            count=max(1, int(self._settings.count_fill * self._caps.max_items)),
            size_bytes=self._bytes_full,
            hurry=self._hurry,
        )

    @property
    def _bytes_full(self) -> int:
        return int(self._settings.bytes_fill * self._caps.max_bytes)

    def _take(self, lane: Lane, now: float) -> Batch:
        self._next_number += 1
        self._flights += 1
        items_max, bytes_max = self._caps.max_items, self._bytes_full
        return lane.take(now, self._next_number, items_max=items_max, bytes_max=bytes_max)

    def _touch(self, lane: Lane) -> None:
        """After any change of a lane: give the verdicts it withheld, schedule or forget it."""
        for entry, reason in lane.verdicts():
            self._answer(lane, entry, Outcome("rejected", reason))
        if lane.empty and lane.flying is None:
            self._lanes.pop(lane.ns, None)
            return
        due = self._due_at(lane)
        if due is not None and (lane.scheduled is None or due < lane.scheduled):
            lane.scheduled = due
            self._next_number += 1
            heappush(self._due, (due, self._next_number, lane.ns))

    # Coming back

    def _land(self, batch: Batch) -> tuple[Lane | None, Part | None]:
        lane = self._lanes.get(batch.ns)
        part = lane.land(batch.number) if lane is not None else None
        if part is not None:
            self._flights -= 1
        return lane, part

    def _learn(self, lane: Lane, part: Part, now: float) -> None:
        size = sum(entry.bytes for entry in part.entries)
        fill = max(len(part.entries) / self._caps.max_items, size / self._caps.max_bytes)
        if fill > FILL_HIGH:
            self._age(lane, AGE_FACTOR)
        elif fill < FILL_LOW:
            self._age(lane, 1 / AGE_FACTOR)
        took_s = max(now - lane.sent_at, 0.001)
        rate = len(part.entries) / took_s * self._settings.flushes_max
        self._writes_s += RATE_WEIGHT * (rate - self._writes_s) if self._writes_s else rate

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
            self._paused_until = max(self._paused_until, now + settings.pause_s)
            part.due = now
        else:
            part.tries = min(part.tries + 1, TRIES_COUNTED)
            wait_s_max = min(settings.retry_s_max, BACKOFF_S * 2**part.tries)
            part.due = now + max(error.retry_after_s, self._rng.uniform(0, wait_s_max))
            self._age(lane, AGE_FACTOR)
        lane.parts.appendleft(part)

    def _bisect(self, lane: Lane, part: Part, reason: str, now: float) -> None:
        """About 2·log2(n) requests find one poison record in n. Verdicts are withheld until the
        batch is through: when more than the cap is refused it was no poison but a mistake (schema,
        dimension). Then all of it is kept, the lane pauses, and two halves are tried on their own,
        so that a small batch with two poisons gets through in the end.
        """
        origin, entries = part.origin, part.entries
        if len(entries) > 1:
            half = len(entries) // 2
            lane.again(entries[half:], now, origin)
            lane.again(entries[:half], now, origin)
            return
        origin.refused += [(entry, reason) for entry in entries]
        lane.suspect = origin
        if len(origin.refused) > max(1, int(self._settings.poison_share_max * origin.size)):
            lane.suspect = None
            left = lane.unite(origin)
            half = max(1, len(left) // 2)
            lane.again(left[half:], now)
            lane.again(left[:half], now)
            lane.paused_until = now + self._settings.pause_s

    # Outcomes

    def _finish(self, ticket: int, outcome: Outcome) -> None:
        self._counts[outcome.word] += 1
        self._finished.append((ticket, outcome))

    def _answer(self, lane: Lane, entry: Entry, outcome: Outcome) -> None:
        """The outcome of an entry, to every ticket on it."""
        for ticket in entry.tickets:
            del self._open[ticket]
            self._finish(ticket, outcome)
        entry.tickets = {}
        before = lane.bytes_held
        lane.discard(entry)
        self._bytes += lane.bytes_held - before

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
