"""A door like Qdrant's REST API over the local mode of its library, written from its documentation
and its source, 1.19: routes, replies, and the errors that a test asks for. Not a Qdrant: what the
local mode does is what it does.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any
from urllib.parse import parse_qsl, urlsplit

from pydantic import BaseModel, TypeAdapter
from qdrant_client import AsyncQdrantClient, models


REQUEST_BYTES_MAX = 32 * 2**20

Answer = tuple[int, dict[str, str], bytes]


def error(status: int, text: str = "", **headers: str) -> Answer:
    """A reply that is no success, as Qdrant words it."""
    body = b'{"result":null,"status":{"error":"%s"},"time":0.0}' % text.encode()
    return status, {name.replace("_", "-"): value for name, value in headers.items()}, body


MISSING = error(404, "Not found: Collection `x` doesn't exist!")


@dataclass
class Seen:
    """A request that came."""

    method: str
    path: str
    query: dict[str, str]
    headers: dict[str, str]
    body: bytes


@dataclass
class Door:
    """Answers with `answers` first, each once, for requests whose path ends as it says."""

    local: AsyncQdrantClient
    url: str = ""
    version: str = "1.19.0"
    seen: list[Seen] = field(default_factory=list)
    answers: list[tuple[str, Answer]] = field(default_factory=list)
    deaf: bool = False

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One request of a connection."""
        head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
        method, target, _ = head[0].split(" ")
        headers = dict(line.lower().split(": ", 1) for line in head[1:-2])
        body = await reader.readexactly(int(headers.get("content-length", "0")))
        url = urlsplit(target)
        self.seen.append(Seen(method, url.path, dict(parse_qsl(url.query)), headers, body))
        if self.deaf:
            await reader.read()  # until the client hangs up
        status, more, text = await self._answer(self.seen[-1])
        lines = [f"{name}: {value}" for name, value in more.items()]
        lines += ["connection: close", f"content-length: {len(text)}", "", ""]
        first = f"HTTP/1.1 {status} {HTTPStatus(status).phrase}"
        writer.write("\r\n".join([first, *lines]).encode() + text)
        await writer.drain()
        writer.close()

    async def _answer(self, request: Seen) -> Answer:
        for one in self.answers:
            if request.path.endswith(one[0]):
                self.answers.remove(one)
                return one[1]
        if request.path == "/":
            said = models.VersionInfo(title="qdrant - vector search engine", version=self.version)
            return 200, {}, said.model_dump_json().encode()
        if len(request.body) > REQUEST_BYTES_MAX:
            return error(400, "JSON payload is larger than allowed (limit: 33554432 bytes).")
        try:
            result = await self._act(request.method, request.path.split("/")[2:], request.body)
        except ValueError as fault:  # the local mode's word for what is missing
            return MISSING if "not found" in str(fault) else error(400, "Wrong input")
        return 200, {}, b'{"result":%s,"status":"ok","time":0.001}' % result

    async def _act(self, method: str, path: list[str], body: bytes) -> bytes:
        name, *rest = path
        act = ACTIONS[method, "/".join(rest)]
        result = await act(self.local, name, body)
        if isinstance(result, BaseModel):
            return result.model_dump_json().encode()
        return TypeAdapter(type(result)).dump_json(result)


Act = Callable[[AsyncQdrantClient, str, bytes], Awaitable[Any]]


async def _exists(local: AsyncQdrantClient, name: str, _: bytes) -> dict[str, bool]:
    return {"exists": await local.collection_exists(name)}


async def _create(local: AsyncQdrantClient, name: str, body: bytes) -> bool:
    asked = models.CreateCollection.model_validate_json(body)
    return await local.create_collection(name, vectors_config=asked.vectors)


async def _info(local: AsyncQdrantClient, name: str, _: bytes) -> models.CollectionInfo:
    return await local.get_collection(name)


async def _drop(local: AsyncQdrantClient, name: str, _: bytes) -> bool:
    return await local.delete_collection(name)


async def _index(local: AsyncQdrantClient, name: str, body: bytes) -> models.UpdateResult:
    models.CreateFieldIndex.model_validate_json(body)
    await local.get_collection(name)
    return models.UpdateResult(operation_id=1, status=models.UpdateStatus.COMPLETED)


async def _upsert(local: AsyncQdrantClient, name: str, body: bytes) -> models.UpdateResult:
    asked = models.PointsList.model_validate_json(body)
    return await local.upsert(name, asked.points, update_filter=asked.update_filter)


async def _delete(local: AsyncQdrantClient, name: str, body: bytes) -> models.UpdateResult:
    return await local.delete(name, models.FilterSelector.model_validate_json(body))


async def _retrieve(local: AsyncQdrantClient, name: str, body: bytes) -> list[models.Record]:
    asked = models.PointRequest.model_validate_json(body)
    shown, vectors = asked.with_payload, asked.with_vector
    return await local.retrieve(name, asked.ids, with_payload=shown, with_vectors=vectors)


async def _query(local: AsyncQdrantClient, name: str, body: bytes) -> models.QueryResponse:
    asked = models.QueryRequest.model_validate_json(body)
    return await local.query_points(
        name,
        query=asked.query,
        query_filter=asked.filter,
        limit=asked.limit,
        with_payload=asked.with_payload,
        with_vectors=asked.with_vector,
    )


async def _scroll(local: AsyncQdrantClient, name: str, body: bytes) -> models.ScrollResult:
    asked = models.ScrollRequest.model_validate_json(body)
    found, offset = await local.scroll(
        name,
        asked.filter,
        limit=asked.limit,
        offset=asked.offset,
        with_payload=asked.with_payload,
        with_vectors=asked.with_vector,
    )
    return models.ScrollResult(points=found, next_page_offset=offset)


async def _count(local: AsyncQdrantClient, name: str, _: bytes) -> models.CountResult:
    return await local.count(name)


ACTIONS: dict[tuple[str, str], Act] = {
    ("GET", "exists"): _exists,
    ("PUT", ""): _create,
    ("GET", ""): _info,
    ("DELETE", ""): _drop,
    ("PUT", "index"): _index,
    ("PUT", "points"): _upsert,
    ("POST", "points"): _retrieve,
    ("POST", "points/delete"): _delete,
    ("POST", "points/query"): _query,
    ("POST", "points/scroll"): _scroll,
    ("POST", "points/count"): _count,
}


@asynccontextmanager
async def door() -> AsyncIterator[Door]:
    """One on 127.0.0.1, until the block ends."""
    made = Door(AsyncQdrantClient(":memory:"))
    async with await asyncio.start_server(made.serve, "127.0.0.1", 0) as server:
        made.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        yield made
    await made.local.close()
