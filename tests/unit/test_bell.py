"""Who waits for something to be stored is woken, and no ring is lost or goes on for ever."""

import asyncio

import sqlalchemy as sa

from serve.jobs.bell import Bell, heard, note, noted


async def test_a_ring_wakes_the_one_that_has_waited_longest():
    bell = Bell()
    first, second, other = bell.listen("a"), bell.listen("a"), bell.listen("b")
    bell.ring("a")
    assert (first.done(), second.done(), other.done()) == (True, False, False)
    bell.ring("a")
    assert second.done()
    bell.ring("a")  # nobody is left


async def test_a_ring_may_wake_everybody():
    bell = Bell()
    waiters = [bell.listen("a") for _ in range(3)]
    bell.ring("a", everybody=True)
    assert all(waiter.done() for waiter in waiters)


async def test_who_leaves_passes_on_a_ring_that_came():
    bell = Bell()
    first, second = bell.listen("a"), bell.listen("a")
    bell.ring("a")
    bell.leave("a", first)
    assert second.done()


async def test_who_leaves_unrung_takes_no_ring():
    bell = Bell()
    first, second = bell.listen("a"), bell.listen("a")
    bell.leave("a", first)
    assert not second.done()
    bell.ring("a")
    assert (first.done(), second.done()) == (False, True)


async def test_one_hears_a_ring_or_that_the_time_is_up():
    bell = Bell()
    waiter = bell.listen("a")
    assert not await heard(waiter, 0)
    hearing = asyncio.create_task(heard(waiter, 1000))
    bell.ring("a")
    assert await hearing


def test_what_a_transaction_notes_is_told_once():
    engine = sa.create_engine("sqlite://")
    with engine.connect() as conn:
        assert noted(conn) == frozenset()
        for word in ("a", "b", "a"):
            note(conn, word)
        assert noted(conn) == {"a", "b"}
        assert noted(conn) == frozenset()
    engine.dispose()
