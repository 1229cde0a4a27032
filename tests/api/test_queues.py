"""`/v1/queues/{collection}`: one verdict a message, and nothing lost, doubled or brought back."""

from types import SimpleNamespace

import orjson
import pytest

from serve.config import Jobs, Limits
from serve.errors import IndexUnavailable, NotFound, Overloaded, StoreUnavailable
from serve.records import Outcome


BOOKS = "/v1/collections/books"
URL = "/v1/queues/books"
NOW_MS = 1_700_000_000_000
"""The frozen time of day."""


def message(number: int, body, sent_ms: int = 0, **fields):
    """One that was sent a minute ago, and `sent_ms` later than others."""
    at = NOW_MS - 60_000 + sent_ms
    return {"id": f"m{number}", "timestamp": at, "attempts": 1, "body": body, **fields}


def document(name: str, text: str = "the tide", **fields):
    return {"id": name, "text": text, **fields}


def vector(name: str, *values: float):
    return {"id": name, "vector": [*values, *[0.0] * (16 - len(values))]}


def removal(name: str):
    return {"id": name, "delete": True}


async def consume(client, *messages, status=200, **headers):
    answer = await client.post(URL, json={"messages": messages}, headers=headers)
    assert answer.status_code == status, answer.text
    return answer.json()


def told(body):
    return [(one["id"], one["verdict"], one["status"]) for one in body["data"]]


def errors(body):
    """Of the messages that are to be retried: delay, whether it is in vain, code and field."""
    return {
        one["id"]: (
            one["delay_seconds"],
            one["dead"],
            one["error"]["code"],
            one["error"].get("param"),
        )
        for one in body["data"]
        if one["verdict"] == "retry"
    }


async def ended(client, body):
    """How the documents and deletes of a reply have ended."""
    job = body["receipt"]["job"]
    async with client.stream("GET", f"/v1/jobs/{job}/events") as events:
        await events.aread()
    items = (await client.get(f"/v1/jobs/{job}/items")).json()["data"]
    return {one["id"]: one["state"] for one in items}


async def held(client):
    """Texts by document, of all that the index holds."""
    lines = (await client.get(f"{BOOKS}/export")).text.splitlines()
    rows = [orjson.loads(line) for line in lines]
    return {one["id"]: one["text"] for one in rows if "id" in one}


@pytest.fixture
async def books(client):
    await client.post("/v1/collections", json={"name": "books"})
    return client


# --- what messages ask for -------------------------------------------------------------------


async def test_a_batch_of_all_kinds_is_done_and_acknowledged(books):
    await books.post(f"{BOOKS}/documents", json={"documents": [document("old")]})
    body = await consume(
        books,
        message(1, document("a", metadata={"year": 1990})),
        message(2, vector("v", 3, 4)),
        message(3, removal("old"), 60_001),
    )
    assert told(body) == [
        ("m1", "ack", "accepted"),
        ("m2", "ack", "indexed"),
        ("m3", "ack", "accepted"),
    ]
    assert body["data"][0] == {"id": "m1", "verdict": "ack", "status": "accepted"}
    assert (body["retried"], body["receipt"]["documents"]) == (0, 2)
    assert await ended(books, body) == {"a": "done", "old": "done"}
    assert await held(books) == {"a": "the tide", "v": ""}


async def test_what_is_accepted_is_in_the_store_before_anybody_works_on_it(start):
    whole = await start(working=False)
    client = await whole.client()
    await client.post("/v1/collections", json={"name": "books"})
    body = await consume(client, message(1, document("a")))
    assert told(body) == [("m1", "ack", "accepted")]
    found = (await client.get(f"/v1/jobs/{body['receipt']['job']}/items")).json()["data"]
    assert [(one["id"], one["state"]) for one in found] == [("a", "ready")]
    await whole.work("late")
    assert await ended(client, body) == {"a": "done"}


async def test_a_time_may_be_written_as_json_has_a_date(books):
    later = message(2, document("a", "new")) | {"timestamp": "2023-11-14T22:13:20.500Z"}
    earlier = message(1, document("a", "old")) | {"timestamp": "2023-11-14T23:13:20.4+01:00"}
    body = await consume(books, later, earlier)
    assert told(body) == [("m2", "ack", "accepted"), ("m1", "ack", "superseded")]
    await ended(books, body)
    assert await held(books) == {"a": "new"}


async def test_what_else_a_queue_says_of_a_message_is_ignored(books):
    body = await consume(books, message(1, document("a"), lease_id="x", metadata={"b": 1}))
    assert told(body) == [("m1", "ack", "accepted")]


# --- one bad message -------------------------------------------------------------------------


async def test_a_bad_message_is_named_dead_and_leaves_the_others_alone(start):
    whole = await start(limits=Limits(document_chars_max=20))
    client = await whole.client()
    await client.post("/v1/collections", json={"name": "books"})
    bad = [
        {"text": "no id"},
        document(""),
        document("long", "x" * 21),
        document("meta", metadata={"a": {"b": 1}}),
        document("odd", colour="red"),
        vector("short") | {"vector": [1.0]},
        vector("zero"),
        vector("text") | {"vector": "not base64!"},
        {"id": "kept", "delete": False},
        removal("control\n"),
        "no object",
        None,
        ["a"],
    ]
    good = [message(100, document("good")), message(101, vector("fine", 1))]
    sent = [good[0], *(message(at, one) for at, one in enumerate(bad)), good[1]]
    body = await consume(client, *sent, status=207)
    assert [one["verdict"] for one in body["data"]] == ["ack", *["retry"] * len(bad), "ack"]
    assert body["retried"] == len(bad)
    found = errors(body)
    assert {(delay, dead) for delay, dead, _, _ in found.values()} == {(0, True)}
    assert [param.removeprefix("messages") for *_, param in found.values()] == [
        "[1].body.id",
        "[2].body.id",
        "[3].body.text",
        "[4].body.metadata.a",
        "[5].body.colour",
        "[6].body.vector",
        "[7].body.vector",
        "[8].body.vector",
        "[9].body.delete",
        "[10].body.id",
        "[11].body",
        "[12].body",
        "[13].body",
    ]
    await ended(client, body)
    assert set(await held(client)) == {"good", "fine"}


async def test_a_batch_of_nothing_but_bad_messages_has_verdicts_and_no_receipt(books):
    body = await consume(books, message(1, {}), message(2, 7), status=207)
    assert told(body) == [("m1", "retry", "failed"), ("m2", "retry", "failed")]
    assert "receipt" not in body


async def test_what_the_index_refuses_is_dead(books, whole, monkeypatch):
    async def refusing(_sender, _ns, records, _deadline_s):
        return [Outcome("rejected", "no") for _ in records]

    monkeypatch.setattr(whole.upserter, "offer", refusing, raising=False)
    body = await consume(books, message(1, vector("v", 1)), status=207)
    assert errors(body) == {"m1": (0, True, "invalid_request", "messages[0].body")}


async def test_a_document_that_fails_later_is_seen_in_the_job(books):
    body = await consume(books, message(1, document("a", "poison")), message(2, document("b")))
    assert await ended(books, body) == {"a": "dead", "b": "done"}


# --- twice, late, out of order ---------------------------------------------------------------


async def test_a_message_that_comes_again_changes_nothing(books, whole):
    sent = [message(1, document("a")), message(2, vector("v", 1)), message(3, removal("gone"))]
    first = await consume(books, *sent)
    await ended(books, first)
    calls = len(whole.embedder.calls)
    again = await consume(books, *(one | {"attempts": 2} for one in sent))
    assert [one["verdict"] for one in again["data"]] == ["ack", "ack", "ack"]
    await ended(books, again)
    assert await held(books) == {"a": "the tide", "v": ""}
    assert len(whole.embedder.calls) == calls


async def test_a_message_that_comes_twice_in_a_batch_is_done_once(books):
    one = message(1, document("a"))
    body = await consume(books, one, one)
    assert told(body) == [("m1", "ack", "superseded"), ("m1", "ack", "accepted")]
    assert body["receipt"]["documents"] == 1


@pytest.mark.parametrize("make", [document, lambda name, text: vector(name, 1) | {"text": text}])
async def test_an_older_message_does_not_overwrite_a_newer_one(books, make):
    old, new = message(1, make("a", "old"), 1), message(2, make("a", "new"), 2)
    for batch in ([new], [old], [old, new], [new, old], [old]):
        body = await consume(books, *batch)
        assert {one["verdict"] for one in body["data"]} == {"ack"}
        if "receipt" in body:
            await ended(books, body)
        assert await held(books) == {"a": "new"}


async def test_an_older_message_does_not_overwrite_what_was_written_directly(books):
    old = message(1, document("a", "old"))
    await ended(books, await consume(books, old))
    await books.post(f"{BOOKS}/documents", json={"documents": [document("a", "new")]})
    await ended(books, await consume(books, old))
    assert await held(books) == {"a": "new"}


@pytest.mark.parametrize("make", [document, lambda name: vector(name, 1)])
async def test_a_write_from_before_a_delete_brings_nothing_back(books, make):
    write, delete = message(1, make("a"), 1), message(2, removal("a"), 2)
    for batch in ([delete], [write], [write, delete], [delete, write]):
        body = await consume(books, *batch)
        assert {one["verdict"] for one in body["data"]} == {"ack"}
        if "receipt" in body:
            await ended(books, body)
        assert await held(books) == {}
    await ended(books, await consume(books, message(3, document("a", "anew"), 3)))
    assert await held(books) == {"a": "anew"}


async def test_a_message_in_place_of_another_takes_its_verdict_along(books, whole):
    whole.store.faults["submit_job"] = Overloaded("Full.", retry_after_s=3)
    body = await consume(
        books, message(1, document("a", "old"), 1), message(2, document("a", "new"), 2), status=207
    )
    assert {(one["verdict"], one["error"]["code"]) for one in body["data"]} == {
        ("retry", "overloaded")
    }
    whole.store.faults.clear()
    await ended(books, await consume(books, message(1, document("a", "old"), 1)))
    assert await held(books) == {"a": "old"}


async def test_a_bad_message_never_counts_for_a_good_one(books):
    body = await consume(
        books, message(1, document("a"), 1), message(2, document("a", ""), 2), status=207
    )
    assert told(body) == [("m1", "ack", "accepted"), ("m2", "retry", "failed")]


async def test_a_vector_waits_until_the_document_of_its_id_is_gone(books):
    await ended(books, await consume(books, message(1, document("a"), 1)))
    body = await consume(books, message(2, vector("a", 1), 3), status=207)
    assert errors(body) == {"m2": (10, False, "id_of_document", "messages[0].body.id")}
    await ended(books, await consume(books, message(3, removal("a"), 2)))
    assert told(await consume(books, message(2, vector("a", 1), 3))) == [("m2", "ack", "indexed")]


# --- what is away or full --------------------------------------------------------------------


async def test_an_index_that_is_away_holds_up_vectors_and_not_documents(books, whole):
    whole.upserter.faults["offer"] = IndexUnavailable("Away.", retry_after_s=3)
    sent = [message(1, vector("v", 1), attempts=4), message(2, removal("a"))]
    body = await consume(books, *sent, status=207)
    assert told(body) == [("m1", "retry", "failed"), ("m2", "ack", "accepted")]
    assert errors(body) == {"m1": (24, False, "index_unavailable", None)}
    whole.upserter.faults.clear()
    assert told(await consume(books, sent[0])) == [("m1", "ack", "indexed")]
    assert await held(books) == {"v": ""}


async def test_what_does_not_land_in_time_is_retried(books, whole):
    whole.upserter.faults["offer"] = AssertionError("nothing is offered any more")
    grant = whole.store.grant_vectors

    async def late(*words):
        whole.clock.advance(60)
        return await grant(*words)

    whole.service.vectors._store = SimpleNamespace(grant_vectors=late)
    body = await consume(books, message(1, vector("v", 1)), status=207, **{"x-deadline-ms": "900"})
    assert errors(body) == {"m1": (10, False, "deadline_exceeded", None)}


async def test_a_tenant_with_too_much_open_is_told_when_to_come_again(start):
    whole = await start(jobs=Jobs(open_items_max=1), working=False)
    client = await whole.client()
    await client.post("/v1/collections", json={"name": "books"})
    sent = [message(1, document("a")), message(2, document("b")), message(3, vector("v", 1))]
    body = await consume(client, *sent, status=207)
    assert told(body) == [
        ("m1", "retry", "failed"),
        ("m2", "retry", "failed"),
        ("m3", "ack", "indexed"),
    ]
    assert errors(body)["m1"] == (60, False, "open_items", None)


async def test_a_store_that_goes_away_in_the_middle_is_told_for_each_message(books, whole):
    whole.store.faults["submit_job"] = StoreUnavailable("Away.")
    body = await consume(books, message(1, document("a")), status=207)
    assert errors(body) == {"m1": (10, False, "store_unavailable", None)}


# --- errors of the whole batch ---------------------------------------------------------------


async def refused(client, *messages, status, url=URL):
    answer = await client.post(url, json={"messages": messages})
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    return answer


async def test_what_concerns_the_whole_batch_is_an_error_of_the_request(books, whole):
    one = message(1, document("a"))
    await refused(await whole.client(None), one, status=401)
    missing = await refused(books, one, status=404, url="/v1/queues/nowhere")
    assert missing.json()["code"] == "collection_not_found"
    await refused(await whole.client("other"), one, status=404)
    whole.store.faults["find_collection"] = StoreUnavailable("Away.", retry_after_s=2)
    away = await refused(books, one, status=503)
    assert away.headers["retry-after"] == "2"


async def test_a_quota_of_requests_refuses_the_batch_and_says_when(whole):
    client = await whole.client("free")
    await client.post("/v1/collections", json={"name": "books"})
    answers = [
        (await client.post(URL, json={"messages": [message(1, {})]})).status_code for _ in range(10)
    ]
    assert answers == [207] * 10  # a batch is one request
    answer = await refused(client, message(1, document("a")), status=429)
    assert answer.headers["retry-after"] == "1"


async def test_a_model_that_is_away_refuses_documents_and_no_vectors(books, whole, monkeypatch):
    def gone(*_, **__):
        raise NotFound("No such model.", code="model_not_found")

    monkeypatch.setattr(whole.service.context.models, "find", gone)
    await refused(books, message(1, document("a")), message(2, vector("v", 1)), status=404)
    assert await held(books) == {}
    assert told(await consume(books, message(2, vector("v", 1)))) == [("m2", "ack", "indexed")]


async def test_a_changed_model_is_refused_and_not_mixed(books, whole):
    served = whole.service.context.models.find("plain")
    object.__setattr__(served, "revision", "f" * 12)  # as after a change of the settings
    answer = await refused(books, message(1, document("a")), status=400)
    assert answer.json()["code"] == "model_revision_changed"
    assert told(await consume(books, message(2, removal("a")))) == [("m2", "ack", "accepted")]


async def test_a_fault_of_the_consumer_is_named(start, subtests):
    whole = await start(limits=Limits(queue_messages_max=2))
    client = await whole.client()
    await client.post("/v1/collections", json={"name": "books"})
    good = message(1, document("a"))
    for sent, param in (
        ([], "messages"),
        ([good, good, good], "messages"),
        ([good, good | {"id": ""}], "messages[1].id"),
        ([good | {"id": "x" * 129}], "messages[0].id"),
        ([good | {"attempts": 0}], "messages[0].attempts"),
        ([good | {"timestamp": "yesterday"}], "messages[0].timestamp"),
        ([good | {"timestamp": "2023-11-14T22:13:20"}], "messages[0].timestamp"),
        ([good | {"timestamp": NOW_MS / 1000}], "messages[0].timestamp"),
        ([good | {"timestamp": NOW_MS + 3_600_001}], "messages[0].timestamp"),
        ([good | {"timestamp": 1e300}], "messages[0].timestamp"),
        ([{"id": "m", "timestamp": NOW_MS}], "messages[0].body"),
        ([7], "messages[0]"),
    ):
        with subtests.test(param, sent=sent):
            answer = await refused(client, *sent, status=400)
            assert answer.json()["param"].startswith(param)
    assert (await client.get("/v1/jobs")).json()["data"] == []
    assert told(await consume(client, good | {"timestamp": NOW_MS + 3_600_000}))
