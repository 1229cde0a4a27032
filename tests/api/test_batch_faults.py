"""Troubles under lines of batches: what is charged, what is tried again, and what the error file says."""

import asyncio
from dataclasses import replace

import pytest

from serve.errors import BadInput, IndexUnavailable, Internal, StoreUnavailable
from serve.flows import batch_requests
from serve.jobs.faults import HOPELESS_S
from tests.api.lines import counts, ended, line, lines_of, submit


@pytest.fixture
async def idle(start):
    """A service whose worker has not been started."""
    return await start(working=False)


def job_of(batch):
    return batch.id.replace("batch_", "job_")


async def used(whole):
    """Tokens of class `bulk` that this month's usage counts."""
    await whole.service.context.quotas._report()
    client = await whole.client()
    rows = (await client.get("/v1/usage")).json()["data"]
    return sum(row["tokens"] for row in rows if row["class"] == "bulk")


async def delayed(whole, batch):
    """The items of a batch, once all of them wait for another try."""
    while True:
        items = await whole.store.list_items("acme", job_of(batch), (), -1, 10)
        if items and all(one.state == "delayed" for one in items):
            return items
        await asyncio.sleep(0)


async def later(whole, seconds):
    whole.clock.advance(seconds)
    await whole.store.tick()


async def test_a_disk_that_fails_once_costs_no_second_embedding(idle):
    put, failed = idle.blobs.put, []

    async def once(name, pieces, **options):
        if "/" in name and not name.endswith("/input") and not failed:
            failed.append(name)
            raise StoreUnavailable("The blobs' disk failed.")
        return await put(name, pieces, **options)

    idle.blobs.put = once
    ai = await idle.openai()
    batch = await submit(ai, line("a", "tide"), line("b", "ebb"))
    await idle.work("late")
    done = await ended(idle, ai, batch)
    assert (done.status, counts(done)) == ("completed", (2, 2, 0))
    assert failed
    assert len(idle.embedder.calls) == 1
    assert await used(idle) == 6 + 5


async def test_a_line_whose_vectors_did_not_land_is_not_paid(idle):
    client, ai = await idle.client(), await idle.openai()
    await client.post("/v1/collections", json={"name": "books"})
    batch = await submit(ai, line("a", "tide"), extra_body={"collection": "books"})
    idle.upserter.faults = {"offer": IndexUnavailable("Away.")}
    await idle.work("late")
    (one,) = await delayed(idle, batch)
    assert (one.attempts, one.error_code) == (1, "index_unavailable")
    assert await used(idle) == 0
    idle.upserter.faults = {}
    await later(idle, 10)
    assert (await ended(idle, ai, batch)).status == "completed"
    assert await used(idle) == 6


async def test_lines_outlast_a_tier_that_is_not_in_the_settings(idle):
    ai = await idle.openai()
    batch = await submit(ai, line("a"))
    tiers = idle.service.context.settings.admission.tiers
    lost = tiers.pop("premium")
    await idle.work("late")
    (one,) = await delayed(idle, batch)
    assert (one.attempts, one.error_code) == (0, "limits_not_valid")
    tiers["premium"] = lost
    await later(idle, 2 * HOPELESS_S)
    assert (await ended(idle, ai, batch)).status == "completed"


async def test_a_line_that_meets_a_fault_of_ours_leaves_the_others_alone(idle, monkeypatch):
    plain = batch_requests.size_of

    def faulty(served, wanted):
        if wanted.dimensions is not None:
            raise KeyError("a fault of ours")
        return plain(served, wanted)

    monkeypatch.setattr(batch_requests, "size_of", faulty)
    ai = await idle.openai()
    batch = await submit(ai, line("a"), line("b", body={"dimensions": 16}), line("c"))
    await idle.work("late")
    while True:
        items = await idle.store.list_items("acme", job_of(batch), (), -1, 10)
        if [one.state for one in items] == ["done", "delayed", "done"]:
            break
        await asyncio.sleep(0)
    assert [(one.attempts, one.error_code) for one in items] == [
        (0, ""),
        (1, "internal_error"),
        (0, ""),
    ]


async def test_vectors_of_another_revision_do_not_land_in_a_collection(idle):
    client, ai = await idle.client(), await idle.openai()
    await client.post("/v1/collections", json={"name": "books"})
    batch = await submit(ai, line("a", "tide"), extra_body={"collection": "books"})
    served = idle.service.context.models._served
    served["plain"] = replace(served["plain"], revision="another")
    await idle.work("late")
    done = await ended(idle, ai, batch)
    assert counts(done) == (1, 0, 1)
    (error,) = (await lines_of(ai, done.error_file_id)).values()
    assert error["response"]["status_code"] == 409
    assert (await client.get("/v1/collections/books")).json()["records"] == 0


async def test_the_error_file_says_what_a_line_died_of_last(idle, monkeypatch):
    def refuses(_served, _wanted):
        raise BadInput("Not now.", param="dimensions")

    monkeypatch.setattr(batch_requests, "size_of", refuses)
    ai, client = await idle.openai(), await idle.client()
    await idle.work("late")
    done = await ended(idle, ai, await submit(ai, line("a")))
    (refused,) = (await lines_of(ai, done.error_file_id)).values()
    assert refused["response"]["status_code"] == 400
    monkeypatch.undo()
    idle.embedder.fault = Internal("Out of order.")
    idle.clock.advance(1)
    await client.post(f"/v1/jobs/{job_of(done)}/retry", json={"all": True})
    while (again := await ai.batches.retrieve(done.id)).status != "completed":
        if not await idle.store.list_items("acme", job_of(done), ("ready", "leased"), -1, 10):
            await later(idle, 600)
        await asyncio.sleep(0)
    (failed,) = (await lines_of(ai, again.error_file_id)).values()
    assert (failed["response"], failed["error"]["code"]) == (None, "internal_error")
