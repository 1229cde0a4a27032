"""The feed of one ingress replica: one poll of the Store, many waiters, bounded memory."""

import asyncio
from collections.abc import Sequence
from typing import Any

import pytest

from serve.errors import StoreUnavailable
from serve.flows import feed as module
from serve.flows.feed import BUFFERED_MAX, PAGE, Feed
from serve.items import Event


LONG_S = 60.0
"""Longer than any test: who waits so long has missed what it waited for."""


class Log:
    """Implements `ports.Events` over a list; polls wait until something is added."""

    def __init__(self) -> None:
        self.all: list[Event] = []
        self.fault: Exception | None = None
        self.polls = 0
        self.reads = 0
        self.offset = 0
        self._more = asyncio.Event()

    def add(self, job: str, kind: str) -> int:
        number = self.offset + len(self.all) + 1
        self.all.append(Event(number, job, "acme", 0.0, kind, {}))
        self._more.set()
        return number

    async def events(self, after: int, limit: int, wait_s: float) -> Sequence[Event]:
        self.polls += 1
        if self.fault is not None:
            raise self.fault
        if after < 0:
            last = self.offset + len(self.all)
            return [Event(last, "", "", 0.0, "", {})]
        while not (found := [one for one in self.all if one.number > after]) and wait_s:
            self._more.clear()
            await self._more.wait()
            if self.fault is not None:
                raise self.fault
        return found[:limit]

    async def job_events(self, tenant: str, job: str, after: int, limit: int) -> Sequence[Event]:
        self.reads += 1
        mine = [one for one in self.all if one.job == job and one.number > after]
        return mine[-1:] if after < 0 else mine[:limit]

    async def job_stats(self, tenant: str) -> Any:
        raise AssertionError(tenant)

    def break_off(self, fault: Exception | None) -> None:
        self.fault = fault
        self._more.set()


@pytest.fixture
def log() -> Log:
    return Log()


@pytest.fixture
async def feed(log: Log, clock: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(module, "AWAY_S", 0)
    made = Feed(log, clock)
    running = asyncio.create_task(made.run())
    await turns()
    yield made
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    assert not made._listeners


async def turns(count: int = 20) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


def until() -> float:
    return asyncio.get_running_loop().time() + LONG_S


async def numbers(reader: Any, count: int) -> list[int]:
    """The next so many events of a stream."""
    found = []
    while len(found) < count:
        event = await anext(reader)
        if event is not None:
            found.append(event.number)
    return found


async def test_a_watch_hears_the_end_of_its_job_only(feed, log):
    with feed.watch("a") as watch:
        log.add("b", "job.completed")
        log.add("a", "job.running")
        log.add("a", "job.progress")
        await turns()
        assert not await watch.ended(0)
        log.add("a", "job.cancelled")
        assert await watch.ended(LONG_S)


@pytest.mark.parametrize(
    "state", ["completed", "completed_with_errors", "failed", "cancelled", "expired"]
)
async def test_every_end_is_one(feed, log, state):
    with feed.watch("a") as watch:
        log.add("a", f"job.{state}")
        assert await watch.ended(LONG_S)


async def test_who_watches_before_submitting_misses_nothing(log, clock):
    """Even when the job ends while the feed still asks where to begin."""
    feed = Feed(log, clock)
    log.offset = 5000
    with feed.watch("a") as watch:
        log.add("a", "job.completed")
        running = asyncio.create_task(feed.run())
        assert await watch.ended(LONG_S)
        running.cancel()
    await asyncio.gather(running, return_exceptions=True)


async def test_one_poll_serves_all(feed, log):
    begun = log.polls
    with feed.watch("a") as one, feed.watch("a") as two, feed.watch("b") as three:
        log.add("a", "job.failed")
        log.add("b", "job.failed")
        assert await asyncio.gather(*(each.ended(LONG_S) for each in (one, two, three)))
    assert log.polls - begun <= 2
    assert log.reads == 0


async def test_it_outlives_the_store(feed, log):
    with feed.watch("a") as watch:
        log.break_off(StoreUnavailable("away"))
        await turns()
        log.break_off(None)
        log.add("a", "job.completed")
        assert await watch.ended(LONG_S)


async def test_wait_ended_returns_at_its_time(feed, log, clock):
    await feed.wait_ended("a", clock() - 1)
    waiting = asyncio.create_task(feed.wait_ended("a", clock() + LONG_S))
    await turns()
    assert not waiting.done()
    log.add("a", "job.completed")
    await waiting


async def test_a_reader_gets_each_event_once_and_in_order(feed, log):
    for _ in range(3):
        log.add("a", "job.progress")
    reader = feed.follow("acme", "a", 1, ended=False, until=until())
    assert await numbers(reader, 2) == [2, 3]
    for _ in range(3):
        log.add("a", "job.progress")
        log.add("b", "job.progress")
    last = log.add("a", "job.completed")
    rest = [event.number async for event in reader if event is not None]
    assert rest == [4, 6, 8, last]


async def test_a_long_past_is_read_in_pages(feed, log):
    for _ in range(2 * PAGE):
        log.add("a", "job.progress")
    log.add("a", "job.completed")
    reader = feed.follow("acme", "a", 0, ended=True, until=until())
    found = [event.number async for event in reader if event is not None]
    assert found == list(range(1, 2 * PAGE + 2))
    assert log.reads == 3


async def test_a_slow_reader_costs_no_memory_and_misses_nothing(feed, log):
    reader = feed.follow("acme", "a", 0, ended=False, until=until())
    log.add("a", "job.running")
    assert await numbers(reader, 1) == [1]
    for _ in range(3 * BUFFERED_MAX):
        log.add("a", "job.progress")
    await turns()
    (heard,) = feed._listeners["a"]
    assert len(heard._heard) <= BUFFERED_MAX
    log.add("a", "job.completed")
    rest = [event.number async for event in reader if event is not None]
    assert rest == list(range(2, 3 * BUFFERED_MAX + 3))


async def test_events_in_between_store_and_feed_are_told_once(feed, log, monkeypatch):
    """What happens while the past is read comes from both sides."""
    read = log.job_events

    async def slow(*args: Any) -> Sequence[Event]:
        log.add("a", "job.progress")
        await turns()
        return await read(*args)

    monkeypatch.setattr(log, "job_events", slow)
    reader = feed.follow("acme", "a", 0, ended=False, until=until())
    assert await numbers(reader, 1) == [1]
    log.add("a", "job.completed")
    assert [event.number async for event in reader if event is not None] == [2]


async def test_a_job_that_goes_on_after_its_end_is_followed(feed, log):
    log.add("a", "job.completed_with_errors")
    log.add("a", "job.queued")
    reader = feed.follow("acme", "a", 0, ended=False, until=until())
    assert await numbers(reader, 2) == [1, 2]
    log.add("a", "job.completed")
    assert [event.number async for event in reader if event is not None] == [3]


async def test_a_stream_ends_at_its_time_and_says_that_nothing_happens(feed, monkeypatch):
    monkeypatch.setattr(module, "PING_S", 0.001)
    soon = asyncio.get_running_loop().time() + 0.02
    found = [event async for event in feed.follow("acme", "a", 0, ended=False, until=soon)]
    assert found
    assert not any(found)


async def test_an_ended_job_without_news_ends_its_stream(feed):
    assert [each async for each in feed.follow("acme", "a", 7, ended=True, until=until())] == []
