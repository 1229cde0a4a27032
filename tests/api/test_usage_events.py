"""What is written as events is what `GET /v1/usage` shows, by operation and model."""

import json
from collections import Counter

import pytest

from serve.admission.metering import Meter, UsageEvents
from serve.errors import ModelUnavailable


BOOKS = "/v1/collections/books"


@pytest.fixture
def events(whole) -> list[dict]:
    """Those that were written."""
    told: list[dict] = []
    sink = lambda lines: told.extend(map(json.loads, lines))  # noqa: E731
    whole.service.context.quotas.meter = Meter(UsageEvents("one"), sink)
    return told


def totals(events) -> Counter:
    sums: Counter = Counter()
    for event in events:
        data = event["data"]
        place = data["key"], data["class"]
        refused = data["outcome"] == "refused"
        if data["outcome"] != "refunded":
            sums[*place, "refused" if refused else "requests"] += data["requests"]
            sums[*place, "tokens"] += data["tokens"]
    return +sums


def shown(usage) -> Counter:
    sums: Counter = Counter()
    for row in usage["data"]:
        for name in ("requests", "tokens", "refused"):
            sums[row["key"], row["class"], name] += row[name]
    return +sums


async def test_events_come_to_the_usage_of_the_month(whole, events):
    client = await whole.client("free")
    for _ in range(4):  # 30 of 100 tokens each: the last one is refused
        await client.post("/v1/embeddings", json={"model": "plain", "input": "x" * 28})
    await client.post("/v1/collections", json={"name": "books"})
    body = {"documents": [{"id": "1", "text": "tide"}, {"id": "2", "text": "ebb"}]}
    await client.post(f"{BOOKS}/documents", json=body)
    whole.clock.advance(60)
    await client.post(f"{BOOKS}/search", json={"text": "tide"})
    whole.embedder.fault = ModelUnavailable("Away.", retry_after_s=1)
    assert (await client.post(f"{BOOKS}/search", json={"text": "tide"})).status_code == 503
    while (await client.get("/v1/collections")).status_code == 200:
        pass
    await whole.service.context.quotas._report()
    usage = (await client.get("/v1/usage")).json()
    assert totals(events) == shown(usage)
    assert {event["subject"] for event in events} == {"frugal"} == {usage["tenant"]}
    assert {event["data"]["month"] for event in events} == {usage["month"]}

    found = Counter()
    for event in events:
        data = event["data"]
        place = data["operation"], data["model"], data["outcome"]
        found[place] += data["requests"]
        found[*place, "tokens"] += data["tokens"]
    assert +found == {
        ("embeddings", "plain", "charged"): 3,
        ("embeddings", "plain", "charged", "tokens"): 90,
        ("embeddings", "plain", "refunded"): 1,  # admitted before its tokens were counted
        ("embeddings", "plain", "refused"): 1,
        ("create_collection", "", "charged"): 1,
        ("write_documents", "", "charged"): 1,
        ("job_documents", "plain", "charged", "tokens"): 11,
        ("search", "", "charged"): 1,
        ("search", "plain", "charged", "tokens"): 6,
        ("search", "", "refunded"): 1,
        ("list_collections", "", "charged"): found["list_collections", "", "charged"],
        ("list_collections", "", "refused"): 1,
    }


async def test_no_text_key_or_vector_is_in_an_event(whole, events):
    client = await whole.client()
    await client.post("/v1/embeddings", json={"model": "plain", "input": "moonlight"})
    await whole.service.context.quotas._report()
    [event] = events
    assert set(event["data"]) == {
        *("month", "tenant", "key", "class", "operation", "model", "outcome"),
        *("requests", "tokens", "until"),
    }
    assert "moonlight" not in json.dumps(event)
    assert whole.keys["premium"] not in json.dumps(event)
