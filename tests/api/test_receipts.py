"""Receipts: how far writes are, waited for, looked up later, and waited for by searches."""

import asyncio

import pytest

from serve.errors import IndexUnavailable, StoreUnavailable
from serve.flows.raw_receipts import RawReceipt
from tests.api.conftest import NOW, POISON
from tests.api.lines import line, submit


BOOKS = "/v1/collections/books"
SOON = {"x-deadline-ms": "300"}


async def shop(whole, who="premium", name="books"):
    client = await whole.client(who)
    answer = await client.post("/v1/collections", json={"name": name, "model": "plain"})
    assert answer.status_code == 201
    return client


@pytest.fixture
async def lagging(start):
    return await start(lagging=True)


@pytest.fixture
async def books(lagging):
    """A client of a service whose index lags behind."""
    return await shop(lagging)


async def write(client, *names, wait="indexed", headers=None, text="tide"):
    body = {"documents": [{"id": name, "text": text} for name in names]}
    return await client.post(
        f"{BOOKS}/documents", params={"wait": wait}, headers=headers, json=body
    )


async def delete(client, *ids, wait="indexed"):
    return await client.request(
        "DELETE", f"{BOOKS}/documents", params={"wait": wait}, json={"ids": ids}
    )


async def put(client, *names, wait="indexed", headers=None, numbers=(1.0,) * 16):
    body = {"vectors": [{"id": name, "vector": list(numbers)} for name in names]}
    return await client.post(f"{BOOKS}/vectors", params={"wait": wait}, headers=headers, json=body)


async def search(client, after=None, headers=None, name="books"):
    body = {"vector": [1.0] * 16} | ({} if after is None else {"after": after})
    return await client.post(f"/v1/collections/{name}/search", json=body, headers=headers)


def receipt_of(answer):
    body = answer.json()
    return body.get("receipt", body)


async def look(client, receipt):
    answer = await client.get(f"/v1/receipts/{receipt['id']}")
    assert answer.status_code == 200
    return answer.json()


def refusal(answer):
    body = answer.json()
    return answer.status_code, body["code"], body.get("param")


async def asked(index, count=1):
    """Return once the index was asked so often, from now on, how far searches see."""
    before = len(index.asked)
    while len(index.asked) < before + count:  # noqa: ASYNC110 - what it waits for has no event
        await asyncio.sleep(0)


# --- where searches see a write at once -------------------------------------------------------


async def test_a_write_that_was_waited_for_is_searchable(whole):
    client = await shop(whole)
    for waits in ("indexed", "searchable"):
        answer = await write(client, "1", "2", wait=waits, text=f"text {waits}")
        assert (answer.status_code, receipt_of(answer)["level"]) == (200, "searchable")
    assert receipt_of(await delete(client, "1", wait="searchable"))["level"] == "searchable"
    shown = await look(client, receipt_of(answer))
    assert shown == receipt_of(answer) | {
        "collection": "books",
        "failed": 0,
        "accepted_at": NOW,
        "indexed_at": NOW,
        "searchable_at": NOW,
        "failures": [],
        "has_more": False,
    }


async def test_a_receipt_goes_with_its_job(start):
    whole = await start(working=False)
    client = await shop(whole)
    accepted = await write(client, "1", "2", wait="accepted")
    shown = await look(client, receipt_of(accepted))
    assert (shown["level"], shown["documents"], shown["accepted_at"]) == ("accepted", 2, NOW)
    assert (shown["indexed_at"], shown["searchable_at"]) == (None, None)
    whole.clock.advance(7)
    await whole.work("late")
    while (shown := await look(client, shown))["level"] == "accepted":  # noqa: ASYNC110
        await asyncio.sleep(0.002)
    assert (shown["level"], shown["indexed_at"], shown["searchable_at"]) == (
        "searchable",
        NOW + 7,
        NOW + 7,
    )


async def test_a_receipt_tells_what_failed_and_why(whole):
    client = await shop(whole)
    body = {"documents": [{"id": "good", "text": "tide"}, {"id": "bad", "text": POISON}]}
    answer = await client.post(f"{BOOKS}/documents", json=body)
    shown = await look(client, receipt_of(answer))
    assert (shown["level"], shown["documents"], shown["failed"]) == ("searchable", 2, 1)
    (failure,) = shown["failures"]
    assert (failure["id"], failure["error"]) == ("bad", answer.json()["data"][1]["error"])
    assert shown["has_more"] is False


async def test_receipts_of_others_are_not_found(whole, subtests):
    client, other = await shop(whole), await shop(whole, "other")
    mine = [receipt_of(await write(client, "1"))["id"], receipt_of(await put(client, "v"))["id"]]
    forged = RawReceipt("ab" * 16, 5, 1, 0, None).id
    broken = [mine[1][:-1], mine[1] + "A", mine[1][:-1] + "*", "rcpt_", "job_1", "rcpt_vé", forged]
    for receipt in (*mine, *broken):
        with subtests.test(receipt=receipt):
            for answer in (
                await other.get(f"/v1/receipts/{receipt}"),
                await search(other, after=[receipt]),
            ):
                status, _, param = refusal(answer)
                named = "id" if answer.request.method == "GET" else "after"
                known = receipt in (mine[1], forged) and named == "after"
                assert (status, param) == ((400, "after") if known else (404, named))
    for receipt in broken:
        assert (await client.get(f"/v1/receipts/{receipt}")).status_code == 404
    assert (await client.delete(BOOKS)).status_code == 200
    assert (await client.get(f"/v1/receipts/{mine[1]}")).status_code == 404


async def test_a_batch_has_no_receipt(whole):
    client, ai = await whole.client(), await whole.openai()
    batch = await submit(ai, line("a"))
    receipt = batch.id.replace("batch_", "rcpt_")
    assert receipt.startswith("rcpt_")
    assert refusal(await client.get(f"/v1/receipts/{receipt}")) == (404, "not_found", "id")


async def test_raw_vectors_have_receipts(whole, subtests):
    client = await shop(whole)
    for waits in ("accepted", "indexed", "searchable"):
        with subtests.test(waits=waits):
            answer = await put(client, "a", "b", wait=waits)
            receipt = receipt_of(answer)
            assert (receipt["level"], receipt["job"]) == ("searchable", None)
            shown = await look(client, receipt)
            assert (await client.get(receipt["status_url"])).json() == shown
            assert {name: shown[name] for name in receipt} == receipt
            assert (shown["documents"], shown["failed"], shown["collection"]) == (2, 0, "books")
            assert (shown["accepted_at"], shown["searchable_at"]) == (NOW, NOW)
    half = await put(client, "a", "")
    assert (half.status_code, (await look(client, receipt_of(half)))["failed"]) == (207, 1)
    none = await put(client, "a", numbers=(1.0,))
    assert (none.status_code, receipt_of(none)) == (207, None)
    assert refusal(await put(client, "a", wait="soon")) == (400, "invalid_request", "wait")


# --- where they lag behind --------------------------------------------------------------------


async def test_what_is_indexed_is_searchable_when_the_index_says_so(lagging, books):
    receipts = [receipt_of(await write(books, "1")), receipt_of(await put(books, "v"))]
    assert [one["level"] for one in receipts] == ["indexed", "indexed"]
    assert [(await look(books, one))["level"] for one in receipts] == ["indexed"] * 2
    await lagging.index.show()
    for shown in [await look(books, one) for one in receipts]:
        assert (shown["level"], shown["indexed_at"], shown["searchable_at"]) == (
            "searchable",
            NOW,
            None,
        )


@pytest.mark.parametrize("send", [write, put])
async def test_who_waits_is_answered_when_searches_see_it(lagging, books, send):
    waiting = asyncio.create_task(send(books, "1", wait="searchable"))
    await asked(lagging.index, 2)
    assert not waiting.done()
    await lagging.index.show()
    answer = await waiting
    assert (answer.status_code, receipt_of(answer)["level"]) == (200, "searchable")


@pytest.mark.parametrize("send", [write, put])
async def test_who_cannot_wait_so_long_is_told_how_far_it_is(books, send):
    answer = await send(books, "1", wait="searchable", headers=SOON)
    assert (answer.status_code, receipt_of(answer)["level"]) == (200, "indexed")


async def test_a_delete_of_which_there_is_no_proof_is_not_waited_for(lagging, books):
    await write(books, "1")
    await lagging.index.show()
    gone = await delete(books, "1", wait="searchable")
    assert (gone.status_code, receipt_of(gone)["level"]) == (200, "indexed")
    assert (await look(books, receipt_of(gone)))["level"] == "indexed"
    assert refusal(await search(books, after=receipt_of(gone)["id"])) == (
        409,
        "freshness_unknown",
        "after",
    )


async def test_an_index_that_is_away_has_shown_nothing_yet(lagging, books):
    receipt = receipt_of(await write(books, "1"))
    lagging.index.away = True
    assert (await look(books, receipt))["level"] == "indexed"


async def test_what_is_unchanged_is_seen_with_the_write_that_landed_it(lagging, books):
    await write(books, "1")
    again = await write(books, "1", wait="searchable", headers=SOON)
    assert again.json()["data"][0]["status"] == "unchanged"
    assert receipt_of(again)["level"] == "indexed"
    await lagging.index.show()
    assert (await look(books, receipt_of(again)))["level"] == "searchable"


async def test_another_replica_knows_as_much(start, lagging, books):
    """All that a receipt needs is in the Store, or in the receipt."""
    receipts = [receipt_of(await write(books, "1")), receipt_of(await put(books, "v"))]
    ports = lagging.ports
    settings = lagging.service.context.settings
    other = start.service(settings, ports, "two")
    caller = await other.door.caller(books.headers["authorization"])
    seen = [await other.receipts.find(caller, one["id"]) for one in receipts]
    assert [one.level for one in seen] == ["indexed"] * 2
    await lagging.index.show()
    seen = [await other.receipts.find(caller, one["id"]) for one in receipts]
    assert [one.level for one in seen] == ["searchable"] * 2


async def test_without_the_store_it_is_indexed_as_far_as_is_known(lagging, books):
    lagging.store.faults["find_job"] = StoreUnavailable("The Store is away.")
    answer = await write(books, "1", wait="searchable")
    assert (answer.status_code, receipt_of(answer)["level"]) == (200, "indexed")


# --- searches after a write -------------------------------------------------------------------


@pytest.mark.parametrize("send", [write, put])
async def test_a_search_after_a_write_sees_it(lagging, books, send):
    receipt = receipt_of(await send(books, "1"))
    assert (await search(books)).json()["data"] == []
    waiting = asyncio.create_task(search(books, after=receipt["id"]))
    await asked(lagging.index, 2)
    assert not waiting.done()
    await lagging.index.show()
    hits = (await waiting).json()["data"]
    assert [hit["document"] for hit in hits] == ["1"]


async def test_a_search_waits_for_what_is_only_accepted(start):
    whole = await start(working=False)
    client = await shop(whole)
    first = receipt_of(await write(client, "1", wait="accepted"))
    second = receipt_of(await write(client, "2", wait="accepted"))
    late = await search(client, after=first["id"], headers=SOON)
    assert refusal(late) == (504, "not_searchable_yet", "after")
    assert "retry-after" in late.headers
    waiting = asyncio.create_task(search(client, after=[first["id"], second["id"], first["id"]]))
    await whole.work("worker")
    found = {hit["document"] for hit in (await waiting).json()["data"]}
    assert found == {"1", "2"}


async def test_a_search_that_cannot_wait_so_long_says_so(lagging, books):
    for answer in (await write(books, "1"), await put(books, "v")):
        late = await search(books, after=receipt_of(answer)["id"], headers=SOON)
        assert refusal(late) == (504, "not_searchable_yet", "after")
    await lagging.index.show()
    assert (await search(books, after=receipt_of(answer)["id"])).status_code == 200


async def test_after_names_receipts_of_the_collection(whole, subtests):
    client = await shop(whole)
    await client.post("/v1/collections", json={"name": "other", "model": "plain"})
    mine = [receipt_of(await write(client, "1"))["id"], receipt_of(await put(client, "v"))["id"]]
    for receipt in mine:
        answer = await search(client, after=receipt, name="other")
        assert refusal(answer) == (400, "other_collection", "after")
    assert refusal(await search(client, after=["rcpt_1"])) == (404, "not_found", "after")
    bad = {"after": [[], [mine[0]] * 17, 5, {}], "after[1]": [[mine[0], ""], [mine[0], 5]]}
    for param, values in bad.items():
        for value in values:
            with subtests.test(value=value):
                assert refusal(await search(client, after=value)) == (400, "invalid_request", param)
    assert (await search(client, after=[mine[0]] * 16)).status_code == 200


# --- lag --------------------------------------------------------------------------------------


async def lag(client):
    return (await client.get("/v1/stats")).json()["lag"]


async def test_the_lag_of_the_last_landings_is_told(start, whole):
    client, other = await shop(whole), await shop(whole, "other")
    assert await lag(client) == {"landings": 0, "indexed": None, "searchable": None}
    await write(client, "1")
    await put(client, "v")  # was never accepted but landed
    whole.clock.advance(10)  # figures are kept for a while
    at_once = {"p50_s": 0.0, "p95_s": 0.0}
    assert await lag(client) == {"landings": 1, "indexed": at_once, "searchable": at_once}
    assert (await lag(other))["landings"] == 0
    whole.upserter.faults["lag"] = IndexUnavailable("The writer is away.")
    whole.clock.advance(10)
    assert await lag(client) is None


async def test_until_searches_see_it_the_lag_grows(lagging, books):
    await write(books, "1")
    await asked(lagging.index)
    assert (await lag(books))["searchable"] is None
    lagging.clock.advance(10)
    await lagging.index.show()
    while (told := await lag(books))["searchable"] is None:
        lagging.clock.advance(10)
        await asyncio.sleep(0.01)
    assert told["indexed"] == {"p50_s": 0.0, "p95_s": 0.0}
    assert told["searchable"]["p95_s"] >= 10
