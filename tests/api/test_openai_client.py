"""OpenAI's own client as the judge of `/v1/embeddings` and `/v1/models`."""

import asyncio
import base64

import anyio
import numpy as np
import openai
import pytest

from serve.allowance import Tier
from serve.config import Admission, Limits
from serve.errors import (
    DeadlineExceeded,
    Internal,
    ModelUnavailable,
    Overloaded,
)


TIERS = ("free", "premium", "enterprise")
TEXTS = ["the tide", "a turbine", "headrace"]


@pytest.fixture
async def ai(whole):
    return await whole.openai()


async def vectors(ai, **request):
    reply = await ai.embeddings.create(**{"model": "plain", "input": TEXTS, **request})
    assert [row.index for row in reply.data] == list(range(len(reply.data)))
    assert all(row.object == "embedding" for row in reply.data)
    return np.array([row.embedding for row in reply.data], np.float32)


# --- inputs ----------------------------------------------------------------------------------


async def test_a_string_and_a_list_give_the_same_vectors(ai):
    together = await vectors(ai)
    assert together.shape == (3, 16)
    for text, row in zip(TEXTS, together, strict=True):
        alone = await vectors(ai, input=text)
        assert np.array_equal(alone, row[None])


async def test_token_ids_mean_the_same_as_their_text(ai, whole):
    tokenizer = whole.service.context.models.find("plain").tokenizer
    ids = [row.tolist() for row in tokenizer.encode(TEXTS)]
    bare = [row[1:-1] for row in ids]  # as a caller makes them without special tokens
    texts = await vectors(ai)
    assert np.array_equal(await vectors(ai, input=ids), texts)
    assert np.array_equal(await vectors(ai, input=bare), texts)
    assert np.array_equal(await vectors(ai, input=bare[1]), texts[1:2])


async def test_usage_counts_the_tokens_the_model_saw(ai):
    reply = await ai.embeddings.create(model="plain", input=["ab", "c"], user="someone")
    assert (reply.usage.prompt_tokens, reply.usage.total_tokens) == (2 + 2 + 1 + 2, 7)
    assert (reply.object, reply.model) == ("list", "plain")


# --- encodings and dimensions ----------------------------------------------------------------


async def test_base64_and_float_are_equal_bit_by_bit(ai):
    default = await vectors(ai)  # the client asks for base64 by itself
    assert np.array_equal(await vectors(ai, encoding_format="float"), default)
    raw = await ai.embeddings.with_raw_response.create(
        model="plain", input=TEXTS, encoding_format="base64"
    )
    texts = [row["embedding"] for row in raw.http_response.json()["data"]]
    decoded = [np.frombuffer(base64.b64decode(text), "<f4") for text in texts]
    assert np.array_equal(np.array(decoded), default)
    assert np.allclose(np.linalg.norm(default, axis=1), 1, atol=1e-6)


async def test_a_null_encoding_is_the_same_as_none(ai):
    null = await vectors(ai, extra_body={"encoding_format": None})
    assert np.array_equal(null, await vectors(ai))


async def test_dimensions_cuts_and_renormalises(ai):
    full = await vectors(ai, model="org/nested")
    cut = await vectors(ai, model="org/nested", dimensions=8)
    assert full.shape == (3, 32)
    assert cut.shape == (3, 8)
    assert np.allclose(np.linalg.norm(cut, axis=1), 1, atol=1e-6)
    norms = np.linalg.norm(full[:, :8], axis=1, keepdims=True)
    assert np.all(norms < 1)
    assert np.allclose(cut, full[:, :8] / norms, atol=1e-6)
    assert np.array_equal(await vectors(ai, model="org/nested", dimensions=32), full)
    as_floats = await vectors(ai, model="org/nested", dimensions=8, encoding_format="float")
    assert np.array_equal(as_floats, cut)


async def test_dimensions_that_the_model_does_not_have(ai):
    for model, dimensions, code in (
        ("plain", 8, "dimensions_not_supported"),
        ("plain", 17, "dimensions_not_supported"),
        ("org/nested", 33, "invalid_request"),
        ("org/nested", 0, "invalid_request"),
    ):
        with pytest.raises(openai.BadRequestError) as caught:
            await vectors(ai, model=model, dimensions=dimensions)
        assert (caught.value.param, caught.value.code) == ("dimensions", code)


# --- smaller outputs --------------------------------------------------------------------------


async def smaller(ai, dtype, **request):
    """As numbers, and as the bytes that they stand for."""
    ask = {"model": "org/nested", "extra_body": {"output_dtype": dtype}, **request}
    numbers = await ai.embeddings.create(**{"input": TEXTS, **ask}, encoding_format="float")
    texts = await ai.embeddings.create(**{"input": TEXTS, **ask}, encoding_format="base64")
    raw = [base64.b64decode(row.embedding) for row in texts.data]
    return [row.embedding for row in numbers.data], raw


async def test_bytes_come_as_integers_or_as_themselves(ai):
    full = await vectors(ai, model="org/nested")
    expected = np.clip(np.rint(full * 127 * np.sqrt(32) / 5), -127, 127).astype(int)
    assert np.abs(expected).max() > 60
    numbers, raw = await smaller(ai, "int8")
    assert numbers == expected.tolist()
    assert [np.frombuffer(row, np.int8).tolist() for row in raw] == numbers
    numbers, raw = await smaller(ai, "uint8")
    assert numbers == (expected + 128).tolist()
    assert [list(row) for row in raw] == numbers


async def test_bits_are_packed(ai):
    full = await vectors(ai, model="org/nested")
    numbers, raw = await smaller(ai, "ubinary")
    assert np.array_equal(np.unpackbits(np.array(numbers, np.uint8), axis=1), full > 0)
    assert [list(row) for row in raw] == numbers
    signed, raw = await smaller(ai, "binary")
    assert np.array_equal(np.array(signed) + 128, numbers)
    assert [np.frombuffer(row, np.int8).tolist() for row in raw] == signed


async def test_vectors_are_cut_before_they_are_made_smaller(ai):
    cut = await vectors(ai, model="org/nested", dimensions=28)
    numbers, _ = await smaller(ai, "int8", dimensions=28)
    assert numbers == np.clip(np.rint(cut * 127 * np.sqrt(28) / 5), -127, 127).tolist()
    bits, _ = await smaller(ai, "ubinary", dimensions=16)
    assert [len(row) for row in bits] == [2, 2, 2]


async def test_a_smaller_vector_does_not_depend_on_its_neighbours(ai):
    for dtype in ("int8", "uint8", "binary", "ubinary"):
        together, _ = await smaller(ai, dtype)
        alone = [(await smaller(ai, dtype, input=text))[0][0] for text in TEXTS]
        assert together == alone


async def test_float_is_the_same_as_no_dtype(ai):
    plain = await vectors(ai)
    for dtype in ("float", None):
        assert np.array_equal(await vectors(ai, extra_body={"output_dtype": dtype}), plain)


async def test_bits_need_whole_bytes(ai):
    with pytest.raises(openai.BadRequestError) as caught:
        await smaller(ai, "binary", dimensions=12)
    assert (caught.value.param, caught.value.code) == ("output_dtype", "invalid_request")


# --- models ----------------------------------------------------------------------------------


async def test_models_are_listed_and_found(ai):
    listed = [model async for model in ai.models.list()]
    assert [model.id for model in listed] == ["plain", "org/nested"]
    assert all(model.object == "model" for model in listed)
    one = await ai.models.retrieve("plain")
    assert (one.id, one.created, one.owned_by) == ("plain", 7, "headrace")
    assert (await ai.models.retrieve("org/nested")).id == "org/nested"


# --- errors ----------------------------------------------------------------------------------


def shown(error):
    return (error.type, error.param, error.code)


async def test_bad_request(ai):
    with pytest.raises(openai.BadRequestError) as caught:
        await vectors(ai, input=["fine", ""])
    assert shown(caught.value) == ("invalid_request_error", "input[1]", "invalid_request")
    assert "input[1]" in caught.value.body["message"]
    assert caught.value.request_id == caught.value.response.headers["x-request-id"]


async def test_unknown_key(whole):
    for key in ("sk-not-ours", f"hr_{'0' * 16}_{'x' * 43}", whole.keys["free"][:-1] + "!"):
        with pytest.raises(openai.AuthenticationError) as caught:
            await vectors(await whole.openai(key))
        assert shown(caught.value) == ("invalid_request_error", None, "invalid_api_key")
        assert caught.value.response.headers["www-authenticate"] == "Bearer"


async def test_key_of_an_unknown_tier(whole, key_of):
    key, text = key_of("ghost", "platinum")
    await whole.store.create_key("op", key)
    with pytest.raises(openai.PermissionDeniedError) as caught:
        await vectors(await whole.openai(text))
    assert shown(caught.value) == ("invalid_request_error", None, "forbidden")


async def test_unknown_model(ai):
    for call in (vectors(ai, model="gpt-none"), ai.models.retrieve("gpt-none")):
        with pytest.raises(openai.NotFoundError) as caught:
            await call
        assert shown(caught.value) == ("invalid_request_error", "model", "model_not_found")


async def test_too_large_a_body(start):
    whole = await start(limits=Limits(body_bytes_max=1024))
    with pytest.raises(openai.APIStatusError) as caught:
        await vectors(await whole.openai(), input="x" * 2000)
    assert caught.value.status_code == 413
    assert shown(caught.value) == ("invalid_request_error", "body", "request_too_large")


async def test_an_input_on_which_the_model_fails(ai):
    with pytest.raises(openai.UnprocessableEntityError) as caught:
        await vectors(ai, input=["fine", "poison"])
    assert shown(caught.value) == ("invalid_request_error", "input[1]", "input_failed")


async def test_our_faults(ai, whole):
    for kind, status in (
        (Overloaded, 503),
        (ModelUnavailable, 503),
        (DeadlineExceeded, 504),
        (Internal, 500),
    ):
        whole.embedder.fault = kind("Sorry.", retry_after_s=2)
        with pytest.raises(openai.InternalServerError) as caught:
            await vectors(ai)
        assert caught.value.status_code == status
        assert shown(caught.value) == ("server_error", None, kind.code)
        assert caught.value.response.headers["retry-after-ms"] == "2000"


async def test_rate_limit(whole):
    ai = await whole.openai("free")
    await vectors(ai, input="x" * 60)
    with pytest.raises(openai.RateLimitError) as caught:
        await vectors(ai, input="x" * 60)
    assert shown(caught.value) == ("tenant_tokens_per_minute", None, "rate_limit_exceeded")
    headers = caught.value.response.headers
    assert headers["retry-after-ms"] in ("2400", "2401")  # 124 of 100 tokens, ten a second
    assert headers["retry-after"] == "3"
    assert headers["x-ratelimit-limit-tokens"] == "100"
    assert headers["x-ratelimit-remaining-tokens"] == "38"
    assert headers["x-ratelimit-reset-tokens"] == "7s"


# --- retries ---------------------------------------------------------------------------------


@pytest.fixture
def slept(monkeypatch, clock):
    """What the client slept; the time passes on the service's clock only."""
    naps = []

    async def sleep(seconds):
        naps.append(seconds)
        clock.advance(seconds)

    monkeypatch.setattr(anyio, "sleep", sleep)
    return naps


async def test_a_429_is_repeated_after_just_the_time_it_names(whole, slept):
    ai = await whole.openai("free", max_retries=1)
    await vectors(ai, input="x" * 60)
    assert (await vectors(ai, input="x" * 60)).shape == (1, 16)
    assert slept == [pytest.approx(2.4, abs=0.001)]


async def test_a_503_is_repeated(whole, slept):
    whole.embedder.fault = Overloaded("Full.", retry_after_s=0.5)
    ai = await whole.openai(max_retries=2)

    async def recover():
        if len(slept) == 2:
            whole.embedder.fault = None

    whole.embedder.before = recover
    assert (await vectors(ai)).shape == (3, 16)
    assert slept == [0.5, 0.5]


async def test_an_exhausted_month_is_not_repeated(start, slept):
    spent = Tier(weight=1, tokens_per_month=8)
    whole = await start(admission=Admission(tiers=dict.fromkeys(TIERS, spent)))
    ai = await whole.openai("free", max_retries=2)
    await vectors(ai, input="x" * 6)
    with pytest.raises(openai.RateLimitError) as caught:
        await vectors(ai, input="x")
    assert shown(caught.value) == ("tenant_tokens_per_month", None, "insufficient_quota")
    assert caught.value.response.headers["x-should-retry"] == "false"
    assert "retry-after" not in caught.value.response.headers
    assert (slept, len(whole.embedder.calls)) == ([], 1)


async def test_a_full_level_is_asked_again_a_second_later(start, monkeypatch):
    narrow = Tier(weight=1, interactive={"concurrent_max": 1})
    whole = await start(admission=Admission(tiers=dict.fromkeys(TIERS, narrow)))
    ai = await whole.openai("free", max_retries=1)
    hold = asyncio.Event()
    whole.embedder.before = hold.wait
    first = asyncio.ensure_future(vectors(ai))
    while not whole.embedder.calls:  # noqa: ASYNC110  a call has no event
        await asyncio.sleep(0)

    async def nap(seconds):
        assert seconds == 1
        hold.set()
        await first

    monkeypatch.setattr(anyio, "sleep", nap)
    assert (await vectors(ai)).shape == (3, 16)
    assert hold.is_set()


async def test_the_longest_wait_is_one_that_the_client_honours(whole, slept):
    whole.embedder.fault = Overloaded("Full.", retry_after_s=3600)
    with pytest.raises(openai.InternalServerError):
        await vectors(await whole.openai(max_retries=1))
    assert slept == [120]
