"""`POST /v1/rerank`, and searches that are reranked, on a fake reranker: it counts shared trigrams."""

import numpy as np
import pytest

from serve.config import Limits, Model, Search
from serve.config import Pool as PoolSettings
from serve.embedding.fake import FakeEngine, Faults
from serve.embedding.tokenizer import Tokenizer
from serve.errors import Overloaded
from tests.api import conftest
from tests.api.conftest import NESTED, PLAIN, POISON


CROSS = Model(id="cross", kind="reranker", engine="fake", dimensions=1, tokens_max=64)
OTHER = Model(id="cross/2", kind="reranker", engine="fake", dimensions=1, tokens_max=32)
POOL = PoolSettings(models=(PLAIN, CROSS, OTHER, NESTED))
DOCUMENTS = ["a tide at noon", "the moon", "the tide at noon", "tides"]
SEARCH = "/v1/collections/books/search"


@pytest.fixture
async def whole(start):
    return await start(pools=(POOL,))


async def post(client, status=200, url="/v1/rerank", **body):
    answer = await client.post(url, json=body)
    assert answer.status_code == status, answer.text
    return answer.json()


async def test_documents_are_sorted_by_relevance(client):
    answer = await post(client, query="the tide at noon", documents=DOCUMENTS)
    results = answer["results"]
    assert [one["index"] for one in results] == [2, 0, 1, 3]
    scores = [one["relevance_score"] for one in results]
    assert scores[0] == 1.0
    assert scores == sorted(scores, reverse=True)
    assert 0 < scores[3] < 0.5
    assert (answer["object"], answer["model"]) == ("list", "cross")
    tokens = sum(16 + 3 + len(text) for text in DOCUMENTS)
    assert answer["usage"] == {"prompt_tokens": tokens, "total_tokens": tokens}
    assert "truncated" not in answer
    assert all(set(one) == {"index", "relevance_score"} for one in results)


async def test_top_n_and_documents_in_the_reply(client):
    body = {"query": "tide at noon", "documents": DOCUMENTS, "top_n": 2}
    shown = (await post(client, **body, return_documents=True, model="cross/2"))["results"]
    assert [one["document"] for one in shown] == [{"text": DOCUMENTS[0]}, {"text": DOCUMENTS[2]}]
    assert len((await post(client, **{**body, "top_n": 99}))["results"]) == 4


async def test_equal_scores_keep_the_order_of_the_documents(client):
    answer = await post(client, query="xyz", documents=["abc", "def", "xyz", "ghi", "xyz"])
    assert [one["index"] for one in answer["results"]] == [2, 4, 0, 1, 3]


async def test_an_empty_document_is_one_that_answers_nothing(client):
    answer = await post(client, query="tide", documents=["", "tide"])
    assert [(one["index"], one["relevance_score"]) for one in answer["results"]] == [
        (1, 1.0),
        (0, 0.0),
    ]


async def test_too_long_a_document_is_refused_or_cut_and_said(client):
    body = {"query": "tide", "documents": ["tide", "x" * 57, "x" * 58, "x" * 90 + "tide"]}
    refused = await post(client, 400, **body)
    assert (refused["param"], refused["code"]) == ("documents[2]", "context_length_exceeded")
    answer = await post(client, **body, truncate="END")
    assert answer["truncated"] == [
        {"index": 2, "tokens": 65, "used": 64},
        {"index": 3, "tokens": 101, "used": 64},
    ]
    assert answer["results"][0]["index"] == 0
    assert answer["usage"]["total_tokens"] == 11 + 3 * 64


async def test_too_long_a_query_is_refused_whatever_truncate_says(client):
    for truncate in ("NONE", "END"):
        refused = await post(client, 400, query="q" * 61, documents=["a"], truncate=truncate)
        assert (refused["param"], refused["code"]) == ("query", "context_length_exceeded")
    answer = await post(client, query="q" * 60, documents=["ab"], truncate="END")
    assert answer["truncated"] == [{"index": 0, "tokens": 65, "used": 64}]


async def test_bad_bodies_are_named(client, subtests):
    for body, param in (
        ({}, "query"),
        ({"query": "x"}, "documents"),
        ({"query": "", "documents": ["a"]}, "query"),
        ({"query": "x", "documents": []}, "documents"),
        ({"query": "x", "documents": "a"}, "documents"),
        ({"query": "x", "documents": ["a", 3]}, "documents[1]"),
        ({"query": "x", "documents": ["a"] * 1001}, "documents"),
        ({"query": "x", "documents": ["a"], "top_n": 0}, "top_n"),
        ({"query": "x", "documents": ["a"], "truncate": "START"}, "truncate"),
        ({"query": "x", "documents": ["a"], "topn": 1}, "topn"),
    ):
        with subtests.test(body=str(body)[:60]):
            assert (await post(client, 400, **body))["param"] == param


async def test_a_model_serves_what_it_was_made_for(client):
    refused = await post(client, 404, query="x", documents=["a"], model="plain")
    assert (refused["code"], refused["param"]) == ("model_not_found", "model")
    await post(client, 404, query="x", documents=["a"], model="none")
    embedded = await client.post("/v1/embeddings", json={"model": "cross", "input": "x"})
    assert embedded.status_code == 404
    made = await client.post("/v1/collections", json={"name": "b", "model": "cross"})
    assert made.status_code == 404
    kinds = {one["id"]: one["kind"] for one in (await client.get("/v1/models")).json()["data"]}
    assert kinds == {
        "plain": "embedding",
        "cross": "reranker",
        "cross/2": "reranker",
        "org/nested": "embedding",
    }
    assert (await client.get("/v1/models/cross/2")).json()["kind"] == "reranker"


async def test_a_service_without_a_reranker_says_so(start):
    client = await (await start()).client()
    refused = await post(client, 404, query="x", documents=["a"])
    assert (refused["code"], refused["param"]) == ("model_not_found", "model")
    await client.post("/v1/collections", json={"name": "books"})
    refused = await post(client, 404, SEARCH, text="x", rerank={})
    assert refused["param"] == "rerank.model"


async def test_it_is_interactive_work_paid_by_the_token(whole):
    client = await whole.client("free")
    answer = await client.post("/v1/rerank", json={"query": "x" * 17, "documents": ["y" * 20]})
    assert answer.headers["x-ratelimit-remaining-tokens"] == "60"
    refused = await post(client, 429, query="x" * 17, documents=["y" * 20, "z" * 20])
    assert refused["code"] == "tenant_tokens_per_minute"
    assert {(call.klass, call.model) for call in whole.embedder.calls} == {("interactive", "cross")}


async def test_our_faults_are_refunded(client, whole):
    before = (await client.get("/v1/models")).headers["x-ratelimit-remaining-tokens"]
    whole.embedder.fault = Overloaded("Full.", retry_after_s=1)
    refused = await client.post("/v1/rerank", json={"query": "x", "documents": ["y"]})
    assert refused.status_code == 503
    assert refused.headers["x-ratelimit-remaining-tokens"] == before


async def test_bounds_follow_the_settings(start):
    limits = Limits(rerank_documents_max=2, request_tokens_max=20)
    client = await (await start(pools=(POOL,), limits=limits)).client()
    await post(client, query="x", documents=["a", "b"])
    assert (await post(client, 400, query="x", documents=["a"] * 3))["param"] == "documents"
    refused = await post(client, 400, query="x", documents=["a" * 9, "b" * 9])
    assert (refused["code"], refused["param"]) == ("max_tokens_per_request", "documents")


@pytest.fixture
def sour(monkeypatch):
    """The pair of `x` and POISON makes a reranker fail, that of `x` and `nan` is scored NaN."""

    def engine(model, _):
        if model.kind != "reranker":
            return FakeEngine(model)
        rows = Tokenizer.open(model).encode_pairs("x", [POISON, "nan"])
        poison, not_finite = (frozenset({tuple(row.tolist())}) for row in rows)
        return FakeEngine(model, faults=Faults(poison=poison, not_finite=not_finite))

    monkeypatch.setattr(conftest, "faulty", engine)


@pytest.mark.usefixtures("sour")
async def test_a_pair_on_which_the_model_fails_is_named(start):
    client = await (await start(pools=(POOL,))).client()
    for text, code in ((POISON, "input_failed"), ("nan", "vector_not_finite")):
        refused = await post(client, 422, query="x", documents=["a", text, "b"])
        assert (refused["code"], refused["param"]) == (code, "documents[1]")


# --- searches --------------------------------------------------------------------------------

TEXTS = {"tide": "tide of noon", "moon": "the moon", "loud": "tide tide tide", "rare": "quokkas"}


@pytest.fixture
async def books(client):
    await client.post("/v1/collections", json={"name": "books"})
    documents = [{"id": name, "text": text} for name, text in TEXTS.items()]
    await client.post("/v1/collections/books/documents", json={"documents": documents})
    return client


async def names(client, **body):
    return [hit["document"] for hit in (await post(client, url=SEARCH, **body))["data"]]


async def test_a_reranker_sorts_what_the_mode_found(books):
    assert await names(books, mode="text", text="of tide") == ["tide", "loud"]
    text = "tide tide"
    answer = await post(books, url=SEARCH, mode="text", text=text, rerank={})
    hits = answer["data"]
    assert [hit["document"] for hit in hits] == ["loud", "tide"]
    assert hits[0]["score"] == 1.0
    assert hits[0]["text"] == TEXTS["loud"]
    pairs = sum(len(text) + 3 + len(TEXTS[name]) for name in ("loud", "tide"))
    assert answer["usage"]["total_tokens"] == pairs
    for mode in ("vector", "hybrid"):
        answer = await post(books, url=SEARCH, mode=mode, text=text, rerank={"model": "cross/2"})
        assert answer["data"][0]["document"] == "loud"
        pairs = sum(len(text) + 3 + len(held) for held in TEXTS.values())
        assert answer["usage"]["total_tokens"] == pairs + len(text) + 2


async def test_candidates_are_what_it_looks_at(books):
    text = "tide tide"
    assert await names(books, mode="text", text="noon tide", top_k=1) == ["tide"]
    body = {"mode": "text", "text": "noon tide", "top_k": 1}
    one = await post(books, url=SEARCH, **body, rerank={"candidates": 1})
    assert [hit["document"] for hit in one["data"]] == ["tide"]
    both = await post(books, url=SEARCH, **body, rerank={"candidates": 2})
    assert both["usage"]["total_tokens"] > one["usage"]["total_tokens"]
    assert len(both["data"]) == 1
    assert await names(books, text=text, rerank={"candidates": 4}, top_k=4) != []


async def test_a_long_chunk_is_cut_for_the_reranker_and_none_is_fine(books):
    text = "tide of the noon of"
    answer = await post(books, url=SEARCH, mode="text", text=text, rerank={"model": "cross/2"})
    assert answer["usage"]["total_tokens"] == 32 + 32 + len(text) + 3 + len("the moon")
    assert await names(books, mode="text", text="nothing", rerank={}) == []


async def test_what_a_rerank_takes_is_named(books, subtests):
    for body, param, status in (
        ({"vector": [1.0] * 16, "rerank": {}}, "rerank", 400),
        ({"text": "x", "rerank": {"candidates": 0}}, "rerank.candidates", 400),
        ({"text": "x", "rerank": {"candidates": 5}, "top_k": 6}, "rerank.candidates", 400),
        ({"text": "x", "rerank": {"candidates": 1001}}, "rerank.candidates", 400),
        ({"text": "x", "rerank": {"model": "plain"}}, "rerank.model", 404),
        ({"text": "x", "rerank": {"models": "x"}}, "rerank.models", 400),
        ({"text": "x", "rerank": True}, "rerank", 400),
        ({"text": "x" * 31, "rerank": {"model": "cross/2"}}, "text", 400),
    ):
        with subtests.test(body=str(body)[:60]):
            assert (await post(books, status, SEARCH, **body))["param"] == param


async def test_how_many_are_looked_at_is_a_setting(start):
    whole = await start(pools=(POOL,), search=Search(rerank_candidates=1))
    client = await whole.client()
    await client.post("/v1/collections", json={"name": "books"})
    documents = [{"id": name, "text": text} for name, text in TEXTS.items()]
    await client.post("/v1/collections/books/documents", json={"documents": documents})
    before = len(whole.embedder.calls)
    await post(client, url=SEARCH, mode="text", text="tide", top_k=1, rerank={})
    assert [len(call.inputs) for call in whole.embedder.calls[before:]] == [1]


async def test_a_reranker_that_is_away_refunds_the_query_too(books, whole):
    before = (await books.get("/v1/models")).headers["x-ratelimit-remaining-tokens"]
    calls = len(whole.embedder.calls)

    async def second_call_fails():
        if len(whole.embedder.calls) > calls + 1:
            raise Overloaded("Full.", retry_after_s=1)

    whole.embedder.before = second_call_fails
    refused = await books.post(SEARCH, json={"text": "tide", "rerank": {}})
    assert refused.status_code == 503
    assert len(whole.embedder.calls) == calls + 2
    assert refused.headers["x-ratelimit-remaining-tokens"] == before


def test_the_fake_counts_the_trigrams_of_the_query():
    engine = FakeEngine(CROSS)
    rows = Tokenizer.open(CROSS).encode_pairs("abcd", ["xabcd", "abc", "", "dcba"])
    from serve.records import Input  # noqa: PLC0415

    scores = engine.forward([Input(ids=row) for row in rows])
    np.testing.assert_allclose(scores[:, 0], [1.0, 0.5, 0.0, 0.0])
