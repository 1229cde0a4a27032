"""What keeps processes on Postgres from waiting for each other in a ring, and how much one statement names:
shown by the statements alone, on SQLite.
"""

import sqlite3
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import count
from typing import Any

import pytest
import sqlalchemy as sa

from serve.items import NewItem
from serve.jobs import claims, handed, order, schema, submit
from serve.jobs.job_tables import items
from tests.property.handed import LEASE_S, ROOM, SHARES, claim, new_job


numbers = count()


@pytest.fixture
def conn() -> Iterator[sa.Connection]:
    engine = sa.create_engine("sqlite://")
    with engine.begin() as conn:
        schema.create(conn, 0.0)
        yield conn
    engine.dispose()


@contextmanager
def seen(conn: sa.Connection) -> Iterator[list[tuple[str, Sequence[Any]]]]:
    """Statements with their parameters, a list of them where there are many."""
    statements: list[tuple[str, Sequence[Any]]] = []

    def note(_conn: Any, _cursor: Any, text: str, parameters: Any, *_: Any) -> None:
        statements.append((text, parameters))

    sa.event.listen(conn, "before_cursor_execute", note)
    yield statements
    sa.event.remove(conn, "before_cursor_execute", note)


def hand_over(conn: sa.Connection, most: int = 1, **fields: Any) -> str:
    job = new_job(next(numbers), "a", **fields)
    new = [NewItem("name", "request", "embed", 1.0, {}) for _ in range(most)]
    submit.submit(conn, job, new, None, room=ROOM, now=1.0)
    return job.id


def test_a_claim_takes_the_clocks_last_and_by_name(conn: sa.Connection):
    for klass in SHARES:
        hand_over(conn, 2, klass=klass)
    with seen(conn) as statements:
        assert len(claim(conn, "w", "embed", 9, now=1.0).items) == 4
    clocks = [at for at, (text, _) in enumerate(statements) if text.startswith("UPDATE vclock")]
    assert clocks == list(range(clocks[0], len(statements)))
    locked = [
        each
        for at in clocks
        for each in statements[at][1]
        if isinstance(each, str) and each in ("", *SHARES)
    ]
    assert locked == sorted(locked)
    assert set(locked) == {"", *SHARES}


def test_who_has_told_of_one_job_waits_for_no_other(conn: sa.Connection):
    for owner in ("w1", "w2"):
        hand_over(conn)
        assert len(claim(conn, owner, "embed", 1, now=1.0).items) == 1
    with seen(conn) as statements:
        claims.reap(conn, 100.0, 1000, leases=claims.Leases(LEASE_S, crashes_max=1))
    texts = [text for text, _ in statements]
    told = next(at for at, text in enumerate(texts) if "INSERT INTO job_events" in text)
    assert not any("FROM jobs" in text for text in texts[told:])
    dead = sa.select(sa.func.count()).where(items.c.state == "dead")
    assert conn.execute(dead).scalar_one() == 2


def leave(conn: sa.Connection) -> None:
    claims.leave(conn, "w", 2.0)


def lose(conn: sa.Connection) -> None:
    claims.keep(conn, "w", [], lease_s=LEASE_S, now=100.0)


def reap(conn: sa.Connection) -> None:
    claims.reap(conn, 100.0, 1000, leases=claims.Leases(LEASE_S, crashes_max=9))


@pytest.mark.parametrize("act", [leave, lose, reap])
def test_an_owner_may_have_more_than_one_statement_can_name(
    conn: sa.Connection, act: Callable[[sa.Connection], None]
):
    for _ in range(550):
        hand_over(conn)
    driver = conn.connection.driver_connection
    assert driver is not None
    driver.setlimit(sqlite3.SQLITE_LIMIT_VARIABLE_NUMBER, 510)
    while claim(conn, "w", "embed", 500, now=1.0).items:
        pass
    act(conn)
    ready = sa.select(sa.func.count()).where(items.c.state == "ready")
    assert conn.execute(ready).scalar_one() == 550


def test_owners_are_reaped_up_to_so_many_items(conn: sa.Connection):
    for owner in ("w1", "w2"):
        hand_over(conn, 3)
        claim(conn, owner, "embed", 3, now=1.0)
    leases = claims.Leases(LEASE_S, crashes_max=9)
    assert [claims.reap(conn, 100.0, 3, leases=leases) for _ in range(3)] == [4, 4, 0]


# How much of a line is reordered


def tags(conn: sa.Connection, job: str) -> list[float]:
    mine = sa.select(items.c.tag).where(items.c.job == job).order_by(items.c.seq)
    return [*conn.execute(mine).scalars()]


def test_a_line_that_is_too_long_stays_as_it_is_when_some_of_it_leaves(conn: sa.Connection):
    gone = hand_over(conn, order.REORDER_MAX - 10)
    stays = hand_over(conn, 20)
    before = tags(conn, stays)
    handed.change(conn, "a", gone, "cancel", 2.0)
    assert tags(conn, stays) == before


def test_however_much_leaves_what_comes_next_stands_in_its_place(conn: sa.Connection):
    gone = hand_over(conn, order.REORDER_MAX + 1)
    handed.change(conn, "a", gone, "cancel", 2.0)
    assert max(tags(conn, hand_over(conn, 5))) == 4.0
