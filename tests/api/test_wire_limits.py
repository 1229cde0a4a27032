"""Limits on the wire: what is refused, how it is explained, and what every reply says is left."""

import asyncio
import re
import threading

import pytest

from serve.admission.quotas import Rate
from serve.allowance import Quota, Tier
from serve.api.rates import rate_headers
from serve.config import Admission
from serve.grants import Limit


EMBED = "/v1/embeddings"
TIERS = ("free", "premium", "enterprise")


def started(start, *, interactive=None, bulk=None, **changes):
    """A service in which tier `free` has these limits and no others."""
    tier = Tier(weight=1, interactive=interactive or {}, bulk=bulk or {}, **changes)
    ample = Tier(weight=1)
    tiers = {"free": tier, "premium": ample, "enterprise": ample}
    return start(admission=Admission(tiers=tiers))


def embed(client, text="x", **headers):
    return client.post(EMBED, json={"model": "plain", "input": text}, headers=headers)


def refusal(response):
    assert response.status_code == 429, response.text
    body = response.json()
    return body["error"]["type"] if "error" in body else body["code"]


def items(header):
    """A structured field's list: name -> parameters, in order."""
    found = re.findall(r'"(\w+)"((?:;\w+=(?:\d+|"[\w-]+"))*)', header)
    assert ", ".join(f'"{name}"{rest}' for name, rest in found) == header
    return {name: dict(part.split("=") for part in rest.split(";")[1:]) for name, rest in found}


async def until(condition):
    while not condition():  # noqa: ASYNC110  a queue has no event
        await asyncio.sleep(0)


# --- headers ---------------------------------------------------------------------------------


LIMITED = {
    "interactive": {
        "requests_per_minute": 60,
        "requests_burst": 10,
        "tokens_per_minute": 600,
        "tokens_burst": 100,
        "concurrent_max": 4,
        "queued_tokens_max": 1000,
    },
    "bulk": {"tokens_per_minute": 6000},
    "tokens_per_month": 5000,
}


async def test_every_limit_of_the_class_is_named_on_every_reply(start):
    whole = await started(start, **LIMITED)
    client = await whole.client("free")
    answer = await embed(client, "x" * 38)
    assert answer.headers["ratelimit-policy"] == (
        '"tenant_requests_per_minute";q=10;w=10, '
        '"tenant_tokens_per_minute";q=100;w=10;qu="tokens", '
        '"tenant_concurrent_requests";q=4;qu="concurrent-requests", '
        '"tenant_queued_tokens";q=1000;qu="tokens", '
        '"tenant_tokens_per_month";q=5000;w=2592000;qu="tokens"'
    )
    month_s = 16 * 86_400 + 6400  # of 14 November, 22:13:20
    assert items(answer.headers["ratelimit"]) == {
        "tenant_requests_per_minute": {"r": "9", "t": "1"},
        "tenant_tokens_per_minute": {"r": "60", "t": "4"},
        "tenant_concurrent_requests": {"r": "4"},
        "tenant_queued_tokens": {"r": "1000"},
        "tenant_tokens_per_month": {"r": "4960", "t": str(month_s)},
    }
    shown = {name: text for name, text in answer.headers.items() if name.startswith("x-ratelimit-")}
    assert shown == {
        "x-ratelimit-limit-requests": "10",
        "x-ratelimit-remaining-requests": "9",
        "x-ratelimit-reset-requests": "1s",
        "x-ratelimit-limit-tokens": "100",
        "x-ratelimit-remaining-tokens": "60",
        "x-ratelimit-reset-tokens": "4s",
    }
    bad = await client.post(EMBED, json={})
    assert items(bad.headers["ratelimit"]) == items(answer.headers["ratelimit"])


async def test_class_bulk_has_limits_of_its_own(start):
    whole = await started(start, **LIMITED)
    client = await whole.client("free")
    answer = await client.request("DELETE", "/v1/collections/none/documents", json={"ids": ["1"]})
    policies = items(answer.headers["ratelimit-policy"])
    assert list(policies) == ["tenant_bulk_tokens_per_minute", "tenant_tokens_per_month"]
    assert "x-ratelimit-limit-requests" not in answer.headers
    assert answer.headers["x-ratelimit-limit-tokens"] == "6000"


async def test_without_limits_no_header_speaks_of_any(start):
    client = await (await started(start)).client("free")
    answer = await embed(client)
    assert answer.status_code == 200
    assert not [name for name in answer.headers if "ratelimit" in name]


async def test_openai_headers_show_the_tighter_of_tenant_and_key(start):
    whole = await started(start, **LIMITED)
    admin = await whole.client("admin")
    own = {"interactive": {"requests_per_minute": 3, "tokens_per_minute": 6000}}
    made = await admin.post("/v1/admin/keys", json={"tenant": "frugal", "limits": own})
    whole.keys["own"] = made.json()["secret"]
    answer = await embed(await whole.client("own"), "x" * 38)
    assert answer.headers["x-ratelimit-limit-requests"] == "3"
    assert answer.headers["x-ratelimit-remaining-requests"] == "2"
    assert answer.headers["x-ratelimit-reset-requests"] == "20s"
    assert answer.headers["x-ratelimit-limit-tokens"] == "100"
    assert list(items(answer.headers["ratelimit"]))[-2:] == [
        "key_requests_per_minute",
        "key_tokens_per_minute",
    ]
    for _ in range(2):
        await embed(await whole.client("own"))
    refused = await embed(await whole.client("own"))
    assert refusal(refused) == "key_requests_per_minute"
    assert next(iter(items(refused.headers["ratelimit"]))) == "key_requests_per_minute"
    assert (await embed(await whole.client("free"))).status_code == 200


def test_integers_of_structured_fields_are_bounded():
    huge = Limit("t/a", "tenant_tokens_per_month", "month", "tokens", 10**15)
    headers = dict(rate_headers([Rate(huge, 10**15, 5.2)], now=1_700_000_000.0, violated=None))
    assert headers[b"ratelimit"] == b'"tenant_tokens_per_month";r=999999999999999;t=6'
    assert b";q=999999999999999;" in headers[b"ratelimit-policy"]


async def test_timing_stands_on_replies_of_model_routes(whole):
    client = await whole.client()
    names = ("x-tokenization-time", "x-queue-time", "x-inference-time", "x-total-time")

    async def slow():
        whole.clock.advance(0.25)

    whole.embedder.before = slow
    books = "/v1/collections/books"
    await client.post("/v1/collections", json={"name": "books"})
    answers = [
        await embed(client),
        await client.post(f"{books}/search", json={"text": "x"}),
    ]
    for answer in answers:
        times = [answer.headers[name] for name in names]
        assert times == ["0.0", "0.0", "0.0", "250.0"]
        assert answer.headers["openai-processing-ms"] == "250"
    by_vector = await client.post(f"{books}/search", json={"vector": [1.0] * 16})
    assert by_vector.headers["x-total-time"] == "0.0"
    assert "x-total-time" not in (await client.get("/v1/models")).headers


# --- refusals --------------------------------------------------------------------------------


async def test_a_refusal_names_the_policy_everywhere(start, clock):
    whole = await started(start, interactive=LIMITED["interactive"])
    client = await whole.client("free")
    assert (await embed(client, "x" * 60)).status_code == 200
    for url, body in (
        (EMBED, {"model": "plain", "input": "x" * 60}),
        ("/v1/collections/books/search", {"text": "x" * 60}),
    ):
        if "books" in url:
            await client.post("/v1/collections", json={"name": "books"})
        refused = await client.post(url, json=body)
        assert refusal(refused) == "tenant_tokens_per_minute"
        assert next(iter(items(refused.headers["ratelimit"]))) == "tenant_tokens_per_minute"
        assert "tenant_tokens_per_minute" in refused.text
        wait_ms = int(refused.headers["retry-after-ms"])
        assert 2400 <= wait_ms <= 2401  # 62 wanted, 38 left, ten a second
        assert refused.headers["retry-after"] == "3"
        assert "x-should-retry" not in refused.headers
    problem = refused.json()
    assert problem["violated-policies"] == ["tenant_tokens_per_minute"]
    assert problem["type"].endswith("#quota-exceeded")
    clock.advance(wait_ms / 1e3)
    assert (await embed(client, "x" * 60)).status_code == 200


async def test_a_refused_tenants_body_is_not_read(start):
    whole = await started(start, interactive={"requests_per_minute": 1, "requests_burst": 1})
    client = await whole.client("free")
    assert (await embed(client)).status_code == 200
    assert refusal(await embed(client)) == "tenant_requests_per_minute"  # known from now on
    sent = []

    async def receive():
        pytest.fail("the body was read")

    async def send(message):
        sent.append(message)

    scope = {
        "type": "http",
        "method": "POST",
        "path": EMBED,
        "headers": [(b"authorization", f"Bearer {whole.keys['free']}".encode())],
        "query_string": b"",
    }
    await whole.app(scope, receive, send)
    assert sent[0]["status"] == 429
    headers = dict(sent[0]["headers"])
    assert headers[b"retry-after"] == b"60"
    assert headers[b"ratelimit"].startswith(b'"tenant_requests_per_minute";r=0;t=')
    assert b"tenant_requests_per_minute" in sent[1]["body"]


async def outcome(whole, who, used, requests):
    """Tokens with the model, and refusals, when all come at once while `used` is under way."""
    client = await whole.client(who)
    hold = asyncio.Event()
    whole.embedder.before = hold.wait
    whole.embedder.calls.clear()
    calls = whole.embedder.calls
    answers = [asyncio.ensure_future(embed(client, used))]
    await until(lambda: calls)
    answers += [asyncio.ensure_future(embed(client, texts)) for texts in requests]
    await until(lambda: len(calls) + sum(one.done() for one in answers) == len(answers))
    hold.set()
    refused = [one.status_code for one in await asyncio.gather(*answers)].count(429)
    return sum(sum(call.tokens) for call in calls), refused


@pytest.mark.parametrize(
    "quota", [{"tokens_per_minute": 1, "tokens_burst": 650}, {"queued_tokens_max": 650}]
)
async def test_many_texts_are_answered_alike_in_one_request_and_in_many(start, quota):
    tier = Tier(weight=1, interactive=quota)
    whole = await start(admission=Admission(tiers=dict.fromkeys(TIERS, tier)))
    packed = ["x" * 8] * 64  # of 10 tokens each
    single = [[text] for text in packed]
    assert await outcome(whole, "free", "x" * 8, [packed]) == (650, 0)
    assert await outcome(whole, "premium", "x" * 8, single) == (650, 0)
    assert await outcome(whole, "enterprise", "x" * 9, [packed]) == (11, 1)
    assert await outcome(whole, "other", "x" * 9, single) == (641, 1)


async def test_concurrent_requests_are_counted_until_they_are_answered(start):
    whole = await started(start, interactive={"concurrent_max": 2})
    client = await whole.client("free")
    hold = asyncio.Event()
    whole.embedder.before = hold.wait
    under_way = [asyncio.ensure_future(embed(client)) for _ in range(2)]
    await until(lambda: len(whole.embedder.calls) == 2)
    refused = await embed(client)
    assert refusal(refused) == "tenant_concurrent_requests"
    assert 1 <= int(refused.headers["retry-after"]) <= 120
    assert items(refused.headers["ratelimit"]) == {"tenant_concurrent_requests": {"r": "0"}}
    hold.set()
    assert {answer.status_code for answer in await asyncio.gather(*under_way)} == {200}
    assert (await embed(client)).status_code == 200


async def test_one_who_leaves_frees_its_place(start):
    whole = await started(start, interactive={"concurrent_max": 1, "queued_tokens_max": 8})
    client = await whole.client("free")
    whole.embedder.before = asyncio.Event().wait
    gone = asyncio.ensure_future(embed(client))
    await until(lambda: whole.embedder.calls)
    gone.cancel()
    await asyncio.wait([gone])
    whole.embedder.before = None
    assert (await embed(client)).status_code == 200


@pytest.mark.parametrize(
    "quota",
    [
        {"requests_per_minute": 1, "requests_burst": 1},
        {"tokens_per_minute": 1, "tokens_burst": 8},
        {"concurrent_max": 1},
        {"queued_tokens_max": 8},
    ],
)
async def test_exactly_one_of_many_gets_the_last_unit(start, quota):
    whole = await started(start, interactive=Quota(**quota))
    client = await whole.client("free")
    hold = asyncio.Event()
    whole.embedder.before = hold.wait
    answers = [asyncio.ensure_future(embed(client, "x" * 6)) for _ in range(20)]
    await until(lambda: sum(answer.done() for answer in answers) == 19)
    hold.set()
    statuses = [answer.status_code for answer in await asyncio.gather(*answers)]
    assert sorted(statuses) == [200] + [429] * 19
    assert len(whole.embedder.calls) == 1


async def test_what_can_never_pass_is_no_429(start):
    for quota in ({"tokens_per_minute": 10}, {"queued_tokens_max": 10}):
        client = await (await started(start, interactive=quota)).client("free")
        answer = await embed(client, "x" * 9)
        assert answer.status_code == 400
        assert answer.json()["error"]["code"] == "tokens_exceed_quota"
        assert answer.json()["error"]["param"] == "input"


async def test_an_exhausted_month_is_not_worth_waiting_for(start):
    whole = await started(start, tokens_per_month=10)
    client = await whole.client("free")
    assert (await embed(client, "x" * 6)).status_code == 200
    refused = await embed(client, "x" * 6)
    assert refusal(refused) == "tenant_tokens_per_month"
    assert refused.json()["error"]["code"] == "insufficient_quota"
    assert refused.headers["x-should-retry"] == "false"
    assert "retry-after" not in refused.headers
    assert (await embed(client, "")).status_code in (400, 429)
    whole.clock.advance(17 * 86_400)
    assert (await embed(client, "x" * 6)).status_code == 200


# --- tokenising ------------------------------------------------------------------------------


async def test_an_input_refused_while_tokenising_costs_a_request(start):
    whole = await started(start, interactive={"requests_per_minute": 60, "requests_burst": 2})
    client = await whole.client("free")
    for left in (1, 0):
        answer = await embed(client, "x" * 500)
        assert answer.status_code == 400
        assert answer.headers["x-ratelimit-remaining-requests"] == str(left)
    assert refusal(await embed(client, "x" * 500)) == "tenant_requests_per_minute"


async def test_what_is_tokenised_counts_as_under_way(start, monkeypatch):
    whole = await started(start, interactive={"concurrent_max": 1})
    client = await whole.client("free")
    tokenizer = type(whole.service.context.models.find("plain").tokenizer)
    encode, begun, go_on = tokenizer.encode, threading.Event(), threading.Event()

    def held(self, texts):
        begun.set()
        assert go_on.wait(20)
        return encode(self, ["short"])

    monkeypatch.setattr(tokenizer, "encode", held)
    first = asyncio.create_task(embed(client, "long " * 101))  # what is short waits for nobody
    try:
        await until(begun.is_set)
        assert refusal(await embed(client)) == "tenant_concurrent_requests"
    finally:
        go_on.set()
    assert (await first).status_code == 200
    assert (await embed(client)).status_code == 200
