"""The service with one embedder pool a policy, all of the same model: policies take turns within
one cluster, and a caller chooses one by the model's name. For `bench.fairness`; `build` is what
its deploy file names.

fair: the service as it is. fifo: the same batcher with everybody in one tenant and one class.
serve_batch: Ray's own `@serve.batch`, whole calls in order of arrival. strict: the highest tier
first. formula: `bench.formula`.
"""

import asyncio
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
from ray.serve import Application, batch

from bench.crowd import Policy
from bench.formula import FormulaQueue, StrictQueue
from deployments.app import compose
from deployments.embedder import Embedder
from serve import config
from serve.config import Settings
from serve.embedding.packing import plan
from serve.embedding.pool import Pool
from serve.flows.batching import Batcher
from serve.flows.pending import Slice
from serve.records import EmbedCall, EmbedReply


CALLS_MAX = 4
"""Of one `@serve.batch` batch. It cannot cut a call: more of them only lengthen the waits."""
BATCH_WAIT_S = 0.01


class Counts:
    """What each tenant was given, in cost and tokens, and how long each hand-out took."""

    def __init__(self, overhead: int) -> None:
        self._overhead = overhead
        self.cost: dict[str, float] = {}
        self.tokens: dict[str, int] = {}
        self.handout_ms: list[float] = []

    def add(self, tenant: str, tokens: int) -> None:
        """One input."""
        self.cost[tenant] = self.cost.get(tenant, 0) + tokens + self._overhead
        self.tokens[tenant] = self.tokens.get(tenant, 0) + tokens

    def take(self) -> dict[str, Any]:
        """What came since the last time."""
        taken = {"cost": self.cost, "tokens": self.tokens, "handout_ms": self.handout_ms}
        self.cost, self.tokens, self.handout_ms = {}, {}, []
        return taken


class Counted(Batcher):
    """The service's batcher, which notes what it hands out."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.counts = Counts(kwargs["batch"].item_overhead_tokens)

    async def _serve(self, slices: Sequence[Slice], *, full: bool) -> None:
        began = time.monotonic()
        for part in slices:
            call = part.pending.call
            for index in part.indices:
                self.counts.add(call.request_id.partition(":")[0], call.tokens[index])
        await super()._serve(slices, full=full)
        self.counts.handout_ms.append((time.monotonic() - began) * 1e3)


class StrictBatcher(Counted):
    """The highest tier first."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._queue = StrictQueue(time.monotonic)


class FormulaBatcher(Counted):
    """The priority formula, at its own speed."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._queue = FormulaQueue(time.monotonic)


class Fair(Embedder):
    """The service's embedder, counted."""

    batcher = Counted

    async def embed(self, call: EmbedCall) -> EmbedReply:
        """The request id carries the payer, because a policy may hide the tenant."""
        return await super().embed(replace(call, request_id=f"{call.tenant}:{call.request_id}"))

    async def counts(self) -> dict[str, Any]:
        """What was given since the last time."""
        counts: Counts = self._batcher.counts
        return counts.take()


class Fifo(Fair):
    """Everybody is one tenant of one class."""

    async def embed(self, call: EmbedCall) -> EmbedReply:
        """Without saying who asks."""
        named = replace(call, request_id=f"{call.tenant}:{call.request_id}")
        everybody = replace(named, tenant="everybody", klass="interactive", weight=1.0, priority=0)
        return await Embedder.embed(self, everybody)


class Strict(Fair):
    """The highest tier first."""

    batcher = StrictBatcher


class Formula(Fair):
    """The priority formula."""

    batcher = FormulaBatcher


class ServeBatch:
    """`@serve.batch` over whole calls, packed by length like ours."""

    async def __init__(self, pool: config.Pool, settings: Settings) -> None:
        """Load the model."""
        del settings
        self._budget = pool.batch
        self._executor = ThreadPoolExecutor(1, "model")
        self._pool = Pool(pool, clock=time.monotonic)
        self._slots = ThreadPoolExecutor(self._pool.slots, "slot")
        await asyncio.get_running_loop().run_in_executor(self._executor, self._pool.load)
        self._counts = Counts(pool.batch.item_overhead_tokens)

    async def embed(self, call: EmbedCall) -> EmbedReply:
        """Wait for a batch."""
        arrived = time.monotonic()
        vectors, started = await self._batch(call)
        now = time.monotonic()
        return EmbedReply(vectors, (), (started - arrived) * 1e3, (now - started) * 1e3)

    @batch(max_batch_size=CALLS_MAX, batch_wait_timeout_s=BATCH_WAIT_S)
    async def _batch(self, calls: list[EmbedCall]) -> list[Any]:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._executor, self._forward, calls)

    def _forward(self, calls: list[EmbedCall]) -> list[Any]:
        began = time.monotonic()
        inputs = [one for call in calls for one in call.inputs]
        tokens = [count for call in calls for count in call.tokens]
        engine = self._pool.engine(calls[0].model)
        rows = np.zeros((len(inputs), engine.dimensions), np.float32)
        profile = self._pool.profile(calls[0].model)
        assert profile is not None, "the pool is loaded"
        groups = plan(
            tokens,
            overhead=profile.pace.overhead,
            tokens_max=self._budget.tokens_max,
            items_max=self._budget.items_max,
            row_tokens=engine.row_tokens,
        )
        given = ([inputs[index] for index in group] for group in groups)
        for group, found in zip(groups, self._slots.map(engine.forward, given), strict=True):
            rows[group] = found
        self._counts.handout_ms.append((time.monotonic() - began) * 1e3)
        parts: list[Any] = []
        for call in calls:
            for count in call.tokens:
                self._counts.add(call.tenant, count)
            parts.append((rows[: len(call.inputs)], began))
            rows = rows[len(call.inputs) :]
        return parts

    async def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Nothing of it can change while it runs."""

    async def ready(self) -> bool:
        """It has loaded."""
        return True

    async def counts(self) -> dict[str, Any]:
        """What was given since the last time."""
        return self._counts.take()


EMBEDDERS: Mapping[Policy, type] = {
    "fair": Fair,
    "fifo": Fifo,
    "serve_batch": ServeBatch,
    "strict": Strict,
    "formula": Formula,
}


def build(args: Settings) -> Application:
    """The service, with the embedder that each pool's name stands for."""
    return compose(args, EMBEDDERS)
