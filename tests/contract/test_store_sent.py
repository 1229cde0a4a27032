"""What every Store promises of writes with a time: what was sent before the last accepted one is older."""

from itertools import count

import pytest

from serve.items import SENT, Job, NewItem, Settlement, Task, new_id
from serve.records import Collection


_ops = count()
LONG_AGO, LATER, LATEST = 1.0, 2.0, 3.0
"""In epoch seconds, all before the Store's own clock."""


def op() -> str:
    return f"sent-{next(_ops)}"


@pytest.fixture
async def uuid(store) -> str:
    made = Collection(f"{next(_ops):032x}", "acme", "docs", "m", "r1", 4, 5.25)
    return (await store.create_collection(op(), made)).uuid


async def accept(
    store, uuid: str, name: str, sent_at: float | None, *, task: Task = "document", sha: str = ""
) -> tuple[str, int, str]:
    """State, generation and status of the item."""
    job = Job(new_id("job", 5.25), "acme", "k", "documents", "bulk", 1.0, 5.25, collection=uuid)
    payload = {} if sent_at is None else {SENT: sent_at}
    await store.submit_job(op(), job, [NewItem(name, task, "embed", 1.0, payload, sha256=sha)])
    (view,) = await store.list_items("acme", job.id, (), -1, 10)
    return view.state, view.generation, view.result.get("status", "")


async def settle_all(store, chunks: int) -> None:
    """Everything that waits has landed, or was deleted."""
    items = (await store.claim("w", "embed", 500, 1e9, 0.0)).items
    assert all(
        await store.settle([Settlement(one.id, one.lease, "done", chunks=chunks) for one in items])
    )


async def test_an_older_write_changes_nothing(store, uuid):
    assert await accept(store, uuid, "a", LATER) == ("ready", 1, "")
    assert await accept(store, uuid, "a", LONG_AGO) == ("skipped", 1, "superseded")
    assert await accept(store, uuid, "a", LONG_AGO, task="delete") == ("skipped", 1, "superseded")
    epoch = await store.take_epoch("w", 1)
    assert await store.superseded("w", epoch, uuid, {"a": 1}) == frozenset()


async def test_of_one_time_the_write_that_is_accepted_last_counts(store, uuid):
    await accept(store, uuid, "a", LATER)
    assert await accept(store, uuid, "a", LATER) == ("ready", 2, "")
    assert await accept(store, uuid, "a", LATEST, task="delete") == ("ready", 3, "")


async def test_a_write_without_a_time_was_sent_when_it_was_accepted(store, uuid):
    await accept(store, uuid, "a", LATEST)
    assert await accept(store, uuid, "a", None) == ("ready", 2, "")
    assert await accept(store, uuid, "a", LATEST) == ("skipped", 2, "superseded")
    assert await accept(store, uuid, "a", None) == ("ready", 3, "")


async def test_a_write_from_a_clock_that_is_ahead_does_not_hold_up_those_without_a_time(
    store, uuid
):
    await accept(store, uuid, "a", 9e9)
    assert await accept(store, uuid, "a", None) == ("ready", 2, "")
    assert await accept(store, uuid, "a", 8e9) == ("skipped", 2, "superseded")


async def test_a_write_that_is_older_than_a_delete_brings_nothing_back(store, uuid):
    await accept(store, uuid, "a", LONG_AGO)
    await accept(store, uuid, "a", LATEST, task="delete")
    assert await accept(store, uuid, "a", LATER) == ("skipped", 2, "superseded")
    await settle_all(store, 0)
    assert await accept(store, uuid, "a", LATER) == ("skipped", 2, "superseded")
    assert await accept(store, uuid, "a", LATEST + 1) == ("ready", 3, "")


async def test_the_delete_of_what_has_not_come_yet_holds(store, uuid):
    assert await accept(store, uuid, "a", LATEST, task="delete") == ("skipped", 0, "absent")
    assert await accept(store, uuid, "a", LATER) == ("skipped", 1, "superseded")
    assert await store.grant_vectors(uuid, ["a"], [LATER]) == [None]
    assert await store.grant_vectors(uuid, ["a"], [LATEST]) == [2]


async def test_a_delete_without_a_time_leaves_no_trace_of_what_there_never_was(store, uuid):
    assert await accept(store, uuid, "a", None, task="delete") == ("skipped", 0, "absent")
    assert await accept(store, uuid, "a", LONG_AGO) == ("ready", 1, "")


@pytest.mark.parametrize("last", [LATEST, None])
async def test_a_write_that_changes_nothing_is_the_last_one_all_the_same(store, uuid, last):
    await accept(store, uuid, "a", LONG_AGO, sha="abc")
    await settle_all(store, 1)
    assert await accept(store, uuid, "a", last, sha="abc") == ("skipped", 1, "unchanged")
    assert await accept(store, uuid, "a", LATER, sha="xyz") == ("skipped", 1, "superseded")


async def test_raw_vectors_keep_to_the_same_order(store, uuid):
    assert await store.grant_vectors(uuid, ["a", "b"], [LATER, None]) == [1, 1]
    assert await store.grant_vectors(uuid, ["a", "b"], [LONG_AGO, LATEST]) == [None, None]
    assert await store.grant_vectors(uuid, ["a", "b"], [LATER, None]) == [2, 2]
    await accept(store, uuid, "a", LATEST)
    assert await store.grant_vectors(uuid, ["a"], [LATER]) == [None]
    assert await store.grant_vectors(uuid, ["a"], [LATEST]) == [0]
    assert await accept(store, uuid, "b", LATEST) == ("skipped", 2, "superseded")
