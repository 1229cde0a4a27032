import asyncio
import base64
import json

import httpx
import numpy as np
import pytest

from bench.plain.__main__ import TOKENS_MAX, Plain, load
from bench.servers import FAKE
from serve.config import Model, Pool


MODEL = Model(**FAKE)


class Server:
    """The application over ASGI, and the sizes of the batches that its model was given."""

    def __init__(self) -> None:
        forward = load(MODEL, Pool(models=(MODEL,)))
        self.batches: list[list[int]] = []

        def noted(batch):
            self.batches.append([len(one.ids) for one in batch])
            return forward(batch)

        self.app = Plain(MODEL, noted)
        transport = httpx.ASGITransport(self.app)
        self.client = httpx.AsyncClient(transport=transport, base_url="http://plain")

    async def ask(self, texts, encoding="base64"):
        body = {"model": MODEL.id, "input": texts, "encoding_format": encoding}
        answer = await self.client.post("/v1/embeddings", json=body)
        assert answer.status_code == 200
        return answer.json()


@pytest.fixture
async def server():
    made = Server()
    task = asyncio.create_task(made.app.run())
    async with made.client:
        yield made
    task.cancel()


async def test_vectors_come_back_in_order_in_both_encodings(server):
    texts = ["short", "a much longer text than that", "middle text"]
    packed, listed = await server.ask(texts), await server.ask(texts, "float")
    rows = [np.frombuffer(base64.b64decode(row["embedding"]), "<f4") for row in packed["data"]]
    for row, text, same in zip(rows, texts, listed["data"], strict=True):
        alone = (await server.ask(text))["data"][0]["embedding"]
        assert np.array_equal(row, np.frombuffer(base64.b64decode(alone), "<f4"))
        assert np.array_equal(row, np.array(same["embedding"], np.float32))
    assert [row["index"] for row in packed["data"]] == [0, 1, 2]
    assert packed["usage"]["total_tokens"] == sum(len(text) + 2 for text in texts)


async def test_what_waits_together_is_batched_by_length_within_the_budget(server):
    texts = ["x" * size for size in (700, 10, 690, 300, 12, 290)]
    await asyncio.gather(*(server.ask(text) for text in texts))
    assert server.batches == [[702], [692], [302, 292, 14], [12]]
    assert all(max(batch) * len(batch) <= TOKENS_MAX for batch in server.batches)


@pytest.mark.parametrize("body", [b"[", b"[]", b"{}", json.dumps({"input": [1]}).encode()])
async def test_what_is_no_request_is_refused(server, body):
    assert (await server.client.post("/v1/embeddings", content=body)).status_code == 400


async def test_it_is_ready_and_has_nothing_else(server):
    assert (await server.client.get("/health/ready")).status_code == 200
    assert (await server.client.get("/v1/models")).status_code == 404
    assert (await server.ask([]))["data"] == []
