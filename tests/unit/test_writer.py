"""The writer over the memory index: fence, faults, drain, and callers who leave."""

import asyncio
import random
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager

import numpy as np
import pytest

from serve.config import Buffer as BufferSettings
from serve.config import Index as IndexSettings
from serve.errors import Fenced, IndexUnavailable, Overloaded, StoreUnavailable
from serve.index.errors import IndexOffline, IndexRetryable, RecordsRejected
from serve.index.memory import MemoryIndex
from serve.index.writer import Writer
from serve.ports import Landed
from serve.pressure import Sender
from serve.records import CollectionSpec, Outcome, Record, Tombstone


NS = "0" * 32
OTHER = "1" * 32
ME = Sender("me", 1.0)
QUICK = BufferSettings(
    age_s_start=0.002, age_s_min=0.001, age_s_max=0.005, retry_s_max=0.002, pause_s=0.002
)


class FakeFence:
    """Knows which generation of a document the Store has, and whether the epoch holds."""

    def __init__(self) -> None:
        self.latest: dict[str, int] = {}
        self.errors: list[Exception] = []
        self.asked: list[dict[str, int]] = []

    async def take_epoch(self, name: str, deploy_seq: int) -> int:
        return deploy_seq

    async def superseded(
        self, name: str, epoch: int, ns: str, versions: Mapping[str, int]
    ) -> frozenset[str]:
        assert (name, epoch) == ("writer", 7)
        self.asked.append(dict(versions))
        if self.errors:
            raise self.errors.pop(0)
        return frozenset(d for d, given in versions.items() if self.latest.get(d, 0) > given)


class FaultyIndex(MemoryIndex):
    """Raises planted errors, and can hold a call until a test lets it go."""

    def __init__(self) -> None:
        super().__init__(IndexSettings())
        self.errors: list[Exception] = []
        self.gate = asyncio.Event()
        self.gate.set()
        self.entered = asyncio.Event()
        self.calls: list[tuple[str, tuple[str, ...]]] = []
        self.maintained = 0

    async def upsert(self, ns: str, records: Sequence[Record]) -> Landed:
        self.calls.append(("upsert", tuple(record.id for record in records)))
        await self._trouble()
        return await super().upsert(ns, records)

    async def delete(self, ns: str, tombstones: Sequence[Tombstone]) -> Landed:
        self.calls.append(("delete", tuple(stone.id for stone in tombstones)))
        await self._trouble()
        return await super().delete(ns, tombstones)

    async def drop(self, ns: str) -> None:
        self.calls.append(("drop", (ns,)))
        await super().drop(ns)

    async def maintain(self) -> None:
        self.maintained += 1

    async def _trouble(self) -> None:
        self.entered.set()
        await self.gate.wait()
        if self.errors:
            raise self.errors.pop(0)


class Bench:
    """A running writer with its fakes."""

    def __init__(self, settings: BufferSettings = QUICK, index: FaultyIndex | None = None) -> None:
        self.index = index or FaultyIndex()
        self.fence = FakeFence()
        self.writer = Writer(
            self.index,
            self.fence,
            name="writer",
            epoch=7,
            settings=settings,
            clock=time.monotonic,
            rng=random.Random(1),  # noqa: S311
        )

    async def land(self, *writes: Record | Tombstone, deadline_s: float = 5.0) -> list[str]:
        outcomes = await self.writer.offer(ME, NS, writes, deadline_s)
        return [outcome.word for outcome in outcomes]

    async def ids(self) -> set[str]:
        space = self.index._spaces.get(NS)
        return set(space.records) if space is not None else set()


@asynccontextmanager
async def running(
    settings: BufferSettings = QUICK, index: FaultyIndex | None = None
) -> AsyncIterator[Bench]:
    made = Bench(settings, index)
    await made.writer.ensure(CollectionSpec(NS, 2))
    async with asyncio.timeout(20):
        task = asyncio.create_task(made.writer.run())
        yield made
        made.index.gate.set()
        await made.writer.drain(5.0)
        await task
    assert made.writer.stats()["depth"] == 0
    assert not made.writer._offers


@pytest.fixture
async def bench() -> AsyncIterator[Bench]:
    async with running() as made:
        yield made


def record(name: str, generation: int = 1, document: str = "d") -> Record:
    return Record(name, document, generation, 0, np.ones(2, np.float32))


def stone(name: str, generation: int = 1, document: str = "d") -> Tombstone:
    return Tombstone(name, document, generation)


async def settle(condition: Callable[[], bool]) -> None:
    while not condition():  # noqa: ASYNC110 - what it waits for has no event
        await asyncio.sleep(0.001)


async def test_writes_land_in_bulk_and_in_order(bench):
    assert await bench.land(*[record(f"r{n}") for n in range(50)]) == ["landed"] * 50
    assert len(bench.index.calls) == 1
    assert await bench.land(record("r0", 2), stone("r1", 2)) == ["landed", "landed"]
    assert await bench.ids() == {f"r{n}" for n in range(50)} - {"r1"}
    assert await bench.land() == []


async def test_callers_that_wait_together_share_a_flush(bench):
    bench.index.gate.clear()
    first = asyncio.create_task(bench.land(record("first")))
    await bench.index.entered.wait()
    others = [asyncio.create_task(bench.land(record(f"r{n}"))) for n in range(20)]
    await settle(lambda: bench.writer.stats()["depth"] == 21)
    bench.index.gate.set()
    assert await first == ["landed"]
    assert await asyncio.gather(*others) == [["landed"]] * 20
    assert len(bench.index.calls) == 2


async def test_rejections_come_back_with_their_reason(bench):
    bad = Record("bad", "d", 1, 0, np.zeros(2, np.float32))
    good, refused = await bench.writer.offer(ME, NS, [record("good"), bad], 5.0)
    assert good == Outcome("landed")
    assert refused.word == "rejected"
    assert "norm zero" in refused.reason


async def test_the_fence_is_asked_once_per_flush_and_skips_superseded_records(bench):
    bench.fence.latest = {"old": 5}
    words = await bench.land(
        record("a", 1, "old"), record("b", 5, "old2"), record("c", 1, "new"), record("d", 2, "new")
    )
    # Within one batch a newer generation of a document outranks an older one, too.
    assert words == ["superseded", "landed", "superseded", "landed"]
    assert bench.fence.asked == [{"old": 1, "old2": 5, "new": 2}]
    assert bench.index.calls == [("upsert", ("b", "d"))]


async def test_a_batch_that_is_all_superseded_makes_no_index_call(bench):
    bench.fence.latest = {"d": 5}
    assert await bench.land(record("a"), record("b")) == ["superseded"] * 2
    assert bench.index.calls == []


async def test_a_tombstone_runs_although_it_is_superseded(bench):
    await bench.land(record("a", 1), record("b", 1))
    bench.fence.latest = {"d": 9}
    assert await bench.land(stone("a", 2)) == ["landed"]
    assert await bench.ids() == {"b"}


async def test_retries_pauses_and_bisects_end_well(bench):
    bench.index.errors = [
        IndexRetryable("busy"),
        IndexOffline("key"),
        TimeoutError(),
        RecordsRejected("somewhere"),
        RecordsRejected("somewhere"),
        RecordsRejected("here"),
    ]
    words = await bench.land(*[record(f"r{n}") for n in range(4)])
    assert words == ["rejected", "landed", "landed", "landed"]
    assert bench.writer.stats()["retried"] == 3


async def test_a_store_that_is_away_is_retried(bench):
    bench.fence.errors = [StoreUnavailable("away", retry_after_s=0.001)] * 2
    assert await bench.land(record("a")) == ["landed"]
    assert len(bench.fence.asked) == 3


async def test_our_own_faults_neither_lose_the_batch_nor_the_loop(bench, caplog):
    bench.index.errors = [ZeroDivisionError("ours"), KeyError("ours")]
    assert await bench.land(record("a")) == ["landed"]
    assert bench.writer.stats()["faults"] == 2
    assert "ZeroDivisionError" in caplog.text


async def test_a_flush_past_its_deadline_is_retried():
    async with running(QUICK.model_copy(update={"flush_deadline_s": 0.005})) as bench:
        bench.index.gate.clear()
        landing = asyncio.create_task(bench.land(record("a")))
        await settle(lambda: bench.writer.stats()["retried"] >= 1)
        bench.index.gate.set()
        assert await landing == ["landed"]


async def test_what_cannot_be_written_in_time_is_released(bench):
    bench.index.errors = [IndexRetryable("busy")] * 100_000
    assert await bench.land(record("a"), deadline_s=0.01) == ["released"]
    bench.index.errors.clear()


async def test_a_full_buffer_refuses():
    async with running(QUICK.model_copy(update={"writes_max": 2})) as bench:
        bench.index.gate.clear()
        first = asyncio.create_task(bench.land(record("a"), record("b")))
        await bench.index.entered.wait()
        with pytest.raises(Overloaded):
            await bench.land(record("c"))
        bench.index.gate.set()
        assert await first == ["landed", "landed"]


async def test_a_cancelled_offer_leaves_the_loop_and_the_others_alone(bench):
    bench.index.gate.clear()
    gone = asyncio.create_task(bench.land(record("gone")))
    await bench.index.entered.wait()
    waiting = asyncio.create_task(bench.land(record("waits")))
    also_gone = asyncio.create_task(bench.land(record("also")))
    await settle(lambda: bench.writer.stats()["depth"] == 3)
    gone.cancel()
    also_gone.cancel()
    bench.index.gate.set()
    assert await waiting == ["landed"]
    assert await asyncio.gather(gone, also_gone, return_exceptions=True) != [["landed"]] * 2
    assert await bench.land(record("next")) == ["landed"]
    assert await bench.ids() == {"gone", "also", "waits", "next"}


async def test_a_fenced_writer_gives_everything_back_and_ends():
    bench = Bench()
    await bench.writer.ensure(CollectionSpec(NS, 2))
    await bench.writer.ensure(CollectionSpec(OTHER, 2))
    running_ = asyncio.create_task(bench.writer.run())
    bench.index.gate.clear()
    flying = asyncio.create_task(bench.writer.offer(ME, OTHER, [record("x")], 5.0))
    await bench.index.entered.wait()
    bench.fence.errors = [Fenced()]
    assert await bench.land(record("a"), record("b")) == ["released"] * 2
    assert await flying == (Outcome("released"),)
    await running_
    assert bench.writer.fenced
    assert bench.writer.stats()["fenced"]
    calls = (
        bench.land(record("c")),
        bench.writer.ensure(CollectionSpec(NS, 2)),
        bench.writer.drop(NS),
    )
    for call in calls:
        with pytest.raises(IndexUnavailable):
            await call
    assert await bench.ids() == set()
    await bench.writer.drain(0.1)


async def test_drain_flushes_what_waits_without_its_age():
    slow = QUICK.model_copy(update={"age_s_start": 50.0, "age_s_max": 60.0})
    async with running(slow) as bench:
        bench.index.gate.clear()
        first = asyncio.create_task(bench.land(record("a")))
        await bench.index.entered.wait()
        second = asyncio.create_task(bench.land(record("b")))
        await settle(lambda: bench.writer.stats()["depth"] == 2)
        draining = asyncio.create_task(bench.writer.drain(10.0))
        await asyncio.sleep(0)
        with pytest.raises(IndexUnavailable):
            await bench.land(record("c"))
        bench.index.gate.set()
        await draining
        assert [await first, await second] == [["landed"], ["landed"]]


async def test_a_switch_to_single_writes_leaves_nothing_behind_and_keeps_the_order():
    slow = QUICK.model_copy(update={"age_s_start": 50.0, "age_s_max": 60.0})
    async with running(slow) as bulk:
        bulk.index.gate.clear()
        offers = [asyncio.create_task(bulk.land(record("first")))]
        await bulk.index.entered.wait()
        offers += [asyncio.create_task(bulk.land(record(f"r{n}"))) for n in range(4)]
        await settle(lambda: bulk.writer.stats()["depth"] == 5)
        draining = asyncio.create_task(bulk.writer.drain(10.0))
        bulk.index.gate.set()
        await draining
        assert await asyncio.gather(*offers) == [["landed"]] * 5
        one_by_one = QUICK.model_copy(update={"flush_writes_max": 1})
        async with running(one_by_one, bulk.index) as single:
            later = [record("r1", 2), record("new"), stone("r2", 2)]
            assert await single.land(*later) == ["landed"] * 3
        sent = [(kind, list(ids)) for kind, ids in bulk.index.calls]
        assert sent == [
            ("upsert", ["first"]),
            ("upsert", ["r0", "r1", "r2", "r3"]),
            ("upsert", ["r1"]),
            ("upsert", ["new"]),
            ("delete", ["r2"]),
        ]
        assert await bulk.ids() == {"first", "r0", "r1", "r3", "new"}


async def test_drain_releases_what_its_deadline_leaves():
    bench = Bench()
    await bench.writer.ensure(CollectionSpec(NS, 2))
    task = asyncio.create_task(bench.writer.run())
    bench.index.gate.clear()
    first = asyncio.create_task(bench.land(record("a")))
    await bench.index.entered.wait()
    second = asyncio.create_task(bench.land(record("b")))
    await settle(lambda: bench.writer.stats()["depth"] == 2)
    await bench.writer.drain(0.005)
    assert [await first, await second] == [["released"], ["released"]]
    await task


async def test_a_cancelled_loop_leaves_nobody_waiting():
    bench = Bench()
    await bench.writer.ensure(CollectionSpec(NS, 2))
    task = asyncio.create_task(bench.writer.run())
    bench.index.gate.clear()
    waiting = asyncio.create_task(bench.land(record("a")))
    await bench.index.entered.wait()
    task.cancel()
    assert await waiting == ["released"]
    with pytest.raises(asyncio.CancelledError):
        await task
    with pytest.raises(IndexUnavailable):
        await bench.land(record("b"))


async def test_drop_waits_for_the_flush_and_releases_the_rest(bench):
    bench.index.gate.clear()
    flying = asyncio.create_task(bench.land(record("a")))
    await bench.index.entered.wait()
    waiting = asyncio.create_task(bench.land(record("b")))
    await settle(lambda: bench.writer.stats()["depth"] == 2)
    dropping = asyncio.create_task(bench.writer.drop(NS))
    assert await waiting == ["released"]
    assert await bench.land(record("c")) == ["released"]
    assert not dropping.done()
    bench.index.gate.set()
    await dropping
    assert await flying == ["landed"]
    assert [call for call, _ in bench.index.calls] == ["upsert", "drop"]
    assert await bench.ids() == set()
    await bench.writer.drop(NS)


async def test_upkeep_follows_flushes_that_landed(bench):
    bench.index.errors = [IndexRetryable("busy")] * 3
    for count in (1, 2):
        await bench.land(record("a"))
        await settle(lambda count=count: bench.index.maintained == count)


async def test_upkeep_goes_on_while_nothing_is_written():
    async with running(QUICK.model_copy(update={"upkeep_s": 0.01})) as bench:
        await settle(lambda: bench.index.maintained >= 2)
        assert bench.index.calls == []


@pytest.mark.parametrize(("error", "faults"), [(IndexRetryable("x"), 0), (KeyError("x"), 1)])
async def test_failed_upkeep_breaks_nothing(bench, monkeypatch, error, faults):
    async def maintain() -> None:
        raise error

    monkeypatch.setattr(bench.index, "maintain", maintain)
    assert await bench.land(record("a")) == ["landed"]
    await settle(lambda: bench.writer.stats()["faults"] == faults)
    assert await bench.land(record("b")) == ["landed"]


@pytest.mark.parametrize("error", [IndexRetryable("x"), IndexOffline("x"), TimeoutError()])
async def test_index_errors_do_not_leak_from_ensure_and_drop(bench, monkeypatch, error):
    async def fail(_: object) -> None:
        raise error

    monkeypatch.setattr(bench.index, "ensure", fail)
    monkeypatch.setattr(bench.index, "drop", fail)
    with pytest.raises(IndexUnavailable):
        await bench.writer.ensure(CollectionSpec(OTHER, 2))
    with pytest.raises(IndexUnavailable):
        await bench.writer.drop(NS)
    assert await bench.land(record("a")) == ["landed"]


async def test_stats_name_what_operators_watch(bench):
    await bench.land(record("a"))
    stats = bench.writer.stats()
    assert stats["landed"] == stats["flushes"] == 1
    gauges = {"depth", "bytes", "oldest_age_s", "lanes", "in_flight", "paused", "accepting"}
    assert gauges | {"retried", "rejected", "superseded", "released"} <= set(stats)
