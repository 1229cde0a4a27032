"""The Store's owner process: lock, file, group commit, failure, and what kill -9 leaves."""

import asyncio
import os
import signal
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from serve.config import Store
from serve.errors import Conflict, Internal, NotFound, Overloaded, StoreUnavailable
from serve.items import Job, NewItem, new_id
from serve.jobs import tables
from serve.jobs.owner import StoreOwner
from serve.records import Collection, Key


REPOSITORY = Path(__file__).parents[2]

Open = Callable[..., StoreOwner]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "data" / "store.db"


@pytest.fixture
def opened(path: Path, clock: Callable[[], float]) -> Iterator[Open]:
    """Opens owners of `path`; closes them at the end, in reverse order."""
    owners: list[StoreOwner] = []

    def open_(**settings: Any) -> StoreOwner:
        owners.append(StoreOwner(path, Store(**{"lock_wait_s": 0.01, **settings}), clock))
        return owners[-1]

    yield open_
    for owner in reversed(owners):
        owner.close()


@contextmanager
def held(owner: StoreOwner) -> Iterator[Future[None]]:
    """Keep the owner's thread inside an operation, so that what comes meanwhile waits."""
    inside, go_on = threading.Event(), threading.Event()

    def block(_conn: sa.Connection, _now: float) -> None:
        inside.set()
        go_on.wait(30)

    future = owner._committer.submit(block)
    inside.wait(30)
    try:
        yield future
    finally:
        go_on.set()
        wait([future], 30)


@contextmanager
def on_event(name: str, fails: Callable[..., None]) -> Iterator[None]:
    sa.event.listen(sa.Engine, name, fails)
    try:
        yield
    finally:
        sa.event.remove(sa.Engine, name, fails)


def disk_full(*_args: object) -> None:
    raise sa.exc.OperationalError("COMMIT", {}, sqlite3.OperationalError("disk is full"))


def remove(path: Path) -> None:
    path.unlink()


def exists(path: Path) -> bool:
    return path.exists()


def job(uuid: str) -> Job:
    return Job(new_id("job", 1.0), "acme", "k", "documents", "bulk", 1.0, 1.0, collection=uuid)


def units(*names: str) -> list[NewItem]:
    return [NewItem(name, "document", "embed", 1.0, {}) for name in names]


def key(name: str, tenant: str = "acme") -> Key:
    return Key(name, tenant, "free", "ab" * 32, 1.0, family=name)


def collection(name: str = "docs", uuid: str = "0" * 32) -> Collection:
    return Collection(uuid, "acme", name, "m", "r1", 4, 1.0)


async def started(*calls: Any) -> list[asyncio.Task[Any]]:
    """Calls as tasks that have queued their operation."""
    tasks = [asyncio.ensure_future(call) for call in calls]
    await asyncio.sleep(0)
    return tasks


# Group commit


async def test_waiting_operations_share_commits(opened: Open):
    owner = opened(commit_ops_max=10)
    before = owner.commits
    with held(owner):
        tasks = await started(*(owner.create_key(f"op{n}", key(f"k{n}")) for n in range(95)))
    await asyncio.gather(*tasks)
    assert owner.commits - before == 1 + 10  # the held one, then 95 in groups of 10
    assert len(await owner.list_keys()) == 95


async def test_a_failing_operation_sinks_no_other_of_its_group(opened: Open):
    owner = opened()
    with held(owner):
        tasks = await started(
            owner.create_key("1", key("a")),
            owner.create_key("2", key("a", tenant="thief")),
            owner.submit_job("3", job("f" * 32), units("d")),
            owner.create_key("4", key("b")),
        )
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert [type(each) for each in results] == [type(None), Conflict, NotFound, type(None)]
    assert await owner.list_keys() == [key("a"), key("b")]


async def test_an_operation_that_fails_half_way_leaves_nothing(opened: Open):
    owner = opened()

    def half(conn: sa.Connection, _now: float) -> None:
        conn.execute(sa.insert(tables.tenants).values(tenant="t", tier="free", created_at=1))
        raise ZeroDivisionError

    with pytest.raises(Internal):
        await asyncio.wrap_future(owner._committer.submit(half))

    def tenants(conn: sa.Connection, _now: float) -> int:
        return len(conn.execute(sa.select(tables.tenants)).all())

    assert await asyncio.wrap_future(owner._committer.submit(tenants)) == 0
    assert owner.healthy


async def test_nothing_is_acknowledged_before_its_commit(opened: Open):
    owner = opened()
    seen: list[bool] = []
    tasks: list[asyncio.Task[Any]] = []
    with held(owner):
        tasks += await started(owner.create_key("1", key("a")), owner.find_key("a"))
        futures = [waiting.future for waiting in owner._committer._queue]

        def committing(_conn: sa.Connection) -> None:
            seen.extend(future.done() for future in futures)

        sa.event.listen(sa.Engine, "commit", committing)
    try:
        assert await asyncio.gather(*tasks) == [None, key("a")]
    finally:
        sa.event.remove(sa.Engine, "commit", committing)
    assert seen
    assert not any(seen)


async def test_a_failed_commit_fails_the_whole_group_and_only_it(opened: Open):
    owner = opened()
    await owner.create_key("0", key("before"))
    with on_event("commit", disk_full):
        with held(owner):
            tasks = await started(owner.create_key("1", key("a")), owner.find_key("a"))
        results = await asyncio.gather(*tasks, return_exceptions=True)
    assert [type(each) for each in results] == [StoreUnavailable] * 2
    assert owner.healthy
    assert await owner.list_keys() == [key("before")]
    await owner.create_key("1", key("a"))  # the repeat of the operation that was not kept
    assert await owner.list_keys() == [key("a"), key("before")]


async def test_a_transaction_that_the_database_undoes_is_acknowledged_to_nobody(opened: Open):
    owner = opened()

    def undone(conn: sa.Connection, _now: float) -> None:  # as SQLite does when the disk is full
        conn.exec_driver_sql("ROLLBACK")
        raise sa.exc.OperationalError("INSERT", {}, sqlite3.OperationalError("disk is full"))

    with held(owner):
        tasks = await started(owner.create_key("1", key("a")))
        failing = asyncio.wrap_future(owner._committer.submit(undone))
        tasks += await started(owner.create_key("2", key("b")))
    results = await asyncio.gather(failing, *tasks, return_exceptions=True)
    assert [type(each) for each in results] == [StoreUnavailable] * 3
    assert await owner.list_keys() == []
    assert owner.healthy


async def test_a_caller_who_left_is_skipped(opened: Open):
    owner = opened()
    with held(owner):
        gone, stays = await started(
            owner.create_key("1", key("gone")), owner.create_key("2", key("stays"))
        )
        gone.cancel()
        await asyncio.sleep(0)
    await stays
    assert await owner.list_keys() == [key("stays")]


async def test_a_full_queue_is_overloaded(opened: Open):
    owner = opened(queue_max=2)
    with held(owner):
        tasks = await started(owner.list_keys(), owner.list_keys())
        with pytest.raises(Overloaded) as caught:
            await owner.list_keys()
    assert caught.value.retry_after_s is not None
    assert await asyncio.gather(*tasks) == [[], []]


# Operations


async def test_repeats_in_one_group_act_once(opened: Open):
    owner = opened()
    await owner.create_collection("c", collection())
    with held(owner):
        tasks = await started(
            *(owner.submit_job("op", job(collection().uuid), units("d")) for _ in range(20))
        )
    results = await asyncio.gather(*tasks)
    assert len({accepted.job.id for accepted in results}) == 1
    assert len(await owner.list_jobs("acme", None, (), "", 100)) == 1


async def test_results_outlive_a_restart_and_then_expire(opened: Open, clock: Any):
    first = opened(operations_kept_s=600)
    await first.create_collection("c", collection())
    first.close()
    owner = opened(operations_kept_s=600)
    clock.advance(599)
    assert await owner.create_collection("c", collection()) == collection()
    clock.advance(2 + 600 / 60)  # it purges once in a sixtieth
    await owner.list_keys()
    with pytest.raises(Conflict):
        await owner.create_collection("c", collection())


async def test_the_purge_keeps_up_with_a_backlog(opened: Open, clock: Any):
    owner = opened(operations_kept_s=600, commit_ops_max=2)
    for n in range(13):
        await owner.create_key(f"op{n}", key(f"k{n}"))
    clock.advance(601)
    for _ in range(4):  # at most 4 a group
        await owner.list_keys()

    def left(conn: sa.Connection, _now: float) -> int:
        return len(conn.execute(sa.select(tables.operations.c.op)).all())

    assert await asyncio.wrap_future(owner._committer.submit(left)) == 0


# Collections


async def test_a_purge_goes_in_portions(opened: Open, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("serve.jobs.owner.PURGE_ROWS", 2)
    owner = opened()
    await owner.create_collection("c", collection())
    await owner.submit_job("b", job(collection().uuid), units(*"abcde"))
    await owner.delete_collection("d", "acme", "docs")
    before = owner.commits
    await owner.purge_collection(collection().uuid)
    assert owner.commits - before == 3

    def left(conn: sa.Connection, _now: float) -> int:
        return len(conn.execute(sa.select(tables.documents.c.document)).all())

    assert await asyncio.wrap_future(owner._committer.submit(left)) == 0
    assert await owner.deleted_collections() == []


# Ends


async def test_close_finishes_what_is_queued(opened: Open):
    owner = opened()
    with held(owner):
        tasks = await started(*(owner.create_key(f"{n}", key(f"k{n}")) for n in range(5)))
        with pytest.raises(StoreUnavailable, match="did not close"):
            owner.close(wait_s=0.001)
        with pytest.raises(StoreUnavailable, match="closed"):
            await owner.list_keys()
    await asyncio.gather(*tasks)
    owner.close()
    assert not owner.healthy
    assert len(await opened().list_keys()) == 5  # the lock is free again


async def test_when_the_thread_dies_nobody_hangs(opened: Open, monkeypatch: pytest.MonkeyPatch):
    owner = opened()
    monkeypatch.setattr("serve.jobs.operations.purge", lambda *_args: 1 / 0)
    with held(owner) as doomed:
        tasks = await started(owner.create_key("1", key("a")), owner.list_keys())
    futures = [asyncio.wrap_future(doomed), *tasks]
    results = await asyncio.gather(*futures, return_exceptions=True)
    assert [type(each) for each in results] == [StoreUnavailable] * 3
    assert not owner.healthy
    with pytest.raises(StoreUnavailable):
        await owner.list_keys()
    monkeypatch.undo()
    owner.close()
    assert await opened().list_keys() == []  # a successor gets the lock


async def test_a_connection_that_cannot_be_replaced_ends_the_owner(opened: Open, path: Path):
    owner = opened()
    with on_event("commit", disk_full):
        with held(owner):
            (task,) = await started(owner.create_key("1", key("a")))
            remove(path)
        with pytest.raises(StoreUnavailable):
            await task
    owner._committer._thread.join(30)
    assert not owner.healthy
    assert not exists(path)  # no empty database was made in its place


# The file and its lock


async def test_the_folder_and_the_file_are_made_once(opened: Open, path: Path):
    owner = opened()
    await owner.create_key("1", key("a"))
    owner.close()
    assert exists(path)
    assert await opened().list_keys() == [key("a")]


async def test_odd_characters_in_the_path(tmp_path: Path, clock: Callable[[], float]):
    path = tmp_path / "a b?mode=ro#%20ä" / "store.db"
    owner = StoreOwner(path, Store(), clock)
    await owner.create_key("1", key("a"))
    owner.close()
    assert exists(path)


def test_a_commit_reaches_the_disk_before_it_is_acknowledged(opened: Open):
    owner = opened()

    def pragmas(conn: sa.Connection, _now: float) -> list[Any]:
        names = ("journal_mode", "synchronous")
        return [conn.exec_driver_sql(f"PRAGMA {name}").scalar() for name in names]

    assert owner._committer.submit(pragmas).result(30) == ["wal", 2]


def test_a_missing_file_is_an_error(opened: Open, path: Path):
    opened().close()
    path.unlink()
    with pytest.raises(StoreUnavailable, match="missing"):
        opened()
    assert not path.exists()


@pytest.mark.parametrize("content", [b"", None], ids=["emptied", "another"])
def test_an_exchanged_file_is_an_error(
    opened: Open, path: Path, tmp_path: Path, content: bytes | None
):
    opened().close()
    if content is None:
        other = tmp_path / "other.db"
        StoreOwner(other, Store(), lambda: 1.0).close()
        content = other.read_bytes()
    path.write_bytes(content)
    for _ in range(2):  # a refused start changes nothing
        with pytest.raises(StoreUnavailable, match="is not the database"):
            opened()


async def test_a_lost_lock_file_is_made_again(opened: Open, path: Path):
    first = opened()
    await first.create_key("1", key("a"))
    first.close()
    remove(path.with_name("store.db.lock"))
    second = opened()
    assert await second.list_keys() == [key("a")]
    second.close()
    remove(path)
    with pytest.raises(StoreUnavailable, match="missing"):
        opened()


def test_a_file_that_is_no_database_is_an_error(opened: Open, path: Path):
    path.parent.mkdir()
    path.write_bytes(b"no database" * 1000)
    with pytest.raises(StoreUnavailable, match="cannot open"):
        opened()


def test_a_newer_schema_is_refused(opened: Open, path: Path):
    opened().close()
    with sqlite3.connect(path) as conn:
        conn.execute("UPDATE store SET version = 99")
    conn.close()
    with pytest.raises(StoreUnavailable, match="schema 99"):
        opened()


def test_a_second_owner_is_refused(opened: Open):
    opened()
    with pytest.raises(StoreUnavailable, match="owns"):
        opened(lock_wait_s=0.1)


# Other processes

CREATES = """
import asyncio, sys, time
from pathlib import Path
from serve.config import Store
from serve.jobs.owner import StoreOwner
from serve.items import Job, NewItem
from serve.records import Collection, Key

async def work(store, worker):
    for n in range(10**6):
        name = f"{worker}-{n}"
        await store.create_key(f"key-{name}", Key(name, "acme", "free", "", 1.0))
        print("key", name, flush=True)
        job = Job(name, "acme", "k", "documents", "bulk", 1.0, 1.0, collection="0" * 32)
        await store.submit_job(name, job, [NewItem(f"d{worker}", "document", "embed", 1.0, {})])
        print("document", f"d{worker}", n + 1, flush=True)

async def main():
    store = StoreOwner(Path(sys.argv[1]), Store(keys_max=10_000), time.time)
    await store.create_collection("c", Collection("0" * 32, "acme", "docs", "m", "r", 4, 1.0))
    await asyncio.gather(*(work(store, worker) for worker in range(8)))

asyncio.run(main())
"""

HOLDS = """
import sys, time
from pathlib import Path
from serve.config import Store
from serve.jobs.owner import StoreOwner

owner = StoreOwner(Path(sys.argv[1]), Store(), time.time)
print("open", flush=True)
sys.stdin.read()
"""


@contextmanager
def child(program: str, path: Path) -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen(
        [sys.executable, "-c", program, str(path)],
        cwd=REPOSITORY,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            yield process
        finally:
            process.kill()


async def test_kill_9_loses_nothing_that_was_acknowledged(opened: Open, path: Path):
    with child(CREATES, path) as process:
        assert process.stdout is not None
        lines = [process.stdout.readline() for _ in range(400)]
        os.kill(process.pid, signal.SIGKILL)
        lines += process.stdout.readlines()
    told = [line.split() for line in lines if line.endswith("\n")]
    keys = {words[1] for words in told if words[0] == "key"}
    generations = {words[1]: int(words[2]) for words in told if words[0] == "document"}
    assert len(keys) > 100
    assert len(generations) == 8

    owner = opened(lock_wait_s=30)
    assert keys <= {each.id for each in await owner.list_keys(limit=100_000)}
    after = job("0" * 32)
    await owner.submit_job("after", after, units(*generations))
    for item in await owner.list_items("acme", after.id, (), -1, 8):
        # One more than acknowledged may have been committed when the process died.
        assert item.generation - generations[item.name] in {1, 2}


async def test_a_successor_waits_for_the_lock_and_takes_over(opened: Open, path: Path):
    with child(HOLDS, path) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "open\n"
        with pytest.raises(StoreUnavailable, match="owns"):
            opened(lock_wait_s=0.1)
        successor = asyncio.create_task(asyncio.to_thread(opened, lock_wait_s=30))
        await asyncio.sleep(0.005)
        assert not successor.done()
        os.kill(process.pid, signal.SIGKILL)
        assert await (await successor).list_keys() == []
