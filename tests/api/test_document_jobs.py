"""Documents are accepted durably: receipts, waiting, repeats, and workers that die in between."""

import asyncio
from dataclasses import replace

import pytest

from serve.config import Jobs
from serve.errors import IndexUnavailable, ModelUnavailable, Overloaded, StoreUnavailable
from serve.jobs.faults import HOPELESS_S
from serve.pressure import Pressure
from serve.records import Outcome


BOOKS = "/v1/collections/books"
SOON = {"x-deadline-ms": "250"}
LEASE_S = 600.0
"""Of the workers in these tests; retries come earlier."""


@pytest.fixture
async def books(client):
    assert (await client.post("/v1/collections", json={"name": "books"})).status_code == 201
    return client


@pytest.fixture
async def idle(start):
    """A service whose worker has not been started."""
    return await start(working=False)


async def shop(whole, who="premium"):
    client = await whole.client(who)
    assert (await client.post("/v1/collections", json={"name": "books"})).status_code == 201
    return client


async def write(client, *documents, wait=None, headers=None, **body):
    shown = [{"id": name, "text": text} for name, text in documents]
    params = {} if wait is None else {"wait": wait}
    return await client.post(
        f"{BOOKS}/documents", params=params, headers=headers, json={"documents": shown, **body}
    )


async def delete(client, *ids, wait=None, headers=None):
    params = {} if wait is None else {"wait": wait}
    return await client.request(
        "DELETE", f"{BOOKS}/documents", params=params, headers=headers, json={"ids": ids}
    )


async def texts(client):
    answer = await client.post(f"{BOOKS}/search", json={"text": "x", "top_k": 100})
    return sorted(hit["text"] for hit in answer.json()["data"])


async def records(client):
    return (await client.get(BOOKS)).json()["records"]


async def job_of(client, answer):
    body = answer.json()
    receipt = body.get("receipt", body)
    return (await client.get(receipt["status_url"])).json()


async def ended(client, answer):
    """The job of an answer, once it has ended."""
    while not (job := await job_of(client, answer))["is_complete"]:  # noqa: ASYNC110  over HTTP
        await asyncio.sleep(0.002)
    return job


async def items(client, answer, *states):
    """The items of an answer's job, once all are in one of these states."""
    while True:
        listed = await client.get(f"{answer.json()['status_url']}/items")
        found = listed.json()["data"]
        if all(one["state"] in states for one in found):
            return found
        await asyncio.sleep(0.002)


def statuses(response):
    return [one["status"] for one in response.json()["data"]]


def tokens_left(response):
    return int(response.headers["x-ratelimit-remaining-tokens"])


# --- receipts --------------------------------------------------------------------------------


async def test_who_does_not_wait_gets_a_receipt_and_a_job(idle):
    client = await shop(idle)
    answer = await write(client, ("1", "tide"), ("2", "ebb"), wait="accepted", priority=70)
    assert answer.status_code == 202
    receipt = answer.json()
    assert receipt.pop("id").startswith("rcpt_")
    assert "goes on" in receipt.pop("detail")
    url = f"/v1/jobs/{receipt.pop('job')}"
    assert receipt == {
        "object": "receipt",
        "level": "accepted",
        "documents": 2,
        "status_url": url,
    }
    assert answer.headers["location"] == url
    job = await job_of(client, answer)
    assert (job["total"], job["processed"], job["class"]) == (2, 0, "bulk")
    assert (job["collection"], job["priority"]) == ("books", 70)
    assert await texts(client) == []
    await idle.work("late")
    assert (await ended(client, answer))["state"] == "completed"
    assert await texts(client) == ["ebb", "tide"]


async def test_a_large_write_goes_to_the_background_by_itself(start):
    whole = await start(jobs=Jobs(background_items=2))
    client = await shop(whole)
    some = [(str(n), f"text {n}") for n in range(3)]
    large = await write(client, *some)
    assert large.status_code == 202
    await ended(client, large)
    assert (await write(client, *some[:2])).status_code == 200
    told = await write(client, *some, ("4", "more"), wait="indexed")
    assert (told.status_code, statuses(told)[-1]) == (200, "indexed")
    assert told.json()["receipt"]["level"] == "searchable"
    assert (await delete(client, "0", "1", "2")).status_code == 200


async def test_only_levels_can_be_waited_for(books, subtests):
    for word in ("", "searched", "true", "INDEXED"):
        for answer in (await write(books, ("1", "x"), wait=word), await delete(books, wait=word)):
            with subtests.test(word=word):
                assert (answer.status_code, answer.json()["param"]) == (
                    400,
                    "wait" if answer.request.method == "POST" else "ids",
                )
    assert (await delete(books, "1", wait="no")).json()["param"] == "wait"


async def test_a_wait_that_is_too_short_loses_nothing(idle):
    client = await shop(idle)
    late = await write(client, ("1", "tide"), ("2", "ebb"), headers=SOON)
    assert late.status_code == 202
    assert late.json()["level"] == "accepted"
    assert statuses(late) == ["accepted", "accepted"]
    gone = await delete(client, "2", headers=SOON)
    assert (gone.status_code, statuses(gone)) == (202, ["accepted"])
    await idle.work("late")
    await ended(client, late)
    await ended(client, gone)
    assert await texts(client) == ["tide"]


async def test_the_service_waits_no_longer_than_its_own_deadline(start):
    whole = await start(working=False)
    limits = whole.service.context.settings.limits.model_copy(update={"bulk_deadline_s": 0.01})
    short = await start(working=False, limits=limits)
    client = await shop(short)
    assert (await write(client, ("1", "tide"))).status_code == 202


async def test_once_accepted_a_store_that_is_away_is_no_error(books, whole):
    whole.store.faults = {"list_items": StoreUnavailable("Away.", retry_after_s=1)}
    answer = await write(books, ("1", "tide"))
    assert (answer.status_code, answer.json()["level"]) == (202, "accepted")
    assert "data" not in answer.json()
    whole.store.faults = {}
    await ended(books, answer)
    assert await texts(books) == ["tide"]


async def test_a_deadline_that_has_passed_accepts_nothing(books, whole):
    async def slowly():
        yield b'{"documents": [{"id": "1",'
        whole.clock.advance(2)
        yield b'"text": "tide"}]}'

    late = await books.post(f"{BOOKS}/documents", content=slowly(), headers=SOON)
    assert (late.status_code, late.json()["code"]) == (504, "deadline_exceeded")
    assert (await books.get("/v1/jobs")).json()["data"] == []


# --- content that has landed already ---------------------------------------------------------


async def test_unchanged_content_is_skipped_and_says_so(books, whole):
    await write(books, ("1", "tide"), ("2", "ebb"))
    calls = len(whole.embedder.calls)
    again = await write(books, ("1", "tide"), ("2", "ebb"))
    assert again.status_code == 200
    assert statuses(again) == ["unchanged", "unchanged"]
    assert [one["generation"] for one in again.json()["data"]] == [1, 1]
    assert again.json()["usage"] == {"total_tokens": 0}
    assert len(whole.embedder.calls) == calls
    assert (await job_of(books, again))["skipped"] == 2
    part = await write(books, ("1", "tide"), ("2", "flood"))
    assert statuses(part) == ["unchanged", "indexed"]
    await delete(books, "1")
    assert statuses(await write(books, ("1", "tide"))) == ["indexed"]
    assert await texts(books) == ["flood", "tide"]


# --- repeats ---------------------------------------------------------------------------------


async def test_a_repeat_with_the_same_key_is_the_same_job(idle):
    client = await shop(idle)
    key = {"idempotency-key": "order-7"}
    first = await write(client, ("1", "tide"), wait="accepted", headers=key)
    second = await write(client, ("1", "tide"), wait="accepted", headers=key)
    assert second.json() == first.json()
    assert "idempotent-replayed" not in first.headers
    assert second.headers["idempotent-replayed"] == "true"
    waiting = asyncio.ensure_future(write(client, ("1", "tide"), headers=key))
    await idle.work("late")
    third = await waiting
    assert (third.status_code, statuses(third)) == (200, ["indexed"])
    assert third.json()["receipt"]["job"] == first.json()["job"]
    fourth = await write(client, ("1", "tide"), headers=key)  # after its end
    assert fourth.json() == third.json()
    assert len((await client.get("/v1/jobs")).json()["data"]) == 1


async def test_a_key_that_was_used_for_something_else_is_refused(books):
    key = {"idempotency-key": "order-7"}
    await write(books, ("1", "tide"), headers=key)
    for answer in (
        await write(books, ("1", "ebb"), headers=key),
        await write(books, ("1", "tide"), headers=key, priority=1),
        await delete(books, "1", headers=key),
    ):
        assert (answer.status_code, answer.json()["code"]) == (422, "idempotency_mismatch")
    bad = await write(books, ("1", "tide"), headers={"idempotency-key": "a b"})
    assert (bad.status_code, bad.json()["param"]) == (400, "Idempotency-Key")
    assert await texts(books) == ["tide"]


# --- order -----------------------------------------------------------------------------------


async def test_the_last_accepted_write_wins_while_an_older_one_is_queued(idle):
    client = await shop(idle)
    old = await write(client, ("1", "the first word"), ("2", "stays"), wait="accepted")
    new = await write(client, ("1", "the last word"), wait="accepted")
    await idle.work("late")
    await ended(client, old)
    await ended(client, new)
    found = await items(client, old, "done", "skipped")
    assert [one["result"]["status"] for one in found] == ["superseded", "indexed"]
    assert await texts(client) == ["stays", "the last word"]


async def test_writes_and_deletes_are_done_as_they_were_accepted(idle):
    client = await shop(idle)
    for name in ("gone", "back"):
        await write(client, (name, "first"), wait="accepted")
        await delete(client, name, wait="accepted")
    last = await write(client, ("back", "second"), wait="accepted")
    repeated = await delete(client, "gone", wait="accepted")
    await idle.work("late")
    await ended(client, last)
    await ended(client, repeated)
    assert await texts(client) == ["second"]
    assert await records(client) == 1


# --- faults ----------------------------------------------------------------------------------


async def test_a_worker_that_dies_in_the_middle_is_succeeded(books, whole):
    entered, hangs = asyncio.Event(), asyncio.Event()

    async def hang():
        entered.set()
        await hangs.wait()

    whole.embedder.before = hang
    names = [str(n) for n in range(20)]
    answer = await write(books, *((name, f"text {name}") for name in names), wait="accepted")
    await entered.wait()
    whole.worker.cancel()
    await asyncio.gather(whole.worker, return_exceptions=True)
    whole.embedder.before = None
    assert (await job_of(books, answer))["processed"] == 0
    whole.clock.advance(LEASE_S + 1)
    await whole.store.tick()
    await whole.work("successor")
    job = await ended(books, answer)
    assert (job["state"], job["succeeded"], job["failed"]) == ("completed", 20, 0)
    found = await items(books, answer, "done")
    assert [one["attempts"] for one in found] == [0] * 20  # a crash is not an attempt
    assert await texts(books) == sorted(f"text {name}" for name in names)


async def test_a_delete_outlives_its_worker(books, whole):
    await write(books, ("1", "tide"))
    whole.worker.cancel()
    await asyncio.gather(whole.worker, return_exceptions=True)
    answer = await delete(books, "1", "2", headers=SOON)
    assert (answer.status_code, statuses(answer)) == (202, ["accepted", "absent"])
    assert await texts(books) == ["tide"]
    whole.clock.advance(LEASE_S + 1)  # the claim that the dead one was waiting with
    await whole.store.tick()
    await whole.work("successor")
    job = await ended(books, answer)
    assert (job["succeeded"], await records(books)) == (2, 0)


@pytest.mark.parametrize(
    "fault", [ModelUnavailable("Gone."), Overloaded("Full.", retry_after_s=3)], ids=lambda e: e.code
)
async def test_what_fails_by_our_fault_is_tried_again_and_paid_once(books, whole, fault):
    whole.embedder.fault = fault
    answer = await write(books, ("1", "tide"), ("2", "ebb"), wait="accepted")
    for one in await items(books, answer, "delayed"):
        assert one["error"]["code"] == fault.code
        assert one["attempts"] == (fault.code == "model_unavailable")  # no room burns none
    assert tokens_left(await delete(books, "none")) == 20_000
    whole.embedder.fault = None
    whole.clock.advance(10)
    await whole.store.tick()
    assert (await ended(books, answer))["state"] == "completed"
    assert await texts(books) == ["ebb", "tide"]
    await whole.service.context.quotas._report()
    used = (await books.get("/v1/usage")).json()["data"]
    assert [row["tokens"] for row in used if row["class"] == "bulk"] == [6 + 5]


async def test_an_index_that_is_away_delays_writes_and_deletes(books, whole):
    await write(books, ("old", "tide"))
    whole.upserter.faults = {"offer": IndexUnavailable("Away.", retry_after_s=1)}
    new = await write(books, ("new", "ebb"), wait="accepted")
    gone = await delete(books, "old", wait="accepted")
    for answer in (new, gone):
        (one,) = await items(books, answer, "delayed")
        assert one["error"]["code"] == "index_unavailable"
    whole.upserter.faults = {}
    whole.clock.advance(10)
    await whole.store.tick()
    await ended(books, new)
    await ended(books, gone)
    assert await texts(books) == ["ebb"]


async def test_nothing_is_embedded_that_the_index_has_no_room_for(books, whole):
    async def full() -> Pressure:
        return Pressure(0.01)

    whole.upserter.pressure = full
    answer = await write(books, ("1", "tide"), wait="accepted")
    (one,) = await items(books, answer, "delayed")
    assert (one["error"]["code"], one["attempts"]) == ("overloaded", 0)
    assert not whole.embedder.calls
    assert tokens_left(await delete(books, "none", wait="accepted")) == 20_000
    del whole.upserter.pressure
    whole.clock.advance(10)
    await whole.store.tick()
    assert (await ended(books, answer))["state"] == "completed"
    assert await texts(books) == ["tide"]


def once(port, name, act):
    """Let `act` stand in for the first call of a method."""
    plain, calls = getattr(port, name), []

    async def stand_in(*args):
        calls.append(args)
        return await (act if len(calls) == 1 else plain)(*args)

    setattr(port, name, stand_in)


async def away(*_args):
    raise IndexUnavailable("Away.", retry_after_s=1)


async def released(_sender, _ns, writes, _deadline_s):
    return [Outcome("released")] * len(writes)


@pytest.mark.parametrize("fault", [away, released])
async def test_a_fault_of_the_index_that_passes_costs_nothing(books, whole, fault):
    once(whole.upserter, "offer", fault)
    answer = await write(books, ("1", "tide"), ("2", "ebb"))
    assert (answer.status_code, statuses(answer)) == (200, ["indexed", "indexed"])
    (job,) = (await books.get("/v1/jobs")).json()["data"]
    listed = (await books.get(f"/v1/jobs/{job['id']}/items")).json()["data"]
    assert [one["attempts"] for one in listed] == [0, 0]
    assert len(whole.embedder.calls) == 1  # what was embedded is landed again, no more
    assert tokens_left(await delete(books, "none")) == 20_000 - 6 - 5


@pytest.mark.parametrize("fault", [away, released])
async def test_what_the_index_does_not_take_is_not_paid_and_comes_again(books, whole, fault):
    once(whole.upserter, "offer", fault)
    once(whole.upserter, "offer", fault)  # both tries of a lease in these tests
    answer = await write(books, ("1", "tide"), wait="accepted")
    (one,) = await items(books, answer, "delayed")
    assert (one["error"]["kind"], one["error"]["code"]) == ("network", "index_unavailable")
    assert tokens_left(await delete(books, "none")) == 20_000
    whole.clock.advance(10)
    await whole.store.tick()
    assert (await ended(books, answer))["state"] == "completed"
    await whole.service.context.quotas._report()
    used = (await books.get("/v1/usage")).json()["data"]
    assert [row["tokens"] for row in used if row["class"] == "bulk"] == [6]


@pytest.mark.parametrize("change", ["revised", "gone"])
async def test_an_accepted_delete_is_done_whatever_became_of_the_model(books, whole, change):
    await write(books, ("1", "tide"))
    served = whole.service.context.models._served
    plain = served.pop("plain")
    if change == "revised":
        served["plain"] = replace(plain, revision="another")
    answer = await delete(books, "1", wait="accepted")
    assert (await ended(books, answer))["state"] == "completed"
    assert await records(books) == 0
    served["plain"] = plain
    assert await texts(books) == []


async def test_writes_for_a_model_that_was_revised_since_are_dead(idle):
    client = await shop(idle)
    answer = await write(client, ("1", "tide"), wait="accepted")
    served = idle.service.context.models._served
    served["plain"] = replace(served["plain"], revision="another")
    await idle.work("late")
    assert (await ended(client, answer))["state"] == "failed"
    (one,) = await items(client, answer, "dead")
    assert (one["error"]["kind"], one["error"]["code"]) == ("invalid", "conflict")


async def test_a_fault_in_one_tenant_s_work_is_not_another_s(idle):
    client, other = await shop(idle), await shop(idle, "other")
    embed = idle.embedder.embed

    async def faulty(call):
        if call.tenant == "acme":
            raise KeyError("a fault of ours")
        for _ in range(50):  # is not done yet when the other fails
            await asyncio.sleep(0)
        return await embed(call)

    idle.embedder.embed = faulty
    ours = await write(client, ("1", "tide"), wait="accepted")
    theirs = await write(other, ("1", "ebb"), wait="accepted")
    await idle.work("late")
    assert (await ended(other, theirs))["state"] == "completed"
    assert [one["attempts"] for one in await items(other, theirs, "done")] == [0]
    (one,) = await items(client, ours, "delayed")
    assert (one["attempts"], one["error"]["code"]) == (1, "internal_error")


async def test_documents_outlast_a_tier_that_is_not_in_the_settings(idle):
    client = await shop(idle)
    answer = await write(client, ("1", "tide"), wait="accepted")
    job = answer.json()["status_url"].rpartition("/")[2]
    tiers = idle.service.context.settings.admission.tiers
    lost = tiers.pop("premium")
    await idle.work("late")
    while True:
        (one,) = await idle.store.list_items("acme", job, (), -1, 10)
        if one.state == "delayed":
            break
        await asyncio.sleep(0)
    assert (one.attempts, one.error_code) == (0, "limits_not_valid")
    tiers["premium"] = lost
    idle.clock.advance(2 * HOPELESS_S)
    await idle.store.tick()
    assert (await ended(client, answer))["state"] == "completed"


async def test_what_is_above_a_limit_waits_for_it(whole):
    client = await shop(whole, "free")
    await write(client, ("1", "x" * 30), ("2", "y" * 30), ("3", "z" * 30))
    answer = await write(
        client, *((str(n), str(n) * 30) for n in range(4, 8)), wait="accepted"
    )  # 128 tokens, of which 104 are there
    found = await items(client, answer, "delayed")
    assert {one["error"]["code"] for one in found} == {"tenant_bulk_tokens_per_minute"}
    whole.clock.advance(10)
    await whole.store.tick()
    job = await ended(client, answer)
    assert (job["state"], job["succeeded"]) == ("completed", 4)


async def test_more_than_a_limit_holds_at_once_is_not_a_fault_of_the_documents(whole):
    client = await shop(whole, "free")
    answer = await write(client, *((str(n), str(n % 10) * 30) for n in range(12)), wait="accepted")
    while not (await job_of(client, answer))["is_complete"]:  # 384 tokens, of 200 at once
        whole.clock.advance(10)
        await whole.store.tick()
        await asyncio.sleep(0.002)
    job = await job_of(client, answer)
    assert (job["state"], job["succeeded"]) == ("completed", 12)
