"""For `bench.landing`: the service's own writer in this process, over an index that counts, and that
fails when it is told to.
"""

import asyncio
import random
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from bench.landing_indexes import DIMENSIONS
from serve.config import Buffer
from serve.config import Store as StoreSettings
from serve.errors import IndexUnavailable
from serve.index.errors import IndexRetryable, RecordsRejected
from serve.index.writer import Writer
from serve.jobs.owner import StoreOwner
from serve.ports import Fence, Index, Landed
from serve.pressure import Sender
from serve.records import Collection, Record


Fault = Callable[[Sequence[Record]], None]
"""Raises why an upsert of these fails, if it does."""


class Unfenced:
    """`ports.Fence` of a writer that nobody replaces."""

    async def take_epoch(self, _name: str, _deploy_seq: int) -> int:
        """See `serve.ports.Fence`."""
        return 1

    async def superseded(
        self, _name: str, _epoch: int, _ns: str, _versions: Mapping[str, int]
    ) -> frozenset[str]:
        """See `serve.ports.Fence`."""
        return frozenset()


SENDER = Sender("bench", 1.0)
WAIT_S = 300.0
"""How long an offer waits: longer than any fault here lasts."""
UNFENCED = Unfenced()
NAME = "upserter"


class Watched:
    """An index whose upserts are timed; `fault` may make them fail."""

    def __init__(self, index: Index) -> None:
        self._index = index
        self.caps = index.caps
        self.fault: Fault | None = None
        self.took_s: list[float] = []
        self.failed = 0

    def __getattr__(self, name: str) -> Any:
        """All else is the index's own."""
        return getattr(self._index, name)

    async def upsert(self, ns: str, records: Sequence[Record]) -> Landed:
        """See `serve.ports.Index`."""
        began = time.perf_counter()
        try:
            if self.fault is not None:
                self.fault(records)
            return await self._index.upsert(ns, records)
        except Exception:
            self.failed += 1
            raise
        finally:
            self.took_s.append(time.perf_counter() - began)


def throttled(share: float, retry_after_s: float) -> Fault:
    """So many of the upserts are told to come again later, as a 429 does."""
    rng = random.Random(7)

    def fault(_: Sequence[Record]) -> None:
        if rng.random() < share:
            raise IndexRetryable("429", retry_after_s=retry_after_s)

    return fault


def poisoned(bad: frozenset[str]) -> Fault:
    """A batch that holds one of these ids is refused whole, and nobody says for which."""

    def fault(records: Sequence[Record]) -> None:
        if bad.intersection(record.id for record in records):
            raise RecordsRejected("400")

    return fault


@asynccontextmanager
async def fence(ns: str) -> AsyncIterator[Fence]:
    """The Store, which knows whose epoch it is, and this collection without a document."""
    with tempfile.TemporaryDirectory(prefix="hr-", ignore_cleanup_errors=True) as folder:
        store = await asyncio.to_thread(
            StoreOwner, Path(folder) / "store.db", StoreSettings(), time.time
        )
        try:
            made = Collection(ns, "bench", "bench", "model", "revision", DIMENSIONS, 0.0)
            await store.create_collection(ns, made)
            yield store
        finally:
            await asyncio.to_thread(store.close)


@asynccontextmanager
async def writing(
    index: Any, settings: Buffer | None = None, *, fence: Fence = UNFENCED, deployment: int = 1
) -> AsyncIterator[Writer]:
    """A writer that runs, as that deployment's; in the end it drains."""
    writer = Writer(
        index,
        fence,
        name=NAME,
        epoch=await fence.take_epoch(NAME, deployment),
        settings=settings or Buffer(),
        clock=time.monotonic,
        rng=random.Random(1),
    )
    running = asyncio.create_task(writer.run())
    try:
        yield writer
    finally:
        await writer.drain(30)
        await running


async def told(writer: Writer, ns: str, row: Sequence[Record]) -> str:
    """What became of one record; a writer that has ended refuses, or gives back."""
    try:
        (outcome,) = await writer.offer(SENDER, ns, row, WAIT_S)
    except IndexUnavailable:
        return "refused"
    return outcome.word
