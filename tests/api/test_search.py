"""`POST /v1/collections/{name}/search`: bounds, vectors, filters, and what it costs."""

import numpy as np
import pytest

from serve.config import Limits
from serve.errors import IndexUnavailable, Overloaded


URL = "/v1/collections/books/search"
YEARS = {"old": 1950, "new": 1990, "newest": 2020}


def problem(response, status=400):
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    return response.json()


@pytest.fixture
async def books(client):
    await client.post("/v1/collections", json={"name": "books"})
    documents = [
        {"id": name, "text": f"a {name} book", "metadata": {"year": year, "tags": [name, "all"]}}
        for name, year in YEARS.items()
    ]
    answer = await client.post("/v1/collections/books/documents", json={"documents": documents})
    assert answer.status_code == 200
    return client


async def found(client, **body):
    answer = await client.post(URL, json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()["data"]


async def names(client, **body):
    return {hit["document"] for hit in await found(client, **body)}


async def test_the_same_text_scores_one_and_comes_first(books):
    hits = await found(books, text="a new book")
    assert hits[0]["document"] == "new"
    assert hits[0]["score"] == pytest.approx(1, abs=1e-6)
    assert [hit["score"] for hit in hits] == sorted((hit["score"] for hit in hits), reverse=True)


async def test_a_vector_finds_what_its_text_finds(books):
    answer = await books.post("/v1/embeddings", json={"model": "plain", "input": "a new book"})
    vector = answer.json()["data"][0]["embedding"]
    by_text = await found(books, text="a new book")
    for scale in (1.0, 1e-300, 1e300, 3.0):
        hits = await found(books, vector=[value * scale for value in vector])
        assert [hit["document"] for hit in hits] == [hit["document"] for hit in by_text]
        scores = [hit["score"] for hit in hits]
        assert np.allclose(scores, [hit["score"] for hit in by_text], atol=1e-5)
    assert (await found(books, vector=[1] + [0] * 15)) != []


async def test_usage_and_headers(books):
    answer = await books.post(URL, json={"text": "abc"})
    assert answer.json()["usage"] == {"prompt_tokens": 5, "total_tokens": 5}
    before = int(answer.headers["x-ratelimit-remaining-tokens"])
    answer = await books.post(URL, json={"vector": [1.0] * 16})
    assert answer.json()["usage"] == {"prompt_tokens": 0, "total_tokens": 0}
    assert int(answer.headers["x-ratelimit-remaining-tokens"]) == before
    assert answer.headers["x-ratelimit-limit-tokens"] == "10000"


async def test_top_k_bounds(books):
    assert len(await found(books, text="book", top_k=2)) == 2
    assert len(await found(books, text="book", top_k=1000)) == 3
    for top_k in (0, -1, 1001, 2**70, 1.5, "3", True, None):
        assert (
            problem(await books.post(URL, json={"text": "x", "top_k": top_k}))["param"] == "top_k"
        )


async def test_bad_bodies_are_named(books, subtests):
    for body, param in (
        ({}, "text"),
        ({"text": "x", "vector": [1.0] * 16}, "text"),
        ({"text": ""}, "text"),
        ({"text": 5}, "text"),
        ({"text": ["x"]}, "text"),
        ({"text": "x" * 63}, "text"),
        ({"vector": []}, "vector"),
        ({"vector": [1.0] * 15}, "vector"),
        ({"vector": [1.0] * 17}, "vector"),
        ({"vector": [0.0] * 16}, "vector"),
        ({"vector": "1"}, "vector"),
        ({"vector": ["1"] * 16}, "vector[0]"),
        ({"vector": [True] * 16}, "vector[0]"),
        ({"vector": [None] * 16}, "vector[0]"),
        ({"text": "x", "topk": 3}, "topk"),
        ({"text": "x", "filter": []}, "filter"),
        ({"text": "x", "filter": "year > 3"}, "filter"),
    ):
        with subtests.test(body=str(body)[:60]):
            assert problem(await books.post(URL, json=body))["param"] == param
    refused = problem(await books.post(URL, json={"text": "x" * 63}))
    assert refused["code"] == "context_length_exceeded"
    assert "text has 65 tokens" in refused["detail"]


async def test_numbers_that_json_does_not_know(books):
    for number in ("NaN", "Infinity", "1e400", "-1e999"):
        raw = f'{{"vector": [{", ".join([number] * 16)}]}}'
        body = problem(await books.post(URL, content=raw))
        assert body["code"] in ("invalid_json", "invalid_request")


async def test_a_query_on_which_the_model_fails(books):
    for text, code in (("poison", "input_failed"), ("not finite", "vector_not_finite")):
        body = problem(await books.post(URL, json={"text": text}), 422)
        assert (body["code"], body["param"]) == (code, "text")


# --- filters ---------------------------------------------------------------------------------


async def test_filters_restrict(books):
    for where, expected in (
        ({}, {"old", "new", "newest"}),
        ({"year": 1990}, {"new"}),
        ({"year": {"$gte": 1990}}, {"new", "newest"}),
        ({"year": {"$gt": 1950, "$lt": 2020}}, {"new"}),
        ({"tags": "all"}, {"old", "new", "newest"}),
        ({"tags": {"$in": ["old", "newest"]}}, {"old", "newest"}),
        ({"$or": [{"year": 1950}, {"tags": "new"}]}, {"old", "new"}),
        ({"year": {"$ne": 1950}, "tags": {"$nin": ["new"]}}, {"newest"}),
        ({"colour": {"$exists": False}}, {"old", "new", "newest"}),
        ({"colour": {"$exists": True}}, set()),
        ({"year": "1990"}, set()),
    ):
        assert await names(books, text="book", filter=where) == expected, where


async def test_hostile_filter_strings_are_only_values(books):
    for text in (
        "'; DROP TABLE documents; --",
        "' OR '1'='1",
        '" OR 1=1',
        "\\",
        "%",
        "_",
        "*",
        "\x00",
        "\u202e",
        "${jndi:ldap://x}",
        "$where",
        "all' --",
    ):
        assert await names(books, text="book", filter={"tags": text}) == set()
        assert await names(books, text="book", filter={"tags": {"$in": [text, "old"]}}) == {"old"}
    hostile = "year' OR '1'='1"
    assert await names(books, text="book", filter={hostile: 1}) == set()
    assert await names(books, text="book") == {"old", "new", "newest"}


async def test_filters_that_are_refused_name_the_place(books, subtests):
    deep = {"year": 1}
    for _ in range(20):
        deep = {"$and": [deep]}
    for where, param in (
        ({"$where": "1"}, "filter"),
        ({"year": {"$regex": "x"}}, "filter.year.$regex"),
        ({"year": {}}, "filter.year"),
        ({"year": {"$in": []}}, "filter.year.$in"),
        ({"year": {"$in": "x"}}, "filter.year.$in"),
        ({"year": {"$gt": True}}, "filter.year.$gt"),
        ({"year": None}, "filter.year"),
        ({"year": [1]}, "filter.year"),
        ({"$and": []}, "filter.$and"),
        ({"$or": {"a": 1}}, "filter.$or"),
        ({"$or": [{"a": 1}, {"b": {"$x": 1}}]}, "filter.$or[1].b.$x"),
        ({"": 1}, "filter"),
        ({"a\x00": 1}, "filter"),
        ({"a" * 300: 1}, "filter"),
        ({"year": {"$exists": 1}}, "filter.year.$exists"),
        ({"tags": "x" * 600}, "filter.tags"),
    ):
        with subtests.test(where=str(where)[:60]):
            body = problem(await books.post(URL, json={"text": "x", "filter": where}))
            assert body["param"] == param
    assert "levels" in problem(await books.post(URL, json={"text": "x", "filter": deep}))["detail"]
    many = {"$or": [{"year": n} for n in range(65)]}
    assert "64" in problem(await books.post(URL, json={"text": "x", "filter": many}))["detail"]


async def test_filter_terms_follow_the_settings(start):
    whole = await start(limits=Limits(filter_terms_max=1, top_k_max=5))
    client = await whole.client()
    await client.post("/v1/collections", json={"name": "books"})
    assert await found(client, text="x", filter={"a": 1}, top_k=5) == []
    assert problem(await client.post(URL, json={"text": "x", "filter": {"a": 1, "b": 2}}))
    assert problem(await client.post(URL, json={"text": "x", "top_k": 6}))["param"] == "top_k"


# --- quotas and faults -----------------------------------------------------------------------


async def test_searches_count_at_class_interactive(whole):
    client = await whole.client("free")
    await client.post("/v1/collections", json={"name": "books"})
    answer = await client.post(URL, json={"text": "x" * 60})
    assert answer.headers["x-ratelimit-remaining-tokens"] == "38"
    assert problem(await client.post(URL, json={"text": "x" * 60}), 429)["code"] == (
        "tenant_tokens_per_minute"
    )
    assert {call.klass for call in whole.embedder.calls} == {"interactive"}
    for _ in range(8):
        assert (await client.post(URL, json={"vector": [1.0] * 16})).status_code == 200
    refused = await client.post(URL, json={"vector": [1.0] * 16})
    assert problem(refused, 429)["code"] == "tenant_requests_per_minute"


async def test_our_faults_are_refunded(books, whole, monkeypatch):
    before = (await books.get("/v1/models")).headers["x-ratelimit-remaining-tokens"]

    async def away(*_):
        raise IndexUnavailable("Away.", retry_after_s=1)

    whole.embedder.fault = Overloaded("Full.", retry_after_s=1)
    refused = await books.post(URL, json={"text": "x"})
    assert problem(refused, 503)["type"].endswith("#temporary-reduced-capacity")
    assert refused.headers["x-ratelimit-remaining-tokens"] == before
    whole.embedder.fault = None
    monkeypatch.setattr(whole.index, "query", away)
    for body in ({"text": "x"}, {"vector": [1.0] * 16}):
        refused = await books.post(URL, json=body)
        assert problem(refused, 503)["code"] == "index_unavailable"
        assert refused.headers["x-ratelimit-remaining-tokens"] == before
        assert refused.headers["retry-after"] == "1"
