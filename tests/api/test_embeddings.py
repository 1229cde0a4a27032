"""`POST /v1/embeddings`: bounds, bad input, headers, quotas, and callers that leave."""

import asyncio
import re

import numpy as np
import pytest

from serve.config import Batch, Limits, Pool
from serve.errors import ModelUnavailable, Overloaded
from serve.records import EmbedReply


URL = "/v1/embeddings"


async def post(client, **body):
    return await client.post(URL, json={"model": "plain", "input": "hello", **body})


def error(response, status=400):
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    body = response.json()["error"]
    assert set(body) == {"message", "type", "param", "code"}
    return body


def rows(response):
    assert response.status_code == 200, response.text
    return np.array([row["embedding"] for row in response.json()["data"]], np.float32)


# --- bounds ----------------------------------------------------------------------------------


async def test_at_most_2048_inputs(whole):
    client = await whole.client("enterprise")
    many = await post(client, input=["x"] * 2048)
    assert rows(many).shape == (2048, 16)
    assert many.json()["usage"]["total_tokens"] == 3 * 2048
    refused = error(await post(client, input=["x"] * 2049))
    assert refused["param"] == "input"
    assert "2049" in refused["message"]
    assert error(await post(client, input=[[5]] * 2049))["param"] == "input"


async def test_a_long_list_of_ids_is_one_input_not_many(whole):
    refused = error(await post(await whole.client("enterprise"), input=[5] * 3000))
    assert refused["code"] == "context_length_exceeded"


async def test_too_long_an_input_is_named_with_its_tokens(client):
    refused = error(await post(client, input=["fine", "x" * 63]))
    assert refused["param"] == "input[1]"
    assert refused["code"] == "context_length_exceeded"
    assert "input[1] has 65 tokens" in refused["message"]
    assert "at most 64" in refused["message"]
    assert error(await post(client, input="x" * 63, truncate="NONE"))["param"] == "input[0]"
    assert error(await post(client, input=[[5] * 63]))["param"] == "input[0]"


async def test_the_api_limit_holds_where_the_model_would_take_more(start):
    whole = await start(limits=Limits(input_tokens_max=10))
    client = await whole.client()
    assert rows(await post(client, input="x" * 8)).shape == (1, 16)
    assert "at most 10" in error(await post(client, input="x" * 9))["message"]


@pytest.mark.parametrize(("side", "kept"), [("END", slice(62)), ("START", slice(-62, None))])
async def test_truncation_is_done_as_asked_and_reported(client, side, kept):
    text = "".join(chr(97 + position % 26) for position in range(100))
    answer = await post(client, input=["fine", text], truncate=side)
    vectors = rows(answer)
    assert answer.json()["truncated"] == [{"index": 1, "tokens": 102, "used": 64}]
    assert answer.headers["x-truncated-inputs"] == "1"
    assert answer.json()["usage"]["prompt_tokens"] == 6 + 64
    whole_text = await post(client, input=["fine", text[kept]], truncate=side)
    assert np.array_equal(vectors, rows(whole_text))
    assert "truncated" not in whole_text.json()
    assert "x-truncated-inputs" not in whole_text.headers


async def test_tokens_of_a_request_are_bounded(start):
    whole = await start(limits=Limits(request_tokens_max=100))
    client = await whole.client()
    assert rows(await post(client, input=["x" * 48] * 2)).shape == (2, 16)
    refused = error(await post(client, input=["x" * 48, "x" * 49]))
    assert refused["param"] == "input"
    assert refused["code"] == "max_tokens_per_request"
    assert "101" in refused["message"]


# --- bad input -------------------------------------------------------------------------------


WRONG = [
    ({"model": None}, "model"),
    ({"model": 3}, "model"),
    ({"model": ""}, "model"),
    ({"input": None}, "input"),
    ({"input": 5}, "input"),
    ({"input": True}, "input"),
    ({"input": {}}, "input"),
    ({"input": []}, "input"),
    ({"input": ""}, "input[0]"),
    ({"input": ["a", ""]}, "input[1]"),
    ({"input": ["a", 5]}, "input[1]"),
    ({"input": ["a", None]}, "input[1]"),
    ({"input": ["a", ["b"]]}, "input[1]"),
    ({"input": [None]}, "input[0]"),
    ({"input": [True]}, "input[0]"),
    ({"input": [1.5]}, "input[0]"),
    ({"input": [{}]}, "input[0]"),
    ({"input": [5, "a"]}, "input[0]"),
    ({"input": [5, True]}, "input[0]"),
    ({"input": [5, 5.0]}, "input[0]"),
    ({"input": [5, [5]]}, "input[0]"),
    ({"input": [[5], 5]}, "input[1]"),
    ({"input": [[5], []]}, "input[1]"),
    ({"input": [[5], ["a"]]}, "input[1]"),
    ({"input": [[5], [True]]}, "input[1]"),
    ({"input": [[5], [[5]]]}, "input[1]"),
    ({"input": [[5], "a"]}, "input[1]"),
    ({"input": [5, 258]}, "input[0]"),
    ({"input": [-1]}, "input[0]"),
    ({"input": [[5], [2**31]]}, "input[1]"),
    ({"input": [[5], [2**63]]}, "input[1]"),
    ({"input": [[5], [2**70]]}, "input[1]"),
    ({"encoding_format": "hex"}, "encoding_format"),
    ({"encoding_format": ["float"]}, "encoding_format"),
    ({"encoding_format": 1}, "encoding_format"),
    ({"dimensions": "8"}, "dimensions"),
    ({"dimensions": True}, "dimensions"),
    ({"dimensions": 8.0}, "dimensions"),
    ({"dimensions": 0}, "dimensions"),
    ({"dimensions": -(2**80)}, "dimensions"),
    ({"user": 5}, "user"),
    ({"truncate": "MIDDLE"}, "truncate"),
    ({"truncate": {}}, "truncate"),
    ({"output_dtype": "int4"}, "output_dtype"),
    ({"output_dtype": ["int8"]}, "output_dtype"),
    ({"output_dtype": 8}, "output_dtype"),
    ({"model": "org/nested", "dimensions": 12, "output_dtype": "binary"}, "output_dtype"),
    ({"model": "org/nested", "dimensions": 31, "output_dtype": "ubinary"}, "output_dtype"),
]


async def test_a_wrong_field_is_named(client, whole, subtests):
    for change, param in WRONG:
        with subtests.test(change=change):
            body = error(await post(client, **change))
            assert body["param"] == param
            assert body["type"] == "invalid_request_error"
            assert len(body["message"]) < 500
    assert whole.embedder.calls == []


async def test_a_missing_field_is_named(client):
    assert error(await client.post(URL, json={}))["param"] == "model"
    assert error(await client.post(URL, json={"model": "plain"}))["param"] == "input"


async def test_an_id_out_of_range_says_so(client):
    refused = error(await post(client, input=[[5], [5, 258]]))
    assert refused["code"] == "invalid_token_id"
    assert "Token 1" in refused["message"]
    assert rows(await post(client, input=[[0, 255]])).shape == (1, 16)


async def test_a_long_model_name_does_not_come_back_whole(client):
    assert len(error(await post(client, model="m" * 10_000), 404)["message"]) < 300


async def test_nulls_are_the_same_as_absent(client):
    nulls = dict.fromkeys(("encoding_format", "dimensions", "user", "truncate", "output_dtype"))
    assert np.array_equal(rows(await post(client, **nulls)), rows(await post(client)))


async def test_unknown_fields_are_accepted_by_default(client):
    answer = await post(client, task="retrieval.query", nested={"a": [1, None]})
    assert rows(answer).shape == (1, 16)


async def test_unknown_fields_are_refused_where_set(start):
    whole = await start(limits=Limits(unknown_fields="refuse"))
    client = await whole.client()
    refused = error(await post(client, task="x", **{"z" * 1000: 1}))
    assert refused["param"] == "task"
    assert len(error(await post(client, **{"z" * 1000: 1}))["message"]) < 200
    known = {"encoding_format": "float", "dimensions": 16, "user": "u", "truncate": "END"}
    assert rows(await post(client, **known)).shape == (1, 16)


NO_OBJECT = [
    b"",
    b"null",
    b"[]",
    b'"text"',
    b"{",
    b'{"model":"plain","input":"x"',
    b'{"model":"plain","input":"x"}}',
    b'{"model":"plain","input":"\xff\xfe"}',
    b"\xff\xfe{\x00}\x00",
    b'{"model":"plain","input":"x","extra":NaN}',
    b'{"model":"plain","input":"x","extra":Infinity}',
    b'{"model":"plain","input":"\\ud800"}',
    b'{"model":"plain","input":"\\udc00\\ud800"}',
    b'{"model":"plain","input":"x","extra":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    b'{"a":' * 50_000 + b"1" + b"}" * 50_000,
    b"model=plain&input=x",
    b"\x00" * 100,
]


async def test_what_is_no_json_object(client, subtests):
    for raw in NO_OBJECT:
        with subtests.test(raw=raw[:60]):
            headers = {"content-type": "application/json"}
            body = error(await client.post(URL, content=raw, headers=headers))
            assert body["code"] == "invalid_json"
            assert len(body["message"]) < 300


async def test_the_content_type_does_not_matter(client):
    raw = b'{"model":"plain","input":"x"}'
    for kind in ("text/plain", "application/x-www-form-urlencoded", "application/json; charset=x"):
        answer = await client.post(URL, content=raw, headers={"content-type": kind})
        assert rows(answer).shape == (1, 16)


async def test_a_compressed_body_is_refused_as_such(client):
    answer = await client.post(URL, content=b"\x1f\x8b", headers={"content-encoding": "gzip"})
    assert error(answer)["code"] == "unsupported_encoding"


async def test_odd_texts_are_texts(client):
    texts = ["\x00", "\u202e", "\ufffe", "\U0001f600", "  ", "'; DROP", "\r\n"]
    assert rows(await post(client, input=texts)).shape == (7, 16)


# --- the size of a body ----------------------------------------------------------------------


TEN_MB = b'{"model":"plain","input":"' + b"x" * 10_000_000 + b'"}'


async def test_ten_megabytes_are_refused_by_their_length(client):
    assert error(await client.post(URL, content=TEN_MB), 413)["param"] == "body"


async def test_ten_megabytes_without_a_length_are_not_read_to_their_end(client):
    read = 0

    async def chunks():
        nonlocal read
        for start in range(0, len(TEN_MB), 65_536):
            read += 65_536
            yield TEN_MB[start : start + 65_536]

    answer = await client.post(URL, content=chunks())
    assert error(answer, 413)["code"] == "request_too_large"
    assert read < 8 * 2**20 + 2 * 65_536


async def test_a_nonsense_length_is_not_believed(client):
    raw = b'{"model":"plain","input":"x"}'
    for length in ("\xb2", "9" * 5000, "-1", "1e9", ""):
        headers = {"content-length": length.encode("latin-1")}
        assert rows(await client.post(URL, content=raw, headers=headers)).shape == (1, 16)


# --- order and headers -----------------------------------------------------------------------


async def test_vectors_come_back_in_order_whatever_the_batches(start):
    batch = Batch(tokens_min=32, tokens_max=64, items_max=3, item_overhead_tokens=0)
    models = (await start()).service.context.settings.pools[0].models
    whole = await start(pools=(Pool(models=models, batch=batch),))
    client = await whole.client("enterprise")
    texts = [f"{n}" * (1 + n * 7 % 20) for n in range(40)]
    alone = [rows(await post(client, input=text))[0] for text in texts]
    assert np.array_equal(rows(await post(client, input=texts)), np.array(alone))
    assert [row["index"] for row in (await post(client, input=texts)).json()["data"]] == [
        *range(40)
    ]


async def test_a_request_above_a_slice_travels_in_parts(start):
    ingress = (await start()).service.context.settings.ingress
    whole = await start(ingress=ingress.model_copy(update={"slice_tokens": 256}))
    client = await whole.client("enterprise")
    texts = [f"text number {n}" for n in range(50)]
    together = rows(await post(client, input=texts))
    assert len(whole.embedder.calls) > 2
    assert all(sum(call.tokens) <= 256 for call in whole.embedder.calls)
    assert np.array_equal(together[-1:], rows(await post(client, input=texts[-1])))
    assert error(await post(client, input=[*texts, "poison"]), 422)["param"] == "input[50]"
    whole.embedder.fault = Overloaded("Full.", retry_after_s=2)
    assert error(await post(client, input=texts), 503)["code"] == "overloaded"


async def test_the_callers_request_id_is_kept(client):
    for given in ("abc-1.2_3", "x" * 128):
        answer = await client.post(URL, json={}, headers={"x-request-id": given})
        assert answer.headers["x-request-id"] == given


async def test_a_malformed_request_id_is_replaced(client):
    for given in ("", "a b", "x" * 129, "a\u00e9", 'a"b', "<script>"):
        answer = await client.post(URL, json={}, headers={"x-request-id": given.encode("latin-1")})
        assert re.fullmatch(r"req_[0-9a-f]{32}", answer.headers["x-request-id"])


async def test_rates_stand_on_every_reply_to_a_known_key(whole, client):
    answers = [await post(client), await post(client, input=""), await client.get("/v1/models")]
    for answer in answers:
        assert answer.headers["x-ratelimit-limit-requests"] == "1000"
        assert answer.headers["x-ratelimit-remaining-requests"] == "999"
        assert answer.headers["x-ratelimit-reset-requests"] == "10ms"
        assert answer.headers["x-ratelimit-limit-tokens"] == "10000"
        assert answer.headers["x-ratelimit-remaining-tokens"] == "9993"
        assert answer.headers["x-ratelimit-reset-tokens"] == "7ms"
        assert answer.headers["openai-processing-ms"] == "0"
    stranger = await (await whole.client(None)).post(URL, json={})
    assert error(stranger, 401)["code"] == "invalid_api_key"
    assert not [name for name in stranger.headers if name.startswith("x-ratelimit")]


async def test_no_usable_key(whole):
    client = await whole.client(None)
    for header in ("", "Bearer", "Basic YTpi", "Bearer hr_x_y", "Bearer \xff", "x" * 10_000):
        answer = await client.post(URL, headers={"authorization": header.encode("latin-1")})
        assert error(answer, 401)["param"] is None
        assert answer.headers["www-authenticate"] == "Bearer"


# --- quotas ----------------------------------------------------------------------------------


def remaining(response, word):
    return int(response.headers[f"x-ratelimit-remaining-{word}"])


async def test_tokens_count_on_this_route(whole, clock):
    client = await whole.client("free")
    answer = await post(client, input=["x" * 28] * 2)
    assert (remaining(answer, "tokens"), remaining(answer, "requests")) == (40, 9)
    refused = await post(client, input="x" * 40)
    assert error(refused, 429)["type"] == "tenant_tokens_per_minute"
    assert (remaining(refused, "tokens"), remaining(refused, "requests")) == (40, 9)
    wait_s = int(refused.headers["retry-after-ms"]) / 1e3
    clock.advance(wait_s - 0.01)
    assert (await post(client, input="x" * 40)).status_code == 429
    clock.advance(0.01)
    assert (await post(client, input="x" * 40)).status_code == 200


async def test_requests_count_as_well(whole, clock):
    client = await whole.client("free")
    for _ in range(10):
        assert (await post(client, input="x")).status_code == 200
    refused = await post(client, input="x")
    assert error(refused, 429)["type"] == "tenant_requests_per_minute"
    assert (refused.headers["retry-after"], refused.headers["retry-after-ms"]) == ("1", "1000")
    clock.advance(1)
    assert (await post(client, input="x")).status_code == 200


async def test_exactly_one_of_many_gets_the_last_tokens(whole):
    client = await whole.client("free")
    answers = await asyncio.gather(*(post(client, input="x" * 60) for _ in range(8)))
    assert sorted(answer.status_code for answer in answers) == [200] + [429] * 7


async def test_what_a_tier_can_never_grant_is_no_429(whole):
    client = await whole.client("free")
    assert error(await post(client, input=["x" * 60] * 2))["code"] == "tokens_exceed_quota"


async def test_tenants_do_not_share_a_quota(whole):
    await post(await whole.client("premium"), input="x" * 40)
    answer = await post(await whole.client("other"), input="x")
    assert remaining(answer, "tokens") == 10_000 - 3


async def test_our_faults_are_refunded(whole, client):
    for fault, status in (
        (Overloaded("Full."), 503),
        (ModelUnavailable("Gone."), 503),
        (RuntimeError("secret detail"), 500),
    ):
        whole.embedder.fault = fault
        answer = await post(client)
        error(answer, status)
        assert (remaining(answer, "tokens"), remaining(answer, "requests")) == (10_000, 1000)


async def test_an_input_that_failed_by_our_fault_is_refunded(whole, client):
    async def broken(call):
        failures = ((0, ModelUnavailable("Gone.", retry_after_s=1)),)
        return EmbedReply(np.zeros((1, 16), np.float32), failures)

    whole.embedder.embed = broken
    answer = await post(client)
    assert error(answer, 503)["param"] == "input[0]"
    assert answer.headers["retry-after"] == "1"
    assert remaining(answer, "tokens") == 10_000


async def test_a_callers_own_mistake_is_charged_once_the_model_has_run(client):
    answer = await post(client, input="poison")
    error(answer, 422)
    assert remaining(answer, "requests") == 999
    refused_early = await post(client, input="")
    assert remaining(refused_early, "requests") == 999


# --- one bad input, one who leaves -----------------------------------------------------------


async def until(condition):
    while not condition():  # noqa: ASYNC110  a queue has no event
        await asyncio.sleep(0)


@pytest.mark.parametrize(
    ("text", "code"), [("poison", "input_failed"), ("not finite", "vector_not_finite")]
)
async def test_one_bad_input_is_named_and_others_are_served(start, text, code):
    whole = await start(serving=False)
    mine, theirs = await whole.client("premium"), await whole.client("other")
    waiting = [
        asyncio.ensure_future(post(mine, input=["fine", text])),
        asyncio.ensure_future(post(theirs, input=["fine", "good"])),
    ]
    await until(lambda: len(whole.embedder.calls) == 2)
    serving = asyncio.create_task(whole.embedder.batcher.run())  # one batch holds all four
    bad, good = await asyncio.gather(*waiting)
    serving.cancel()
    refused = error(bad, 422)
    assert (refused["param"], refused["code"]) == ("input[1]", code)
    assert rows(good).shape == (2, 16)
    assert np.all(np.isfinite(rows(good)))


async def test_the_work_of_one_who_leaves_is_dropped_and_refunded(start):
    whole = await start(serving=False)
    client = await whole.client()
    request = asyncio.ensure_future(post(client, input=["x"] * 20))
    await until(lambda: whole.embedder.batcher.queued_items > 0)
    request.cancel()
    await asyncio.wait([request])
    assert request.cancelled()
    assert whole.embedder.batcher.queued_items == 0
    assert whole.embedder.batcher.queued_tokens == 0
    assert remaining(await client.get("/v1/models"), "tokens") == 10_000


async def test_one_who_leaves_while_sending_is_no_fault(whole, caplog):
    sent = []

    async def receive():
        return {"type": "http.disconnect"}

    async def send(message):
        sent.append(message)

    headers = [(b"authorization", f"Bearer {whole.keys['premium']}".encode())]
    scope = {
        "type": "http",
        "method": "POST",
        "path": URL,
        "headers": headers,
        "query_string": b"",
    }
    await whole.app(scope, receive, send)
    assert sent == []
    assert [record for record in caplog.records if record.levelname == "ERROR"] == []
