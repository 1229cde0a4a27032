"""What every Store promises of jobs whose items stand in a file (`job_ports.Jobs`, `Queue`)."""

from typing import Any

import pytest

from serve.items import Replay
from tests.contract.work import (
    BAD,
    BUSY,
    EXPAND,
    Store,
    claimed,
    found,
    one,
    op,
    request,
    settle,
    settlement,
    submitted,
    tenant,
)


# Handing over


async def test_a_batch_is_read_worked_on_and_written(store: Store):
    await tenant(store)
    kept = await submitted(store, [EXPAND], kind="embeddings", files={"input": "f1"})
    assert (await found(store, kept)).state == "validating"
    expand = await one(store, "prepare")
    assert (expand.task, expand.seq, expand.payload) == ("expand", -1, {"file": "f1"})
    for start in (0, 2, 0):  # the first part again, after a crash
        part = [request(f"r{start}"), request(f"r{start + 1}")]
        assert await store.add_items(expand.id, expand.lease, start, part)
    early = await one(store, "embed")
    await settle(store, [early], "done")
    assert (await found(store, kept)).state == "validating"
    await settle(store, [expand], "done")
    running = await found(store, kept)
    assert (running.state, running.total, running.done) == ("running", 4, 1)
    assert not await store.add_items(expand.id, expand.lease, 4, [request("late")])
    await settle(store, (await claimed(store, "embed")).items, "done")
    assert (await found(store, kept)).state == "finalizing"
    finish = await one(store, "prepare")
    assert (finish.task, finish.seq) == ("finish", -2)
    await settle(store, [finish], "done", result={"output": "f2"})
    ended = await found(store, kept)
    assert (ended.state, ended.files) == ("completed", {"input": "f1", "output": "f2"})


async def test_a_batch_without_lines_is_written_too(store: Store):
    await tenant(store)
    kept = await submitted(store, [EXPAND], kind="embeddings")
    await settle(store, [await one(store, "prepare")], "done")
    assert (await found(store, kept)).state == "finalizing"
    await settle(store, [await one(store, "prepare")], "done")
    assert (await found(store, kept)).state == "completed"


async def test_a_batch_whose_file_is_wrong_fails_and_nothing_of_it_is_worked_on(store: Store):
    await tenant(store)
    kept = await submitted(store, [EXPAND], kind="embeddings")
    expand = await one(store, "prepare")
    await store.add_items(expand.id, expand.lease, 0, [request("a"), request("b")])
    early = await one(store, "embed")
    wrong = {"errors": [{"code": "bad_line", "message": "No.", "line": 3}]}
    await settle(store, [expand], "dead", fault=BAD, result=wrong)
    stopping = await found(store, kept)
    assert (stopping.state, stopping.cancelled) == ("cancelling", 1)
    await settle(store, [early], "done")
    ended = await found(store, kept)
    assert (ended.state, list(ended.errors)) == ("failed", wrong["errors"])
    assert (await claimed(store, "prepare")).items == ()


async def test_a_batch_whose_output_cannot_be_written_fails(store: Store):
    await tenant(store)
    kept = await submitted(store, [request("a")], kind="embeddings")
    await settle(store, [await one(store, "embed")], "done")
    await settle(store, [await one(store, "prepare")], "dead", fault=BAD)
    ended = await found(store, kept)
    assert ended.state == "failed"
    assert list(ended.errors) == [{"code": BAD.code, "message": BAD.text}]


@pytest.mark.parametrize("worked_on", [False, True])
async def test_a_batch_is_cancelled_while_its_file_is_read(store: Store, worked_on: bool):
    await tenant(store)
    kept = await submitted(store, [EXPAND], kind="embeddings")
    expand = await one(store, "prepare") if worked_on else None
    changed = await store.change_job(op(), "acme", kept, "cancel")
    assert changed.state == "cancelling"
    if expand is not None:
        assert not await store.add_items(expand.id, expand.lease, 0, [request("a")])
        await settle(store, [expand], "retry", fault=BUSY)
    finish = await one(store, "prepare")
    assert finish.task == "finish"
    await settle(store, [finish], "done", result={"output": "f2"})
    ended = await found(store, kept)
    assert (ended.state, ended.files) == ("cancelled", {"output": "f2"})
    assert (await claimed(store, "prepare")).items == ()


async def test_a_batch_expires_while_its_file_is_read(store: Store, clock: Any):
    await tenant(store)
    kept = await submitted(store, [EXPAND], kind="embeddings", expires_at=clock.now + 5)
    expand = await one(store, "prepare")
    await store.add_items(expand.id, expand.lease, 0, [request("a"), request("b")])
    early = await one(store, "embed")
    clock.advance(6)
    await store.keep("w", [expand.id, early.id])
    await store.tick()
    await settle(store, [early], "done")
    await settle(store, [expand], "done")
    finish = await one(store, "prepare")
    await settle(store, [finish], "done")
    ended = await found(store, kept)
    assert (ended.state, ended.done, ended.cancelled) == ("expired", 1, 1)


async def test_a_batch_that_is_being_written_does_not_expire(store: Store, clock: Any):
    await tenant(store)
    kept = await submitted(store, [request("a")], kind="embeddings", expires_at=clock.now + 5)
    await settle(store, [await one(store, "embed")], "done")
    clock.advance(6)
    await store.tick()
    await settle(store, [await one(store, "prepare")], "done")
    assert (await found(store, kept)).state == "completed"


@pytest.mark.parametrize("written", [False, True])
async def test_the_output_of_a_batch_is_written_anew_after_a_replay(store: Store, written: bool):
    await tenant(store)
    kept = await submitted(store, [request("a"), request("b")], kind="embeddings")
    items = (await claimed(store, "embed")).items
    await settle(store, items[:1], "done")
    await settle(store, items[1:], "dead", fault=BAD)
    first = await one(store, "prepare")
    if written:
        await settle(store, [first], "done", result={"output": "f2"})
        assert (await found(store, kept)).state == "completed_with_errors"
    assert await store.retry_items(op(), "acme", kept, Replay()) == 1
    assert await store.settle([settlement(first, "done", result={"output": "f0"})]) == [False]
    assert (await found(store, kept)).state == "queued"
    await settle(store, [await one(store, "embed")], "done")
    await settle(store, [await one(store, "prepare")], "done", result={"output": "f3"})
    ended = await found(store, kept)
    assert (ended.state, ended.files) == ("completed", {"output": "f3"})


async def test_a_replay_leaves_a_batch_that_is_still_read_as_it_is(store: Store):
    await tenant(store)
    kept = await submitted(store, [EXPAND], kind="embeddings")
    expand = await one(store, "prepare")
    await store.add_items(expand.id, expand.lease, 0, [request("a")])
    await settle(store, [await one(store, "embed")], "dead", fault=BAD)
    assert await store.retry_items(op(), "acme", kept, Replay()) == 1
    assert (await found(store, kept)).state == "validating"
    assert await store.add_items(expand.id, expand.lease, 1, [request("b")])


# Events, and forgetting
