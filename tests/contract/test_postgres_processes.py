"""Many processes over one Postgres, step by step: what one does while another is half-way."""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import pytest
import sqlalchemy as sa

from bench.postgres_server import careless, emptied, url
from serve.config import Store as Settings
from serve.jobs import order, progress, settling
from serve.jobs.job_tables import flows, items, jobs
from serve.jobs.owner import StoreOwner
from serve.jobs.postgres import CHORES_LOCK
from tests.contract.work import (
    claimed,
    documents,
    found,
    one,
    op,
    settle,
    settlement,
    submitted,
    tenant,
)
from tests.property.handed import claim


pytestmark = pytest.mark.postgres


@pytest.fixture
async def store(clock: Callable[[], float]) -> AsyncIterator[Any]:
    careless()
    with emptied() as place:
        opened = StoreOwner(place, Settings(), clock)
        await claimed(opened, "prepare")  # the clocks' rows are there
        yield opened
        opened.close()


@pytest.fixture
def other(store: Any) -> Iterator[sa.Connection]:
    """Another process's transaction, undone unless the test commits it."""
    with store._committer._engine.connect() as conn:
        yield conn


def names(given: Any) -> str:
    return "".join(item.name[0] for item in given.items)


async def at_once(store: Any, work: Callable[[sa.Connection, float], Any]) -> Any:
    """Work that may wait for nobody's lock."""

    def hurried(conn: sa.Connection, now: float) -> Any:
        conn.execute(sa.text("SET LOCAL lock_timeout = '1s'"))
        return work(conn, now)

    return await store._do(hurried)


async def held_up(store: Any) -> None:
    """Until somebody waits for a lock."""
    waits = sa.text("SELECT count(*) FROM pg_locks WHERE NOT granted")
    for _ in range(2000):
        if await store._do(lambda conn, _now: conn.execute(waits).scalar_one()):
            return
    pytest.fail("nobody waits")


async def test_the_clock_stands_while_what_waits_is_moved(store: Any, other: sa.Connection):
    await tenant(store, "a")
    await tenant(store, "b")
    await submitted(store, documents([f"a{n}" for n in range(20)]), "a")
    other.execute(sa.select(items.c.id).with_for_update())
    assert names(await claimed(store, "prepare")) == ""
    await submitted(store, documents("b"), "b")
    other.rollback()
    assert "b" in names(await claimed(store, "prepare", 2))


async def test_the_clock_stands_while_a_claim_holds_more_than_it_takes(
    store: Any, other: sa.Connection
):
    await tenant(store, "a")
    await tenant(store, "b")
    await submitted(store, documents([f"a{n}" for n in range(20)]), "a")
    assert len(claim(other, "w1", "prepare", 20, now=1000.0, cost=1.0).items) == 1
    seen = await at_once(store, lambda conn, now: claim(conn, "w2", "prepare", 20, now=now))
    assert names(seen) == ""
    other.commit()
    await submitted(store, documents("b"), "b")
    assert "b" in names(await claimed(store, "prepare", 2))


async def test_a_weight_that_stays_waits_for_nobody(store: Any, other: sa.Connection):
    await tenant(store)
    await submitted(store, documents("a"))
    other.execute(sa.select(flows).with_for_update())
    await at_once(store, lambda conn, _now: order.reweigh(conn, "acme", 1.0))


async def test_a_job_stops_around_what_a_claim_holds_and_comes_back_to_it(
    store: Any, other: sa.Connection, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(progress.stop, "__defaults__", (2,))
    await tenant(store)
    kept = await submitted(store, documents("abcde"))
    await store.change_job(op(), "acme", kept, "cancel")
    ready = sa.select(items.c.id).where(items.c.state == "ready").order_by(items.c.id)
    other.execute(ready.limit(1).with_for_update())
    await at_once(store, lambda conn, now: progress.go_on_moving(conn, now, 1000))
    assert (await found(store, kept)).cancelled == 4
    other.rollback()
    await store.tick()
    assert (await found(store, kept)).state == "cancelled"


async def test_who_leaves_gives_back_what_a_claim_under_way_gets(store: Any, other: sa.Connection):
    await tenant(store)
    await submitted(store, documents("a"))
    await store.keep("w", [])
    assert names(claim(other, "w", "prepare", 9, now=1000.0)) == "a"
    leaving = asyncio.create_task(store.leave("w"))
    await held_up(store)
    other.commit()
    await leaving
    assert names(await claimed(store, "prepare", owner="w2")) == "a"


async def test_what_another_owner_has_by_now_stays_with_it(store: Any, other: sa.Connection):
    await tenant(store)
    await submitted(store, documents("a"))
    item = await one(store, "prepare", "w1")
    settling.settle(other, [settlement(item, "release")], attempts_max=5, now=1000.0)
    (again,) = claim(other, "w2", "prepare", 9, now=1000.0).items
    leaving = asyncio.create_task(store.leave("w1"))
    await held_up(store)
    other.commit()
    await leaving
    await settle(store, [again], "done")


async def test_a_process_that_starts_revives_no_dead_owner(store: Any, clock: Any):
    await tenant(store)
    await submitted(store, documents("a"))
    await one(store, "prepare", "dies")
    for _ in range(4):
        clock.advance(5)
        another = StoreOwner(url(), Settings(), clock)
        await another.tick()
        another.close()
    assert names(await claimed(store, "prepare", owner="lives")) == "a"


async def test_one_process_at_a_time_does_chores(store: Any, other: sa.Connection, clock: Any):
    await tenant(store)
    await submitted(store, documents("a"))
    await settle(store, [await one(store, "prepare")], "release", delay_s=5)
    clock.advance(5)
    other.execute(sa.select(sa.func.pg_advisory_xact_lock(CHORES_LOCK)))
    await store.tick()
    assert names(await claimed(store, "prepare")) == ""
    other.rollback()
    await store.tick()
    assert names(await claimed(store, "prepare")) == "a"


async def test_a_claim_waits_for_nobody_who_holds_a_job(
    store: Any, other: sa.Connection, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(progress.stop, "__defaults__", (1,))
    await tenant(store)
    kept = await submitted(store, documents("ab"))
    await store.change_job(op(), "acme", kept, "cancel")
    other.execute(sa.select(jobs.c.id).with_for_update())
    seen = await at_once(store, lambda conn, now: claim(conn, "w", "prepare", 9, now=now))
    assert names(seen) == ""
    other.rollback()
    assert (await found(store, kept)).cancelled == 1
    assert names(await claimed(store, "prepare")) == ""
    assert (await found(store, kept)).state == "cancelled"


async def test_who_moves_items_back_waits_for_no_claim(store: Any, other: sa.Connection):
    await tenant(store)
    await submitted(store, documents("abc"), priority=10)
    first = sa.select(items.c.id).order_by(items.c.tag).limit(1)
    other.execute(first.with_for_update())
    line = order.Line("prepare", "bulk", "acme")
    given = await at_once(
        store, lambda conn, _now: order.tags(conn, line, weight=1.0, costs=[5.0], priority=90)
    )
    assert given == [0.0]
    other.rollback()
    tags = sa.select(items.c.tag).order_by(items.c.seq)
    seen = await store._do(lambda conn, _now: conn.execute(tags).scalars().all())
    assert seen == [0.0, 15.0, 25.0]
