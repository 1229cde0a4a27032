"""The buffer against a model: nothing lost, nothing twice, bounds and rates hold, the newest write wins.

What it owes to tenants is in test_buffer_fairness.py.
"""

import random
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from serve.capabilities import Capabilities, Rates
from serve.config import Buffer as BufferSettings
from serve.errors import Overloaded
from serve.index.buffer import Buffer
from serve.index.errors import BatchTooLarge, IndexOffline, IndexRetryable, RecordsRejected
from serve.index.lanes import Batch
from serve.index.pace import BURST_S
from serve.ports import Landed
from serve.pressure import Sender
from serve.records import Outcome, Record, Tombstone, Write


SETTINGS = BufferSettings(
    writes_max=40,
    tenant_writes_max=25,
    lanes_max=3,
    flushes_max=3,
    flushes_s=5,
    pause_s=3,
)
UPSERTS, DELETES = Rates(requests_s=3, bytes_s=2000), Rates(requests_s=2)
CAPS = Capabilities(
    max_items=6,
    max_bytes=2000,
    max_dim=8,
    max_top_k=10,
    consistency="strong",
    single_writer=True,
    upserts=UPSERTS,
    deletes=DELETES,
)
ANN, BOB = Sender("ann", 1.0), Sender("bob", 4.0)
SENDERS = {"a": ANN, "b": ANN, "c": BOB, "d": BOB}
SPACES = tuple(SENDERS)
VECTOR = np.ones(2, np.float32)
Key = tuple[str, str]


@dataclass
class Asked:
    """A write the model offered; `key` is (namespace, id)."""

    key: Key
    write: Write
    deadline: float
    poison: bool


def kind(write: Write) -> type:
    return type(write)


@st.composite
def writes(draw: st.DrawFn) -> list[tuple[str, int, str]]:
    one = st.tuples(
        st.sampled_from("uvwxyz"),
        st.integers(1, 4),
        st.sampled_from(("record", "record", "record", "poison", "tombstone")),
    )
    return draw(st.lists(one, max_size=9))


class BufferMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.now = 100.0
        self.buffer = Buffer(SETTINGS, CAPS, random.Random(1))  # noqa: S311
        self.asked: dict[int, Asked] = {}
        self.open: set[int] = set()
        self.outcomes: dict[int, Outcome] = {}
        self.ended: dict[int, int] = {}
        self.flying: list[Batch] = []
        self.sent: set[str] = set()
        self.index: dict[Key, int] = {}
        self.applied: list[tuple[Key, Write]] = []
        self.refused: set[tuple[Key, int]] = set()
        self.outdated: set[tuple[Key, int]] = set()
        self.dropped: set[str] = set()
        self.made = 0
        self.flushed: list[tuple[float, Batch]] = []
        self.offline = False

    # What a driver does

    @rule(ns=st.sampled_from(SPACES), wanted=writes(), ttl=st.sampled_from((0.5, 20.0, 500.0)))
    def offer(self, ns: str, wanted: list[tuple[str, int, str]], ttl: float) -> None:
        batch = [self._make(*one) for one in wanted]
        before = self.buffer.stats(self.now)
        try:
            tickets = self.buffer.offer(SENDERS[ns], ns, batch, self.now, self.now + ttl)
        except Overloaded as error:
            assert self.buffer.stats(self.now) == before
            self._check_refusal(error, ns, len(batch))
            return
        assert len(tickets) == len(batch)
        for ticket, write, one in zip(tickets, batch, wanted, strict=True):
            assert ticket not in self.asked
            asked = Asked((ns, write.id), write, self.now + ttl, one[2] == "poison")
            self.asked[ticket] = asked
            self.open.add(ticket)
        self._collect()

    def _check_refusal(self, error: Overloaded, ns: str, count: int) -> None:
        """It names the bound that this would have passed."""
        assert error.retry_after_s is not None
        assert error.retry_after_s > 0
        if "tenant_writes_max" in error.message:
            assert self._held(SENDERS[ns]) + count > SETTINGS.tenant_writes_max
        elif "buffer.writes_max" in error.message:
            assert len(self.open) + count > SETTINGS.writes_max
        else:
            assert "lanes_max" in error.message
            assert self.buffer.stats(self.now)["lanes"] == SETTINGS.lanes_max

    def _held(self, sender: Sender) -> int:
        return sum(SENDERS[self.asked[ticket].key[0]] is sender for ticket in self.open)

    def _make(self, name: str, generation: int, word: str) -> Write:
        self.made += 1
        if word == "tombstone":
            return Tombstone(name, f"d{self.made}", generation)
        return Record(name, f"d{self.made}", generation, 0, VECTOR, text=word)

    @rule(seconds=st.sampled_from((0.0, 0.03, 0.3, 4.0, 30.0)))
    def pass_time(self, seconds: float) -> None:
        self.now += seconds
        self._send()

    def _send(self) -> None:
        batches = self.buffer.due(self.now)
        self._collect()  # what was too late has left before they went
        for batch in batches:
            ids = [write.id for write in batch.writes]
            assert len(set(ids)) == len(ids)
            assert 1 <= len(ids) <= CAPS.max_items
            assert len({kind(write) for write in batch.writes}) == 1
            assert batch.ns not in {other.ns for other in self.flying}
            self._check_order(batch)
            self.flying.append(batch)
            self.flushed.append((self.now, batch))
            assert len(self.flying) <= self.buffer.stats(self.now)["window"]
            self._check_rates(batch)

    def _check_rates(self, batch: Batch) -> None:
        """In no period does more go out than the burst and what its length allows, and one request."""
        self._check_rate([*self.flushed], SETTINGS.flushes_s, 1.0)
        alike = [
            (at, one)
            for at, one in self.flushed
            if one.ns == batch.ns
            if kind(one.writes[0]) is kind(batch.writes[0])
        ]
        rates = UPSERTS if batch.records else DELETES
        self._check_rate(alike, rates.requests_s, 1.0)
        if batch.records:
            self._check_rate(alike, rates.bytes_s, None)

    def _check_rate(self, sent: list[tuple[float, Batch]], rate: float, each: float | None) -> None:
        total = largest = 0.0
        for at, one in reversed(sent):
            amount = each or one.bytes
            total, largest = total + amount, max(largest, amount)
            assert total <= rate * (BURST_S + self.now - at) + largest + 1e-6

    def _check_order(self, batch: Batch) -> None:
        """A record's first flight comes after the tombstones of its id that were there before."""
        for record in batch.records:
            if record.document not in self.sent:
                waiting = [
                    ticket
                    for ticket in self.open
                    if self.asked[ticket].key == (batch.ns, record.id)
                    if isinstance(self.asked[ticket].write, Tombstone)
                ]
                assert not waiting
            self.sent.add(record.document)

    @precondition(lambda self: self.flying)
    @rule(data=st.data(), picky=st.booleans())
    def flush(self, data: st.DataObject, picky: bool) -> None:
        """The index takes a batch, refuses it as a whole, or names what it refuses."""
        self._flush(self._pick(data), picky)

    def _flush(self, batch: Batch, picky: bool) -> None:
        self.flying.remove(batch)
        self.offline = False
        poison = [record for record in batch.records if record.text == "poison"]
        if poison and not picky:
            error = RecordsRejected("no") if len(batch.writes) % 2 else BatchTooLarge("no")
            self.buffer.nack(batch, error, self.now)
        else:
            refused = {record.id for record in poison}
            self._apply(batch, refused)
            pairs = tuple((record_id, "named") for record_id in sorted(refused))
            if len(batch.writes) % 2:
                self.buffer.ack(batch, Landed(rejected=pairs), self.now)
            else:
                self.buffer.nack(batch, RecordsRejected(pairs=pairs), self.now)
        self._collect()

    @precondition(lambda self: self.flying)
    @rule(data=st.data(), applied=st.booleans(), word=st.sampled_from(("busy", "other", "offline")))
    def fail(self, data: st.DataObject, applied: bool, word: str) -> None:
        """The answer is lost; the work may have been done all the same."""
        batch = self._pick(data)
        self.flying.remove(batch)
        if applied:
            self._apply(batch, {record.id for record in batch.records if record.text == "poison"})
        before = self.buffer.stats(self.now)["window"]
        if word == "offline":
            self.buffer.nack(batch, IndexOffline("off"), self.now)
            self.offline = True
        else:
            error = IndexRetryable("no", retry_after_s=1, busy=word == "busy")
            self.buffer.nack(batch, error, self.now)
        after = self.buffer.stats(self.now)["window"]
        assert after == before or (word == "busy" and after == max(1, before // 2))
        self._collect()

    @precondition(lambda self: self.flying)
    @rule(data=st.data())
    def supersede(self, data: st.DataObject) -> None:
        batch = self._pick(data)
        ids = data.draw(st.sets(st.sampled_from([write.id for write in batch.writes])))
        left = self.buffer.supersede(batch, ids)
        gone = [write for write in batch.writes if write.id in ids]
        self.outdated |= {((batch.ns, write.id), write.generation) for write in gone}
        assert [write for write in batch.writes if write.id not in ids] == list(left.writes)
        self.flying.remove(batch)
        if left.writes:
            self.flying.append(left)
        else:
            self.buffer.ack(left, Landed(), self.now)
        self._collect()

    @rule(ns=st.sampled_from(SPACES))
    def drop(self, ns: str) -> None:
        self.buffer.drop(ns)
        self.dropped.add(ns)
        self._collect()
        in_flight = {batch.ns for batch in self.flying}
        waiting = [ticket for ticket in self.open if self.asked[ticket].key[0] == ns]
        assert ns in in_flight or not waiting

    def _pick(self, data: st.DataObject) -> Batch:
        return self.flying[data.draw(st.integers(0, len(self.flying) - 1))]

    def _apply(self, batch: Batch, refused: set[str]) -> None:
        for write in batch.writes:
            key = (batch.ns, write.id)
            if write.id in refused:
                self.refused.add((key, write.generation))
                continue
            held = self.index.get(key, -1)
            if held <= write.generation:
                self.index.pop(key, None)
                if isinstance(write, Record):
                    self.index[key] = write.generation
            self.applied.append((key, write))

    # What must hold

    def _collect(self) -> None:
        for ticket, outcome in self.buffer.finished():
            assert ticket in self.open, "an outcome twice, or for nobody"
            self.open.remove(ticket)
            self.outcomes[ticket] = outcome
            self.ended[ticket] = max(self.asked)
            self._check(ticket, outcome)

    def _check(self, ticket: int, outcome: Outcome) -> None:
        asked = self.asked[ticket]
        write, twin = asked.write, (asked.key, asked.write.generation)
        if outcome.word == "landed":
            assert any(
                key == asked.key
                and done.generation == write.generation
                and kind(done) is kind(write)
                for key, done in self.applied
            )
        elif outcome.word == "rejected":
            assert outcome.reason
            assert any(
                other.poison and (other.key, other.write.generation) == twin
                for other in self.asked.values()
            )
        elif outcome.word == "superseded":
            assert twin in self.outdated or self._outranked(ticket)
        else:
            assert asked.deadline <= self.now or asked.key[0] in self.dropped

    def _outranked(self, ticket: int) -> bool:
        asked = self.asked[ticket]
        return any(
            other.write.generation > asked.write.generation
            or (
                other.write.generation == asked.write.generation
                and kind(other.write) is not kind(asked.write)
            )
            for number, other in self.asked.items()
            if number != ticket
            if other.key == asked.key
        )

    @invariant()
    def bounds_hold(self) -> None:
        stats = self.buffer.stats(self.now)
        assert stats["depth"] == len(self.open) <= SETTINGS.writes_max
        held = {self.asked[ticket].key[0] for ticket in self.open}
        assert stats["lanes"] == len(held | {batch.ns for batch in self.flying})
        assert stats["lanes"] <= SETTINGS.lanes_max
        assert 0 <= stats["bytes"] <= SETTINGS.bytes_max
        assert (stats["bytes"] > 0) == (stats["depth"] > 0)
        assert stats["in_flight"] == len(self.flying)
        assert 1 <= stats["window"] <= SETTINGS.flushes_max
        assert stats["tenants"] == len({SENDERS[ns] for ns in held})
        for sender in (ANN, BOB):
            assert self._held(sender) <= SETTINGS.tenant_writes_max

    @invariant()
    def whoever_asks_is_told_to_wait_before_a_bound(self) -> None:
        pressure = self.buffer.pressure(self.now)
        paused = self.buffer.stats(self.now)["paused"]
        assert pressure.paused == bool(paused or (self.offline and self.open))
        full = len(self.open) >= SETTINGS.soft_fill * SETTINGS.writes_max
        assert (pressure.wait_s > 0) == (full or pressure.paused)
        soft = SETTINGS.soft_fill * SETTINGS.tenant_writes_max
        crowded = {one.tenant for one in (ANN, BOB) if self._held(one) >= soft}
        assert set(pressure.tenants) == crowded
        assert all(wait_s > 0 for wait_s in pressure.tenants.values())

    def teardown(self) -> None:
        """With a healthy index every ticket is answered, woken by `next_due` alone."""
        for _ in range(3000):
            for batch in list(self.flying):
                self._flush(batch, picky=False)
            due = self.buffer.next_due(self.now)
            if due is None and not self.flying:
                break
            self.now = self.now if due is None else max(self.now, due)
            self._send()
        self.bounds_hold()
        assert not self.open
        assert set(self.outcomes) == set(self.asked)
        self._check_newest()

    def _check_newest(self) -> None:
        for ticket, outcome in self.outcomes.items():
            if outcome.word != "landed":
                continue
            asked = self.asked[ticket]
            held, generation = self.index.get(asked.key), asked.write.generation
            removed = [
                done.generation
                for key, done in self.applied
                if key == asked.key
                if isinstance(done, Tombstone)
            ]
            if isinstance(asked.write, Record):
                assert (held is not None and held >= generation) or max(removed) >= generation
            else:
                late = self._came_back(ticket)
                assert held is None or held > generation or late or self._outranked(ticket)

    def _came_back(self, ticket: int) -> bool:
        """Whether its id was offered again later: of what it removed only the Store knows then."""
        key = self.asked[ticket].key
        return any(
            other.key == key for number, other in self.asked.items() if number > self.ended[ticket]
        )


BufferMachine.TestCase.settings = settings(
    max_examples=120, stateful_step_count=40, deadline=None, derandomize=True
)
TestBufferMachine = BufferMachine.TestCase


def test_a_poison_record_costs_few_requests_and_its_neighbours_land(rng: random.Random) -> None:
    caps = Capabilities(
        max_items=100,
        max_bytes=10**9,
        max_dim=8,
        max_top_k=10,
        consistency="strong",
        single_writer=True,
    )
    for bad in (0, 37, 99):
        buffer = Buffer(BufferSettings(), caps, rng)
        records = [Record(f"r{i}", "d", 1, i, VECTOR) for i in range(100)]
        buffer.offer(ANN, "a", records, 0.0, 100.0)
        requests = 0
        while batches := buffer.due(1.0):
            requests += 1
            if any(write.id == f"r{bad}" for write in batches[0].writes):
                buffer.nack(batches[0], RecordsRejected("no"), 1.0)
            else:
                buffer.ack(batches[0], Landed(), 1.0)
        words = [outcome.word for _, outcome in buffer.finished()]
        assert (words.count("landed"), words.count("rejected")) == (99, 1)
        assert requests <= 15  # 2·log2(100) and the first


@pytest.mark.parametrize(("share", "deadline_s"), [(0.3, 300.0), (1.0, 60.0)])
def test_a_refused_batch_never_becomes_a_mass_of_rejections(
    share: float, deadline_s: float, rng: random.Random
) -> None:
    buffer = Buffer(BufferSettings(pause_s=5), CAPS_WIDE, rng)
    records = [Record(f"r{i:03}", "d", 1, i, VECTOR) for i in range(100)]
    bad = {record.id for record in records[:: round(1 / share)]}
    buffer.offer(ANN, "a", records, 0.0, deadline_s)
    now, words = 0.0, []
    while (due := buffer.next_due(now)) is not None:
        now = due
        for batch in buffer.due(now):
            if any(write.id in bad for write in batch.writes):
                buffer.nack(batch, RecordsRejected("schema"), now)
            else:
                buffer.ack(batch, Landed(), now)
        words += [outcome.word for _, outcome in buffer.finished()]
    assert len(words) == 100
    if share == 1.0:
        # One mistake refuses all: within a minute of pauses hardly any is called poison.
        assert words.count("rejected") <= 20
    else:
        # Halves with few poisons get through, so that in time every good record lands.
        assert words.count("landed") == 100 - len(bad)


CAPS_WIDE = Capabilities(
    max_items=100,
    max_bytes=10**9,
    max_dim=8,
    max_top_k=10,
    consistency="strong",
    single_writer=True,
)
