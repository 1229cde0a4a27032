"""When lanes go: rates, the window, and that what waits for itself holds up nobody."""

import random
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from serve.capabilities import Capabilities, Rates
from serve.config import Buffer as BufferSettings
from serve.index.buffer import Buffer
from serve.index.errors import IndexOffline, IndexRetryable, RecordsRejected
from serve.index.lanes import Batch
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
ANN, BOB = Sender("ann", 1.0), Sender("bob", 1.0)
VECTOR = np.ones(4, np.float32)


def records(count: int = 1, start: int = 0, chars: int = 0) -> list[Record]:
    some = range(start, start + count)
    return [Record(f"r{number}", "d", 1, 0, VECTOR, "x" * chars) for number in some]


def make(caps: Capabilities = CAPS, **fields) -> Buffer:
    values = {"age_s_start": 0.02, "age_s_max": 0.02, **fields}
    return Buffer(BufferSettings(**values), caps, random.Random(1))  # noqa: S311 - not a secret


def spaces(batches: list[Batch]) -> list[str]:
    return [batch.ns for batch in batches]


def through(buffer: Buffer, now: float, until: float) -> list[tuple[float, Batch]]:
    """Flushes until then with an index that is quick, woken by `next_due` alone."""
    sent = []
    while (due := buffer.next_due(now)) is not None and due < until:
        now = due
        for batch in buffer.due(now):
            sent.append((now, batch))
            buffer.ack(batch, Landed(), now)
    return sent


# Rates


def test_requests_of_a_namespace_keep_its_rate():
    buffer = make(replace(CAPS, upserts=Rates(requests_s=2)))
    buffer.offer(ANN, "a", records(100), 0.0, FAR)
    times = [now for now, _ in through(buffer, 0.0, 60.0)]
    assert times == pytest.approx([0, 0, *(n / 2 for n in range(1, 9))], abs=0.05)


def test_bytes_of_a_namespace_keep_its_rate():
    buffer = make(replace(CAPS, upserts=Rates(bytes_s=10_000)))
    buffer.offer(ANN, "a", records(40, chars=900), 0.0, FAR)
    sent = through(buffer, 0.0, 60.0)
    size = sent[0][1].bytes
    pauses = [later - now for (now, _), (later, _) in pairwise(sent)]
    assert pauses == pytest.approx([size / 10_000] * 3)


def test_a_lane_that_waits_for_its_rate_takes_no_place_and_holds_up_nobody():
    buffer = make(replace(CAPS, upserts=Rates(requests_s=1)), flushes_max=1)
    buffer.offer(ANN, "a", records(30), 0.0, FAR)
    [first] = buffer.due(0.0)
    buffer.ack(first, Landed(), 0.0)
    buffer.offer(ANN, "b", records(1), 0.0, FAR)
    assert spaces(buffer.due(0.0)) == ["b"]  # "a" is full and was there before
    assert buffer.stats(0.0)["in_flight"] == 1


def test_deletes_have_a_rate_of_their_own():
    buffer = make(replace(CAPS, upserts=Rates(requests_s=1), deletes=Rates(requests_s=1)))
    stones = [Tombstone(f"t{number}", "d", 1) for number in range(12)]
    writes = [*records(10), *stones[:10], *records(10, start=10), *stones[10:]]
    buffer.offer(ANN, "a", writes, 0.0, FAR)
    sent = [(round(now), bool(batch.records)) for now, batch in through(buffer, 0.0, 60.0)]
    assert sent == [(0, True), (0, False), (1, True), (1, False)]


def test_the_whole_index_keeps_its_rate_in_fair_order():
    buffer = make(flushes_s=1.0)
    for ns in ("a", "b", "c"):
        buffer.offer(ANN, ns, records(20), 0.0, FAR)
    buffer.offer(BOB, "z", records(20), 0.0, FAR)
    sent = through(buffer, 0.0, 60.0)
    assert [round(now, 6) for now, _ in sent] == [0, 1, 2, 3, 4, 5, 6, 7]
    assert [batch.ns for _, batch in sent[:4]] == ["a", "z", "b", "z"]


def test_an_emptied_namespace_keeps_its_debt():
    buffer = make(replace(CAPS, upserts=Rates(requests_s=1)))
    buffer.offer(ANN, "a", records(), 0.0, FAR)
    [batch] = buffer.due(0.0)
    buffer.ack(batch, Landed(), 0.0)
    assert buffer.stats(0.0)["lanes"] == 0
    buffer.offer(ANN, "a", records(), 0.0, FAR)
    assert buffer.due(0.0) == []
    assert buffer.next_due(0.0) == pytest.approx(1.0)


# The window


def fly(buffer: Buffer, count: int, now: float = 0.0) -> list[Batch]:
    for number in range(count):
        buffer.offer(ANN, f"n{number}", records(), now, FAR)
    return buffer.due(now)


def test_a_busy_index_is_given_half_and_then_one_more_a_round():
    buffer = make(flushes_max=4)
    flights = fly(buffer, 8)
    assert len(flights) == 4
    for batch in flights:
        buffer.nack(batch, IndexRetryable(retry_after_s=50), 0.0)
    assert buffer.stats(0.0)["window"] == 2  # once for all four
    flights = buffer.due(0.0)
    assert len(flights) == 2
    for batch in flights:
        buffer.ack(batch, Landed(), 0.0)
    flights = buffer.due(0.0)
    assert len(flights) == 2
    for batch in flights:
        buffer.nack(batch, IndexRetryable(retry_after_s=50), 0.0)
    assert buffer.stats(0.0)["window"] == 1


@pytest.mark.parametrize(
    "error", [IndexRetryable(busy=False), IndexOffline("key"), RecordsRejected("no")]
)
def test_what_is_not_the_indexes_haste_leaves_the_window(error):
    buffer = make(flushes_max=4)
    for batch in fly(buffer, 4):
        buffer.nack(batch, error, 0.0)
    assert buffer.stats(0.0)["window"] == 4


# Backpressure


def test_pressure_tells_of_a_paused_index_until_it_is_seen_to_be_back():
    buffer = make()
    [batch] = fly(buffer, 1)
    assert buffer.pressure(0.0).wait_s == 0
    buffer.nack(batch, IndexOffline("key"), 0.0)
    assert (buffer.pressure(1.0).wait_s, buffer.pressure(1.0).paused) == (4.0, True)
    [batch] = buffer.due(5.0)
    assert buffer.pressure(5.0).paused  # nobody knows yet
    buffer.ack(batch, Landed(), 6.0)
    assert (buffer.pressure(6.0).wait_s, buffer.pressure(6.0).paused) == (0.0, False)


def test_a_paused_index_with_nothing_to_try_it_with_is_tried_again():
    buffer = make()
    buffer.offer(ANN, "a", records(), 0.0, 1.0)
    [batch] = buffer.due(0.0)
    buffer.nack(batch, IndexOffline("key"), 2.0)  # too late: given back
    assert buffer.stats(2.0)["depth"] == 0
    assert buffer.pressure(6.0).paused
    assert not buffer.pressure(7.0).paused


def test_pressure_tells_everybody_or_one_tenant_of_a_soft_bound():
    buffer = make(writes_max=40, tenant_writes_max=20, soft_fill=0.5)
    buffer.offer(ANN, "a", records(10), 0.0, FAR)
    assert set(buffer.pressure(0.0).tenants) == {"ann"}
    assert buffer.pressure(0.0).wait_s == 0.0
    buffer.offer(BOB, "b", records(9), 0.0, FAR)
    assert buffer.pressure(0.0).wait_s == 0.0
    buffer.offer(BOB, "c", records(1), 0.0, FAR)
    assert buffer.pressure(0.0).wait_s > 0
    assert set(buffer.pressure(0.0).tenants) == {"ann", "bob"}
