"""The ingress: a Serve deployment around the FastAPI app, built on the replica."""

import asyncio
import time
from collections.abc import Awaitable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

from fastapi import FastAPI
from ray.serve import get_replica_context, ingress
from ray.serve.handle import DeploymentHandle

from deployments.handles import LedgerPort, UpserterPort, embedder_ports
from deployments.indexes import make_index
from deployments.live import Following
from deployments.metrics import publish
from deployments.observed import observe
from deployments.quotas import open_quotas
from deployments.stores import close_store, open_store
from deployments.vaults import open_vault
from serve.admission.keys import Door
from serve.api.app import create_app
from serve.api.health import INDEX
from serve.api.service import Service
from serve.config import Settings
from serve.content.blobs import LocalBlobs
from serve.errors import IndexUnavailable, ServiceError
from serve.flows.batch import BatchFlow
from serve.flows.canaries import Canaries
from serve.flows.collections import CollectionFlow
from serve.flows.context import Context
from serve.flows.embed import EmbedFlow
from serve.flows.erasure import EraseFlow
from serve.flows.exports import ExportFlow
from serve.flows.feed import Feed
from serve.flows.files import FileFlow
from serve.flows.ingest import IngestFlow
from serve.flows.jobs import JobFlow
from serve.flows.models import Models
from serve.flows.operators import OperatorFlow
from serve.flows.queues import QueueFlow
from serve.flows.readings import of_answers, of_canaries, of_quotas, of_reuse
from serve.flows.receipts import ReceiptFlow
from serve.flows.rerank import RerankFlow
from serve.flows.room import away_s
from serve.flows.scalings import ScalingFlow
from serve.flows.search import SearchFlow
from serve.flows.streams import Streams
from serve.flows.usage import UsageFlow
from serve.flows.vectors import VectorFlow
from serve.flows.webhooks import WebhookFlow
from serve.index.probes import Probes
from serve.ports import Index, Upserter


READY_TIMEOUT_S = 2.0
READY_CACHE_S = 1.0
"""How long an answer counts; one that something is not ready for a fifth of it."""


def make_app() -> FastAPI:
    """The app over the service that this replica's `Ingress` holds."""

    def service() -> Service:
        return cast("Ingress", get_replica_context().servable_object).service

    return create_app(service, id_echoed=True)


@ingress(make_app)
class Ingress:
    """Authenticates, tokenises, checks quotas and runs the flows."""

    async def __init__(  # type: ignore[misc]
        self,
        settings: Settings,
        embedders: Mapping[str, DeploymentHandle[Any]],
        _workers: Sequence[DeploymentHandle[Any]],
    ) -> None:
        """`embedders` holds one handle per pool, by name; `settings.data_dir` is absolute.

        The workers are nobody's to call: they stand here so that Serve deploys them.
        """
        observe("ingress", settings.logs)
        self._embedders = embedder_ports(embedders, settings)
        self._awake = [pool.name for pool in settings.pools if not pool.sleeps]
        self._store = await asyncio.to_thread(open_store, settings)
        self._upserter = UpserterPort(settings)
        self._ready: tuple[float, dict[str, bool]] = (-READY_CACHE_S, {})
        replica = get_replica_context().replica_tag
        self._quotas = open_quotas(settings, self._store, replica, settings.ingress.replicas_max)
        self._feed = Feed(self._store, time.monotonic)
        index = make_index(settings)
        self._probes = Probes(index, settings.index.probe_s)
        self.service = self._wire(settings, index)
        self._following = Following(self.service.context.live)
        self._tasks = [
            asyncio.create_task(self._quotas.run()),
            asyncio.create_task(self._feed.run()),
            asyncio.create_task(self._probes.run()),
            asyncio.create_task(
                publish(
                    self._following.readings,
                    lambda: of_answers(self.service.context.answers),
                    lambda: of_quotas(self._quotas),
                    lambda: of_reuse(self.service.embed.reuse),
                    lambda: of_canaries(self.service.canaries.tally, self.service.canaries.stopped),
                )
            ),
            asyncio.create_task(self.service.canaries.run()),
            *(asyncio.create_task(one.run()) for one in self._embedders.values()),
            asyncio.create_task(self._warm(index)),
        ]

    def _context(self, settings: Settings) -> Context:
        return Context(
            settings,
            Models.open(settings, self._embedders),
            self._quotas,
            ThreadPoolExecutor(settings.ingress.tokenizer_threads, "tokenizer"),
            time.monotonic,
            time.time,
        )

    def _wire(self, settings: Settings, index: Index) -> Service:
        context, queues = self._context(settings), LedgerPort(settings)
        canaries = Canaries(context, queues, get_replica_context().replica_tag)
        embed = EmbedFlow(context, kept_bytes_max=settings.cache.bytes_max, canaries=canaries)
        rerank = RerankFlow(context, embed)
        collections = CollectionFlow(context, self._store, self._upserter)
        ingest = IngestFlow(context, collections, self._store, self._feed, self._probes)
        receipts = ReceiptFlow(context, collections, self._store, self._feed, self._probes)
        vectors = VectorFlow(
            context,
            collections,
            self._store,
            upserter=self._upserter,
            index=index,
            ingest=ingest,
            probes=self._probes,
        )
        blobs = LocalBlobs(Path(settings.data_dir) / settings.files.folder)
        files = FileFlow(context, self._store, blobs)
        return Service(
            context,
            Door(self._store, settings.admission, clock=time.monotonic, wall=time.time),
            embed,
            collections,
            ingest,
            receipts,
            SearchFlow(context, collections, embed, rerank, index=index, receipts=receipts),
            rerank,
            vectors,
            QueueFlow(context, collections, ingest, vectors),
            ExportFlow(context, collections, index),
            OperatorFlow(settings, self._store, self._store, time.time),
            EraseFlow(
                self._store,
                upserter=self._upserter,
                index=index,
                blobs=blobs,
                wait_s=settings.limits.deadline_s_max,
            ),
            UsageFlow(context, self._store, queues),
            ScalingFlow(settings, queues),
            canaries,
            JobFlow(context, collections, self._store, self._store, queues=queues, files=files),
            self._feed,
            Streams(settings),
            files,
            BatchFlow(context, collections, self._store, files),
            WebhookFlow(context, self._store, open_vault(settings)),
            self.ready,
        )

    async def _warm(self, index: Index) -> None:
        """Load what only searches need once all else is ready, or the first of them would wait."""
        while not all((await self.ready()).values()):  # noqa: ASYNC110  nobody tells it
            await asyncio.sleep(READY_CACHE_S)
        with suppress(IndexUnavailable):  # a search will try again
            await index.open()

    async def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Serve calls this at the start and whenever the deploy file has another `user_config`."""
        if self._following.follow(user_config):
            now = self._following.live.now
            self.service.door.retier(now.admission.tiers)
            self.service.operators.retier(now.admission.tiers)
            self.service.canaries.update(now.canaries)

    async def check_health(self) -> None:
        """Serve replaces the replica when this raises."""
        for task in self._tasks:
            if task.done():
                task.result()

    async def __del__(self) -> None:
        """Serve awaits this once the last request is done: give back what is held, tell the rest."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._quotas.close()
        await close_store(self._store)

    async def ready(self) -> dict[str, bool]:
        """Part by part; asked at most once a second, however often the probes come."""
        at, parts = self._ready
        if time.monotonic() - at >= (READY_CACHE_S if all(parts.values()) else READY_CACHE_S / 5):
            names = ["store", "upserter", INDEX, *(f"embedder-{name}" for name in self._awake)]
            answers = await asyncio.gather(
                _usable(self._store.ready(READY_TIMEOUT_S)),
                _usable(self._upserter.ready(READY_TIMEOUT_S)),
                _has_room(self._upserter),
                # One that may sleep is not asked: that would wake it.
                *(_usable(self._embedders[name].ready()) for name in self._awake),
            )
            parts = dict(zip(names, answers, strict=True))
            self._ready = (time.monotonic(), parts)
        return parts


async def _has_room(upserter: Upserter) -> bool:
    return not await away_s(upserter)


async def _usable(answer: Awaitable[bool]) -> bool:
    try:
        async with asyncio.timeout(READY_TIMEOUT_S):
            return await answer
    except (ServiceError, TimeoutError):
        return False
