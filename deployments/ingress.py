"""The ingress: a Serve deployment around the FastAPI app, built on the replica."""

import asyncio
import time
from collections.abc import Awaitable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

from fastapi import FastAPI
from ray.serve import get_replica_context, ingress
from ray.serve.handle import DeploymentHandle

from deployments.handles import EmbedderPort, StorePort, UpserterPort
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
from serve.flows.search import SearchFlow
from serve.index.lancedb import LanceIndex


READY_TIMEOUT_S = 2.0
READY_CACHE_S = 1.0


def make_app() -> FastAPI:
    """The app over the service that this replica's `Ingress` holds."""

    def service() -> Service:
        return cast("Ingress", get_replica_context().servable_object).service

    return create_app(service, id_echoed=True)


@ingress(make_app)
class Ingress:
    """Authenticates, tokenises, checks quotas and runs the flows."""

    def __init__(self, settings: Settings, embedders: Mapping[str, DeploymentHandle[Any]]) -> None:
        """`embedders` holds one handle per pool, by name; `settings.data_dir` is absolute."""
        pace = settings.ingress.tokens_per_s_min
        self._embedders = {
            name: EmbedderPort(handle, tokens_per_s_min=pace) for name, handle in embedders.items()
        }
        self._store = StorePort(settings)
        self._upserter = UpserterPort(settings)
        self._ready: tuple[float, dict[str, bool]] = (-READY_CACHE_S, {})
        self.service = self._wire(settings)

    def _wire(self, settings: Settings) -> Service:
        context = Context(
            settings,
            Models.open(settings, self._embedders),
            Quotas(
                settings.admission.tiers,
                replicas=settings.ingress.replicas,
                tenants_max=settings.admission.tenants_tracked_max,
            ),
            ThreadPoolExecutor(settings.ingress.tokenizer_threads, "tokenizer"),
            time.monotonic,
            time.time,
        )
        index = LanceIndex(str(Path(settings.data_dir) / settings.index.uri), settings.index)
        embed = EmbedFlow(context)
        collections = CollectionFlow(context, self._store, self._upserter)
        return Service(
            context,
            Door(self._store, settings.admission, clock=time.monotonic),
            embed,
            collections,
            IngestFlow(context, collections, embed, self._store, self._upserter),
            SearchFlow(context, collections, embed, index),
            self.ready,
        )

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
