"""A worker: a Serve deployment that claims items of its stages from the Store and works on them.

Nobody calls it; Serve keeps its replicas alive, replaces those that are not healthy, and lets those
that leave finish what they have.
"""

import asyncio
import random
import time
import uuid
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from ray.serve import get_replica_context
from ray.serve.handle import DeploymentHandle

from deployments.handles import UpserterPort, embedder_ports
from deployments.live import Following
from deployments.metrics import Source, publish
from deployments.observed import observe
from deployments.quotas import open_quotas
from deployments.store_port import StorePort
from deployments.stores import close_store, open_store, tick
from deployments.vaults import open_vault
from deployments.yielding import yield_cores
from serve import config
from serve.config import Settings
from serve.content.blobs import LocalBlobs
from serve.egress import EgressClient
from serve.errors import Internal
from serve.flows.batch_work import batch_handlers
from serve.flows.context import Context
from serve.flows.document_work import DocumentWork
from serve.flows.embed import EmbedFlow
from serve.flows.files import Tidy
from serve.flows.models import Models
from serve.flows.readings import of_quotas, of_reuse, of_work
from serve.flows.room import LANDING, away_s
from serve.flows.webhooks import Sender
from serve.jobs.faults import Retries
from serve.jobs.runner import Runner


class Worker:
    """Runs until it is told to leave."""

    async def __init__(  # type: ignore[misc]
        self,
        worker: config.Worker,
        settings: Settings,
        embedders: Mapping[str, DeploymentHandle[Any]],
    ) -> None:
        """`embedders` holds one handle per pool, by name; `settings.data_dir` is absolute."""
        observe("worker", settings.logs)
        ports = embedder_ports(embedders, settings)
        store = self._store = await asyncio.to_thread(open_store, settings)
        replica = get_replica_context().replica_tag
        self._quotas = open_quotas(settings, store, replica, worker.replicas_max)
        threads = ThreadPoolExecutor(settings.ingress.tokenizer_threads, "tokenizer")
        context = Context(
            settings, Models.open(settings, ports), self._quotas, threads, time.monotonic, time.time
        )
        rng = random.Random()  # noqa: S311  jitter, not a secret
        rules = settings.jobs
        retries = Retries(rules.retry_s, rules.retry_factor, rules.retry_s_max, rng)
        self._following = Following(context.live)
        embed, upserter = EmbedFlow(context), UpserterPort(settings)
        blobs = LocalBlobs(Path(settings.data_dir) / settings.files.folder)
        documents = DocumentWork(context, embed, upserter, retries)
        batches = batch_handlers(
            context, embed, store, upserter=upserter, blobs=blobs, retries=retries
        )
        self._runner = Runner(
            store,
            {**documents.handlers(), **batches},
            owner=f"{replica}/{uuid.uuid4().hex[:8]}",
            worker=worker,
            rules=rules,
            retries=retries,
            gates={LANDING: partial(away_s, upserter)},
        )
        self._egress = EgressClient(settings.egress)
        vault = open_vault(settings)
        self._sender = Sender(store, self._egress, vault, settings, wall=time.time, rng=rng)
        self._drain_s = worker.drain_s
        self._tasks = [
            asyncio.create_task(self._quotas.run()),
            asyncio.create_task(self._runner.run()),
            asyncio.create_task(self._sender.run()),
            asyncio.create_task(Tidy(store, blobs, settings.files, time.time).run()),
            *(asyncio.create_task(port.run()) for port in ports.values()),
            asyncio.create_task(publish(*self._sources(embed))),
        ]
        if not isinstance(store, StorePort):  # the Store's actor ticks by itself
            self._tasks.append(asyncio.create_task(tick(store, rules.tick_s)))
        yield_cores()  # not before: a start is waited for

    def _sources(self, embed: EmbedFlow) -> tuple[Source, ...]:
        """What it tells of itself."""
        return (
            self._following.readings,
            lambda: of_work(self._runner.done),
            lambda: of_quotas(self._quotas),
            lambda: of_reuse(embed.reuse),
        )

    async def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Serve calls this at the start and whenever the deploy file has another `user_config`."""
        self._following.follow(user_config)

    async def check_health(self) -> None:
        """Serve replaces the replica when this raises."""
        for task in self._tasks:
            if task.done():
                task.result()
                raise Internal("The worker's loop has ended.")

    async def stats(self) -> dict[str, int]:
        """What it has done since it started."""
        done = self._runner.done
        return {"claimed": done.claimed, "settled": done.settled, "lost": done.lost}

    async def __del__(self) -> None:
        """Serve awaits this: finish, give the rest back, tell what was used."""
        await asyncio.gather(self._runner.drain(self._drain_s), self._sender.drain(self._drain_s))
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._egress.aclose()
        await self._quotas.close()
        await close_store(self._store)
