"""Load on an embeddings server: closed loops over keep-alive connections, in raw asyncio.

A raw HTTP/1.1 client, because the load program shares the cores with what it measures, and httpx
would take more of them. It speaks as much of HTTP as servers answer with:
`Content-Length` and chunked bodies, kept and closed connections. No TLS.
"""

import asyncio
import base64
import itertools
import json
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from time import perf_counter
from urllib.parse import urlsplit

import numpy as np

from bench import processes, texts
from serve.records import Vector


BODIES = 256
"""Distinct request bodies of a load, made beforehand and sent in turn."""
READ_MAX = 2**22
GRACE_S = 60.0
"""A load whose last answers take longer than this after its end has failed."""
OK = 200


class Failed(Exception):
    """A server answered with an error or with something else than vectors."""


@dataclass(frozen=True, slots=True)
class Target:
    """A server under test: its base address, or its embeddings route itself; a key, a model.

    `pid` is the process that all of its processes descend from, where this program started it.
    """

    name: str
    url: str
    model: str
    key: str = ""
    pid: int | None = None

    @property
    def route(self) -> str:
        """The path of the embeddings route, or of another one of `/v1/` that the URL names."""
        path = urlsplit(self.url).path.rstrip("/")
        return path if path.endswith("/embeddings") or "/v1/" in path else f"{path}/v1/embeddings"


@dataclass(frozen=True, slots=True)
class Load:
    """`connections` closed loops, each sending requests of `inputs` texts."""

    name: str
    connections: int
    inputs: int = 1
    stretch: float = 1.0
    """How many times longer than the others it is measured: its requests are longer."""

    def bodies(self, model: str) -> Iterator[bytes]:
        """Request bodies without end."""
        count = BODIES if self.inputs == 1 else 16
        pool = texts.shorts(count) if self.inputs == 1 else texts.mixed(count * self.inputs)
        groups = [pool[at : at + self.inputs] for at in range(0, len(pool), self.inputs)]
        return itertools.cycle([_body(model, group) for group in groups])


LOADS = (Load("c1", 1), Load("c16", 16), Load("c64", 64), Load("x32", 4, 32, stretch=2.5))
"""Single short texts at three concurrencies, and 4 connections with 32 mixed texts a request."""


@dataclass(slots=True)
class Sample:
    """What one load of one round came to.

    CPU seconds are those of all the server's processes, where they are known, of this program, and
    of the servers that waited for their turn, which the caller of `measure` may fill in.
    """

    inputs: int
    elapsed_s: float = 0.0
    latencies_ms: list[float] = field(default_factory=list)
    server_cpu_s: float | None = None
    client_cpu_s: float = 0.0
    others_cpu_s: float = 0.0

    @property
    def rps(self) -> float:
        """Requests answered in a second."""
        return len(self.latencies_ms) / self.elapsed_s

    @property
    def texts_s(self) -> float:
        """Texts embedded in a second."""
        return self.rps * self.inputs


@dataclass(frozen=True, slots=True)
class Answer:
    """One reply; `head` in lower case."""

    status: int
    head: bytes
    body: bytes

    def header(self, name: str) -> str:
        """Its value; empty when it is absent."""
        _, _, rest = self.head.partition(b"\r\n" + name.encode() + b":")
        return rest.partition(b"\r\n")[0].strip().decode()


class Connection:
    """One keep-alive connection; opened when needed, again after the server has closed it."""

    def __init__(self, target: Target) -> None:
        where = urlsplit(target.url)
        self._host, self._port = where.hostname or "127.0.0.1", where.port or 80
        key = f"authorization: Bearer {target.key}\r\n" if target.key else ""
        self._head = (
            f"POST {target.route} HTTP/1.1\r\nhost: {where.netloc}\r\n{key}"
            "content-type: application/json\r\ncontent-length: "
        ).encode()
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def post(self, body: bytes) -> bytes:
        """The body of the answer. Raises Failed when it is not a 200."""
        answer = await self.send(body)
        if answer.status != OK:
            raise Failed(f"{answer.status}: {answer.body[:300].decode(errors='replace')}")
        return answer.body

    async def send(self, body: bytes) -> Answer:
        """Whatever the server answers."""
        if self._streams is None:
            self._streams = await asyncio.open_connection(self._host, self._port, limit=READ_MAX)
        reader, writer = self._streams
        writer.write(b"%b%d\r\n\r\n%b" % (self._head, len(body), body))
        head = (await reader.readuntil(b"\r\n\r\n")).lower()
        answer = await _read_body(reader, head)
        if b"\r\nconnection: close" in head:
            self.close()
        return Answer(int(head[9:12]), head, answer)

    def close(self) -> None:
        """Let go of the socket."""
        if self._streams is not None:
            self._streams[1].close()
            self._streams = None


async def _read_body(reader: asyncio.StreamReader, head: bytes) -> bytes:
    at = head.find(b"\r\ncontent-length:")
    if at >= 0:
        return await reader.readexactly(int(head[at + 17 : head.index(b"\r\n", at + 2)]))
    if b"\r\ntransfer-encoding: chunked" not in head:
        raise Failed("an answer with neither a length nor chunks")
    parts: list[bytes] = []
    while size := int((await reader.readuntil(b"\r\n")).partition(b";")[0], 16):
        parts.append((await reader.readexactly(size + 2))[:-2])
    await reader.readuntil(b"\r\n")
    return b"".join(parts)


@asynccontextmanager
async def connected(target: Target, count: int) -> AsyncIterator[list[Connection]]:
    """Connections that are closed in the end."""
    connections = [Connection(target) for _ in range(count)]
    try:
        yield connections
    finally:
        for one in connections:
            one.close()


async def measure(target: Target, load: Load, seconds: float) -> Sample:
    """Keep the target busy for `seconds`, then wait for what is under way.

    Raises Failed at the first answer that is not a success: rates of refusals mean nothing.
    """
    bodies, sample = load.bodies(target.model), Sample(load.inputs)
    async with connected(target, load.connections) as connections:
        server_s, client_s = _server_cpu_s(target), time.process_time()
        began = perf_counter()
        try:
            async with asyncio.timeout(seconds + GRACE_S), asyncio.TaskGroup() as group:
                for one in connections:
                    group.create_task(_loop(one, bodies, began + seconds, sample))
        except* (OSError, EOFError, TimeoutError, Failed) as errors:
            first = errors.exceptions[0]
            raise Failed(f"{target.name}, load {load.name}: {first!r}") from None
        sample.elapsed_s = perf_counter() - began
        sample.client_cpu_s = time.process_time() - client_s
        if server_s is not None:
            sample.server_cpu_s = (_server_cpu_s(target) or server_s) - server_s
    return sample


def _server_cpu_s(target: Target) -> float | None:
    return None if target.pid is None else processes.cpu_s(target.pid)


async def _loop(
    connection: Connection, bodies: Iterator[bytes], until: float, sample: Sample
) -> None:
    while (began := perf_counter()) < until:
        await connection.post(next(bodies))
        sample.latencies_ms.append((perf_counter() - began) * 1e3)


async def embed(target: Target, inputs: Sequence[str]) -> Vector:
    """The vectors of some texts, checked: as many as texts, of unit length. Raises Failed."""
    async with connected(target, 1) as (connection,):
        answer = json.loads(await connection.post(_body(target.model, inputs)))
    rows = sorted(answer["data"], key=lambda row: row["index"])
    vectors = np.stack([np.frombuffer(base64.b64decode(row["embedding"]), "<f4") for row in rows])
    norms = np.linalg.norm(vectors, axis=1)
    if len(vectors) != len(inputs) or np.abs(norms - 1).max() > 1e-3:
        raise Failed(
            f"{target.name}: {vectors.shape} vectors of length {norms.min()}-{norms.max()}"
        )
    return vectors


def _body(model: str, inputs: Sequence[str]) -> bytes:
    wanted = inputs[0] if len(inputs) == 1 else list(inputs)
    return json.dumps({"model": model, "input": wanted, "encoding_format": "base64"}).encode()
