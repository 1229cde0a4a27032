"""The ports of jobs over one process: what its contract cannot show."""

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from serve.config import Jobs, Store
from serve.errors import QuotaExceeded
from serve.items import Once, Settlement
from serve.jobs import claims, handed, job_owner, settling
from serve.jobs.job_tables import items
from serve.jobs.owner import StoreOwner
from tests.contract.work import EXPAND, documents, job, op, request, submitted


Open = Callable[..., StoreOwner]


@pytest.fixture
def opened(tmp_path: Path, clock: Callable[[], float]) -> Iterator[Open]:
    owners: list[StoreOwner] = []

    def open_(**rules: Any) -> StoreOwner:
        owners.append(StoreOwner(tmp_path / "s.db", Store(), clock, jobs=Jobs(**rules)))
        return owners[-1]

    yield open_
    for owner in owners:
        owner.close()


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The owners whose claims looked for something, when it rang."""
    seen: list[str] = []
    plain = claims.claim

    def claim(conn: Any, owner: str, *args: Any, **fields: Any) -> Any:
        seen.append(owner)
        return plain(conn, owner, *args, **fields)

    monkeypatch.setattr(claims, "claim", claim)
    monkeypatch.setattr(job_owner, "LOOK_S", 1000)
    return seen


async def waiting(owner: StoreOwner, *names: str) -> list[asyncio.Task[Any]]:
    """Claims that have looked, found nothing, and wait."""
    tasks = []
    for name in names:
        tasks.append(asyncio.create_task(owner.claim(name, "embed", 1, 1.0, 1000)))
        await passed(owner)
    return tasks


async def passed(owner: StoreOwner) -> None:
    """So long as whatever was set off needs."""
    for _ in range(20):
        await owner.find_job("acme", "none")


async def left(tasks: list[asyncio.Task[Any]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def test_a_ring_for_nothing_is_looked_after_once(opened: Open, looks: list[str]):
    owner = opened()
    tasks = await waiting(owner, "a", "b", "c")
    assert looks == ["a", "b", "c"]
    owner._bell.ring("embed")
    await passed(owner)
    assert looks == ["a", "b", "c", "a"]
    await left(tasks)


async def test_who_waits_for_another_stage_is_not_woken(opened: Open, looks: list[str]):
    owner = opened()
    tasks = await waiting(owner, "a")
    await submitted(owner, documents("x"))
    await passed(owner)
    assert looks == ["a"]
    await left(tasks)


async def test_one_who_was_woken_and_gave_up_passes_it_on(opened: Open, looks: list[str]):
    owner = opened()
    tasks = await waiting(owner, "a", "b")
    owner._bell.ring("embed")
    tasks[0].cancel()
    await passed(owner)
    assert looks[-1] == "b"
    await left(tasks)


async def test_who_is_woken_and_cannot_look_passes_it_on(
    opened: Open, looks: list[str], monkeypatch: pytest.MonkeyPatch
):
    owner = opened()
    first, second = await waiting(owner, "a", "b")
    plain = claims.claim

    def broken(conn: Any, name: str, *args: Any, **fields: Any) -> Any:
        if name == "a":
            raise QuotaExceeded("any error")
        return plain(conn, name, *args, **fields)

    monkeypatch.setattr(claims, "claim", broken)
    owner._bell.ring("embed")
    with pytest.raises(QuotaExceeded):
        await first
    await passed(owner)
    assert looks == ["a", "b", "b"]
    await left([second])


async def test_leases_outlast_an_absence_of_the_store(opened: Open, clock: Any):
    owner = opened()
    await submitted(owner, documents("x"))
    (item,) = (await owner.claim("w", "prepare", 1, 1e9, 0)).items
    owner.close()
    clock.advance(3600)
    owner = opened()
    await owner.tick()
    assert await owner.settle([Settlement(item.id, item.lease, "release")]) == [True]
    (item,) = (await owner.claim("w", "prepare", 1, 1e9, 0)).items
    clock.advance(16)
    await owner.tick()
    assert await owner.settle([Settlement(item.id, item.lease, "done")]) == [False]


async def test_a_tenant_has_room_for_so_many_open_jobs_and_items(opened: Open):
    owner = opened(open_jobs_max=2, open_items_max=5)
    first = await submitted(owner, documents("abc"))
    with pytest.raises(QuotaExceeded) as caught:
        await submitted(owner, documents("xyz"))
    assert caught.value.code == "open_items"
    await submitted(owner, documents("ab"))
    with pytest.raises(QuotaExceeded) as caught:
        await submitted(owner, [])
    assert caught.value.code == "open_jobs"
    await submitted(owner, documents("abc"), "other")
    await owner.change_job(op(), "acme", first, "cancel")
    await submitted(owner, documents("abc"))


async def test_idempotency_keys_are_forgotten_when_their_time_is_over(opened: Open, clock: Any):
    owner = opened()
    await owner.submit_job(op(), job(), documents("a"), Once("key", "print", 60))
    clock.advance(61)
    await owner.tick()
    again = await owner.submit_job(op(), job(), documents("a"), Once("key", "another", 60))
    assert not again.replayed


async def test_jobs_are_forgotten_many_at_once(opened: Open, clock: Any):
    owner = opened(kept_s=60, idempotency_kept_s=60)
    for _ in range(30):
        await submitted(owner, [])
    clock.advance(61)
    await owner.tick()
    assert await owner.list_jobs("acme", None, [], "", 100) == []


async def test_lines_of_a_file_need_room_for_items_as_others_do(opened: Open, clock: Any):
    owner = opened(open_jobs_max=2, open_items_max=5)
    other = await submitted(owner, documents("xy"))
    await submitted(owner, [EXPAND], kind="embeddings")
    expand = (await owner.claim("w", "prepare", 9, 1e9, 0)).items[-1]
    part = [request(name) for name in "abc"]
    assert await owner.add_items(expand.id, expand.lease, 0, part)
    with pytest.raises(QuotaExceeded) as caught:
        await owner.add_items(expand.id, expand.lease, 3, [request("d")])
    assert caught.value.code == "open_items"
    assert await owner.add_items(expand.id, expand.lease, 0, part)  # a repeat needs none
    await owner.leave("w")
    await owner.change_job(op(), "acme", other, "cancel")
    expand = (await owner.claim("w2", "prepare", 9, 1e9, 0)).items[-1]
    assert await owner.add_items(expand.id, expand.lease, 0, [*part, request("d"), request("e")])


async def test_lines_of_a_file_need_room_for_tokens_as_others_do(opened: Open):
    owner = opened(open_tokens_max=100)
    await submitted(owner, [EXPAND], kind="embeddings")
    (expand,) = (await owner.claim("w", "prepare", 9, 1e9, 0)).items
    assert await owner.add_items(expand.id, expand.lease, 0, [request("a", cost=90)])
    with pytest.raises(QuotaExceeded) as caught:
        await owner.add_items(expand.id, expand.lease, 1, [request("b", cost=11)])
    assert caught.value.code == "open_tokens"


async def test_jobs_expire_a_few_in_one_transaction(opened: Open, clock: Any):
    """Each has a place in the fair order to give up; others wait meanwhile."""
    owner = opened()
    made = [await submitted(owner, documents("ab"), expires_at=clock.now + 1) for _ in range(25)]
    clock.advance(1)

    async def open_ones() -> int:
        jobs = [await owner.find_job("acme", each) for each in made]
        return sum(not seen.job.ended for seen in jobs if seen is not None)

    asked = await owner._do(lambda conn, now: handed.expire(conn, now, 1000))
    assert (asked, await open_ones()) == (1000, 15)  # there are more: come again
    await owner.tick()
    assert await open_ones() == 0
    assert await owner._do(lambda conn, now: handed.expire(conn, now, 1000)) == 0


async def test_who_takes_all_there_is_wakes_nobody_else(opened: Open, looks: list[str]):
    owner = opened()
    tasks = []
    for name in ("a", "b"):
        tasks.append(asyncio.create_task(owner.claim(name, "embed", 9, 1e9, 1000)))
        await passed(owner)
    await submitted(owner, [request("x"), request("y")])
    await passed(owner)
    assert looks == ["a", "b", "a"]
    await left(tasks)


async def test_a_lost_ring_is_made_up_for_by_a_look(opened: Open, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(job_owner, "LOOK_S", 0.01)
    owner = opened()
    await submitted(owner, [request("x")])
    await owner.claim("w", "embed", 1, 1e9, 0)
    waits = asyncio.create_task(owner.claim("a", "embed", 1, 1e9, 1000))
    await passed(owner)
    free = sa.update(items).values(state="ready")  # and its caller is gone before he rings
    owner._committer.submit(lambda conn, _now: conn.execute(free)).result(30)
    async with asyncio.timeout(30):
        assert len((await waits).items) == 1


async def test_a_chore_that_fails_keeps_no_other_from_being_done(
    opened: Open, clock: Any, monkeypatch: pytest.MonkeyPatch
):
    def broken(*_: Any) -> int:
        raise QuotaExceeded("any error")

    owner = opened()
    await submitted(owner, documents("x"))
    (item,) = (await owner.claim("w", "prepare", 1, 1e9, 0)).items
    await owner.tick()
    monkeypatch.setattr(settling, "due", broken)
    clock.advance(16)
    with pytest.raises(QuotaExceeded):
        await owner.tick()
    assert await owner.settle([Settlement(item.id, item.lease, "done")]) == [False]


def test_a_file_needs_a_clock(tmp_path: Path):
    with pytest.raises(ValueError, match="clock"):
        StoreOwner(tmp_path / "s.db", Store(), None)
