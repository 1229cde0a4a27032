"""What `serve.jobs.postgres` adds to the contracts: its bound, and rings between processes."""

import threading
from collections.abc import Iterator

import pytest

from bench.postgres_server import careless, emptied
from serve.errors import Overloaded
from serve.jobs.postgres import Postgres


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
