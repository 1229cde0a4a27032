"""A Pinecone index for the contracts: over the loopback server, and over the service itself."""

import asyncio
import os
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import pytest

from serve.config.index import Pinecone
from serve.index.checks import NAMESPACE
from serve.index.pinecone import PineconeIndex
from serve.ports import Index, IndexStats, Landed
from serve.records import CollectionSpec, Filter, Hit, Record, Tombstone, Vector
from tests.contract.pinecone_server import KEY, PineconeServer, serving


HOST_GIVEN = os.environ.get("PINECONE_TEST_HOST", "")
"""An index of the service with 8 dimensions and metric cosine, which may be written to."""

KEY_GIVEN = os.environ.get("PINECONE_API_KEY", "")
SERVICE_MARKS = (pytest.mark.enable_socket, pytest.mark.timeout(900))
SERVICE = (
    [pytest.param("pinecone-service", marks=SERVICE_MARKS)] if HOST_GIVEN and KEY_GIVEN else []
)
"""A parameter of the contract suite where both variables are set, and none elsewhere."""


SETTLE_S = 10.0
"""For what has no token on the service: fetches, deletes, counts."""

TRIES_MAX = 100


def connected(url: str, **settings: Any) -> PineconeIndex:
    return PineconeIndex(Pinecone(host=url, **settings), KEY, time.monotonic)


@asynccontextmanager
async def local(dimensions: int, lag: int = 0) -> AsyncIterator[Index]:
    """The loopback server; with a lag, each write is waited for."""
    server = PineconeServer(dimensions, lag=lag)
    async with serving(server) as url:
        index = connected(url)

        async def settle() -> None:
            server.settle()

        yield Settled(index, settle, 0) if lag else index
        await index.aclose()


@asynccontextmanager
async def service() -> AsyncIterator[Index]:
    """The service, in namespaces of its own that are removed afterwards."""
    index = PineconeIndex(Pinecone(host=HOST_GIVEN), KEY_GIVEN, time.monotonic)
    settled = Settled(index, lambda: asyncio.sleep(SETTLE_S), 0.5)
    try:
        yield settled
    finally:
        for ns in settled.spaces.values():
            await index.drop(ns)
        await index.aclose()


class Settled:
    """An index whose writes return when they are seen, in namespaces that nobody else has."""

    def __init__(
        self, index: PineconeIndex, settle: Callable[[], Awaitable[None]], every_s: float
    ) -> None:
        self._index = index
        self._settle = settle
        self._every_s = every_s
        self.caps = index.caps
        self.spaces: dict[str, str] = {}

    def _own(self, ns: str) -> str:
        if not NAMESPACE.fullmatch(ns):
            return ns
        return self.spaces.setdefault(ns, uuid.uuid4().hex)

    async def open(self) -> None:
        await self._index.open()

    async def upsert(self, ns: str, records: Sequence[Record]) -> Landed:
        own = self._own(ns)
        landed = await self._index.upsert(own, records)
        if landed.token is not None:
            for _ in range(TRIES_MAX):
                if await self._index.reached(own, landed.token):
                    break
                await asyncio.sleep(self._every_s)
            else:
                raise AssertionError(f"{landed.token} was never reached")
        await self._settle()
        return landed

    async def delete(self, ns: str, tombstones: Sequence[Tombstone]) -> Landed:
        landed = await self._index.delete(self._own(ns), tombstones)
        await self._settle()
        return landed

    async def query(
        self, ns: str, vector: Vector, top_k: int, where: Filter | None = None
    ) -> Sequence[Hit]:
        return await self._index.query(self._own(ns), vector, top_k, where)

    async def match(
        self, ns: str, text: str, top_k: int, where: Filter | None = None
    ) -> Sequence[Hit]:
        return await self._index.match(self._own(ns), text, top_k, where)

    async def fetch(self, ns: str, ids: Sequence[str]) -> Sequence[Record]:
        return await self._index.fetch(self._own(ns), ids)

    async def scan(self, ns: str, where: Filter | None = None) -> AsyncIterator[Sequence[Record]]:
        async for part in self._index.scan(self._own(ns), where):
            yield part

    async def reached(self, ns: str, token: str) -> bool | None:
        return await self._index.reached(self._own(ns), token)

    async def ensure(self, spec: CollectionSpec) -> None:
        await self._index.ensure(replace(spec, ns=self._own(spec.ns)))

    async def drop(self, ns: str) -> None:
        await self._index.drop(self._own(ns))
        await self._settle()

    async def stats(self, ns: str) -> IndexStats:
        return await self._index.stats(self._own(ns))

    async def maintain(self) -> None:
        await self._index.maintain()

    async def aclose(self) -> None:
        await self._index.aclose()
