"""A Store and an index that are written to all the time, and what a copy of both must hold."""

import asyncio
import time
from collections.abc import Iterable, Mapping
from threading import Event
from typing import Any

import numpy as np

from serve.items import Job, NewItem, Settlement, new_id
from serve.records import Collection, CollectionSpec, Record


UUID = "a" * 32
VECTORS = [f"v{number}" for number in range(40)]
GO_ON_S_MAX = 60


def record(name: str, generation: int) -> Record:
    return Record(f"r-{name}", name, generation, 0, np.full(4, generation, np.float32))


async def held(index: Any, names: Iterable[str]) -> dict[str, int]:
    """Generations of what the index has."""
    found = await index.fetch(UUID, [f"r-{name}" for name in names])
    return {one.document: one.generation for one in found}


class Busy:
    """Writes raw vectors again and again, and documents, half of which land; and knows what was acknowledged."""

    def __init__(self, store: Any, index: Any) -> None:
        self.store, self.index = store, index
        self.vectors: dict[str, int] = {}
        self.documents: list[tuple[str, str]] = []
        self._rounds = self._wanted = 0
        self._stopped = False
        self._reached = Event()

    async def begin(self) -> asyncio.Task[None]:
        await self.store.create_collection("c", Collection(UUID, "ann", "c", "m", "r", 4, 1.0))
        await self.index.ensure(CollectionSpec(UUID, 4))
        return asyncio.create_task(self._write())

    def go_on(self, rounds: int) -> None:
        """Blocks until it has written so many more times."""
        self._reached.clear()
        self._wanted = self._rounds + rounds
        assert self._reached.wait(GO_ON_S_MAX)

    async def end(self, writing: asyncio.Task[None]) -> None:
        self._stopped = True
        await writing
        await self.index.aclose()
        await asyncio.to_thread(self.store.close)

    async def _write(self) -> None:
        while not self._stopped:
            await self._vectors()
            await self._document()
            await self.index.maintain()
            self._rounds += 1
            if self._rounds >= self._wanted:
                self._reached.set()

    async def _vectors(self) -> None:
        names = VECTORS[self._rounds % 7 :: 3]
        granted = await self.store.grant_vectors(UUID, names, [None] * len(names))
        await self.index.upsert(UUID, [record(*one) for one in zip(names, granted, strict=True)])
        self.vectors.update(zip(names, granted, strict=True))

    async def _document(self) -> None:
        name, now = f"d{self._rounds}", time.time()
        job = Job(new_id("job", now), "ann", "k", "documents", "bulk", 1.0, now, collection=UUID)
        item = NewItem(name, "document", "embed", 1.0, {}, sha256="abc")
        await self.store.submit_job(f"op-{name}", job, [item])
        self.documents.append((job.id, name))
        if self._rounds % 2:
            return
        own = await self._claimed()
        await self.store.settle([Settlement(own.id, own.lease, "advance", chunks=1)])
        own = await self._claimed()
        await self.index.upsert(UUID, [record(own.name, own.generation)])
        await self.store.settle([Settlement(own.id, own.lease, "done", chunks=1)])

    async def _claimed(self) -> Any:
        [item] = (await self.store.claim("w", "embed", 1, 1e9, 0.0)).items
        return item


async def check_restored(
    store: Any, index: Any, vectors: Mapping[str, int], documents: Iterable[tuple[str, str]]
) -> None:
    """All of these, acknowledged before the copy was made, are there, and writes go on."""
    found = await held(index, VECTORS)
    assert all(found[name] >= generation for name, generation in vectors.items())

    waiting: dict[str, set[str]] = {"ready": set(), "leased": set()}
    for job, name in documents:
        [view] = await store.list_items("ann", job, (), -1, 10)
        if view.state == "done":
            assert await held(index, [name]) == {name: view.generation}
        else:
            waiting[view.state].add(name)  # what was in work comes back as after a crash
    claimed = (await store.claim("w2", "embed", 500, 1e9, 0.0)).items
    assert waiting["ready"]
    assert waiting["ready"] <= {item.name for item in claimed}
    assert len(waiting["leased"]) <= 1

    # Nothing of after that moment: a write of now has a higher generation than what is there.
    granted = await store.grant_vectors(UUID, VECTORS, [None] * len(VECTORS))
    now = dict(zip(VECTORS, granted, strict=True))
    assert all(found[name] < now[name] for name in found)
    await index.upsert(UUID, [record(*one) for one in now.items()])
    assert await held(index, VECTORS) == now
