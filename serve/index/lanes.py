"""One lane: the writes of one namespace on their way into the index. No I/O and no clock.

A lane has at most one batch in flight. That alone keeps the order per id, lets writes gather while
a flush runs, and suits a store that commits per call. A write passes through these places:

    waiting (`records`, `tombstones`: one write per id and kind) -> `flying` -> answered
                                                      ^  |
                                                      |  v   refused or failed
                                                      `parts`: they go out again before what waits

Last write wins, per id, by generation:

- A record is outranked by any operation of higher generation on its id.
- A tombstone is outranked only by another tombstone: it must run even when a newer record waits,
  or an old chunk would stay should that record be refused. It then goes out before the record.
- Equal generations are repeats of one write: the later replaces the earlier while it waits, and
  both callers get the later's outcome.
"""

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain

from serve.pressure import Sender
from serve.records import Record, Tombstone, Write


WRITE_BYTES = 128
"""Ids, generation and framing of one write."""


@dataclass(slots=True, eq=False)
class Entry:
    """A write that waits for its outcome, and who asked: `tickets` maps ticket to deadline."""

    write: Write
    bytes: int
    since: float
    seq: int
    tickets: dict[int, float]
    flying: bool = False


@dataclass(slots=True, eq=False)
class Origin:
    """The batch that parts were cut from: the cap on poison counts against its size."""

    size: int
    refused: list[tuple[Entry, str]] = field(default_factory=list)


@dataclass(slots=True, eq=False)
class Part:
    """Entries that were sent before and go out again, alone, at `due`."""

    entries: list[Entry]
    origin: Origin
    due: float
    tries: int = 0


@dataclass(frozen=True, slots=True)
class Batch:
    """What one flush carries: only records, or only tombstones; every id once.

    `number` names it to `ack` and `nack`. `bytes` is the estimate it was charged at.
    """

    number: int
    ns: str
    writes: tuple[Write, ...]
    bytes: int

    @property
    def records(self) -> tuple[Record, ...]:
        """The records of it (all writes, or none)."""
        return tuple(write for write in self.writes if isinstance(write, Record))

    @property
    def tombstones(self) -> tuple[Tombstone, ...]:
        """The tombstones of it (all writes, or none)."""
        return tuple(write for write in self.writes if isinstance(write, Tombstone))


class Lane:
    """Writes of one namespace, all of one tenant."""

    def __init__(self, ns: str, sender: Sender, age_s: float) -> None:
        self.ns = ns
        self.tenant = sender.tenant
        self.weight = sender.weight
        self.age_s = age_s
        self.records: dict[str, Entry] = {}
        self.tombstones: dict[str, Entry] = {}
        self.busy: dict[str, Entry] = {}
        self.parts: deque[Part] = deque()
        self.flying: Part | None = None
        self.suspect: Origin | None = None
        self.number = 0
        self.sent_at = 0.0
        self.served_at: float | None = None
        self.paused_until = 0.0
        self.scheduled: float | None = None
        self.closing = False
        self.bytes_waiting = 0
        self.bytes_busy = 0

    @property
    def empty(self) -> bool:
        """Nothing waits, nothing is in flight."""
        return not (self.records or self.tombstones or self.busy)

    @property
    def bytes_held(self) -> int:
        """Estimated bytes of all it holds."""
        return self.bytes_waiting + self.bytes_busy

    def put(self, entry: Entry) -> tuple[Entry | None, list[int]]:
        """Place a write.

        Returns the entry that now holds its tickets (None: it is outranked) and the tickets of
        those it outranks.
        """
        if self._outranked(entry.write):
            return None, []
        losers: list[int] = []
        queue = self._queue(entry.write)
        home = queue.get(entry.write.id)
        if home is None:
            home = queue[entry.write.id] = entry
            self.bytes_waiting += entry.bytes
        else:
            self._replace(home, entry, losers)
        if isinstance(entry.write, Tombstone):
            self._outrank_record(entry.write, losers)
        return home, losers

    def _outranked(self, write: Write) -> bool:
        rivals: list[Entry | None] = [self.busy.get(write.id), self.tombstones.get(write.id)]
        if isinstance(write, Record):
            rivals.append(self.records.get(write.id))
        return any(
            rival.write.generation > write.generation
            for rival in rivals
            if rival is not None
            if isinstance(write, Record) or isinstance(rival.write, Tombstone)
        )

    def _replace(self, home: Entry, entry: Entry, losers: list[int]) -> None:
        # The place and age of the earlier one are kept: rewriting an id must not starve it.
        if home.write.generation < entry.write.generation:
            losers += home.tickets
            home.tickets = {}
        home.tickets |= entry.tickets
        self.bytes_waiting += entry.bytes - home.bytes
        home.write, home.bytes = entry.write, entry.bytes

    def _outrank_record(self, tombstone: Tombstone, losers: list[int]) -> None:
        record = self.records.get(tombstone.id)
        if record is not None and record.write.generation <= tombstone.generation:
            losers += record.tickets
            self.discard(record)

    def discard(self, entry: Entry) -> None:
        """Forget an entry that has been answered."""
        record_id = entry.write.id
        if self.busy.get(record_id) is entry:
            del self.busy[record_id]
            self.bytes_busy -= entry.bytes
        elif (queue := self._queue(entry.write)).get(record_id) is entry:
            del queue[record_id]
            self.bytes_waiting -= entry.bytes

    def entries(self) -> Iterator[Entry]:
        """Everything it holds, in flight included."""
        held = (self.busy, self.tombstones, self.records)
        return chain.from_iterable(list(queue.values()) for queue in held)

    def oldest(self) -> float | None:
        """When the oldest of what it holds was offered."""
        heads = (next(iter(queue.values()), None) for queue in self._queues())
        return min((head.since for head in heads if head is not None), default=None)

    def due_at(self, *, count: int, size_bytes: int, hurry: bool) -> float | None:
        """When its next batch may go out; None while one is in flight or nothing waits.

        `count` and `size_bytes` are what makes it full. Between lanes of one tenant, `served_at` makes
        this round robin: a lane with a backlog queues again behind those that were due since.
        """
        if self.flying is not None or self.empty:
            return None
        self._prune()
        if self.parts:
            return max(self.parts[0].due, self.paused_until)
        if not (self.records or self.tombstones):
            return None
        first = self._head().since
        full = len(self.records) + len(self.tombstones) >= count or self.bytes_waiting >= size_bytes
        idle = self.served_at is None
        due = first if full or idle or hurry else first + self.age_s
        return max(due, self.paused_until, self.served_at or due)

    def ahead(self, bytes_max: int) -> tuple[type[Write], int]:
        """Whether its next batch holds records or tombstones, and of about how many bytes at most."""
        if self.parts:
            entries = self.parts[0].entries
            return type(entries[0].write), sum(entry.bytes for entry in entries)
        kind: type[Write] = Record if self._records_are_next() else Tombstone
        return kind, min(self.bytes_waiting, bytes_max)

    def take(self, now: float, number: int, *, items_max: int, bytes_max: int) -> Batch:
        """The next batch, now in flight. Call it only when the lane is due."""
        self._prune()
        if self.parts:
            part = self.parts.popleft()
        else:
            entries = self._cut(items_max, bytes_max)
            part = Part(entries, Origin(len(entries)), now)
        for entry in part.entries:
            entry.flying = True
        self.flying, self.number = part, number
        self.sent_at = self.served_at = now
        size = sum(entry.bytes for entry in part.entries)
        return Batch(number, self.ns, tuple(entry.write for entry in part.entries), size)

    def land(self, number: int) -> Part | None:
        """Take the batch in flight back, whatever became of it; None when it is not this one."""
        part = self.flying
        if part is None or self.number != number:
            return None
        self.flying = None
        for entry in part.entries:
            entry.flying = False
        return part

    def again(self, entries: list[Entry], due: float, origin: Origin | None = None) -> None:
        """Send entries again before everything else: as one batch of their own, unless `origin`
        says which batch they are a part of.
        """
        if entries:
            self.parts.appendleft(Part(entries, origin or Origin(len(entries)), due))

    def bisect(
        self, part: Part, reason: str, now: float, *, share_max: float, pause_s: float
    ) -> None:
        """Send a refused part again in halves: about 2·log2(n) requests find one poison record in n.

        Verdicts are withheld until the batch is through: when more than `share_max` of it is refused it
        was no poison but a mistake (schema, dimension). Then all of it is kept, the lane pauses, and two
        halves are tried on their own, so that a small batch with two poisons gets through in the end.
        """
        origin, entries = part.origin, part.entries
        if len(entries) > 1:
            half = len(entries) // 2
            self.again(entries[half:], now, origin)
            self.again(entries[:half], now, origin)
            return
        origin.refused += [(entry, reason) for entry in entries]
        self.suspect = origin
        if len(origin.refused) > max(1, int(share_max * origin.size)):
            self.suspect = None
            left = self._unite(origin)
            half = max(1, len(left) // 2)
            self.again(left[half:], now)
            self.again(left[:half], now)
            self.paused_until = now + pause_s

    def _unite(self, origin: Origin) -> list[Entry]:
        """Take back what is left of a batch, refused entries included, in the order offered."""
        entries = [entry for entry, _ in origin.refused]
        entries += [e for part in self.parts if part.origin is origin for e in part.entries]
        self.parts = deque(part for part in self.parts if part.origin is not origin)
        return sorted((entry for entry in entries if entry.tickets), key=lambda entry: entry.seq)

    def verdicts(self) -> list[tuple[Entry, str]]:
        """The refused of a batch that was sent to its last part; they were withheld until now."""
        self._prune()
        suspect = self.suspect
        if suspect is None or self.flying is not None:
            return []
        if any(part.origin is suspect for part in self.parts):
            return []
        self.suspect = None
        return [(entry, reason) for entry, reason in suspect.refused if entry.tickets]

    def _prune(self) -> None:
        # Entries whose tickets are all answered (deadline) are not sent again.
        for part in self.parts:
            part.entries = [entry for entry in part.entries if entry.tickets]
        self.parts = deque(part for part in self.parts if part.entries)

    def _queue(self, write: Write) -> dict[str, Entry]:
        return self.records if isinstance(write, Record) else self.tombstones

    def _queues(self) -> tuple[dict[str, Entry], ...]:
        return self.busy, self.tombstones, self.records

    def _head(self) -> Entry:
        heads = (next(iter(queue.values()), None) for queue in (self.tombstones, self.records))
        return min((head for head in heads if head is not None), key=lambda head: head.seq)

    def _records_are_next(self) -> bool:
        # A record behind a tombstone of its id waits for it; if all do, the tombstones go first.
        return isinstance(self._head().write, Record) and any(self._free())

    def _free(self) -> Iterator[Entry]:
        return (entry for key, entry in self.records.items() if key not in self.tombstones)

    def _cut(self, items_max: int, bytes_max: int) -> list[Entry]:
        source = self._free() if self._records_are_next() else self.tombstones.values()
        entries = _fill(source, items_max, bytes_max)
        for entry in entries:
            self._queue(entry.write).pop(entry.write.id)
            self.busy[entry.write.id] = entry
            self.bytes_waiting -= entry.bytes
            self.bytes_busy += entry.bytes
        return entries


def _fill(entries: Iterable[Entry], items_max: int, bytes_max: int) -> list[Entry]:
    """As many as fit, at least one."""
    taken: list[Entry] = []
    size = 0
    for entry in entries:
        size += entry.bytes
        if taken and (len(taken) >= items_max or size > bytes_max):
            break
        taken.append(entry)
    return taken


def size_bytes(write: Write) -> int:
    """Estimate of a write's size on the wire."""
    size = WRITE_BYTES + len(write.document)
    if isinstance(write, Record):
        size += write.vector.nbytes + len(write.text.encode("utf-8", "replace"))
        size += _value_bytes(list(write.metadata.items()))
    return size


def _value_bytes(value: object) -> int:
    if isinstance(value, str):
        return len(value.encode("utf-8", "replace")) + 2
    if isinstance(value, list | tuple):
        return sum(_value_bytes(item) for item in value) + 2
    return 8
