"""A worker's loop, over a queue in memory."""

import asyncio
import random
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import pytest

from serve.config import Jobs, Worker
from serve.errors import BadInput, Conflict, IndexUnavailable, Internal, StoreUnavailable
from serve.items import Claim, Item, Settlement
from serve.jobs import runner as module
from serve.jobs.faults import Retries
from serve.jobs.runner import Runner


class Shelf:
    """Hands out claims, and keeps what is said. `away` counts the calls that will still fail."""

    def __init__(self) -> None:
        self.claims: dict[str, asyncio.Queue[Claim]] = {
            stage: asyncio.Queue() for stage in ("prepare", "embed")
        }
        self.settled: dict[int, Settlement] = {}
        self.refused: set[int] = set()
        self.unkept: set[int] = set()
        self.cannot: Exception = Internal("cannot keep it")
        self.lost: set[int] = set()
        self.away = 0
        self.said = asyncio.Event()
        self.kept: asyncio.Queue[Sequence[int]] = asyncio.Queue()
        self.left: list[str] = []

    def put(self, *ids: int, stage: Any = "embed", task: Any = "document", **fields: Any) -> None:
        some = tuple(Item(n, 1, "job", n, f"d{n}", task, stage, 1.0, 0, {}) for n in ids)
        self.claims[stage].put_nowait(Claim(some, **fields))

    def check(self) -> None:
        if self.away:
            self.away -= 1
            raise StoreUnavailable("away")

    async def claim(self, owner: str, stage: Any, *_bounds: Any) -> Claim:
        self.check()
        return await self.claims[stage].get()

    async def keep(self, owner: str, held: Sequence[int]) -> frozenset[int]:
        self.kept.put_nowait(held)
        self.check()
        return frozenset(self.lost & set(held))

    async def settle(self, settlements: Sequence[Settlement]) -> Sequence[bool]:
        self.check()
        if self.unkept & {one.item for one in settlements if one.result}:
            raise self.cannot
        self.settled |= {one.item: one for one in settlements}
        self.said.set()
        return [one.item not in self.refused for one in settlements]

    async def leave(self, owner: str) -> None:
        self.check()
        self.left.append(owner)

    async def words(self, count: int) -> dict[int, str]:
        """What is said of the items, once it is said of so many."""
        while len(self.settled) < count:
            self.said.clear()
            await self.said.wait()
        return {each: one.word for each, one in sorted(self.settled.items())}


@pytest.fixture
def shelf(monkeypatch: pytest.MonkeyPatch) -> Shelf:
    monkeypatch.setattr(module, "AWAY_S", 0.0)
    return Shelf()


async def turns(count: int) -> None:
    """Let the others of this loop go on."""
    for _ in range(count):
        await asyncio.sleep(0)


async def done(items: Sequence[Item], _claim: Claim) -> list[Settlement]:
    return [Settlement(item.id, item.lease, "done") for item in items]


def worker(
    shelf: Any, handler: Any = done, *, beats_s: float = 5.0, claims: int = 2, gate: Any = None
) -> Runner:
    return Runner(
        shelf,
        {"document": handler, "delete": done},
        owner="me",
        worker=Worker(claims_max=claims),
        rules=Jobs(heartbeat_s=beats_s),
        retries=Retries(60, 2, 600, random.Random(1)),  # noqa: S311 - not a secret
        gates={"embed": gate} if gate else {},
    )


@asynccontextmanager
async def running(runner: Runner) -> AsyncIterator[None]:
    task = asyncio.create_task(runner.run())
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def test_items_are_given_to_the_handler_of_their_task(shelf: Shelf):
    seen = []

    async def handler(items: Sequence[Item], claim: Claim) -> list[Settlement]:
        seen.append([item.id for item in items])
        return await done(items, claim)

    shelf.put(1, 2)
    shelf.put(3, stage="prepare")
    shelf.put(4, task="delete")
    runner = worker(shelf, handler)
    async with running(runner):
        assert await shelf.words(4) == dict.fromkeys((1, 2, 3, 4), "done")
        await turns(3)
    assert sorted(seen) == [[1, 2], [3]]
    assert (runner.done.claimed, runner.done.settled, runner.done.lost) == (4, 4, 0)
    assert runner.done.words == {("document", "done"): 3, ("delete", "done"): 1}
    took = [one.labels for one in runner.done.took.read("headrace_item_seconds")]
    assert sorted(took) == [("delete",), ("document",), ("document",)]


async def test_nothing_is_claimed_while_the_gate_of_its_stage_is_shut(shelf: Shelf):
    waits, claimed = [0.001, 0.001, 0.0], []
    claim = shelf.claim

    async def gate() -> float:
        return waits.pop(0) if waits else 0.0

    async def noted(owner: str, stage: Any, *bounds: Any) -> Claim:
        claimed.append((stage, len(waits)))
        return await claim(owner, stage, *bounds)

    shelf.claim = noted
    shelf.put(1)
    async with running(worker(shelf, claims=1, gate=gate)):
        assert await shelf.words(1) == {1: "done"}
    assert next(left for stage, left in claimed if stage == "embed") == 0
    assert claimed[0][0] == "prepare"  # which has no gate


async def test_a_worker_that_leaves_waits_for_no_gate(shelf: Shelf, monkeypatch):
    monkeypatch.setattr(module, "GATE_S_MAX", 1000.0)
    asked = asyncio.Event()

    async def gate() -> float:
        asked.set()
        return 1000.0

    runner = worker(shelf, gate=gate)
    async with running(runner):
        await asked.wait()
        await runner.drain(50)
    assert shelf.left == ["me"]
    assert runner.done.claimed == 0


async def test_what_a_handler_raises_befalls_all_its_items(shelf: Shelf):
    async def handler(_items: Sequence[Item], _claim: Claim) -> list[Settlement]:
        raise IndexUnavailable("away")

    shelf.put(1, 2)
    async with running(worker(shelf, handler)):
        assert await shelf.words(2) == {1: "retry", 2: "retry"}
    assert shelf.settled[1].delay_s > 40
    assert shelf.settled[1].fault is not None
    assert shelf.settled[1].fault.kind == "network"


@pytest.mark.parametrize("error", [KeyError("our fault"), None])
async def test_a_fault_of_ours_is_tried_again_and_the_worker_goes_on(
    shelf: Shelf, error: Exception | None
):
    async def handler(items: Sequence[Item], claim: Claim) -> list[Settlement]:
        if items[0].id == 1 and error:
            raise error
        return await done(items[1:] if items[0].id == 1 else items, claim)

    shelf.put(1)
    shelf.put(2)
    shelf.put(3, task="request")  # has no handler
    async with running(worker(shelf, handler, claims=1)):
        assert await shelf.words(3) == {1: "retry", 2: "done", 3: "retry"}
    for number in (1, 3):
        fault = shelf.settled[number].fault
        assert fault is not None
        assert (fault.kind, fault.code) == ("server", "internal_error")


async def test_a_bad_item_takes_no_other_of_its_batch_with_it(shelf: Shelf):
    async def handler(items: Sequence[Item], claim: Claim) -> list[Settlement]:
        if any(item.id == 2 for item in items):
            raise BadInput("no")
        return await done(items, claim)

    shelf.put(1, 2, 3)
    async with running(worker(shelf, handler)):
        assert await shelf.words(3) == {1: "done", 2: "dead", 3: "done"}


@pytest.mark.parametrize("error", [Internal("cannot keep it"), Conflict("never")])
async def test_what_the_store_cannot_keep_fails_alone(shelf: Shelf, error: Exception):
    async def handler(items: Sequence[Item], _claim: Claim) -> list[Settlement]:
        return [Settlement(item.id, item.lease, "done", result={"a": 1}) for item in items]

    shelf.unkept, shelf.cannot = {2}, error
    shelf.put(1, 2, 3)
    async with running(worker(shelf, handler)):
        assert await shelf.words(3) == {1: "done", 2: "retry", 3: "done"}


async def test_a_lost_lease_is_counted_and_not_repeated(shelf: Shelf):
    shelf.refused = {1}
    shelf.put(1, 2)
    runner = worker(shelf)
    async with running(runner):
        await shelf.words(2)
        await asyncio.sleep(0)
    assert (runner.done.settled, runner.done.lost) == (1, 1)
    assert runner.done.words == {("document", "done"): 1}


async def test_nothing_is_lost_while_the_store_is_away_for_a_while(shelf: Shelf):
    shelf.away = 20
    shelf.put(1)
    async with running(worker(shelf)):
        await shelf.words(1)
        shelf.away = 20  # claims that wait fail, and settlements
        shelf.put(2, stage="prepare")
        shelf.put(3)
        assert await shelf.words(3) == dict.fromkeys((1, 2, 3), "done")


async def test_what_was_done_is_kept_however_long_the_store_is_away(
    shelf: Shelf, monkeypatch: pytest.MonkeyPatch
):
    runner = worker(shelf)
    shelf.away = 100
    loop = asyncio.get_running_loop()
    start, steps = loop.time(), iter(range(10**6))
    monkeypatch.setattr(loop, "time", lambda: start + 60 * next(steps))
    await runner._settle("document", [Settlement(1, 1, "done")])
    assert shelf.settled[1].word == "done"
    assert runner.done.settled == 1


async def test_a_worker_says_what_it_holds(shelf: Shelf):
    gate = asyncio.Event()

    async def handler(items: Sequence[Item], claim: Claim) -> list[Settlement]:
        await gate.wait()
        return await done(items, claim)

    shelf.put(1, 2)
    shelf.put(3, stage="prepare")
    async with running(worker(shelf, handler, beats_s=0.001)):
        while sorted(await shelf.kept.get()) != [1, 2, 3]:
            pass
        shelf.away = 1  # the next beat fails, those after it do not
        gate.set()
        while await shelf.kept.get():
            pass
        assert await shelf.words(3)


async def test_a_beat_that_was_not_heard_is_repeated_soon(
    shelf: Shelf, monkeypatch: pytest.MonkeyPatch
):
    """A lost call and another whole pause would outlast a lease."""
    pauses: list[float] = []

    async def record(seconds: float) -> None:
        pauses.append(seconds)
        if len(pauses) == 3:
            raise asyncio.CancelledError

    monkeypatch.setattr(asyncio, "sleep", record)
    shelf.away = 1
    with pytest.raises(asyncio.CancelledError):
        await worker(shelf)._beat()
    assert pauses == [5.0, module.AWAY_S, 5.0]


async def test_work_of_which_all_is_lost_is_stopped_and_the_worker_goes_on(shelf: Shelf):
    stopped = []

    async def handler(items: Sequence[Item], claim: Claim) -> list[Settlement]:
        if items[0].id in (1, 3):
            try:
                await asyncio.Event().wait()
            finally:
                stopped.append(items[0].id)
        return await done(items, claim)

    shelf.lost = {1, 2, 3}
    shelf.put(1, 2)
    shelf.put(3, 4)  # of these one is still its own
    runner = worker(shelf, handler, beats_s=0.001)
    async with running(runner):
        shelf.put(5)  # has no place before the first claim is given up
        assert await shelf.words(1) == {5: "done"}
        while sorted(await shelf.kept.get()) != [3, 4]:
            pass
        assert stopped == [1]
        assert runner.done.lost == 2


async def test_an_item_that_crashed_its_worker_is_worked_on_alone(shelf: Shelf):
    inside: set[int] = set()
    crowds: dict[int, set[int]] = {}
    gate = asyncio.Event()

    async def handler(items: Sequence[Item], claim: Claim) -> list[Settlement]:
        inside.update(item.id for item in items)
        for item in items:
            crowds[item.id] = set(inside)
        if items[0].id == 1:
            await gate.wait()
        await turns(5)
        inside.difference_update(item.id for item in items)
        return await done(items, claim)

    shelf.put(1)
    shelf.put(2, stage="prepare", alone=True)
    async with running(worker(shelf, handler)):
        await turns(20)
        assert inside == {1}
        shelf.put(3)  # comes while that one waits to be alone
        shelf.put(4, stage="prepare")
        await turns(20)
        gate.set()
        await shelf.words(4)
    assert crowds[2] == {2}
    assert all(2 not in crowd for number, crowd in crowds.items() if number != 2)


# Drain


async def test_an_idle_worker_leaves_at_once(shelf: Shelf):
    runner = worker(shelf)
    async with running(runner):
        await asyncio.sleep(0)
        await runner.drain(1000)
        assert shelf.left == ["me"]


async def test_a_worker_that_leaves_finishes_what_it_has_and_claims_no_more(shelf: Shelf):
    gate, begun = asyncio.Event(), asyncio.Event()

    async def handler(items: Sequence[Item], claim: Claim) -> list[Settlement]:
        begun.set()
        await gate.wait()
        return await done(items, claim)

    shelf.put(1)
    runner = worker(shelf, handler)
    async with running(runner):
        await begun.wait()
        leaving = asyncio.create_task(runner.drain(1000))
        await turns(5)
        shelf.put(2)
        gate.set()
        await leaving
        assert shelf.left == ["me"]
        assert await shelf.words(1) == {1: "done"}
        await runner._ended.wait()
    assert shelf.claims["embed"].qsize() == 1


async def test_what_is_not_finished_in_time_is_stopped_and_given_back(shelf: Shelf):
    begun, stopped = asyncio.Event(), asyncio.Event()

    async def handler(_items: Sequence[Item], _claim: Claim) -> list[Settlement]:
        begun.set()
        try:
            await asyncio.Event().wait()
        finally:
            stopped.set()
        return []

    shelf.put(1)
    runner = worker(shelf, handler)
    async with running(runner):
        await begun.wait()
        await runner.drain(0)
        assert shelf.left == ["me"]
        await stopped.wait()
        await runner._ended.wait()
    assert shelf.settled == {}


async def test_who_leaves_does_not_wait_for_a_store_that_is_away(shelf: Shelf):
    runner = worker(shelf)
    async with running(runner):
        await turns(5)
        shelf.away = 10**9
        shelf.put(1)
        await turns(20)
        await runner.drain(0)
        await runner._ended.wait()
    assert shelf.settled == {}


async def test_a_worker_leaves_also_while_the_store_is_away(shelf: Shelf):
    runner = worker(shelf)
    async with running(runner):
        await asyncio.sleep(0)
        shelf.away = 10**9
        await runner.drain(1000)
        assert shelf.left == []


async def test_a_fault_of_the_loop_ends_it(shelf: Shelf, monkeypatch: pytest.MonkeyPatch):
    async def broken(*_args: Any) -> Claim:
        raise ZeroDivisionError

    monkeypatch.setattr(shelf, "claim", broken)
    runner = worker(shelf)
    with pytest.RaisesGroup(*[ZeroDivisionError] * 4):
        await runner.run()
    await runner.drain(1000)
