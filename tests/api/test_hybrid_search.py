"""`POST /v1/collections/{name}/search` by words, and by words and vectors."""

from dataclasses import replace

import pytest

from serve.config import Search
from serve.errors import IndexUnavailable, Overloaded


URL = "/v1/collections/books/search"
TEXTS = {
    "tide": "the tide at noon",
    "moon": "the moon and the tide",
    "loud": "TIDE! TIDE!",
    "rare": "quokkas at noon",
}


async def problem(client, status=400, **body):
    response = await client.post(URL, json=body)
    assert response.status_code == status, response.text
    return response.json()


@pytest.fixture
async def books(client):
    await client.post("/v1/collections", json={"name": "books"})
    documents = [
        {"id": name, "text": text, "metadata": {"letters": len(name), "loud": name == "loud"}}
        for name, text in TEXTS.items()
    ]
    answer = await client.post("/v1/collections/books/documents", json={"documents": documents})
    assert answer.status_code == 200
    return client


async def found(client, **body):
    answer = await client.post(URL, json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


async def names(client, **body):
    return [hit["document"] for hit in (await found(client, **body))["data"]]


async def test_text_ranks_by_words(books):
    assert await names(books, mode="text", text="Tide") == ["loud", "tide", "moon"]
    assert await names(books, mode="text", text="the quokkas") == ["rare", "moon", "tide"]
    assert await names(books, mode="text", text="tid") == []
    hits = (await found(books, mode="text", text="noon tide", top_k=2))["data"]
    assert [hit["document"] for hit in hits] == ["tide", "rare"]
    assert hits[0]["score"] > hits[1]["score"] > 0
    assert hits[0]["text"] == TEXTS["tide"]


async def test_text_needs_no_model_and_costs_no_tokens(books, whole):
    before = len(whole.embedder.calls)
    whole.embedder.fault = Overloaded("Full.", retry_after_s=1)
    answer = await books.post(URL, json={"mode": "text", "text": "tide " * 100})
    assert answer.status_code == 200
    assert answer.json()["usage"] == {"prompt_tokens": 0, "total_tokens": 0}
    assert len(whole.embedder.calls) == before


async def test_hybrid_fuses_the_two_rankings(books):
    text = "the tide at noon"
    near = await names(books, text=text)
    worded = await names(books, mode="text", text=text)
    hits = (await found(books, mode="hybrid", text=text))["data"]
    scores = {
        name: sum(1 / (61 + order.index(name)) for order in (near, worded) if name in order)
        for name in near
    }
    assert {hit["document"]: hit["score"] for hit in hits} == pytest.approx(scores)
    assert [hit["score"] for hit in hits] == sorted(scores.values(), reverse=True)
    assert hits[0]["document"] == "tide"


async def test_hybrid_costs_the_text_unless_a_vector_comes_with_it(books, whole):
    by_text = await found(books, mode="hybrid", text="quokkas")
    assert by_text["usage"]["total_tokens"] == 9
    vectors = await books.post("/v1/embeddings", json={"model": "plain", "input": "quokkas"})
    vector = vectors.json()["data"][0]["embedding"]
    before = len(whole.embedder.calls)
    by_both = await found(books, mode="hybrid", text="quokkas", vector=vector)
    assert by_both["data"] == by_text["data"]
    assert by_both["usage"]["total_tokens"] == 0
    assert len(whole.embedder.calls) == before


async def test_a_text_without_words_leaves_hybrid_to_the_vectors(books):
    assert await names(books, mode="text", text="?!") == []
    assert sorted(await names(books, mode="hybrid", text="?!")) == sorted(TEXTS)


@pytest.mark.parametrize("mode", ["text", "hybrid"])
async def test_filters_restrict_both(books, mode):
    assert await names(books, mode=mode, text="tide", filter={"loud": True}) == ["loud"]
    assert await names(books, mode=mode, text="tide", filter={"x": 1}) == []


async def test_the_settings_bound_candidates_and_words(start):
    whole = await start(search=Search(candidates=1, rrf_k=1, words_max=3))
    client = await whole.client()
    await client.post("/v1/collections", json={"name": "books"})
    documents = [{"id": name, "text": text} for name, text in TEXTS.items()]
    await client.post("/v1/collections/books/documents", json={"documents": documents})
    hits = (await found(client, mode="hybrid", text="quokkas at noon", top_k=1))["data"]
    assert [(hit["document"], hit["score"]) for hit in hits] == [("rare", 1.0)]
    assert len(await names(client, mode="hybrid", text="quokkas at noon", top_k=4)) == 4
    for mode in ("text", "hybrid"):
        await found(client, mode=mode, text="a a b b c c")
        for text in ("a b c d", "a" * 193):
            refused = await problem(client, mode=mode, text=text)
            assert (refused["param"], refused["code"]) == ("text", "invalid_request")
    assert len(await names(client, text="a b c d e")) == 4


async def test_what_a_mode_takes_is_named(books, subtests):
    vector = [1.0] * 16
    for body, param in (
        ({"mode": "text"}, "text"),
        ({"mode": "text", "vector": vector}, "text"),
        ({"mode": "text", "text": "x", "vector": vector}, "vector"),
        ({"mode": "hybrid"}, "text"),
        ({"mode": "hybrid", "vector": vector}, "text"),
        ({"mode": "hybrid", "text": "x", "vector": vector[1:]}, "vector"),
        ({"mode": "vector", "text": "x", "vector": vector}, "text"),
        ({"mode": "text", "text": ""}, "text"),
        ({"mode": "words", "text": "x"}, "mode"),
        ({"mode": None, "text": "x"}, "mode"),
        ({"mode": "text", "text": "x", "top_k": 1001}, "top_k"),
        ({"mode": "text", "text": "x", "filter": {"a": None}}, "filter.a"),
        ({"mode": "hybrid", "text": "x" * 63}, "text"),
    ):
        with subtests.test(body=str(body)[:60]):
            assert (await problem(books, **body))["param"] == param


async def test_an_index_without_full_text_refuses_the_mode_before_anything_is_paid(
    books, whole, monkeypatch
):
    monkeypatch.setattr(whole.index, "caps", replace(whole.index.caps, full_text=False))
    before = len(whole.embedder.calls)
    for mode in ("text", "hybrid"):
        refused = await problem(books, mode=mode, text="tide")
        assert (refused["code"], refused["param"]) == ("mode_unsupported", "mode")
    assert len(whole.embedder.calls) == before
    assert await names(books, mode="vector", text="tide") != []


@pytest.mark.parametrize("broken", ["query", "match"])
async def test_an_index_that_is_away_is_refunded(books, whole, monkeypatch, broken):
    before = (await books.get("/v1/models")).headers["x-ratelimit-remaining-tokens"]

    async def away(*_):
        raise IndexUnavailable("Away.", retry_after_s=1)

    monkeypatch.setattr(whole.index, broken, away)
    refused = await books.post(URL, json={"mode": "hybrid", "text": "tide"})
    assert (refused.status_code, refused.json()["code"]) == (503, "index_unavailable")
    assert refused.headers["x-ratelimit-remaining-tokens"] == before
