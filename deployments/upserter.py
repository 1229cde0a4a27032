"""The single writer of the index, as a named actor around `serve.index.writer`."""

import asyncio
import random
import time
from collections.abc import Sequence
from contextlib import suppress

import ray

from deployments.actors import (
    START_S_MAX,
    UPSERTER,
    State,
    ended,
    leave,
    starting,
    watch,
)
from deployments.indexes import make_index
from deployments.metrics import publish
from deployments.observed import observe
from deployments.stores import Store, close_store, open_store
from deployments.yielding import yield_cores
from serve.config import Settings
from serve.errors import IndexUnavailable, Overloaded, ServiceError, StoreUnavailable
from serve.flows.readings import of_buffer, of_census, of_lags
from serve.freshness import Lag
from serve.index.lags import Lags, TimedWriter
from serve.index.probes import Probes
from serve.index.writer import Writer
from serve.ports import Index
from serve.pressure import Pressure, Sender
from serve.records import CollectionSpec, Outcome, Write
from serve.scaling import Backlog
from serve.telemetry import Census


CENSUS_EVERY_S = 10.0
"""Between two looks into the Store for figures, each some ms of it."""

SCALED_EVERY_S = 2.0
"""The same where something is scaled by them."""

AWAY_S = 0.5
"""Between two tries while the Store is away."""


@ray.remote
class UpserterActor:
    """Buffers writes and lands them in bulk. Its memory is a cache: callers repeat after a kill."""

    async def __init__(self, settings: Settings, deploy_seq: int) -> None:  # type: ignore[misc]
        """Take the epoch, open and warm the index, drop what was deleted but not yet gone."""
        observe("upserter", settings.logs)
        self._settings = settings
        self._leaving = False
        async with starting(UPSERTER, settings):
            store = self._store = await asyncio.to_thread(open_store, settings)
            index = make_index(settings)
            epoch, _ = await asyncio.gather(_take_epoch(store, deploy_seq, settings), _open(index))
            for gone in await store.deleted_collections():
                await index.drop(gone.uuid)
                await store.purge_collection(gone.uuid)
        self._writer = Writer(
            index,
            store,
            name=UPSERTER,
            epoch=epoch,
            settings=settings.buffer,
            clock=time.monotonic,
            rng=random.Random(),  # noqa: S311  jitter, not a secret
        )
        probes = Probes(index, settings.index.probe_s)
        lags = Lags(probes, time.time)
        self._timed = TimedWriter(self._writer, lags)
        self._running = asyncio.create_task(self._writer.run())
        self._census: Census | None = None
        self._counted: tuple[float, Census] | None = None
        self._beside = [
            asyncio.create_task(probes.run()),
            asyncio.create_task(self._count(store)),
            asyncio.create_task(
                publish(
                    lambda: of_buffer(self._writer.stats()),
                    lambda: of_census(self._census),
                    lambda: of_lags(lags),
                )
            ),
        ]
        self._watch = asyncio.create_task(
            watch(self._state, self.retire, grace_s=settings.actors.orphan_grace_s)
        )
        yield_cores()  # not before: a start is waited for

    def _state(self) -> State:
        if self._leaving:  # draining ends `run`: that is no reason to be restarted
            return "leaving"
        if self._writer.fenced:
            return "replaced"
        tasks = (self._running, *self._beside)
        return "failed" if any(ended(task) for task in tasks) else "works"

    async def ready(self) -> bool:
        """Whether it takes offers."""
        return not self._running.done() and not self._writer.fenced

    async def offer(
        self, sender: Sender, ns: str, writes: Sequence[Write], deadline_s: float
    ) -> tuple[Outcome, ...]:
        """See `serve.ports.Upserter`."""
        return await self._timed.offer(sender, ns, writes, deadline_s)

    async def pressure(self) -> Pressure:
        """See `serve.ports.Upserter`."""
        return await self._timed.pressure()

    async def ensure(self, spec: CollectionSpec) -> None:
        """See `serve.ports.Upserter`."""
        await self._timed.ensure(spec)

    async def drop(self, ns: str) -> None:
        """See `serve.ports.Upserter`."""
        await self._timed.drop(ns)

    async def lag(self, namespaces: Sequence[str]) -> Lag:
        """See `serve.ports.Upserter`."""
        return await self._timed.lag(namespaces)

    async def backlog(self) -> Backlog | None:
        """What waits in the Store, as it was counted last; None: it has not answered yet."""
        if self._counted is None:
            return None
        at, census = self._counted
        full = (await self._timed.pressure()).wait_s > 0
        return Backlog(census.tokens, census.stages, full, time.monotonic() - at)

    async def stats(self) -> dict[str, float]:
        """Depth, age and counts of the buffer."""
        return dict(self._writer.stats())

    async def _count(self, store: Store) -> None:
        """Ask the Store what it holds: here, since there is one Upserter whatever the Store is."""
        every_s = SCALED_EVERY_S if self._settings.scales else CENSUS_EVERY_S
        while True:
            at = time.monotonic()
            try:
                self._census = await store.census()
            except ServiceError:
                self._census = None
            else:
                self._counted = at, self._census
            await asyncio.sleep(every_s)

    async def retire(self) -> None:
        """Flush, release the rest and end for good."""
        self._leaving = True
        try:
            await self._writer.drain(self._settings.actors.drain_s)
            await close_store(self._store)
        finally:
            leave()


async def _open(index: Index) -> None:
    """Load what the index needs, beside the wait for the Store."""
    with suppress(IndexUnavailable):  # it may come back: until then whoever writes is told so
        await index.open()


async def _take_epoch(store: Store, deploy_seq: int, settings: Settings) -> int:
    """Wait for a Store that starts beside us or hands over.

    Raises Fenced when a later deployment writes: then this actor must not live.
    """
    expires = time.monotonic() + settings.store.lock_wait_s + START_S_MAX
    while True:
        try:
            return await store.take_epoch(UPSERTER, deploy_seq)
        except (StoreUnavailable, Overloaded):
            if time.monotonic() > expires:
                raise
            await asyncio.sleep(AWAY_S)
