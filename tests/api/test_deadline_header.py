"""`x-deadline-ms`: counted from the arrival of a request, over everything that is done for it."""

import asyncio

import pytest

from serve.config import Limits


EMBED = {"model": "plain", "input": "hello"}
BOOKS = "/v1/collections/books"


def due(ms):
    return {"x-deadline-ms": str(ms)}


def code(response):
    body = response.json()
    return response.status_code, body.get("error", body)["code"]


def requests_left(response):
    return int(response.headers["x-ratelimit-remaining-requests"])


def tokens_left(response):
    return int(response.headers["x-ratelimit-remaining-tokens"])


@pytest.fixture
async def books(client):
    assert (await client.post("/v1/collections", json={"name": "books"})).status_code == 201
    return client


def hangs(whole):
    async def before():
        await asyncio.Event().wait()

    whole.embedder.before = before


def writes(client, **headers):
    documents = {"documents": [{"id": "1", "text": "tide"}]}
    return client.post(f"{BOOKS}/documents", json=documents, headers=headers)


async def test_only_whole_milliseconds_in_range_are_a_deadline(books, subtests):
    for text in ("0", "-1", "1.5", "1e3", "", "soon", "+5", "290001", "9" * 50, "\u0661"):
        for method, url, body in (
            ("POST", "/v1/embeddings", EMBED),
            ("POST", f"{BOOKS}/search", {"text": "tide"}),
            ("POST", f"{BOOKS}/documents", {"documents": [{"id": "1", "text": "tide"}]}),
            ("DELETE", f"{BOOKS}/documents", {"ids": ["1"]}),
        ):
            with subtests.test(text=text, url=url):
                headers = {"x-deadline-ms": text.encode()}
                answer = await books.request(method, url, json=body, headers=headers)
                told = answer.json()
                assert answer.status_code == 400
                assert told.get("error", told)["param"] == "x-deadline-ms"
    assert (await books.post("/v1/embeddings", json=EMBED, headers=due(290_000))).status_code == 200


async def test_the_longest_deadline_is_a_setting(start):
    whole = await start(limits=Limits(deadline_s_max=0.5))
    client = await whole.client()
    refused = await client.post("/v1/embeddings", json=EMBED, headers=due(501))
    assert "from 1 to 500" in refused.json()["error"]["message"]
    assert (await client.post("/v1/embeddings", json=EMBED, headers=due(500))).status_code == 200


async def test_calls_carry_what_is_left_of_it(books, whole):
    await books.post("/v1/embeddings", json=EMBED)
    await books.post("/v1/embeddings", json=EMBED, headers=due(30_000))
    await books.post(f"{BOOKS}/search", json={"text": "tide"}, headers=due(20_000))
    await writes(books, **due(250_000))  # accepted: it goes on whether or not somebody waits
    told = [(call.deadline_s, call.limit_s) for call in whole.embedder.calls]
    assert told == [(10, None), (30, 30), (20, 20), (120, None)]


async def test_reading_the_body_counts(whole):
    async def slowly():
        yield b'{"model": "plain",'
        whole.clock.advance(2)
        yield b'"input": "hello"}'

    client = await whole.client()
    answer = await client.post("/v1/embeddings", content=slowly(), headers=due(5_000))
    assert answer.status_code == 200
    assert [call.limit_s for call in whole.embedder.calls] == [3]
    late = await client.post("/v1/embeddings", content=slowly(), headers=due(2_000))
    assert code(late) == (504, "deadline_exceeded")
    assert late.headers["x-should-retry"] == "false"  # it would pass again
    assert len(whole.embedder.calls) == 1


async def test_tokenising_counts(whole, monkeypatch):
    client = await whole.client()
    tokenizer = whole.service.context.models.find("plain").tokenizer
    encode = type(tokenizer).encode

    def slow(self, texts):
        whole.clock.advance(2)
        return encode(self, texts)

    monkeypatch.setattr(type(tokenizer), "encode", slow)
    answer = await client.post("/v1/embeddings", json=EMBED, headers=due(5_000))
    assert whole.embedder.calls[0].limit_s == 3
    assert float(answer.headers["x-tokenization-time"]) == 2000
    late = await client.post("/v1/embeddings", json=EMBED, headers=due(2_000))
    assert code(late) == (504, "deadline_exceeded")
    assert len(whole.embedder.calls) == 1
    assert requests_left(late) == 1000


async def test_a_quota_wait_counts(whole):
    client = await whole.client("free")

    class Slow:
        async def exchange(self, *_):
            await asyncio.Event().wait()

    whole.service.context.quotas._ledger = Slow()
    late = await client.post("/v1/embeddings", json=EMBED, headers=due(1))
    assert code(late) == (504, "deadline_exceeded")


async def test_waiting_for_the_model_counts_and_is_refunded(books, whole):
    before = await books.get("/v1/models")
    hangs(whole)
    for request in (
        books.post("/v1/embeddings", json=EMBED, headers=due(1)),
        books.post(f"{BOOKS}/search", json={"text": "tide"}, headers=due(1)),
    ):
        late = await request
        assert code(late) == (504, "deadline_exceeded")
        assert tokens_left(late) == tokens_left(before)
        assert requests_left(late) == requests_left(before)


async def test_expired_work_never_reaches_the_model(start):
    whole = await start(serving=False)
    client = await whole.client()
    late = await client.post("/v1/embeddings", json=EMBED, headers=due(1))
    assert code(late) == (504, "deadline_exceeded")
    assert whole.embedder.batcher.queued_items == 0
    assert whole.embedder.batcher.tally.batches == 0


async def test_a_write_that_is_late_is_accepted_all_the_same(books, whole):
    hangs(whole)
    late = await writes(books, **due(20))
    assert (late.status_code, late.json()["level"]) == (202, "accepted")
    assert requests_left(late) == 999


async def test_priority_is_passed_on_and_checked(books, whole):
    url = f"{BOOKS}/documents"
    for body, expected in (({}, 50), ({"priority": 0}, 0), ({"priority": 100}, 100)):
        documents = [{"id": str(expected), "text": "tide"}]
        await books.post(url, json={"documents": documents, **body})
        assert whole.embedder.calls[-1].priority == expected
    for wrong in (-1, 101, 1.5, "9", True, None):
        answer = await books.post(url, json={"documents": documents, "priority": wrong})
        assert (answer.status_code, answer.json()["param"]) == (400, "priority")
