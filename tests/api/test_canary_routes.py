"""Canaries as callers and operators see them: headers, who answers what, and `GET /v1/admin/canaries`."""

import asyncio

import numpy as np
import pytest

from serve.config import Cache, Canary
from serve.config import Pool as PoolSettings
from serve.errors import LedgerUnavailable, ModelUnavailable
from serve.flows.readings import of_canaries
from tests.api.conftest import NESTED, PLAIN
from tests.api.lines import counts, ended, line, submit


SHOWN = "/v1/admin/canaries"
NEW = PLAIN.model_copy(update={"id": "plain-2"})
POOLS = (PoolSettings(models=(PLAIN, NEW, NESTED)),)
"""Fake models of equal length make the same vectors."""


def canary(**fields) -> Canary:
    return Canary(**{"model": "plain", "to": "plain-2", "same_vectors": True, **fields})


async def post(client, *texts, headers=None, **body):
    body = {"model": "plain", "input": [*texts], **body}
    return await client.post("/v1/embeddings", json=body, headers=headers)


def rows(answer):
    assert answer.status_code == 200, answer.text
    return np.array([row["embedding"] for row in answer.json()["data"]], np.float32)


async def until(condition):
    while not condition():  # noqa: ASYNC110  the model works in a thread
        await asyncio.sleep(0.01)


def asked(whole, model, klass="interactive"):
    calls = [call for call in whole.embedder.calls if call.request_id != "canary-check"]
    return [call for call in calls if (call.model, call.klass) == (model, klass)]


def trial(whole):
    return whole.service.canaries._trials["plain"]


async def tokens_used(whole, client):
    await whole.service.context.quotas._report()
    rows = (await client.get("/v1/usage")).json()["data"]
    return sum(row["tokens"] for row in rows)


@pytest.fixture
async def answering(start):
    """A service whose candidate answers everything."""
    whole = await start(pools=POOLS, canaries=(canary(share=1.0),))
    await until(lambda: trial(whole).state == "running")
    return whole


async def shown(whole):
    """What operators see, once the replica has told it."""
    await whole.service.canaries._exchange()
    answer = await (await whole.client("admin")).get(SHOWN)
    assert answer.status_code == 200, answer.text
    [one] = answer.json()["data"]
    return one


# --- callers -----------------------------------------------------------------------------------


async def test_a_reply_says_which_of_the_two_answered_and_keeps_the_name_asked_for(answering):
    client = await answering.client()
    answer = await post(client, "the tide", "a wheel")
    assert answer.json()["model"] == "plain"
    assert answer.json()["usage"]["total_tokens"] == 19
    assert answer.headers["x-canary"] == "candidate"
    found = answering.service.context.models.find("plain-2")
    assert answer.headers["x-model-revision"] == found.revision
    assert [len(call.inputs) for call in asked(answering, "plain-2")] == [2]
    assert asked(answering, "plain") == []
    answering.service.canaries.update(())
    plain = await post(client, "the tide", "a wheel")
    assert {"x-canary", "x-model-revision"} & plain.headers.keys() == set()
    assert np.array_equal(rows(plain), rows(answer))


async def test_about_half_of_the_requests_and_always_the_same_half(start):
    whole = await start(pools=POOLS, canaries=(canary(share=0.5),))
    await until(lambda: trial(whole).state == "running")
    client = await whole.client("enterprise")

    async def arms():
        return [(await post(client, f"text {n}")).headers["x-canary"] for n in range(60)]

    first = await arms()
    assert 10 < first.count("candidate") < 50
    assert first == await arms()


async def test_only_embeddings_are_answered_by_a_candidate(answering):
    """A collection's vectors are of the model that it pins; so are those that search it."""
    client = await answering.client()
    await client.post("/v1/collections", json={"name": "books", "model": "plain"})
    documents = {"documents": [{"id": "1", "text": "tide"}]}
    path = "/v1/collections/books"
    written = await client.post(f"{path}/documents?wait=indexed", json=documents)
    assert written.status_code == 200, written.text
    hits = (await client.post(f"{path}/search", json={"text": "tide"})).json()["data"]
    assert [hit["document"] for hit in hits] == ["1"]
    ai = await answering.openai()
    batch = await ended(answering, ai, await submit(ai, line("one")))
    assert counts(batch) == (1, 1, 0)
    assert asked(answering, "plain-2") == asked(answering, "plain-2", "bulk") == []
    assert len(asked(answering, "plain", "bulk")) >= 2


async def test_a_candidate_that_fails_is_nothing_to_a_caller(answering):
    whole, client = answering, await answering.client()
    submit_call = whole.embedder.batcher.submit

    async def failing(call):
        if call.model == "plain-2":
            raise ModelUnavailable("gone")
        return await submit_call(call)

    whole.embedder.batcher.submit = failing
    answer = await post(client, "the tide")
    assert rows(answer).shape == (1, 16)
    assert answer.headers["x-canary"] == "stable"
    assert (await shown(whole))["fallbacks"] == 1
    assert await tokens_used(whole, client) == 10  # charged once


async def test_errors_are_those_of_the_stable_model(answering):
    client = await answering.client()
    refused = await post(client, "poison")
    assert refused.status_code == 422
    assert refused.json()["error"]["param"] == "input[0]"
    assert trial(answering).figures.fallbacks == 0
    too_long = await post(client, "x" * 100)
    assert too_long.json()["error"]["code"] == "context_length_exceeded"
    assert (await post(client, "a", dimensions=8)).json()["error"]["param"] == "dimensions"


async def test_what_is_kept_is_kept_by_model(start):
    whole = await start(pools=POOLS, cache=Cache(), canaries=(canary(share=1.0),))
    await until(lambda: trial(whole).state == "running")
    client = await whole.client()
    for cached in (None, "1"):
        answer = await post(client, "the tide")
        assert answer.headers.get("x-cached-inputs") == cached
        assert answer.headers["x-canary"] == "candidate"
    whole.service.canaries.update(())
    assert "x-cached-inputs" not in (await post(client, "the tide")).headers
    assert [len(asked(whole, name)) for name in ("plain", "plain-2")] == [1, 1]


async def test_repetitions_cost_a_tenant_nothing(start):
    without = await (await start(pools=POOLS)).client()
    whole = await start(pools=POOLS, canaries=(canary(shadow=1.0),))
    client = await whole.client()
    left = [
        (await post(one, "the tide")).headers["x-ratelimit-remaining-tokens"]
        for one in (without, client)
    ]
    await until(lambda: trial(whole).figures.shadows["compared"] == 1)
    assert left[0] == left[1]
    [call] = asked(whole, "plain-2", "bulk")
    assert call.tenant == "~canary"
    assert await tokens_used(whole, client) == 10


async def test_two_models_may_be_compared_whose_vectors_differ(start):
    pair = canary(to="org/nested", same_vectors=False, shadow=1.0)
    whole = await start(pools=POOLS, canaries=(pair,))
    answer = await post(await whole.client(), "the tide")
    assert "x-canary" not in answer.headers
    await until(lambda: trial(whole).figures.shadows["compared"] == 1)
    one = await shown(whole)
    assert (one["state"], one["cosine"]["inputs"], one["cosine"]["min"]) == ("running", 0, None)


# --- operators ---------------------------------------------------------------------------------


async def test_operators_see_how_the_two_compare(start):
    whole = await start(pools=POOLS, canaries=(canary(share=0.5, shadow=0.5),))
    await until(lambda: trial(whole).state == "running")
    client = await whole.client("enterprise")
    answers = [await post(client, f"text {n}", "and more") for n in range(20)]
    chosen = [answer.headers["x-canary"] for answer in answers].count("candidate")
    figures = trial(whole).figures
    await until(lambda: figures.shadows["compared"] == 20 - chosen)
    one = await shown(whole)
    assert {key: one[key] for key in ("model", "to", "share", "shadow", "same_vectors")} == {
        "model": "plain",
        "to": "plain-2",
        "share": 0.5,
        "shadow": 0.5,
        "same_vectors": True,
    }
    assert (one["state"], one["replicas"], one["fallbacks"]) == ("running", 1, 0)
    assert one["arms"]["candidate"]["requests"] == chosen
    assert one["arms"]["stable"]["requests"] == 20 - chosen
    assert one["arms"]["candidate"]["latency_ms"]["requests"] == chosen
    assert one["arms"]["candidate"]["model_ms"]["p95"] is None  # the clock stands still
    assert one["shadows"] == {"compared": 20 - chosen, "failed": 0, "dropped": 0, "skipped": 0}
    cosine = one["cosine"]
    assert cosine["inputs"] == 2 * (20 - chosen)
    assert cosine["min"] == pytest.approx(1, abs=1e-6)
    assert cosine["min"] <= cosine["p01"] <= 1


async def test_figures_of_several_replicas_are_added_up(answering):
    await post(await answering.client(), "the tide")
    reports = [one.report() for one in answering.service.canaries._trials.values()]
    await answering.ports.queues.report_canaries("another", reports)
    one = await shown(answering)
    assert (one["replicas"], one["arms"]["candidate"]["requests"]) == (2, 2)


async def test_one_that_was_stopped_or_switched_off_says_why(start):
    whole = await start(pools=POOLS, canaries=(canary(share=1.0),))
    await until(lambda: trial(whole).state == "running")
    trial(whole).stop("The vectors are others.")
    one = await shown(whole)
    assert (one["state"], one["reason"]) == ("stopped", "The vectors are others.")
    assert "x-canary" not in (await post(await whole.client(), "the tide")).headers
    whole.service.canaries.update((canary(share=1.0, enabled=False),))
    assert (await shown(whole))["state"] == "off"


async def test_without_the_ledger_nobody_can_say(answering):
    answering.queues.faults = {"canary_reports": LedgerUnavailable("Away.", retry_after_s=1)}
    answer = await (await answering.client("admin")).get(SHOWN)
    assert (answer.status_code, answer.json()["code"]) == (503, "ledger_unavailable")


async def test_only_operators_may_look(answering):
    answer = await (await answering.client()).get(SHOWN)
    assert (answer.status_code, answer.json()["code"]) == (403, "admin_required")


async def test_a_service_without_canaries_shows_none(whole):
    answer = await (await whole.client("admin")).get(SHOWN)
    assert answer.json() == {"object": "list", "data": []}


# --- figures -----------------------------------------------------------------------------------


async def test_what_is_counted_is_told_as_metrics(start):
    whole = await start(pools=POOLS, canaries=(canary(share=0.5, shadow=0.5),))
    await until(lambda: trial(whole).state == "running")
    client = await whole.client("enterprise")
    for number in range(10):
        await post(client, f"text {number}")
    figures = trial(whole).figures
    await until(lambda: figures.shadows["compared"] == figures.arms["stable"].requests)
    canaries = whole.service.canaries
    told = list(of_canaries(canaries.tally, canaries.stopped))
    found = {(one.name, *one.labels): one.value for one in told}
    requests = "headrace_canary_requests"
    assert found[requests, "plain", "stable"] + found[requests, "plain", "candidate"] == 10
    assert found["headrace_canary_stopped", "plain"] is False
    cosines = [one.value for one in told if one.name == "headrace_canary_cosine"]
    assert len(cosines) == found["headrace_canary_shadows", "plain", "compared"]
    assert sum(one.name == "headrace_canary_request_seconds" for one in told) == 10
