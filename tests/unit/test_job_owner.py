"""The ports of jobs over one process: what its contract cannot show."""

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from serve.config import Jobs, Store
from serve.errors import QuotaExceeded
from serve.items import Once, Settlement
from serve.jobs import claims
from serve.jobs.owner import StoreOwner
from tests.contract.work import documents, job, op, submitted


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
    """The owners whose claims looked for something."""
    seen: list[str] = []
    plain = claims.claim

    def claim(conn: Any, owner: str, *args: Any, **fields: Any) -> Any:
        seen.append(owner)
        return plain(conn, owner, *args, **fields)

    monkeypatch.setattr(claims, "claim", claim)
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
    owner = opened(kept_s=60)
    for _ in range(30):
        await submitted(owner, [])
    clock.advance(61)
    await owner.tick()
    assert await owner.list_jobs("acme", None, [], "", 100) == []
