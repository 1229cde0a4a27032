"""Asking an index how far searches see: how often, for whom, and until when."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import replace

import pytest

from serve.capabilities import Capabilities
from serve.config import Index as IndexSettings
from serve.errors import IndexUnavailable
from serve.freshness import UNPROVED
from serve.index import probes as module
from serve.index.memory import MemoryIndex
from serve.index.probes import Probes, token_of
from serve.ports import Landed


NS, OTHER = "0" * 32, "1" * 32


class Log(MemoryIndex):
    """Searches see the log up to `shown`; None: it does not say."""

    def __init__(self) -> None:
        super().__init__(IndexSettings())
        self.caps = replace(self.caps, consistency="token")
        self.shown: int | None = 0
        self.asked: list[tuple[str, int]] = []
        self.fault: Exception | None = None
        self.gate = asyncio.Event()
        self.gate.set()

    async def reached(self, ns: str, token: str, /) -> bool | None:
        self.asked.append((ns, int(token)))
        await self.gate.wait()
        if self.fault is not None:
            raise self.fault
        return None if self.shown is None else self.shown >= int(token)


@pytest.fixture
def log() -> Log:
    return Log()


@pytest.fixture
async def probes(log: Log) -> AsyncIterator[Probes]:
    made = Probes(log, 0.001)
    running = asyncio.create_task(made.run())
    yield made
    running.cancel()
    with suppress(asyncio.CancelledError):
        await running


async def until(condition) -> None:
    while not condition():  # noqa: ASYNC110 - what it waits for has no event
        await asyncio.sleep(0)


async def test_where_a_write_is_seen_at_once_nobody_asks(log: Log, probes: Probes):
    assert await probes.sees(NS, None) is True
    assert await probes.sees(NS, UNPROVED, 30) is None
    assert log.asked == []
    assert not probes.at_once
    assert Probes(MemoryIndex(IndexSettings()), 1).at_once


async def test_who_waits_is_told_when_it_is_seen(log: Log, probes: Probes):
    waiting = asyncio.create_task(probes.sees(NS, 7, 30))
    await until(lambda: len(log.asked) == 3)
    assert not waiting.done()
    log.shown = 7
    assert await waiting is True
    assert set(log.asked) == {(NS, 7)}


async def test_who_does_not_wait_longer_is_told_that_it_is_not_seen(log: Log, probes: Probes):
    assert await probes.sees(NS, 7, 0.01) is False
    assert await probes.sees(NS, 7, -1) is False
    await until(lambda: not probes._lines)  # nobody waits: nobody asks
    assert probes._waiting == 0


async def test_what_was_seen_a_moment_ago_is_not_asked_again(log: Log):
    probes = Probes(log, 3600)
    running = asyncio.create_task(probes.run())
    log.shown = 9
    assert await probes.sees(NS, 9, 30) is True
    assert await probes.sees(NS, 8, 30) is True
    assert log.asked == [(NS, 9)]
    running.cancel()


async def test_a_namespace_is_asked_once_for_all_who_came_since(log: Log, probes: Probes):
    log.gate.clear()
    told: list[tuple[int, bool]] = []

    def expect(token: int) -> None:
        assert probes.expect(NS, token, lambda seen: told.append((token, seen)))

    expect(3)
    await until(lambda: log.asked == [(NS, 3)])
    for token in (9, 4, 6):
        expect(token)
    log.shown = 9
    log.gate.set()
    await until(lambda: len(told) == 4)
    assert log.asked == [(NS, 3), (NS, 9)]
    assert sorted(told) == [(3, True), (4, True), (6, True), (9, True)]


async def test_the_lowest_is_asked_about_first_and_none_waits_for_a_higher_one(
    log: Log, probes: Probes
):
    high = asyncio.create_task(probes.sees(NS, 90, 30))
    await until(lambda: (NS, 90) in log.asked)
    low = asyncio.create_task(probes.sees(NS, 10, 30))
    other = asyncio.create_task(probes.sees(OTHER, 20, 30))
    await until(lambda: {(NS, 10), (OTHER, 20)} <= set(log.asked))
    log.shown = 20
    assert await low is True
    assert await other is True
    assert not high.done()
    log.shown = 90
    assert await high is True


async def test_an_index_that_is_away_has_not_shown_it(log: Log, probes: Probes):
    log.fault = IndexUnavailable("away")
    waiting = asyncio.create_task(probes.sees(NS, 7, 30))
    await until(lambda: len(log.asked) > module.UNSAID_MAX + 5)
    log.shown, log.fault = 7, None
    assert await waiting is True


async def test_an_index_that_never_says_is_not_asked_for_ever(log: Log, probes: Probes):
    log.shown = None
    assert await probes.sees(NS, 7, 30) is None
    assert len(log.asked) == module.UNSAID_MAX
    assert probes._waiting == 0
    log.shown = 7
    assert await probes.sees(NS, 7, 30) is True


async def test_so_many_wait_and_no_more(log: Log, probes: Probes, monkeypatch):
    monkeypatch.setattr(module, "WAITING_MAX", 2)
    told: list[int] = []
    assert probes.expect(NS, 1, lambda _: told.append(1))
    assert probes.expect(OTHER, 2, lambda _: told.append(2))
    assert not probes.expect(NS, 3, lambda _: told.append(3))
    assert await probes.sees(NS, 3, 30) is None
    log.shown = 3
    await until(lambda: len(told) == 2)
    assert await probes.sees(NS, 3, 30) is True


async def test_an_index_that_is_far_behind_is_asked_about_more_at_once(
    log: Log, probes: Probes, monkeypatch
):
    monkeypatch.setattr(module, "GROUPS_MAX", 3)
    told: list[int] = []
    for token in range(1, 11):
        probes.expect(NS, token, lambda _, token=token: told.append(token))
        before = len(log.asked)
        await until(lambda before=before: len(log.asked) > before + 1)
    assert len(probes._lines[NS].groups) == 3
    log.shown = 10
    await until(lambda: len(told) == 10)
    assert sorted(told) == list(range(1, 11))


@pytest.mark.parametrize(
    ("consistency", "token", "expected"),
    [
        ("strong", None, None),
        ("strong", "5", None),
        ("token", "5", 5),
        ("token", "0", 0),
        ("token", None, UNPROVED),
        ("token", "²", UNPROVED),
        ("token", "-5", UNPROVED),
        ("eventual", None, UNPROVED),
    ],
)
def test_what_there_is_of_a_write_to_prove_it(consistency, token, expected):
    caps = Capabilities(1, 1, 1, 1, consistency, single_writer=True)
    assert token_of(caps, Landed(token=token)) == expected
