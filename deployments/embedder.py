"""The embedder: a Serve deployment per pool; models, a fair queue and a batcher in each replica."""

import asyncio
import logging
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, ClassVar

import ray
from ray.serve import get_replica_context

from deployments.handles import LedgerPort
from deployments.live import Following
from deployments.metrics import publish
from deployments.observed import observe
from deployments.outlet import LOOPBACK, Address, Outlet
from serve import config
from serve.allowance import Tier
from serve.config.live import Live
from serve.embedding.pool import Pool
from serve.errors import ServiceError
from serve.flows.batching import Batcher
from serve.flows.readings import of_batches, of_gpu, of_models, of_queue
from serve.records import EmbedCall, EmbedReply


log = logging.getLogger("headrace.embedder")


class Embedder:
    """Requests wait in its own queue, not in Serve's: `max_ongoing_requests` is far above a batch."""

    batcher: ClassVar[type[Batcher]] = Batcher

    async def __init__(self, pool: config.Pool, settings: config.Settings) -> None:  # type: ignore[misc]
        """Load and warm every pinned model, then start the batcher; ready means a forward pass ran."""
        # First: Serve calls `__del__` even when a model cannot be loaded.
        self._outlet = Outlet(self.embed, calls_max=pool.calls_max)
        observe("embedder", settings.logs)
        self._following = Following(Live(settings))
        self._name = pool.name
        self._drain_s = pool.drain_s
        self._pool = Pool(pool, clock=time.monotonic)
        self._executor = ThreadPoolExecutor(self._pool.slots, "model")
        await asyncio.get_running_loop().run_in_executor(self._executor, self._pool.load)
        self._batcher = self.batcher(
            self._pool,
            [model.id for model in pool.models],
            admission=settings.admission,
            batch=pool.batch,
            executor=self._executor,
            clock=time.monotonic,
        )
        self._task = asyncio.create_task(self._batcher.run())
        self._address = await self._listen(pool)
        self._reports_failed = 0
        self._reporting = asyncio.create_task(self._report(pool.name, settings))
        self._publishing = asyncio.create_task(
            publish(
                lambda: of_queue(self._batcher.waiting(), pool.name, self._tiers),
                lambda: of_batches(self._batcher.tally, pool.name),
                lambda: of_models(self._pool.holdings),
                lambda: of_gpu(self._pool.card_bytes(), pool.name),
                self._following.readings,
            )
        )

    @property
    def _tiers(self) -> Mapping[str, Tier]:
        return self._following.live.now.admission.tiers

    async def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Serve calls this at the start and whenever the deploy file has another `user_config`."""
        if self._following.follow(user_config):
            pools = {pool.name: pool for pool in self._following.live.now.pools}
            weights = {name: tier.weight for name, tier in self._tiers.items()}
            self._batcher.adapt(pools[self._name].batch, weights)

    async def embed(self, call: EmbedCall) -> EmbedReply:
        """See `serve.ports.Embedder`."""
        return await self._batcher.submit(call)

    async def _listen(self, pool: config.Pool) -> Address | None:
        if pool.conduits == "off":
            return None
        host = LOOPBACK
        if pool.conduits == "network":
            host = ray.util.get_node_ip_address()  # type: ignore[no-untyped-call]
        return await self._outlet.open(ray.get_runtime_context().get_node_id(), host)

    async def address(self) -> Address | None:
        """Where calls may come in without Ray's handle."""
        return self._address

    async def ready(self) -> bool:
        """Whether the batcher lives and a model works."""
        return self._batcher.healthy and not self._task.done()

    async def check_health(self) -> None:
        """Serve replaces the replica when this raises."""
        for task in (self._task, self._reporting, self._publishing):
            if task.done():
                task.result()
        self._batcher.check()

    async def __del__(self) -> None:
        """Serve awaits this once its own calls are done; those of the conduits end here."""
        await self._outlet.close(self._drain_s)

    async def stats(self) -> dict[str, float]:
        """What waits now, and counts since the replica started."""
        waiting = {
            "queued_tokens": self._batcher.queued_tokens,
            "queued_items": self._batcher.queued_items,
        }
        counts = {
            "reports_failed": self._reports_failed,
            "conduit_calls": self._outlet.calls,
            "settings_refused": bool(self._following.refused),
        }
        return waiting | counts | self._batcher.tally.counts()

    def record_autoscaling_stats(self) -> dict[str, float]:
        """What autoscaling looks at (`deployments.scaling`): what waits here, the pace, and how long each
        slot has been busy since the replica started.
        """
        return {
            "queued_tokens": self._batcher.queued_tokens,
            "tokens_per_s": self._batcher.tokens_per_s,
            "busy_s": self._batcher.tally.model_s / self._pool.slots,
        }

    async def _report(self, pool: str, settings: config.Settings) -> None:
        """Tell the Ledger what waits here, for as long as something does and once when all is done.

        A report that fails is only counted: the next one says more.
        """
        ledger, replica = LedgerPort(settings), get_replica_context().replica_tag
        told = False
        while True:
            await asyncio.sleep(settings.ledger.queue_report_s)
            if not told and not self._batcher.queued_items:
                continue
            try:
                report = self._batcher.report(pool, replica, settings.ledger.queue_places_max)
                await ledger.report_queue(report)
            except ServiceError:
                self._reports_failed += 1
            except Exception:  # a named rim: no model is reloaded because of a statistic
                log.exception("what waits could not be reported")
                self._reports_failed += 1
            else:
                told = report.items > 0
