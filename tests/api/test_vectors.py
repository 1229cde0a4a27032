"""`/v1/collections/{name}/vectors`: vectors of the user's own, beside documents, and who may see them."""

import base64

import numpy as np
import pytest

from serve.config import Limits
from serve.errors import IndexUnavailable, NotFound, StoreUnavailable


BOOKS = "/v1/collections/books"
URL = f"{BOOKS}/vectors"


def problem(response, status=400):
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    return response.json()


def row(*values: float) -> list[float]:
    """A vector of 16 dimensions that begins so."""
    return [*values, *[0.0] * (16 - len(values))]


def in_base64(values) -> str:
    return base64.b64encode(np.asarray(values, "<f4").tobytes()).decode()


def vector(name: str, *values: float, **fields):
    return {"id": name, "vector": row(*values), **fields}


async def put(client, *vectors, status=200, **headers):
    answer = await client.post(URL, json={"vectors": vectors}, headers=headers)
    assert answer.status_code == status, answer.text
    return answer.json()


async def nearest(client, *values: float, **body):
    answer = await client.post(f"{BOOKS}/search", json={"vector": row(*values), **body})
    assert answer.status_code == 200, answer.text
    return answer.json()["data"]


def statuses(body):
    return [one["status"] for one in body["data"]]


@pytest.fixture
async def books(client):
    await client.post("/v1/collections", json={"name": "books"})
    return client


# --- writing ---------------------------------------------------------------------------------


async def test_vectors_are_found_as_soon_as_they_are_answered(books, whole):
    name = "any id: \u00e4/\U0001f600 'quoted' --"
    body = await put(
        books,
        vector(name, 3, 4, text="hello", metadata={"year": 1990}),
        {"id": "b", "vector": in_base64(row(0, 0, 1))},
    )
    assert (body.pop("receipt")["documents"], body) == (
        2,
        {
            "object": "list",
            "data": [
                {"id": name, "status": "indexed", "generation": 1},
                {"id": "b", "status": "indexed", "generation": 1},
            ],
            "failed": 0,
        },
    )
    (hit,) = await nearest(books, 3, 4, filter={"year": 1990})
    assert hit["score"] == pytest.approx(1)
    assert hit | {"score": 1} == {
        "document": name,
        "score": 1,
        "chunk": 0,
        "text": "hello",
        "start": 0,
        "end": 5,
        "metadata": {"year": 1990},
    }
    assert (await nearest(books, 0, 0, 1))[0]["document"] == "b"
    assert not whole.embedder.calls


async def test_the_last_write_of_an_id_wins(books):
    await put(books, vector("a", 1))
    body = await put(books, vector("a", 0, 1))
    assert body["data"][0]["generation"] == 2
    (hit,) = await nearest(books, 0, 1)
    assert hit["score"] == pytest.approx(1)


async def test_one_bad_vector_leaves_the_others_alone(books):
    body = await put(
        books,
        vector("good", 1),
        vector("short") | {"vector": [1.0]},
        vector("zero"),
        vector("huge", 1e300),
        vector("odd", 1, colour="red"),
        {"vector": row(1)},
        "no object",
        vector("good", 2),
        vector("\x00", 1),
        vector("meta", 1, metadata={"a": {"b": 1}}),
        vector("fine", 0, 1),
        status=207,
    )
    found = [(one["id"], one["status"], one.get("error", {}).get("param")) for one in body["data"]]
    assert found == [
        ("good", "indexed", None),
        ("short", "failed", "vectors[1].vector"),
        ("zero", "failed", "vectors[2].vector"),
        ("huge", "failed", "vectors[3].vector"),
        ("odd", "failed", "vectors[4].colour"),
        (None, "failed", "vectors[5].id"),
        (None, "failed", "vectors[6]"),
        ("good", "failed", "vectors[7].id"),
        ("\x00", "failed", "vectors[8].id"),
        ("meta", "failed", "vectors[9].metadata.a"),
        ("fine", "indexed", None),
    ]
    assert body["failed"] == 9
    assert {hit["document"] for hit in await nearest(books, 1)} == {"good", "fine"}


async def test_bad_requests_are_named(start, subtests):
    whole = await start(limits=Limits(vectors_max=2))
    client = await whole.client()
    await client.post("/v1/collections", json={"name": "books"})
    for body, param in (
        ({}, "vectors"),
        ({"vectors": []}, "vectors"),
        ({"vectors": {}}, "vectors"),
        ({"vectors": [1, 2, 3]}, "vectors"),
        ({"vectors": [1], "priority": 1}, "priority"),
    ):
        with subtests.test(body=body):
            assert problem(await client.post(URL, json=body))["param"] == param


async def test_numbers_that_json_does_not_know(books):
    for number in ("NaN", "Infinity", "1e400"):
        raw = f'{{"vectors": [{{"id": "a", "vector": [{", ".join([number] * 16)}]}}]}}'
        answer = await books.post(URL, content=raw)
        assert answer.status_code in (207, 400)
    body = await put(books, {"id": "a", "vector": in_base64([np.nan] * 16)}, status=207)
    assert body["data"][0]["error"]["param"] == "vectors[0].vector"


# --- beside documents ------------------------------------------------------------------------


async def test_the_id_of_a_document_is_refused_until_it_is_deleted(books):
    documents = {"documents": [{"id": "a", "text": "some text"}]}
    await books.post(f"{BOOKS}/documents", json=documents)
    body = await put(books, vector("a", 1), vector("b", 1), status=207)
    assert statuses(body) == ["failed", "indexed"]
    error = body["data"][0]["error"]
    assert (error["status"], error["code"], error["param"]) == (
        409,
        "id_of_document",
        "vectors[0].id",
    )
    await books.request("DELETE", f"{BOOKS}/documents", json={"ids": ["a"]})
    assert statuses(await put(books, vector("a", 1))) == ["indexed"]


async def test_a_document_replaces_a_raw_vector_of_its_id_and_deletes_reach_it(books):
    await put(books, vector("a", 1), vector("b", 1))
    documents = {"documents": [{"id": "a", "text": "some text"}]}
    answer = await books.post(f"{BOOKS}/documents", json=documents)
    assert answer.json()["data"][0]["status"] == "indexed"
    texts = {hit["document"]: hit["text"] for hit in await nearest(books, 1)}
    assert texts == {"a": "some text", "b": ""}
    gone = await books.request("DELETE", f"{BOOKS}/documents", json={"ids": ["b"]})
    assert gone.json()["data"][0]["status"] == "deleted"
    assert [hit["document"] for hit in await nearest(books, 1)] == ["a"]


async def test_a_vector_whose_write_died_half_way_takes_nothing_with_it(books, whole):
    """Granted and never offered: what was there stays, and a repeat is written."""
    await put(books, vector("a", 1))
    whole.upserter.faults["offer"] = IndexUnavailable("Away.", retry_after_s=1)
    answer = await books.post(URL, json={"vectors": [vector("a", 0, 1)]})
    assert problem(answer, 503)["code"] == "index_unavailable"
    assert answer.headers["retry-after"] == "1"
    whole.upserter.faults.clear()
    assert (await nearest(books, 1))[0]["score"] == pytest.approx(1)
    assert (await put(books, vector("a", 0, 1)))["data"][0]["generation"] == 3
    assert (await nearest(books, 0, 1))[0]["score"] == pytest.approx(1)


# --- reading ---------------------------------------------------------------------------------


async def fetch(client, *ids, **body):
    answer = await client.post(f"{URL}/fetch", json={"ids": ids, **body})
    assert answer.status_code == 200, answer.text
    return answer.json()


async def test_vectors_come_back_as_they_were_sent_in_the_order_that_was_asked(books):
    await put(books, vector("a", 3, 4, text="t", metadata={"tags": ["x"]}), vector("b", 0.1))
    body = await fetch(books, "none", "b", "a", "b")
    assert [one["id"] for one in body["data"]] == ["b", "a"]
    assert body["missing"] == ["none"]
    assert body["data"][1] == {
        "id": "a",
        "chunk": 0,
        "vector": row(3, 4),
        "text": "t",
        "start": 0,
        "end": 1,
        "metadata": {"tags": ["x"]},
        "generation": 1,
    }
    (one,) = (await fetch(books, "b", encoding_format="base64"))["data"]
    assert one["vector"] == in_base64(row(0.1))
    again = await put(books, {"id": "c", "vector": one["vector"]})
    assert statuses(again) == ["indexed"]


async def test_of_a_document_the_first_chunk_is_shown(books):
    text = "water falls through the headrace and " * 3
    await books.post(f"{BOOKS}/documents", json={"documents": [{"id": "a", "text": text}]})
    (one,) = (await fetch(books, "a"))["data"]
    assert (one["chunk"], one["text"]) == (0, text[: one["end"]])
    assert np.linalg.norm(one["vector"]) == pytest.approx(1, abs=1e-5)


async def test_bad_fetches_are_named(start, subtests):
    whole = await start(limits=Limits(vectors_max=2))
    client = await whole.client()
    await client.post("/v1/collections", json={"name": "books"})
    for body, param in (
        ({}, "ids"),
        ({"ids": []}, "ids"),
        ({"ids": ["a", "b", "c"]}, "ids"),
        ({"ids": ["a", ""]}, "ids[1]"),
        ({"ids": ["a", "\n"]}, "ids[1]"),
        ({"ids": ["a", 1]}, "ids[1]"),
        ({"ids": ["a"], "encoding_format": "hex"}, "encoding_format"),
    ):
        with subtests.test(body=body):
            assert problem(await client.post(f"{URL}/fetch", json=body))["param"] == param


# --- deleting --------------------------------------------------------------------------------


async def erase(client, status=200, wait=None, **body):
    url = f"{URL}/delete" + (f"?wait={wait}" if wait else "")
    answer = await client.post(url, json=body)
    assert answer.status_code == status, answer.text
    return answer.json()


async def test_vectors_and_documents_are_deleted_by_id(books):
    await put(books, vector("a", 1), vector("b", 1))
    documents = {"documents": [{"id": "text", "text": "some text"}]}
    await books.post(f"{BOOKS}/documents", json=documents)
    body = await erase(books, ids=["a", "none", "text", "a"])
    assert [(one["id"], one["status"]) for one in body["data"]] == [
        ("a", "deleted"),
        ("none", "absent"),
        ("text", "deleted"),
    ]
    assert body["receipt"]["level"] == "searchable"
    assert [hit["document"] for hit in await nearest(books, 1)] == ["b"]
    assert (await fetch(books, "a", "b"))["missing"] == ["a"]


async def test_a_delete_that_was_accepted_is_not_lost_to_a_later_write(start):
    """Until it has landed the id is refused: a write that dies half-way would undo it."""
    whole = await start(working=False)
    client = await whole.client()
    await client.post("/v1/collections", json={"name": "books"})
    await put(client, vector("a", 1))
    accepted = await erase(client, 202, wait="accepted", ids=["a"])
    body = await put(client, vector("a", 0, 1), status=207)
    assert body["data"][0]["error"]["code"] == "id_of_document"
    await whole.work("worker")
    seen = await client.get(accepted["status_url"])
    while not seen.json()["is_complete"]:
        seen = await client.get(accepted["status_url"])
    assert (await fetch(client, "a"))["missing"] == ["a"]
    assert statuses(await put(client, vector("a", 0, 1))) == ["indexed"]


async def test_a_filter_deletes_what_matches_of_vectors_and_documents(books):
    years = {"a": 1950, "b": 1990, "c": 2020}
    await put(books, *(vector(one, 1, metadata={"year": year}) for one, year in years.items()))
    long = {"id": "text", "text": "water falls and " * 10, "metadata": {"year": 1900}}
    await books.post(f"{BOOKS}/documents", json={"documents": [long]})
    body = await erase(books, filter={"year": {"$lt": 2000}})
    assert {one["id"]: one["status"] for one in body["data"]} == dict.fromkeys(
        ("a", "b", "text"), "deleted"
    )
    assert body["has_more"] is False
    assert (await books.get(BOOKS)).json()["records"] == 1
    again = await erase(books, filter={"year": {"$lt": 2000}})
    reached = again["receipt"]["level"]
    assert (again["data"], again["has_more"], reached) == ([], False, "searchable")


async def test_a_filter_deletes_so_many_at_once_and_says_that_there_are_more(start):
    whole = await start(limits=Limits(documents_max=2))
    client = await whole.client()
    await client.post("/v1/collections", json={"name": "books"})
    await put(client, *(vector(str(n), 1, metadata={"old": True}) for n in range(5)))
    accepted = await erase(client, 202, wait="accepted", filter={"old": True})
    assert (accepted["documents"], accepted["has_more"]) == (2, True)
    left = [5]
    while left[-1]:
        body = await erase(client, filter={"old": True})
        left.append((await client.get(BOOKS)).json()["records"])
        assert body["has_more"] is (left[-1] > 0)
    assert len(left) <= 4


async def test_a_filter_spares_what_was_written_after_it_was_read(books, whole, monkeypatch):
    await put(books, vector("a", 1, metadata={"year": 1950}), vector("b", 1, metadata={"year": 1}))
    scan = type(whole.index).scan

    async def slowly(index, ns, where=None):
        async for part in scan(index, ns, where):
            yield part
        await put(books, vector("a", 0, 1, metadata={"year": 2020}))

    monkeypatch.setattr(type(whole.index), "scan", slowly)
    body = await erase(books, filter={"year": {"$lt": 2000}})
    assert sorted(statuses(body)) == ["deleted", "deleted"]
    found = await fetch(books, "a", "b")
    assert [one["metadata"] for one in found["data"]] == [{"year": 2020}]
    assert found["missing"] == ["b"]


async def test_a_filter_reaches_what_an_unfinished_write_was_to_replace(books, whole):
    await put(books, vector("a", 1, metadata={"old": True}))
    whole.upserter.faults["offer"] = IndexUnavailable("Away.", retry_after_s=1)
    await books.post(URL, json={"vectors": [vector("a", 0, 1)]})
    whole.upserter.faults.clear()
    assert statuses(await erase(books, filter={"old": True})) == ["deleted"]
    assert (await fetch(books, "a"))["missing"] == ["a"]
    assert statuses(await put(books, vector("a", 1))) == ["indexed"]


async def test_a_delete_by_filter_is_repeated_by_its_key(books):
    await put(books, vector("a", 1, metadata={"old": True}))
    headers, body = {"idempotency-key": "k"}, {"filter": {"old": True}}
    first = await books.post(f"{URL}/delete", json=body, headers=headers)
    await put(books, vector("b", 1, metadata={"old": True}))
    again = await books.post(f"{URL}/delete", json=body, headers=headers)
    assert again.headers["idempotent-replayed"] == "true"
    assert again.json() == first.json()
    assert (await fetch(books, "b"))["missing"] == []


async def test_bad_deletes_are_named(books):
    for body, param in (
        ({"ids": ["a"], "filter": {"a": 1}}, "ids"),
        ({"filter": {}}, "filter"),
        ({"filter": {"year": {"$near": 1}}}, "filter.year.$near"),
        ({"filter": "all"}, "filter"),
        ({}, "ids"),
        ({"ids": []}, "ids"),
        ({"ids": ["a", "\n"]}, "ids[1]"),
        ({"id": ["a"]}, "id"),
    ):
        assert problem(await books.post(f"{URL}/delete", json=body))["param"] == param
    answer = await books.post(f"{URL}/delete?wait=seen", json={"ids": ["a"]})
    assert problem(answer)["param"] == "wait"


# --- stats -----------------------------------------------------------------------------------


async def test_stats_say_what_a_collection_holds(books, whole, monkeypatch):
    await put(books, vector("a", 1), vector("b", 1))
    stats = (await books.get(f"{BOOKS}/stats")).json()
    revision = (await books.get(BOOKS)).json()["revision"]
    assert stats == {
        "object": "collection.stats",
        "name": "books",
        "model": "plain",
        "revision": revision,
        "served_revision": revision,
        "dimensions": 16,
        "records": 2,
        "vector_bytes": 128,
    }
    stranger = await whole.client("other")
    assert problem(await stranger.get(f"{BOOKS}/stats"), 404)["code"] == "collection_not_found"


async def test_raw_vectors_outlive_their_collections_model(books, whole, monkeypatch):
    await put(books, vector("a", 1))

    def gone(*_, **__):
        raise NotFound("No such model.", param="model")

    monkeypatch.setattr(type(whole.service.context.models), "find", gone)
    assert (await books.get(f"{BOOKS}/stats")).json()["served_revision"] is None
    assert statuses(await put(books, vector("b", 1))) == ["indexed"]
    assert len(await nearest(books, 1)) == 2


# --- who may, and what it costs --------------------------------------------------------------


async def test_another_tenants_collection_does_not_exist(books, whole):
    await put(books, vector("a", 1))
    stranger = await whole.client("other")
    answer = await stranger.post(URL, json={"vectors": [vector("a", 0, 1)]})
    assert problem(answer, 404)["code"] == "collection_not_found"
    answer = await stranger.post(f"{URL}/fetch", json={"ids": ["a"]})
    assert problem(answer, 404)["code"] == "collection_not_found"
    assert problem(await stranger.post(f"{URL}/delete", json={"ids": ["a"]}), 404)
    assert problem(await stranger.post(f"{URL}/delete", json={"filter": {"a": 1}}), 404)
    await stranger.post("/v1/collections", json={"name": "books"})
    assert (await erase(stranger, filter={"a": {"$exists": False}}))["data"] == []
    assert statuses(await erase(stranger, ids=["a"])) == ["absent"]
    assert (await fetch(stranger, "a"))["missing"] == ["a"]
    assert (await nearest(books, 1))[0]["score"] == pytest.approx(1)


async def test_a_write_is_one_request_of_class_bulk_and_no_tokens(whole):
    client = await whole.client("free")
    await client.post("/v1/collections", json={"name": "books"})
    answer = await client.post(URL, json={"vectors": [vector("a", 1), vector("b", 1)]})
    assert answer.headers["x-ratelimit-remaining-requests"] == "9"
    assert answer.headers["x-ratelimit-remaining-tokens"] == "200"
    for _ in range(9):
        await put(client, vector("a", 1))
    refused = await client.post(URL, json={"vectors": [vector("a", 1)]})
    assert problem(refused, 429)["code"] == "tenant_bulk_requests_per_minute"


async def test_our_faults_are_refunded(whole):
    client = await whole.client("free")
    await client.post("/v1/collections", json={"name": "books"})
    for port, name, error in (
        (whole.store, "grant_vectors", StoreUnavailable("Away.")),
        (whole.upserter, "offer", IndexUnavailable("Away.", retry_after_s=1)),
    ):
        port.faults[name] = error
        answer = await client.post(URL, json={"vectors": [vector("a", 1)]})
        assert problem(answer, 503)["code"] == error.code
        assert answer.headers["x-ratelimit-remaining-requests"] == "10"
        port.faults.clear()
