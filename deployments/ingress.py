"""The ingress: a Serve deployment around the FastAPI app, built on the replica."""

import asyncio
import os
import time
from collections.abc import Awaitable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

from fastapi import FastAPI
from ray.serve import get_replica_context, ingress
from ray.serve.handle import DeploymentHandle

from deployments.handles import EmbedderPort, LedgerPort, UpserterPort
from deployments.metrics import publish
from deployments.store_port import StorePort
from serve.admission.keys import Door
from serve.admission.quotas import Quotas
from serve.api.app import create_app
from serve.api.service import Service
from serve.config import Settings
from serve.errors import ServiceError
from serve.flows.collections import CollectionFlow
from serve.flows.context import Context
from serve.flows.embed import EmbedFlow
from serve.flows.ingest import IngestFlow
from serve.flows.models import Models
from serve.flows.operators import OperatorFlow
from serve.flows.search import SearchFlow
from serve.flows.usage import UsageFlow
from serve.index.lancedb import LanceIndex
from serve.ports import Ledger


READY_TIMEOUT_S = 2.0
READY_CACHE_S = 1.0


def make_app() -> FastAPI:
    """The app over the service that this replica's `Ingress` holds."""

    def service() -> Service:
        return cast("Ingress", get_replica_context().servable_object).service

    return create_app(service, id_echoed=True)


def open_ledger(settings: Settings) -> Ledger:
    """The Ledger actor, or the Redis that is configured in its place.

    Raises RuntimeError when the variable that `ledger.redis_url_env` names is not set.
    """
    name = settings.ledger.redis_url_env
    if not name:
        return LedgerPort(settings)
    url = os.environ.get(name)
    if not url:
        raise RuntimeError(f"ledger.redis_url_env: the environment variable {name} is not set")
    from serve.admission.redis import RedisLedger  # noqa: PLC0415  an optional dependency

    return RedisLedger(url, settings.ledger, wall=time.time)


@ingress(make_app)
class Ingress:
    """Authenticates, tokenises, checks quotas and runs the flows."""

    async def __init__(  # type: ignore[misc]
        self, settings: Settings, embedders: Mapping[str, DeploymentHandle[Any]]
    ) -> None:
        """`embedders` holds one handle per pool, by name; `settings.data_dir` is absolute."""
        pace = settings.ingress.tokens_per_s_min
        self._embedders = {
            name: EmbedderPort(handle, tokens_per_s_min=pace) for name, handle in embedders.items()
        }
        self._store = StorePort(settings)
        self._upserter = UpserterPort(settings)
        self._ready: tuple[float, dict[str, bool]] = (-READY_CACHE_S, {})
        self._ledger = open_ledger(settings)
        self._quotas = Quotas(
            self._ledger,
            self._store,
            settings.ledger,
            replica=get_replica_context().replica_tag,
            replicas=settings.ingress.replicas,
            owners_max=settings.admission.tenants_tracked_max,
            clock=time.monotonic,
            wall=time.time,
        )
        self._tasks = [
            asyncio.create_task(self._quotas.run()),
            asyncio.create_task(publish(self._quotas)),
        ]
        self.service = self._wire(settings)

    def _wire(self, settings: Settings) -> Service:
        context = Context(
            settings,
            Models.open(settings, self._embedders),
            self._quotas,
            ThreadPoolExecutor(settings.ingress.tokenizer_threads, "tokenizer"),
            time.monotonic,
            time.time,
        )
        index = LanceIndex(str(Path(settings.data_dir) / settings.index.uri), settings.index)
        embed = EmbedFlow(context)
        collections = CollectionFlow(context, self._store, self._upserter)
        return Service(
            context,
            Door(self._store, settings.admission, clock=time.monotonic, wall=time.time),
            embed,
            collections,
            IngestFlow(context, collections, embed, self._store, self._upserter),
            SearchFlow(context, collections, embed, index),
            OperatorFlow(settings, self._store, self._store, time.time),
            UsageFlow(context, self._store, LedgerPort(settings)),
            self.ready,
        )

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

    async def ready(self) -> dict[str, bool]:
        """Part by part; asked at most once a second, however often the probes come."""
        at, parts = self._ready
        if time.monotonic() - at >= READY_CACHE_S:
            names = ["store", "upserter", *(f"embedder-{name}" for name in self._embedders)]
            answers = await asyncio.gather(
                _usable(self._store.ready(READY_TIMEOUT_S)),
                _usable(self._upserter.ready(READY_TIMEOUT_S)),
                *(_usable(embedder.ready()) for embedder in self._embedders.values()),
            )
            parts = dict(zip(names, answers, strict=True))
            self._ready = (time.monotonic(), parts)
        return parts


async def _usable(answer: Awaitable[bool]) -> bool:
    try:
        async with asyncio.timeout(READY_TIMEOUT_S):
            return await answer
    except (ServiceError, TimeoutError):
        return False
