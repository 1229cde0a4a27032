"""The plainest server of the same model: uvicorn and ONNX Runtime in one process, without Ray.

    python -m bench.plain --config config.yaml --port 8001

What somebody would write who needs vectors over HTTP and nothing else, and what everything that the
service does on top is judged against: no keys, limits, fairness, deadlines, index or validation
beyond types. It runs the service's own graph with ONNX Runtime as that comes, and takes its batches
as the service does: when the model is free, everything that waits, sorted by length; each padded to
its longest, as such servers do.
"""

import argparse
import asyncio
import base64
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import orjson
import uvicorn
import uvloop

from deployments.places import DeployFile
from serve.config import Model, Pool
from serve.embedding.fake import FakeEngine
from serve.embedding.graph_engine import IDS, MASK, MEMBERS, PLACES, POSITIONS, VECTORS
from serve.embedding.graphs import Graphs
from serve.embedding.packing import pack
from serve.embedding.rows import Rows
from serve.embedding.tokenizer import Tokenizer
from serve.errors import BadInput
from serve.records import Input, TokenIds, Vector


Forward = Callable[[Sequence[Input]], Vector]

TOKENS_MAX = 1024
"""Padded tokens of a batch: the optimum of throughput on two cores."""
WARM_UP = ((1, 3), (1, 128), (4, 256))
"""Inputs, and tokens of each, that are embedded before it is ready."""


@dataclass(slots=True)
class Request:
    """One request's texts as ids, and the vectors that came so far."""

    rows: Sequence[TokenIds]
    vectors: Vector
    left: int
    done: asyncio.Future[Vector]


class Plain:
    """An ASGI application over one model, and the batcher in front of it."""

    def __init__(self, model: Model, forward: Forward) -> None:
        self._model = model
        self._forward = forward
        self._tokenizer = Tokenizer.open(model)
        self._thread = ThreadPoolExecutor(1, "model")
        self._waiting: list[Request] = []
        self._arrived = asyncio.Event()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Answer one request."""
        if scope["path"] != "/v1/embeddings":
            await _answer(send, 200 if scope["path"] == "/health/ready" else 404, b"{}")
            return
        try:
            asked = orjson.loads(await _body(receive))
            rows = self._tokenizer.encode(_texts(asked["input"]))
            rows = [self._tokenizer.truncate(row, self._model.tokens_max) for row in rows]
        except (ValueError, KeyError, TypeError, BadInput):
            await _answer(send, 400, b"{}")
            return
        vectors = await self._embed(rows)
        tokens = sum(map(len, rows))
        await _answer(send, 200, self._reply(vectors, asked.get("encoding_format"), tokens))

    async def _embed(self, rows: Sequence[TokenIds]) -> Vector:
        vectors = np.zeros((len(rows), self._model.dimensions), np.float32)
        request = Request(rows, vectors, len(rows), asyncio.get_running_loop().create_future())
        if not rows:
            return vectors
        self._waiting.append(request)
        self._arrived.set()
        return await request.done

    async def run(self) -> None:
        """Embed what waits, for ever. What the model raises ends the server."""
        while True:
            await self._arrived.wait()
            await asyncio.sleep(0)  # arrivals of the same turn of the loop join
            self._arrived.clear()
            taken, self._waiting = self._waiting, []
            texts = [(request, at) for request in taken for at in range(len(request.rows))]
            lengths = [len(request.rows[at]) for request, at in texts]
            for batch in pack(lengths, tokens_max=TOKENS_MAX, items_max=TOKENS_MAX):
                await self._serve([texts[index] for index in batch])

    async def _serve(self, batch: Sequence[tuple[Request, int]]) -> None:
        inputs = [Input(ids=request.rows[at]) for request, at in batch]
        loop = asyncio.get_running_loop()
        vectors = await loop.run_in_executor(self._thread, self._forward, inputs)
        for (request, at), vector in zip(batch, vectors, strict=True):
            request.vectors[at] = vector
            request.left -= 1
            if not request.left and not request.done.done():
                request.done.set_result(request.vectors)

    def _reply(self, vectors: Vector, encoding: str | None, tokens: int) -> bytes:
        rows: list[Any] = list(vectors)
        if encoding == "base64":
            rows = [base64.b64encode(row.tobytes()).decode() for row in vectors]
        data = [
            {"object": "embedding", "index": index, "embedding": row}
            for index, row in enumerate(rows)
        ]
        usage = {"prompt_tokens": tokens, "total_tokens": tokens}
        whole = {"object": "list", "data": data, "model": self._model.id, "usage": usage}
        return orjson.dumps(whole, option=orjson.OPT_SERIALIZE_NUMPY)


def _texts(value: Any) -> list[str]:
    """One text or a list of them. Raises TypeError for anything else."""
    texts = [value] if isinstance(value, str) else list(value)
    if not all(isinstance(text, str) for text in texts):
        raise TypeError("not a text")
    return texts


async def _body(receive: Any) -> bytes:
    parts, more = [], True
    while more:
        message = await receive()
        parts.append(message.get("body", b""))
        more = message.get("more_body", False)
    return b"".join(parts)


async def _answer(send: Any, status: int, body: bytes) -> None:
    length = str(len(body)).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", length)]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def load(model: Model, pool: Pool) -> Forward:
    """The model, warm. Raises ModelUnavailable when there is no graph and none can be made."""
    forward = FakeEngine(model).forward if model.engine == "fake" else _graph(model, pool)
    for inputs, tokens in WARM_UP:
        forward([Input(ids=np.ones(tokens, np.int32))] * inputs)
    return forward


def _graph(model: Model, pool: Pool) -> Forward:
    threads = max(1, int(pool.cpus))
    graph = Graphs(Path(pool.graphs)).take(model, threads=threads)
    rows = Rows(model, vocab_size=graph.vocab_size, pad_id=graph.pad_id, pad_left=graph.pad_left)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(graph.path, options, providers=["CPUExecutionProvider"])

    def forward(batch: Sequence[Input]) -> Vector:
        ids, mask = rows.padded(batch)
        feed = {IDS: ids, MASK: mask}
        if graph.row_tokens:  # it reads rows that inputs share; here each has its own
            feed[POSITIONS] = np.broadcast_to(np.arange(ids.shape[1]), ids.shape).copy()
            feed[MEMBERS], feed[PLACES] = mask - 1, np.arange(ids.size).reshape(ids.shape)
        vectors: Vector
        [vectors] = session.run([VECTORS], feed)
        return vectors

    return forward


async def serve(config: Path, port: int) -> None:
    """Load the first model of a deploy file and serve it on 127.0.0.1 until told to end."""
    pool = DeployFile.read(config).settings.pools[0]
    app = Plain(pool.models[0], load(pool.models[0], pool))
    served = uvicorn.Config(app, port=port, lifespan="off", log_level="warning", access_log=False)
    async with asyncio.TaskGroup() as group:
        batching = group.create_task(app.run())
        await uvicorn.Server(served).serve()
        batching.cancel()


def main() -> None:
    """Read the options and serve."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", type=Path, default=Path("config.yaml"), help="deploy file")
    parser.add_argument("--port", type=int, default=8001)
    options = parser.parse_args()
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(serve(options.config, options.port))


if __name__ == "__main__":
    main()
