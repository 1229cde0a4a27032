"""Collections and documents: create, write, replace, delete, and what must not be seen."""

import asyncio

import pytest

from serve.config import Buffer, Chunking, Limits
from serve.errors import IndexUnavailable, StoreUnavailable


BOOKS = "/v1/collections/books"
TALE = (
    "Water gathers behind the dam. It falls through the headrace.\n\n"
    "The turbines turn, and evenly so. Nobody upstream notices them."
)


def problem(response, status):
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    body = response.json()
    assert body["status"] == status
    return body


async def create(client, name="books", **body):
    return await client.post("/v1/collections", json={"name": name, **body})


async def write(client, *documents, url=BOOKS):
    shown = [
        {"id": one[0], "text": one[1], "metadata": one[2] if len(one) > 2 else {}}
        for one in documents
    ]
    return await client.post(f"{url}/documents", json={"documents": shown})


async def delete(client, *ids):
    return await client.request("DELETE", f"{BOOKS}/documents", json={"ids": ids})


async def search(client, text, **body):
    answer = await client.post(f"{BOOKS}/search", json={"text": text, **body})
    assert answer.status_code == 200, answer.text
    return answer.json()["data"]


async def records(client):
    return (await client.get(BOOKS)).json()["records"]


def statuses(response):
    return [one["status"] for one in response.json()["data"]]


@pytest.fixture
async def books(client):
    assert (await create(client)).status_code == 201
    return client


# --- collections -----------------------------------------------------------------------------


async def test_a_collection_is_made_shown_listed_and_removed(client):
    made = await create(client, model="org/nested")
    assert made.status_code == 201
    assert made.headers["location"] == BOOKS
    assert made.json() | {"id": "-", "revision": "-"} == {
        "object": "collection",
        "id": "-",
        "name": "books",
        "model": "org/nested",
        "revision": "-",
        "dimensions": 32,
        "created": 1_700_000_000,
    }
    assert (await client.get(BOOKS)).json() == {**made.json(), "records": 0}
    await create(client, "articles")
    listed = (await client.get("/v1/collections")).json()["data"]
    assert [one["name"] for one in listed] == ["articles", "books"]
    assert listed[1] == made.json()
    gone = await client.delete(BOOKS)
    assert gone.json() == {"object": "collection", "name": "books", "deleted": True}
    assert problem(await client.get(BOOKS), 404)["code"] == "collection_not_found"
    assert problem(await client.delete(BOOKS), 404)["code"] == "collection_not_found"


async def test_the_first_model_is_the_default(client):
    assert (await create(client)).json()["model"] == "plain"


async def test_a_name_is_taken_once_for_each_tenant(books, whole):
    taken = await create(books, model="org/nested")
    body = problem(taken, 409)
    assert (body["code"], body["param"]) == ("conflict", "name")
    assert taken.headers["x-should-retry"] == "false"
    assert (await create(await whole.client("other"))).status_code == 201


async def test_of_many_who_want_one_name_one_gets_it(client, whole):
    answers = await asyncio.gather(*(create(client) for _ in range(5)))
    assert sorted(answer.status_code for answer in answers) == [201] + [409] * 4
    assert (await write(client, ("1", "text"))).status_code == 200
    assert len(whole.index._spaces) == 1  # the others' namespaces are gone


async def test_names_and_models_are_checked(client, subtests):
    for name in ("", "a b", "-x", "a/b", "x" * 129, "\u00e9", "..", 5, None, ["a"]):
        with subtests.test(name=name):
            body = problem(await create(client, name), 400)
            assert body["param"] == "name"
    assert problem(await create(client, model="none"), 404)["code"] == "model_not_found"
    assert problem(await create(client, model=7), 400)["param"] == "model"
    assert problem(await create(client, colour="red"), 400)["param"] == "colour"
    long = problem(await create(client, **{"z" * 5000: 1}), 400)
    assert len(long["param"]) <= 300
    assert len(long["detail"]) <= 300


async def test_the_number_of_collections_is_bounded(start):
    whole = await start(limits=Limits(collections_max=2))
    client = await whole.client()
    assert [(await create(client, name)).status_code for name in ("a", "b")] == [201, 201]
    refused = await create(client, "c")
    body = problem(refused, 429)
    assert (body["code"], body["violated-policies"]) == ("collections", ["collections"])
    assert body["type"] == "https://iana.org/assignments/http-problem-types#quota-exceeded"
    assert refused.headers["x-should-retry"] == "false"
    await client.delete("/v1/collections/a")
    assert (await create(client, "c")).status_code == 201


async def test_collections_count_as_requests(whole):
    client = await whole.client("free")
    for left in (9, 8):
        answer = await client.get("/v1/collections")
        assert answer.headers["x-ratelimit-remaining-requests"] == str(left)
    for _ in range(8):
        await create(client, model="none")  # refused before anything was done: free
        assert problem(await client.get(BOOKS), 404)
    refused = await client.get(BOOKS)
    assert problem(refused, 429)["code"] == "tenant_requests_per_minute"
    assert refused.headers["retry-after-ms"] == "1000"


async def test_another_tenants_collection_does_not_exist(books, whole):
    await write(books, ("1", TALE))
    stranger = await whole.client("other")
    answers = [
        await stranger.get(BOOKS),
        await stranger.delete(BOOKS),
        await write(stranger, ("1", "mine now")),
        await delete(stranger, "1"),
        await stranger.post(f"{BOOKS}/search", json={"text": "dam"}),
        await stranger.post(f"{BOOKS}/search", json={"vector": [1.0] * 16}),
    ]
    nothing = problem(await stranger.get("/v1/collections/none"), 404)
    for answer in answers:
        body = problem(answer, 404)
        assert body["code"] == nothing["code"]
        assert body["detail"] == nothing["detail"].replace("none", "books")
    assert (await stranger.get("/v1/collections")).json()["data"] == []
    assert (await search(books, "dam"))[0]["document"] == "1"


async def test_every_route_of_ours_needs_a_key(whole):
    client = await whole.client(None)
    for method, url in (
        ("GET", "/v1/collections"),
        ("POST", "/v1/collections"),
        ("GET", BOOKS),
        ("DELETE", BOOKS),
        ("POST", f"{BOOKS}/documents"),
        ("DELETE", f"{BOOKS}/documents"),
        ("POST", f"{BOOKS}/search"),
    ):
        assert problem(await client.request(method, url), 401)["code"] == "invalid_api_key"


async def test_a_recreated_collection_shares_nothing(books):
    await write(books, ("1", TALE))
    before = (await books.get(BOOKS)).json()
    await books.delete(BOOKS)
    after = (await create(books)).json()
    assert after["id"] != before["id"]
    assert await records(books) == 0
    assert await search(books, "dam") == []
    assert statuses(await delete(books, "1")) == ["absent"]
    assert (await write(books, ("1", "new"))).json()["data"][0]["generation"] == 1


async def test_a_deletion_holds_even_if_the_writer_is_away(books, whole):
    await write(books, ("1", TALE))
    whole.upserter.faults["drop"] = IndexUnavailable("Away.")
    assert (await books.delete(BOOKS)).status_code == 200
    assert problem(await books.get(BOOKS), 404)
    assert [one.name for one in await whole.store.deleted_collections()] == ["books"]


async def test_a_collection_that_was_not_made_is_not_there(client, whole):
    whole.upserter.faults["ensure"] = IndexUnavailable("Away.", retry_after_s=1)
    refused = await create(client)
    assert problem(refused, 503)["code"] == "index_unavailable"
    assert refused.headers["retry-after"] == "1"
    assert refused.headers["x-ratelimit-remaining-requests"] == "1000"
    whole.upserter.faults.clear()
    assert (await create(client)).status_code == 201


async def test_a_changed_model_is_refused_not_mixed(books, whole):
    served = whole.service.context.models.find("plain")
    object.__setattr__(served, "revision", "f" * 12)  # as after a change of the settings
    for answer in (
        await write(books, ("1", "text")),
        await books.post(f"{BOOKS}/search", json={"text": "x"}),
    ):
        assert problem(answer, 400)["code"] == "model_revision_changed"


# --- writing ---------------------------------------------------------------------------------


async def test_what_is_written_is_found_with_its_offsets(books):
    answer = await write(books, ("tale", TALE, {"year": 1990, "kind": "story"}), ("other", "x"))
    assert answer.status_code == 200
    tale, other = answer.json()["data"]
    assert tale | {"chunks": 0} == {
        "id": "tale",
        "status": "indexed",
        "generation": 1,
        "chunks": 0,
    }
    assert tale["chunks"] > 2
    assert other["chunks"] == 1
    assert answer.json()["failed"] == 0
    assert await records(books) == tale["chunks"] + 1
    hits = await search(books, "The turbines turn")
    assert hits[0]["document"] == "tale"
    assert "turbines" in hits[0]["text"]
    assert hits[0]["metadata"] == {"year": 1990, "kind": "story"}
    tales = [hit for hit in hits if hit["document"] == "tale"]
    assert len(tales) == tale["chunks"]
    assert all(hit["text"] == TALE[hit["start"] : hit["end"]] for hit in tales)
    assert sorted(hit["chunk"] for hit in tales) == [*range(tale["chunks"])]


async def test_usage_counts_the_tokens_of_the_chunks(books):
    answer = await write(books, ("1", "abc"), ("2", "de"))
    assert answer.json()["usage"] == {"total_tokens": 5 + 4}
    assert answer.headers["x-ratelimit-limit-tokens"] == "20000"
    assert answer.headers["x-ratelimit-remaining-tokens"] == str(20_000 - 9)


async def test_a_document_is_replaced_and_stale_chunks_go(books):
    first = await write(books, ("1", TALE), ("2", "stays"))
    chunks = first.json()["data"][0]["chunks"]
    second = await write(books, ("1", "A new and shorter text."))
    assert second.json()["data"][0] == {
        "id": "1",
        "status": "indexed",
        "generation": 2,
        "chunks": 1,
    }
    assert chunks > 1
    assert await records(books) == 2
    texts = {hit["text"] for hit in await search(books, "turbines", top_k=100)}
    assert texts == {"A new and shorter text.", "stays"}
    third = await write(books, ("1", TALE))
    assert third.json()["data"][0]["chunks"] == chunks
    assert await records(books) == chunks + 1


async def test_documents_are_deleted_by_id(books):
    await write(books, ("1", TALE), ("2", "stays"))
    answer = await delete(books, "1", "never", "1")
    assert [(one["id"], one["status"]) for one in answer.json()["data"]] == [
        ("1", "deleted"),
        ("never", "absent"),
    ]
    assert [hit["document"] for hit in await search(books, "dam")] == ["2"]
    assert await records(books) == 1
    assert statuses(await delete(books, "1")) == ["absent"]
    assert (await write(books, ("1", TALE))).json()["data"][0]["status"] == "indexed"
    assert (await search(books, "dam"))[0]["document"] == "1"


async def test_a_document_that_fails_leaves_the_others(books):
    answer = await write(books, ("1", "fine"), ("2", "poison"), ("3", "not finite"), ("4", "good"))
    assert answer.status_code == 207
    assert statuses(answer) == ["indexed", "failed", "failed", "indexed"]
    assert answer.json()["failed"] == 2
    errors = [one.get("error") for one in answer.json()["data"]]
    assert [error and error["code"] for error in errors] == [
        None,
        "input_failed",
        "vector_not_finite",
        None,
    ]
    assert {hit["document"] for hit in await search(books, "x")} == {"1", "4"}
    alone = await write(books, ("2", "poison"))
    assert (alone.status_code, alone.json()["failed"]) == (207, 1)


async def test_the_last_accepted_write_of_a_document_wins(books, whole):
    gate = asyncio.Event()
    entered = asyncio.Event()

    async def hold_the_first():
        if len(whole.embedder.calls) == 1:
            entered.set()
            await gate.wait()

    whole.embedder.before = hold_the_first
    slow = asyncio.ensure_future(write(books, ("1", TALE)))
    await entered.wait()
    fast = await write(books, ("1", "the last word"))
    gate.set()
    late = await slow
    assert fast.json()["data"][0]["generation"] == 2
    assert late.status_code == 200
    assert statuses(late) == ["superseded"]
    assert [hit["text"] for hit in await search(books, "x")] == ["the last word"]


async def test_concurrent_writes_of_one_document_leave_one_version(books):
    texts = [f"version {n} " * (n + 1) for n in range(8)]
    answers = await asyncio.gather(*(write(books, ("1", text)) for text in texts))
    assert {status for answer in answers for status in statuses(answer)} <= {
        "indexed",
        "superseded",
    }
    generations = [answer.json()["data"][0]["generation"] for answer in answers]
    assert sorted(generations) == [*range(1, 9)]
    last = texts[generations.index(8)]
    hits = await search(books, "version", top_k=100)
    assert all(hit["text"] == last[hit["start"] : hit["end"]] for hit in hits)
    assert len(hits) == await records(books)


async def test_a_delete_after_a_write_began_wins(books, whole):
    await write(books, ("1", "first"))
    gate, entered = asyncio.Event(), asyncio.Event()

    async def hold():
        entered.set()
        await gate.wait()

    whole.embedder.before = hold
    slow = asyncio.ensure_future(write(books, ("1", TALE)))
    await entered.wait()
    assert statuses(await delete(books, "1")) == ["deleted"]
    gate.set()
    assert statuses(await slow) == ["superseded"]
    assert await records(books) == 0


async def test_large_requests_go_in_groups_and_parts(start):
    small = (await start()).service.context.settings
    whole = await start(
        ingress=small.ingress.model_copy(update={"slice_tokens": 256}),
        index=small.index.model_copy(update={"max_items": 4}),
        buffer=Buffer(age_s_start=0.001, age_s_min=0.001, writes_max=20),
    )
    client = await whole.client("enterprise")
    await create(client)
    offered = []
    offer = whole.upserter.offer

    async def spy(sender, ns, writes, deadline_s):
        offered.append(len(writes))
        return await offer(sender, ns, writes, deadline_s)

    whole.upserter.offer = spy
    long = " ".join(f"word{n}" for n in range(200))
    answer = await write(client, ("long", long), *((f"{n}", f"text {n}") for n in range(30)))
    assert set(statuses(answer)) == {"indexed"}
    assert len(whole.embedder.calls) > 3
    assert max(offered) == 4
    chunks = answer.json()["data"][0]["chunks"]
    assert chunks > 20  # more than the write buffer holds at once
    assert statuses(await write(client, ("long", "short"))) == ["indexed"]
    assert await records(client) == 31
    await write(client, ("long", long))
    assert set(statuses(await delete(client, "long", *map(str, range(30))))) == {"deleted"}
    assert await records(client) == 0


# --- bad documents ---------------------------------------------------------------------------


async def test_a_bad_document_is_named(books, whole, subtests):
    good = {"id": "1", "text": "fine"}
    for bad, param in (
        ({"text": "x"}, "documents[1].id"),
        ({"id": "2"}, "documents[1].text"),
        ({"id": 2, "text": "x"}, "documents[1].id"),
        ({"id": "2", "text": None}, "documents[1].text"),
        ({"id": "", "text": "x"}, "documents[1].id"),
        ({"id": " ", "text": "x"}, "documents[1].id"),
        ({"id": "a\x00", "text": "x"}, "documents[1].id"),
        ({"id": "x" * 513, "text": "x"}, "documents[1].id"),
        ({"id": "1", "text": "x"}, "documents[1].id"),
        ({"id": "2", "text": ""}, "documents[1].text"),
        ({"id": "2", "text": " \n"}, "documents[1].text"),
        ({"id": "2", "text": "x" * 1_000_001}, "documents[1].text"),
        ({"id": "2", "text": "x", "colour": 1}, "documents[1].colour"),
        ({"id": "2", "text": "x", "metadata": None}, "documents[1].metadata"),
        ({"id": "2", "text": "x", "metadata": [1]}, "documents[1].metadata"),
        ({"id": "2", "text": "x", "metadata": {"a": None}}, "documents[1].metadata.a"),
        ({"id": "2", "text": "x", "metadata": {"a": {}}}, "documents[1].metadata.a"),
        ({"id": "2", "text": "x", "metadata": {"a": [1]}}, "documents[1].metadata.a"),
        ({"id": "2", "text": "x", "metadata": {"$a": 1}}, "documents[1].metadata"),
        ({"id": "2", "text": "x", "metadata": {"": 1}}, "documents[1].metadata"),
        ({"id": "2", "text": "x", "metadata": {"a": "x" * 20_000}}, "documents[1].metadata"),
        ("text", "documents[1]"),
        (None, "documents[1]"),
    ):
        with subtests.test(bad=str(bad)[:80]):
            answer = await books.post(f"{BOOKS}/documents", json={"documents": [good, bad]})
            assert problem(answer, 400)["param"] == param
    assert whole.embedder.calls == []
    assert await records(books) == 0


async def test_a_bad_list_is_named(books, subtests):
    for body, param in (
        ({}, "documents"),
        ({"documents": []}, "documents"),
        ({"documents": {}}, "documents"),
        ({"documents": [{"id": str(n), "text": "x"} for n in range(1001)]}, "documents"),
        ({"documents": [{"id": "1", "text": "x"}], "wait": True}, "wait"),
    ):
        with subtests.test(body=str(body)[:60]):
            answer = await books.post(f"{BOOKS}/documents", json=body)
            assert problem(answer, 400)["param"] == param
    for ids, param in (([], "ids"), ([""], "ids[0]"), (["a", 5], "ids[1]"), ("a", "ids")):
        with subtests.test(ids=ids):
            answer = await books.request("DELETE", f"{BOOKS}/documents", json={"ids": ids})
            assert problem(answer, 400)["param"] == param
    assert problem(await delete(books, *map(str, range(1001))), 400)["param"] == "ids"
    assert problem(await books.post(f"{BOOKS}/documents", content=b"\xff"), 400)


async def test_the_chunks_of_a_document_are_bounded(start):
    whole = await start(limits=Limits(chunks_max=3))
    client = await whole.client()
    await create(client)
    answer = await write(client, ("1", TALE), ("2", "short"))
    assert answer.status_code == 207
    assert statuses(answer) == ["failed", "indexed"]
    assert answer.json()["data"][0]["error"]["code"] == "too_many_chunks"
    assert await records(client) == 1


async def test_odd_ids_and_metadata_come_back_as_they_were(books):
    odd = ["a/b c", "'; DROP TABLE documents; --", "\u00e9\u202e", "../x", "{}", "x" * 512]
    metadata = {"tags": ["a", "b"], "n": -0.5, "big": 2**53, "yes": True, "\u00e9 x": "'\"\\"}
    assert set(statuses(await write(books, *((one, "text", metadata) for one in odd)))) == {
        "indexed"
    }
    hits = await search(books, "text")
    assert {hit["document"] for hit in hits} == set(odd)
    assert all(hit["metadata"] == metadata for hit in hits)
    assert statuses(await delete(books, *odd)) == ["deleted"] * len(odd)


async def test_chunks_never_exceed_the_model(start):
    whole = await start(chunking=Chunking(tokens=500, overlap=50))
    client = await whole.client()
    await create(client)
    assert statuses(await write(client, ("1", TALE))) == ["indexed"]
    assert all(tokens <= 64 for call in whole.embedder.calls for tokens in call.tokens)


# --- quotas and faults -----------------------------------------------------------------------


def remaining(response):
    return int(response.headers["x-ratelimit-remaining-tokens"])


async def test_bulk_tokens_are_a_quota_of_their_own(whole):
    client = await whole.client("free")
    await create(client)
    first = await write(client, ("1", "x" * 30), ("2", "y" * 30), ("3", "z" * 30))
    assert (remaining(first), first.headers["x-ratelimit-limit-tokens"]) == (200 - 96, "200")
    embed = await client.post("/v1/embeddings", json={"model": "plain", "input": "x" * 50})
    assert remaining(embed) == 100 - 52
    assert {call.klass for call in whole.embedder.calls} == {"bulk", "interactive"}


async def test_what_cannot_be_accepted_is_an_error_and_refunded(books, whole):
    for name in ("find_collection", "submit_job"):
        whole.store.faults = {name: StoreUnavailable("Away.", retry_after_s=1)}
        refused = await write(books, ("1", "text"))
        assert problem(refused, 503)["code"] == "store_unavailable"
        assert refused.headers["retry-after"] == "1"
        assert refused.headers["x-ratelimit-remaining-requests"] == "1000"
    whole.store.faults = {}
    assert statuses(await write(books, ("1", "text"))) == ["indexed"]
