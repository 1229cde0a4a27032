"""For `bench.landing`: every index that can run here, empty, and records to put into it.

LanceDB and the twin in memory always; pgvector where a Postgres can be started (`bench.postgres_server`);
Qdrant in its library's local mode, which is no server; Pinecone's real client over the loopback server of
the contract tests, which holds to the limits and does nothing else.
"""

import importlib
import importlib.util
import tempfile
import time
import uuid
import warnings
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager

import numpy as np

from bench import postgres_server
from serve.config import Index as IndexSettings
from serve.config.index import Pgvector, Pinecone
from serve.index.lancedb import LanceIndex
from serve.index.memory import MemoryIndex
from serve.ports import Index
from serve.records import CollectionSpec, Record


DIMENSIONS = 384
SERVER = "tests.contract.pinecone_server"
PACED = 1e5
"""Requests a second: a namespace's limits would be all that is seen of Pinecone."""


def records(start: int, count: int, generation: int = 1) -> list[Record]:
    """Numbered ones, with unit vectors of chance: the same for the same numbers."""
    rows = np.random.default_rng(start).normal(size=(count, DIMENSIONS)).astype(np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    return [
        Record(
            f"{start + at:032x}",
            f"d{start + at}",
            generation,
            0,
            row,
            text="a passage of a document " * 8,
            metadata={"number": start + at},
        )
        for at, row in enumerate(rows)
    ]


def namespace() -> str:
    """A new one."""
    return uuid.uuid4().hex


async def made(index: Index) -> str:
    """A new namespace in it."""
    ns = namespace()
    await index.ensure(CollectionSpec(ns, DIMENSIONS))
    return ns


@asynccontextmanager
async def lancedbs(openings: int, settings: IndexSettings) -> AsyncIterator[list[LanceIndex]]:
    """One folder, which goes with it, opened several times."""
    with tempfile.TemporaryDirectory(prefix="hr-", ignore_cleanup_errors=True) as folder:
        indexes = [LanceIndex(folder, settings) for _ in range(openings)]
        for one in indexes:
            await one.open()
        yield indexes
        for one in indexes:
            await one.aclose()


@asynccontextmanager
async def lancedb() -> AsyncIterator[LanceIndex]:
    """One, with the settings that the service has by default."""
    async with lancedbs(1, IndexSettings()) as (index,):
        yield index


@asynccontextmanager
async def _memory() -> AsyncIterator[Index]:
    yield MemoryIndex(IndexSettings())


@asynccontextmanager
async def _pgvector() -> AsyncIterator[Index]:
    from serve.index.pgvector import PgIndex  # noqa: PLC0415  an extra of the package

    own = Pgvector(url_env="X", schema_name="headrace_bench")
    index = PgIndex(postgres_server.url(), IndexSettings(backend="pgvector", pgvector=own))
    await index.open()
    yield index
    await index.aclose()


@asynccontextmanager
async def _qdrant() -> AsyncIterator[Index]:
    from qdrant_client import AsyncQdrantClient  # noqa: PLC0415  an extra of the package

    from serve.index.qdrant import QdrantIndex  # noqa: PLC0415

    warnings.filterwarnings("ignore", "Payload indexes have no effect", UserWarning)
    local = AsyncQdrantClient(":memory:")
    index = QdrantIndex(IndexSettings(backend="qdrant"), connect=lambda: local)
    yield index
    await index.aclose()


@asynccontextmanager
async def _pinecone() -> AsyncIterator[Index]:
    from serve.index.pinecone import PineconeIndex  # noqa: PLC0415  an extra of the package

    fake = importlib.import_module(SERVER)
    async with fake.serving(fake.PineconeServer(DIMENSIONS)) as url:
        own = Pinecone(
            host=url,
            upserts_s=PACED,
            upsert_bytes_s=1e11,
            deletes_s=PACED,
            fetches_s=PACED,
        )
        index = PineconeIndex(own, fake.KEY, time.monotonic)
        yield index
        await index.aclose()


OPENERS: dict[str, Callable[[], AbstractAsyncContextManager[Index]]] = {
    "lancedb": lancedb,
    "memory": _memory,
    "pgvector": _pgvector,
    "qdrant-local": _qdrant,
    "pinecone-loopback": _pinecone,
}


def present() -> Sequence[str]:
    """Those of them that can run here."""
    there = {
        "lancedb": True,
        "memory": True,
        "pgvector": postgres_server.PRESENT and _found("pgvector"),
        "qdrant-local": _found("qdrant_client"),
        "pinecone-loopback": _found("pinecone") and _found("tests") and _found(SERVER),
    }
    return [name for name in OPENERS if there[name]]


def _found(module: str) -> bool:
    return importlib.util.find_spec(module) is not None
