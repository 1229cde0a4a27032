"""What `serve.jobs.postgres` adds to the contracts: its bounds, and rings between processes."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import sqlalchemy as sa

from bench.postgres_server import careless, emptied
from serve.errors import Overloaded, StoreUnavailable
from serve.jobs.postgres import BOUNDS_MS, Postgres


pytestmark = pytest.mark.postgres

QUEUE_MAX = 3


@pytest.fixture
def two() -> Iterator[list[Postgres]]:
    careless()
    with emptied() as url:
        opened = [
            Postgres(
                url, connections=1, queue_max=QUEUE_MAX, clock=None, upkeep=lambda _conn, _now: None
            )
            for _ in range(2)
        ]
        yield opened
        for one in opened:
            one.close(5)


def test_work_that_is_given_up_before_it_ran_leaves_its_place(two: list[Postgres]):
    store, let_go = two[0], threading.Event()
    for _ in range(3):
        let_go.clear()
        busy = store.submit(lambda _conn, _now: let_go.wait(30))
        waiting = [store.submit(lambda _conn, _now: 1) for _ in range(QUEUE_MAX - 1)]
        with pytest.raises(Overloaded):
            store.submit(lambda _conn, _now: 1)
        assert all(one.cancel() for one in waiting)
        let_go.set()
        assert busy.result(30)
    assert store.submit(lambda _conn, _now: 7).result(30) == 7


def test_a_ring_reaches_who_listens_elsewhere(two: list[Postgres]):
    listener, ringer = two
    heard = threading.Event()
    listener.listen(lambda word: heard.set() if word == "embed" else None)
    for _ in range(300):  # it may not listen yet; the ringer itself never does
        ringer.ring(["embed"])
        if heard.wait(0.1):
            break
    assert heard.is_set()


def shown(conn: sa.Connection, _now: float) -> dict[str, str]:
    return {name: conn.execute(sa.text(f"SHOW {name}")).scalar_one() for name in BOUNDS_MS}


@contextmanager
def bounded(options: str) -> Iterator[Postgres]:
    """Of a URL with options of its own."""
    with emptied() as url:
        address = sa.make_url(url).update_query_dict({"options": options})
        opened = Postgres(
            address.render_as_string(hide_password=False),
            connections=1,
            queue_max=QUEUE_MAX,
            clock=None,
            upkeep=lambda _conn, _now: None,
        )
        yield opened
        opened.close(5)


def test_every_session_is_bounded(two: list[Postgres]):
    assert two[0].submit(shown).result(30) == {
        "idle_in_transaction_session_timeout": "15s",
        "lock_timeout": "20s",
        "statement_timeout": "1min",
    }


def test_what_the_url_says_goes_before_our_bounds():
    with bounded("-c lock_timeout=7s") as store:
        found = store.submit(shown).result(30)
        assert (found["lock_timeout"], found["statement_timeout"]) == ("7s", "1min")
        heard = threading.Event()
        store.listen(lambda _word: heard.set())
        for _ in range(300):
            store.ring(["embed"])
            if heard.wait(0.1):
                break
        assert heard.is_set()


@pytest.mark.parametrize("how", ["it was idle in its transaction", "it was ended"])
def test_who_loses_the_connection_is_told_that_the_store_is_away(two: list[Postgres], how: str):
    alive = sa.text("SELECT count(*) FROM pg_stat_activity WHERE pid = :pid")
    end = sa.text("SELECT pg_terminate_backend(:pid)")

    def lost(conn: sa.Connection, _now: float) -> None:
        me = {"pid": conn.execute(sa.select(sa.func.pg_backend_pid())).scalar_one()}
        while two[0].submit(lambda other, _now: other.execute(alive, me).scalar_one()).result(30):
            if how == "it was ended":
                two[0].submit(lambda other, _now: other.execute(end, me).scalar_one()).result(30)
        conn.execute(sa.text("SELECT 1"))

    with bounded("-c idle_in_transaction_session_timeout=50ms") as store:
        with pytest.raises(StoreUnavailable):
            store.submit(lost).result(30)
        assert store.submit(lambda _conn, _now: 7).result(30) == 7


def test_closing_waits_for_so_long_and_gives_up_what_is_queued(two: list[Postgres]):
    store, begun, let_go = two[0], threading.Event(), threading.Event()

    def slow(_conn: sa.Connection, _now: float) -> bool:
        begun.set()
        return let_go.wait(5)

    busy = store.submit(slow)
    queued = store.submit(lambda _conn, _now: 1)
    assert begun.wait(30)
    with pytest.raises(StoreUnavailable):
        store.close(0.05)
    let_go.set()
    assert busy.result(30)
    with pytest.raises(StoreUnavailable):
        queued.result(30)
