"""The embedder: a Serve deployment per pool; models, a fair queue and a batcher in each replica."""

import asyncio
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict

from serve import config
from serve.embedding.pool import Pool
from serve.errors import ModelUnavailable
from serve.flows.batching import Batcher
from serve.records import EmbedCall, EmbedReply


class Embedder:
    """Requests wait in its own queue, not in Serve's: `max_ongoing_requests` is far above a batch."""

    async def __init__(self, pool: config.Pool, admission: config.Admission) -> None:  # type: ignore[misc]
        """Load and warm every model, then start the batcher; ready means a forward pass ran."""
        self._executor = ThreadPoolExecutor(1, "model")  # one slot: two pools of threads fight
        self._pool = Pool(pool, clock=time.monotonic)
        await asyncio.get_running_loop().run_in_executor(self._executor, self._pool.load)
        self._batcher = Batcher(
            self._pool,
            [model.id for model in pool.models],
            admission=admission,
            batch=pool.batch,
            executor=self._executor,
            clock=time.monotonic,
        )
        self._task = asyncio.create_task(self._batcher.run())

    async def embed(self, call: EmbedCall) -> EmbedReply:
        """See `serve.ports.Embedder`."""
        return await self._batcher.submit(call)

    async def ready(self) -> bool:
        """Whether the batcher lives and the models answer."""
        return self._batcher.healthy and not self._task.done()

    async def check_health(self) -> None:
        """Serve replaces the replica when this raises."""
        if self._task.done():
            self._task.result()
        if not self._batcher.healthy:
            raise ModelUnavailable("A model fails on its warm-up input.")

    async def stats(self) -> dict[str, float]:
        """What waits now, and counts since the replica started."""
        waiting = {
            "queued_tokens": self._batcher.queued_tokens,
            "queued_items": self._batcher.queued_items,
        }
        return waiting | asdict(self._batcher.tally)

    def record_autoscaling_stats(self) -> dict[str, float]:
        """What autoscaling looks at: the cost that waits here."""
        return {"queued_tokens": self._batcher.queued_tokens}
