"""The order of work under three policies, through the same batcher on the same simulated device.

fair: the service's own queue. fifo: the same code with everybody in one tenant and one class.
formula: `bench.formula`. All run in this process and in real time; the device sleeps.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import replace
from time import monotonic, perf_counter
from typing import Literal, Protocol, get_args

from bench.formula import FormulaQueue
from serve.config import Admission, Batch, Model
from serve.config import Pool as PoolSettings
from serve.embedding.pool import Pool
from serve.flows.batching import Batcher
from serve.flows.pending import Slice
from serve.records import EmbedCall, EmbedReply


Policy = Literal["fair", "fifo", "formula"]
POLICIES: tuple[Policy, ...] = get_args(Policy)

TOKENS_S = 60_000
"""Padded tokens that the simulated device takes in a second, beside 6 ms for each batch."""
DEVICE = Model(
    id="simulated",
    engine="fake",
    dimensions=8,
    tokens_max=2048,
    fake_ms_per_batch=6,
    fake_ms_per_token=1e3 / TOKENS_S,
)
BATCH = Batch(
    target_ms=50,
    tokens_max=2048,
    queue_tokens_max=10**9,
    queue_items_max=10**7,
    tenant_tokens_max=10**9,
    tenant_items_max=10**7,
)
"""The queue has room for every flood: this measures order, not refusal."""


class Target(Protocol):
    """What the tenants load: a batcher in this process, or a cluster's embedders."""

    async def embed(self, call: EmbedCall) -> EmbedReply:
        """See `serve.ports.Embedder`."""
        ...

    @property
    def handout_ms(self) -> Sequence[float]:
        """How long each hand-out took; empty where that cannot be seen."""
        ...


Opener = Callable[[Policy], AbstractAsyncContextManager[Target]]
"""Gives an idle target under a policy."""


class TimedBatcher(Batcher):
    """The service's batcher with a stopwatch about its hand-outs at the device."""

    def __init__(self, pool: Pool, executor: ThreadPoolExecutor, policy: Policy) -> None:
        super().__init__(
            pool,
            [DEVICE.id],
            admission=Admission(),
            batch=BATCH,
            executor=executor,
            clock=monotonic,
        )
        self.handout_ms: list[float] = []
        self._policy = policy
        if policy == "formula":
            self._queue = FormulaQueue(monotonic)

    async def embed(self, call: EmbedCall) -> EmbedReply:
        """Submit, under `fifo` without saying who asks."""
        if self._policy == "fifo":
            call = replace(call, tenant="everybody", klass="interactive", weight=1.0)
        return await self.submit(call)

    async def _serve(self, slices: Sequence[Slice], *, full: bool) -> None:
        began = perf_counter()
        await super()._serve(slices, full=full)
        self.handout_ms.append((perf_counter() - began) * 1e3)


@asynccontextmanager
async def simulated(policy: Policy) -> AsyncIterator[Target]:
    """A batcher of its own, empty and warm."""
    with ThreadPoolExecutor(1, "device") as executor:
        pool = Pool(PoolSettings(models=(DEVICE,), batch=BATCH), clock=monotonic)
        await asyncio.get_running_loop().run_in_executor(executor, pool.load)
        batcher = TimedBatcher(pool, executor, policy)
        task = asyncio.create_task(batcher.run())
        try:
            yield batcher
        finally:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
