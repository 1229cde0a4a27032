"""What the Store forgets and folds: bounded in one transaction, and nothing too early."""

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from serve.admission.usage import SESSIONS_MAX
from serve.config import Store
from serve.errors import Conflict, QuotaExceeded
from serve.jobs import schema, usage
from serve.jobs.owner import HOUR_S, StoreOwner
from serve.jobs.upkeep import Chore
from serve.records import Collection, UsageRow


DAY_S = 86_400.0


@pytest.fixture
def conn() -> Iterator[sa.Connection]:
    engine = sa.create_engine("sqlite://")
    with engine.begin() as conn:
        schema.create(conn, 1.0)
        yield conn
    engine.dispose()


@pytest.fixture
def owner(tmp_path: Path, clock: Callable[[], float]) -> Iterator[StoreOwner]:
    settings = Store(commit_ops_max=2, audit_kept_s=DAY_S)
    owner = StoreOwner(tmp_path / "store.db", settings, clock, collections_max=2)
    yield owner
    owner.close()


def used(key: str = "k", tokens: int = 1, month: str = "2026-11") -> UsageRow:
    return UsageRow(month, "acme", key, "bulk", 1, tokens, 0)


def rows(conn: sa.Connection) -> dict[tuple[str, str], int]:
    kept = schema.usage_month.c
    found = conn.execute(sa.select(kept.key, kept.session, kept.tokens))
    return {(key, session): tokens for key, session, tokens in found}


# A chore


@pytest.mark.parametrize("more", [True, False])
def test_a_chore_comes_again_at_once_only_while_there_is_more(conn: sa.Connection, more: bool):
    done: list[float] = []

    def work(_conn: sa.Connection, now: float, rows_max: int) -> int:
        done.append(now)
        return rows_max if more else rows_max - 1

    chore = Chore(work, every_s=10, rows_max=3)
    for now in (1.0, 2.0, 10.9, 11.0, 20.9):
        chore(conn, now)
    assert done == ([1.0, 2.0, 10.9, 11.0, 20.9] if more else [1.0, 11.0])


# Usage


def test_sessions_that_ended_become_one_row_per_key_and_class(conn: sa.Connection):
    usage.report(conn, "r1/1", [used(tokens=5), used("j", tokens=7)], 0.0)
    usage.report(conn, "r2/1", [used(tokens=6)], 0.0)
    usage.report(conn, "r1/2", [used(tokens=100)], 1.0)
    assert usage.fold(conn, usage.OVER_S, 10) == 0
    assert usage.fold(conn, usage.OVER_S + 0.5, 10) == 3
    assert rows(conn) == {("k", ""): 11, ("j", ""): 7, ("k", "r1/2"): 100}
    assert usage.fold(conn, usage.OVER_S + 1.5, 10) == 1
    assert rows(conn) == {("k", ""): 111, ("j", ""): 7}
    assert usage.fold(conn, 100 * usage.OVER_S, 10) == 0  # what was folded stays


def test_nothing_is_folded_that_a_replica_may_still_report():
    """It keeps the sessions of so many days before today's."""
    assert usage.OVER_S >= (SESSIONS_MAX + 1) * DAY_S + HOUR_S


def test_a_report_keeps_its_session_open(conn: sa.Connection):
    usage.report(conn, "s", [used()], 0.0)
    usage.report(conn, "s", [used()], 10.0)  # with nothing new
    assert usage.fold(conn, usage.OVER_S + 5, 10) == 0


def test_folding_goes_in_portions(conn: sa.Connection):
    for session in range(5):
        usage.report(conn, f"s{session}", [used()], float(-session))
    assert [usage.fold(conn, 2 * usage.OVER_S, 2) for _ in range(4)] == [2, 2, 1, 0]
    assert rows(conn) == {("k", ""): 5}


def test_old_months_go_in_portions(conn: sa.Connection):
    months = ["2024-01", "2024-02", "2024-12", "2025-01"]
    for session in ("", "s"):
        usage.report(conn, session, [used(month=month) for month in months], 0.0)
    in_january_2026 = 1_767_225_600.0
    assert [usage.purge(conn, in_january_2026, 3) for _ in range(3)] == [3, 1, 0]
    kept = conn.execute(sa.select(schema.usage_month.c.month).distinct()).scalars()
    assert sorted(kept) == ["2024-12", "2025-01"]


async def test_the_owner_folds_every_hour(owner: StoreOwner, clock: Any):
    await owner.report_usage("s", [used()])

    async def sessions() -> list[str]:
        def read(conn: sa.Connection, _now: float) -> list[str]:
            return sorted(session for _, session in rows(conn))

        return await asyncio.wrap_future(owner._committer.submit(read))

    clock.advance(usage.OVER_S + 1)
    await owner.find_key("k")
    await owner.report_usage("t", [used()])
    assert await sessions() == ["", "t"]
    clock.advance(usage.OVER_S + HOUR_S)
    await owner.find_key("k")
    assert await sessions() == [""]


# The audit log


async def test_the_log_forgets_after_its_time_in_portions(owner: StoreOwner, clock: Any):
    for number in range(6):
        await owner.set_tenant(f"{number}", f"t{number}", "free", None, "cli:ann@host")
    clock.advance(10)
    await owner.set_tenant("later", "later", "free", None, "cli:ann@host")
    clock.advance(DAY_S - 10)
    await owner.find_key("k")
    assert len(await owner.list_audit(None, None, 100)) == 7
    clock.advance(HOUR_S)
    await owner.set_tenant("last", "last", "free", None, "cli:ann@host")  # 4 of them go
    await owner.find_key("k")
    entries = await owner.list_audit(None, None, 100)
    assert [(entry.number, entry.tenant) for entry in entries] == [(8, "last")]


async def test_numbers_never_come_back(owner: StoreOwner, clock: Any):
    await owner.set_tenant("1", "a", "free", None, "cli:ann@host")
    clock.advance(2 * DAY_S)
    await owner.find_key("k")
    assert await owner.list_audit(None, None, 100) == []
    await owner.set_tenant("2", "b", "free", None, "cli:ann@host")
    assert [entry.number for entry in await owner.list_audit(None, None, 100)] == [2]


# Collections


async def test_live_collections_are_bounded_in_the_transaction(owner: StoreOwner):
    def collection(name: str) -> Collection:
        return Collection(name * 32, "acme", name, "m", "r1", 4, 1.0)

    made = await asyncio.gather(
        *(owner.create_collection(name, collection(name)) for name in "abcde"),
        return_exceptions=True,
    )
    refused = [each for each in made if isinstance(each, QuotaExceeded)]
    assert [each.code for each in refused] == ["collections"] * 3
    (first, second) = await owner.list_collections("acme")
    with pytest.raises(Conflict):
        await owner.create_collection("again", first)
    await owner.delete_collection("d", "acme", second.name)
    await owner.create_collection("z", collection("z"))
