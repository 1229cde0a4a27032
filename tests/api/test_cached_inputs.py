"""What need not be computed again, as callers see it: headers, quotas, tenants, batches."""

import asyncio

import numpy as np
import pytest

from serve.config import Cache
from tests.api.lines import counts, ended, line, lines_of, submit


URL = "/v1/embeddings"


@pytest.fixture
async def whole(start):
    """As `conftest.whole`, with the cache as it is deployed."""
    return await start(cache=Cache())


async def post(client, *texts, **body):
    answer = await client.post(URL, json={"model": "plain", "input": [*texts], **body})
    assert answer.status_code == 200, answer.text
    return answer


def rows(answer):
    return np.array([row["embedding"] for row in answer.json()["data"]], np.float32)


def asked(whole):
    """Inputs that the embedder was asked for, by call."""
    return [len(call.inputs) for call in whole.embedder.calls]


async def test_a_reply_says_how_many_inputs_were_at_hand(client, whole):
    first = await post(client, "the tide", "a wheel")
    assert "x-cached-inputs" not in first.headers
    again = await post(client, "a wheel", "a race", "the tide", "a wheel")
    assert again.headers["x-cached-inputs"] == "3"
    assert np.array_equal(rows(again)[[2, 0]], rows(first))
    assert np.array_equal(rows(again)[3], rows(first)[1])
    assert asked(whole) == [2, 1]
    assert (await post(client, "the tide")).headers["x-inference-time"] == "0.0"


async def test_texts_ids_and_what_was_cut_share_what_is_kept(client, whole):
    tokenizer = whole.service.context.models.find("plain").tokenizer
    await post(client, "the tide", "x" * 62)
    by_ids = await post(client, tokenizer.encode(["the tide"])[0].tolist())
    by_cut = await post(client, "x" * 100, truncate="END")
    assert [one.headers["x-cached-inputs"] for one in (by_ids, by_cut)] == ["1", "1"]
    assert by_cut.headers["x-truncated-inputs"] == "1"


async def test_dimensions_and_dtypes_share_one_vector(client, whole):
    nested = {"model": "org/nested"}
    await post(client, "the tide", **nested)
    for body in ({"dimensions": 8}, {"output_dtype": "int8"}, {"encoding_format": "base64"}):
        assert (await post(client, "the tide", **nested, **body)).headers["x-cached-inputs"] == "1"
    assert asked(whole) == [1]
    await post(client, "the tide")  # another model
    assert asked(whole) == [1, 1]


async def test_limits_count_what_was_asked_for(client):
    left = []
    for _ in range(2):
        answer = await post(client, "four", "four")
        left.append(int(answer.headers["x-ratelimit-remaining-tokens"]))
        assert answer.json()["usage"]["total_tokens"] == 12
    assert left == [10_000 - 12, 10_000 - 24]


async def test_another_tenant_cannot_tell_what_was_embedded(whole):
    mine, theirs = await whole.client("premium"), await whole.client("other")
    await post(mine, "a secret")
    answer = await post(theirs, "a secret")
    assert "x-cached-inputs" not in answer.headers
    assert asked(whole) == [1, 1]


async def test_the_operator_may_let_tenants_share(start):
    whole = await start(cache=Cache(scope="shared"))
    mine, theirs = await whole.client("premium"), await whole.client("other")
    first = await post(mine, "no secret")
    answer = await post(theirs, "no secret")
    assert answer.headers["x-cached-inputs"] == "1"
    assert np.array_equal(rows(first), rows(answer))


@pytest.mark.parametrize("cache", [Cache(scope="none"), Cache(bytes_max=0)])
async def test_the_operator_may_keep_nothing(start, cache):
    whole = await start(cache=cache)
    client = await whole.client()
    for _ in range(2):
        assert "x-cached-inputs" not in (await post(client, "the tide")).headers
    assert asked(whole) == [1, 1]


async def test_a_search_for_the_same_text_finds_its_vector_at_hand(client, whole):
    await client.post("/v1/collections", json={"name": "books", "model": "plain"})
    for _ in range(2):
        answer = await client.post("/v1/collections/books/search", json={"text": "the tide"})
        assert answer.status_code == 200
    assert asked(whole) == [1]


async def test_one_who_leaves_does_not_take_the_vector_from_another(start):
    whole = await start(serving=False, cache=Cache())
    client = await whole.client()
    waiting = [asyncio.ensure_future(post(client, "the tide")) for _ in range(2)]
    while whole.service.embed.reuse.tally.misses < 2:  # noqa: ASYNC110  a request has no event
        await asyncio.sleep(0)
    assert asked(whole) == [1]
    waiting[0].cancel()
    serving = asyncio.create_task(whole.embedder.batcher.run())
    assert rows(await waiting[1]).shape == (1, 16)
    serving.cancel()
    assert asked(whole) == [1, 1]


async def test_equal_lines_of_a_batch_are_computed_once(whole):
    ai = await whole.openai()
    lines = [line(name, "the tide", body={"output_dtype": "int8"}) for name in "abc"]
    done = await ended(whole, ai, await submit(ai, *lines))
    assert counts(done) == (3, 3, 0)
    found = await lines_of(ai, done.output_file_id)
    numbers = [found[name]["response"]["body"]["data"][0]["embedding"] for name in "abc"]
    assert all(type(one) is int for one in numbers[0])
    assert numbers[0] == numbers[1] == numbers[2]
    assert sum(asked(whole)) == 1
    usages = [found[name]["response"]["body"]["usage"]["total_tokens"] for name in "abc"]
    assert usages == [10, 10, 10]
