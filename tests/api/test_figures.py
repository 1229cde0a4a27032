"""What the service counts while it answers: replies, their times, and how long writes take to land."""

from serve.flows.readings import of_answers, of_lags


MODEL = "plain"


async def test_replies_are_counted_by_class_and_status(whole, client):
    await client.post("/v1/embeddings", json={"model": MODEL, "input": "one"})
    await client.post("/v1/embeddings", json={"model": "nobody's", "input": "one"})
    await client.get("/v1/models")
    await (await whole.client(None)).post("/v1/embeddings", json={"model": MODEL, "input": "one"})
    await client.get("/nowhere")
    assert whole.service.context.answers.replies == {
        ("interactive", "200"): 1,
        ("interactive", "404"): 1,
        ("none", "200"): 1,
        ("interactive", "401"): 1,
        ("none", "404"): 1,
    }


async def test_replies_that_used_a_model_tell_what_their_parts_took(whole, client):
    await client.post("/v1/embeddings", json={"model": MODEL, "input": "one"})
    await client.get("/v1/models")
    names = [one.name for one in of_answers(whole.service.context.answers)]
    assert names.count("headrace_request_seconds") == 2
    assert names.count("headrace_tokenise_seconds") == names.count("headrace_encode_seconds") == 1


async def test_calls_carry_the_tier_of_their_tenant(whole, client):
    await client.post("/v1/embeddings", json={"model": MODEL, "input": "one"})
    assert [call.tier for call in whole.embedder.calls] == ["premium"]


async def test_writes_and_deletes_tell_when_they_are_in_the_index(whole, client):
    await client.post("/v1/collections", json={"name": "books"})
    path = "/v1/collections/books/documents"
    documents = [{"id": name, "text": f"text {name}"} for name in "ab"]
    await client.post(path, params={"wait": "indexed"}, json={"documents": documents})
    told = list(of_lags(whole.lags))
    assert {one.name for one in told} == {
        "headrace_lag_indexed_seconds",
        "headrace_lag_searchable_seconds",
    }
    assert all(one.value >= 0 for one in told)
    await client.request("DELETE", path, params={"wait": "indexed"}, json={"ids": ["a"]})
    assert len(list(of_lags(whole.lags))) == 2
