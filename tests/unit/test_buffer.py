"""When the buffer flushes, what it keeps, and how long it waits."""

import random

import numpy as np
import pytest

from serve.capabilities import Capabilities
from serve.config import Buffer as BufferSettings
from serve.errors import Overloaded, TooLarge
from serve.index.buffer import Buffer
from serve.index.errors import IndexOffline, IndexRetryable, RecordsRejected
from serve.index.lanes import Batch, size_bytes
from serve.ports import Landed
from serve.pressure import Sender
from serve.records import Record, Tombstone


CAPS = Capabilities(
    max_items=10,
    max_bytes=100_000,
    max_dim=8,
    max_top_k=10,
    consistency="strong",
    single_writer=True,
)
FAR = 1e9
ME = Sender("me", 1.0)
VECTOR = np.ones(4, np.float32)


def record(name: str, generation: int = 1, text: str = "") -> Record:
    return Record(name, f"d-{name}", generation, 0, VECTOR, text)


def stone(name: str, generation: int = 1) -> Tombstone:
    return Tombstone(name, f"d-{name}", generation)


def many(count: int, start: int = 0) -> list[Record]:
    return [record(f"r{number:03}") for number in range(start, start + count)]


def ids(batch: Batch) -> list[str]:
    return [write.id for write in batch.writes]


@pytest.fixture
def buffer(rng: random.Random) -> Buffer:
    return Buffer(BufferSettings(age_s_start=1.0), CAPS, rng)


def words(buffer: Buffer) -> list[tuple[int, str]]:
    return [(ticket, outcome.word) for ticket, outcome in buffer.finished()]


def busy(buffer: Buffer, ns: str = "a", now: float = 0.0) -> Batch:
    """A lane with one write in flight, so that the next ones wait."""
    buffer.offer(ME, ns, [record("first")], now, FAR)
    [batch] = buffer.due(now)
    return batch


def test_an_idle_lane_is_flushed_at_once(buffer):
    assert list(buffer.offer(ME, "a", many(2), 5.0, FAR)) == [0, 1]
    assert buffer.next_due(5.0) == 5.0
    [batch] = buffer.due(5.0)
    assert ids(batch) == ["r000", "r001"]
    assert buffer.next_due(5.0) == FAR  # nothing but the deadline
    buffer.ack(batch, Landed(), 5.1)
    assert words(buffer) == [(0, "landed"), (1, "landed")]
    assert buffer.stats(5.1)["lanes"] == 0


def test_writes_gather_behind_a_flush_until_they_are_old_enough(buffer):
    batch = busy(buffer)
    buffer.offer(ME, "a", many(2), 0.2, FAR)
    assert buffer.due(0.9) == []
    buffer.ack(batch, Landed(), 0.9)
    age_s = 1.0  # a fill of exactly a tenth leaves it
    assert buffer.due(0.2 + age_s - 0.01) == []
    assert buffer.next_due(0.9) == 0.2 + age_s
    assert len(buffer.due(0.2 + age_s)) == 1


def test_a_full_lane_does_not_wait(buffer):
    batch = busy(buffer)
    buffer.offer(ME, "a", many(7), 0.1, FAR)
    buffer.ack(batch, Landed(), 0.2)
    assert buffer.due(0.2) == []
    buffer.offer(ME, "a", many(1, 7), 0.3, FAR)  # eight of ten
    [batch] = buffer.due(0.3)
    assert len(batch.writes) == 8


def test_single_writes_go_one_by_one_in_order_and_wait_for_no_age(rng):
    buffer = Buffer(BufferSettings(age_s_start=1.0, flush_writes_max=1), CAPS, rng)
    buffer.offer(ME, "a", [*many(3), record("r001", 2)], 0.0, FAR)
    sent = []
    while buffer.depth:
        assert buffer.next_due(0.0) == 0.0
        [batch] = buffer.due(0.0)
        sent += [[(write.id, write.generation) for write in batch.writes]]
        buffer.ack(batch, Landed(), 0.0)
    assert sent == [[("r000", 1)], [("r001", 2)], [("r002", 1)]]


def test_a_flush_holds_no_more_than_the_index_takes_whatever_is_allowed(rng):
    buffer = Buffer(BufferSettings(flush_writes_max=1000), CAPS, rng)
    buffer.offer(ME, "a", many(50), 0.0, FAR)
    [batch] = buffer.due(0.0)
    assert len(batch.writes) == CAPS.max_items


def test_bytes_fill_a_lane_and_bound_a_batch(buffer):
    batch = busy(buffer)
    large = [record(f"l{number}", text="x" * 20_000) for number in range(4)]
    buffer.offer(ME, "a", large, 0.1, FAR)  # 80,000 of 75,000
    buffer.ack(batch, Landed(), 0.2)
    [batch] = buffer.due(0.2)
    assert sum(size_bytes(write) for write in batch.writes) <= 75_000
    assert len(batch.writes) == 3


def test_one_write_above_the_limit_goes_alone(buffer):
    buffer.offer(ME, "a", [record("l", text="x" * 200_000), record("r")], 0.0, FAR)
    [batch] = buffer.due(0.0)
    assert ids(batch) == ["l"]


def test_the_size_counts_bytes_not_characters():
    plain = size_bytes(record("a"))
    assert size_bytes(record("a", text="漢" * 10)) == plain + 30
    assert size_bytes(stone("a")) < plain


@pytest.mark.parametrize(("count", "factor"), [(6, 1.5), (3, 1.0), (0, 1 / 1.5)])
def test_the_age_adapts_to_the_fill(rng, count, factor):
    caps = Capabilities(11, CAPS.max_bytes, 8, 10, "strong", single_writer=True)
    buffer = Buffer(BufferSettings(age_s_start=1.0), caps, rng)
    buffer.offer(ME, "a", many(max(count, 1)), 0.0, FAR)
    [batch] = buffer.due(0.0)
    buffer.offer(ME, "a", [record("later")], 0.0, FAR)
    buffer.ack(batch, Landed(), 0.0)
    assert buffer.next_due(0.0) == pytest.approx(factor)


def test_the_age_stays_within_its_bounds(rng):
    caps = Capabilities(11, CAPS.max_bytes, 8, 10, "strong", single_writer=True)
    buffer = Buffer(BufferSettings(age_s_start=0.03, age_s_min=0.02), caps, rng)
    for step in range(5):
        buffer.offer(ME, "a", [record("r")], float(step), FAR)
        for batch in buffer.due(float(step)):
            buffer.offer(ME, "a", [record("r")], float(step), FAR)
            buffer.ack(batch, Landed(), float(step))
    assert buffer.next_due(4.0) == pytest.approx(4.02)


def test_one_batch_in_flight_per_lane_and_a_few_in_all(buffer):
    for ns in "abc":
        buffer.offer(ME, ns, many(25), 0.0, FAR)
    batches = buffer.due(0.0)
    assert [batch.ns for batch in batches] == ["a", "b"]
    assert buffer.due(0.0) == []
    buffer.ack(batches[0], Landed(), 0.1)
    assert [batch.ns for batch in buffer.due(0.1)] == ["c"]  # not "a" again: its turn comes


def test_a_backlog_in_one_lane_does_not_hold_up_another(buffer):
    buffer.offer(ME, "big", many(100), 0.0, FAR)
    buffer.offer(ME, "other", many(100), 0.0, FAR)
    served = []
    now = 0.0
    for _ in range(4):
        batches = buffer.due(now)
        now += 1.0
        if now == 1.0:
            buffer.offer(ME, "small", [record("r")], now, FAR)
        for batch in batches:
            served.append(batch.ns)
            buffer.ack(batch, Landed(), now)
    assert served.index("small") <= 4


# Last write wins


def test_a_newer_write_replaces_a_waiting_one_and_an_older_is_outranked(buffer):
    busy(buffer)
    buffer.offer(ME, "a", [record("r", 2), record("r", 3), record("r", 1)], 0.1, FAR)
    assert words(buffer) == [(1, "superseded"), (3, "superseded")]
    assert buffer.depth == 2


def test_a_newer_write_waits_for_its_predecessor_in_flight(buffer):
    batch = busy(buffer)
    buffer.offer(ME, "a", [record("first", 2)], 0.1, FAR)
    buffer.ack(batch, Landed(), 0.2)
    [batch] = buffer.due(5.0)
    assert batch.writes[0].generation == 2
    buffer.ack(batch, Landed(), 5.1)
    assert words(buffer) == [(0, "landed"), (1, "landed")]


def test_what_flies_outranks_an_older_record_but_not_an_older_tombstone(buffer):
    buffer.offer(ME, "a", [record("r", 5)], 0.0, FAR)
    [batch] = buffer.due(0.0)
    buffer.offer(ME, "a", [record("r", 4)], 0.1, FAR)
    assert words(buffer) == [(1, "superseded")]
    buffer.offer(ME, "a", [stone("r", 4)], 0.1, FAR)
    buffer.ack(batch, Landed(), 0.2)
    [batch] = buffer.due(5.0)
    assert batch.tombstones == (stone("r", 4),)


def test_repeats_of_one_generation_share_the_outcome(buffer):
    first = busy(buffer)
    buffer.offer(ME, "a", [record("r", 2, "one")], 0.1, FAR)
    buffer.offer(ME, "a", [record("r", 2, "two")], 0.2, FAR)
    buffer.ack(first, Landed(), 0.3)
    [batch] = buffer.due(5.0)
    assert [write.text for write in batch.records] == ["two"]
    buffer.ack(batch, Landed(rejected=(("r", "no"),)), 5.1)
    assert words(buffer) == [(0, "landed"), (1, "rejected"), (2, "rejected")]


def test_a_tombstone_outranks_older_records_only(buffer):
    busy(buffer)
    writes = [record("r", 2), stone("r", 3), record("r", 3), record("r", 4), stone("r", 1)]
    buffer.offer(ME, "a", writes, 0.1, FAR)
    # The record of generation 2 is gone, 3 gave way to 4, and the old tombstone to the newer.
    assert words(buffer) == [(1, "superseded"), (3, "superseded"), (5, "superseded")]


def test_a_tombstone_goes_before_the_newer_record_of_its_id(buffer):
    first = busy(buffer)
    buffer.offer(ME, "a", [record("x", 1), record("r", 5), stone("r", 4)], 0.1, FAR)
    buffer.ack(first, Landed(), 0.2)
    order = []
    now = 5.0
    while batches := buffer.due(now):
        order += [(write.id, type(write)) for write in batches[0].writes]
        buffer.ack(batches[0], Landed(), now)
        now += 5.0
    assert order == [("x", Record), ("r", Tombstone), ("r", Record)]


def test_writes_that_the_store_superseded_leave_the_batch(buffer):
    buffer.offer(ME, "a", many(3), 0.0, FAR)
    [batch] = buffer.due(0.0)
    left = buffer.supersede(batch, ["r001", "absent"])
    assert ids(left) == ["r000", "r002"]
    buffer.ack(left, Landed(), 0.1)
    assert dict(words(buffer)) == {0: "landed", 1: "superseded", 2: "landed"}


# Faults


def test_a_retryable_batch_comes_back_whole_after_a_growing_wait(buffer):
    buffer.offer(ME, "a", many(3), 0.0, FAR)
    [batch] = buffer.due(0.0)
    buffer.offer(ME, "a", many(3, 3), 0.0, FAR)
    now = 0.0
    for tries in range(1, 12):
        buffer.nack(batch, IndexRetryable(), now)
        due = buffer.next_due(now)
        assert due is not None
        assert due - now <= min(60, 0.2 * 2**tries)
        now = due
        [batch] = buffer.due(now)
        assert ids(batch) == ["r000", "r001", "r002"]
    assert now > 30
    buffer.nack(batch, IndexRetryable(retry_after_s=70), now)
    assert buffer.next_due(now) == now + 70
    assert buffer.stats(now)["retried"] == 12


def test_an_offline_index_pauses_everything_and_keeps_it(buffer):
    buffer.offer(ME, "a", many(3), 0.0, FAR)
    [batch] = buffer.due(0.0)
    buffer.nack(batch, IndexOffline("key"), 0.0)
    buffer.offer(ME, "b", many(3), 0.1, FAR)
    assert buffer.stats(0.1)["paused"]
    assert buffer.due(4.9) == []
    assert buffer.next_due(0.1) == 5.0
    assert {batch.ns for batch in buffer.due(5.0)} == {"a", "b"}
    assert not buffer.stats(5.0)["paused"]
    assert words(buffer) == []


def test_a_single_refused_record_is_poison(buffer):
    buffer.offer(ME, "a", [record("r")], 0.0, FAR)
    [batch] = buffer.due(0.0)
    buffer.nack(batch, RecordsRejected("bad row"), 0.0)
    [(ticket, outcome)] = buffer.finished()
    assert (ticket, outcome.word, outcome.reason) == (0, "rejected", "bad row")


def test_verdicts_wait_until_the_batch_is_through(buffer):
    buffer.offer(ME, "a", many(4), 0.0, FAR)
    [batch] = buffer.due(0.0)
    buffer.nack(batch, RecordsRejected("no"), 0.0)
    [half] = buffer.due(0.0)
    buffer.nack(half, RecordsRejected("no"), 0.0)
    [one] = buffer.due(0.0)
    buffer.nack(one, RecordsRejected("no"), 0.0)
    assert words(buffer) == []
    for _ in range(2):
        [part] = buffer.due(0.0)
        buffer.ack(part, Landed(), 0.0)
    assert dict(words(buffer)) == {0: "rejected", 1: "landed", 2: "landed", 3: "landed"}


def test_a_second_refusal_in_a_small_batch_pauses_its_lane_only(buffer):
    buffer.offer(ME, "a", many(2), 0.0, FAR)
    buffer.offer(ME, "b", many(2), 0.0, FAR)
    batch, other = buffer.due(0.0)
    buffer.nack(batch, RecordsRejected("no"), 0.0)
    for _ in range(2):
        [one] = buffer.due(0.0)
        buffer.nack(one, RecordsRejected("no"), 0.0)
    assert words(buffer) == []
    buffer.ack(other, Landed(), 0.0)
    assert words(buffer) == [(2, "landed"), (3, "landed")]
    assert buffer.due(4.9) == []
    [one] = buffer.due(5.0)
    assert ids(one) == ["r000"]


# Bounds and giving back


def test_a_full_buffer_takes_nothing(rng):
    buffer = Buffer(BufferSettings(writes_max=5, lanes_max=2, flushes_max=1), CAPS, rng)
    buffer.offer(ME, "a", many(3), 0.0, FAR)
    before = buffer.stats(0.0)
    with pytest.raises(Overloaded) as caught:
        buffer.offer(ME, "a", many(3, 3), 0.0, FAR)
    assert caught.value.retry_after_s == 1.0  # nothing landed yet: a guess
    assert buffer.stats(0.0) == before
    [batch] = buffer.due(0.0)
    buffer.ack(batch, Landed(), 1.0)  # three a second
    buffer.offer(ME, "a", many(3), 1.0, FAR)
    with pytest.raises(Overloaded) as caught:
        buffer.offer(ME, "a", many(5, 3), 1.0, FAR)
    assert caught.value.retry_after_s == pytest.approx(5 / 3)
    with pytest.raises(TooLarge):
        buffer.offer(ME, "a", many(6), 1.0, FAR)


def test_lanes_and_bytes_are_bounded(rng):
    settings = BufferSettings(lanes_max=1, bytes_max=2**20)
    buffer = Buffer(settings, CAPS, rng)
    buffer.offer(ME, "a", [record("r", text="x" * 900_000)], 0.0, FAR)
    with pytest.raises(Overloaded):
        buffer.offer(ME, "b", [record("r")], 0.0, FAR)
    with pytest.raises(Overloaded):
        buffer.offer(ME, "a", [record("s", text="x" * 200_000)], 0.0, FAR)
    buffer.offer(ME, "a", [record("s", text="x" * 100_000)], 0.0, FAR)
    with pytest.raises(TooLarge):
        buffer.offer(ME, "a", [record("s", text="x" * 2_000_000)], 0.0, FAR)


def test_an_empty_offer_leaves_no_trace(buffer):
    assert len(buffer.offer(ME, "a", [], 0.0, FAR)) == 0
    assert buffer.stats(0.0)["lanes"] == 0
    assert buffer.next_due(0.0) is None


def test_a_deadline_releases_what_is_not_in_flight(buffer):
    buffer.offer(ME, "a", [record("first")], 0.0, 10.0)
    [batch] = buffer.due(0.0)
    buffer.offer(ME, "a", many(2), 0.0, 5.0)
    assert buffer.next_due(0.0) == 5.0
    assert buffer.due(5.0) == []
    assert words(buffer) == [(1, "released"), (2, "released")]
    assert buffer.due(11.0) == []
    assert words(buffer) == []  # it is in flight: maybe it lands
    buffer.nack(batch, IndexRetryable(), 11.0)
    assert words(buffer) == [(0, "released")]
    assert buffer.stats(11.0)["bytes"] == 0


def test_a_lane_whose_writes_all_expired_is_forgotten(buffer):
    buffer.offer(ME, "a", many(2), 0.0, 5.0)
    [batch] = buffer.due(0.0)
    buffer.nack(batch, IndexRetryable(retry_after_s=50), 0.0)
    assert buffer.due(5.0) == []
    assert words(buffer) == [(0, "released"), (1, "released")]
    assert buffer.stats(5.0)["lanes"] == 0


def test_repeats_keep_their_own_deadlines(buffer):
    first = busy(buffer)
    buffer.offer(ME, "a", [record("r")], 0.0, 2.0)
    buffer.offer(ME, "a", [record("r")], 0.0, 9.0)
    assert buffer.due(3.0) == []
    assert words(buffer) == [(1, "released")]
    buffer.ack(first, Landed(), 3.0)
    [batch] = buffer.due(3.0)
    buffer.ack(batch, Landed(), 3.1)
    assert words(buffer) == [(0, "landed"), (2, "landed")]


def test_drop_releases_a_lane_and_lets_its_flight_end(buffer):
    batch = busy(buffer)
    buffer.offer(ME, "a", many(2), 0.0, FAR)
    buffer.drop("a")
    assert words(buffer) == [(1, "released"), (2, "released")]
    assert buffer.is_flying("a")
    buffer.offer(ME, "a", many(1), 0.1, FAR)
    assert words(buffer) == [(3, "released")]
    buffer.nack(batch, IndexRetryable(), 0.2)
    assert words(buffer) == [(0, "released")]
    assert not buffer.is_flying("a")
    buffer.drop("never seen")


def test_release_all_gives_back_also_what_flies_and_ignores_its_return(buffer):
    batch = busy(buffer)
    buffer.offer(ME, "b", many(2), 0.0, FAR)
    buffer.release_all()
    assert sorted(words(buffer)) == [(0, "released"), (1, "released"), (2, "released")]
    buffer.ack(batch, Landed(), 0.1)
    buffer.nack(batch, IndexRetryable(), 0.1)
    assert words(buffer) == []
    assert buffer.stats(0.1)["depth"] == 0
    assert buffer.stats(0.1)["in_flight"] == 0


def test_a_stale_batch_number_is_ignored(buffer):
    batch = busy(buffer)
    buffer.ack(batch, Landed(), 0.1)
    again = busy(buffer, now=0.2)
    buffer.ack(batch, Landed(), 0.3)
    assert words(buffer) == [(0, "landed")]
    assert buffer.is_flying("a")
    assert again.number != batch.number


def test_hurry_makes_every_lane_due(buffer):
    batch = busy(buffer)
    buffer.offer(ME, "a", many(2), 0.0, FAR)
    buffer.hurry()
    buffer.ack(batch, Landed(), 0.01)
    assert len(buffer.due(0.01)) == 1


def test_the_oldest_age_counts_what_flies(buffer):
    busy(buffer)
    buffer.offer(ME, "a", many(1), 3.0, FAR)
    assert buffer.stats(4.0)["oldest_age_s"] == 4.0


def test_finished_offers_leave_no_deadlines_behind(buffer):
    for step in range(500):
        buffer.offer(ME, "a", many(1), float(step), FAR)
        for batch in buffer.due(float(step)):
            buffer.ack(batch, Landed(), float(step))
    assert len(buffer._deadlines) < 100
    assert len(buffer._schedule._timers) < 100
