"""The order of work under three policies, through the same batcher on the same simulated device.

fair: the service's own queue. fifo: the same code with everybody in one tenant and class. formula:
`P = base * multiplier - a * usage + b * age` of every tenant's oldest item, computed anew at each
pick, which lives here only, for comparison.
"""

import asyncio
import contextlib
import math
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from time import monotonic, perf_counter
from typing import Literal, Protocol, TypeVar, get_args

from serve.admission.fairness import Entry, FairQueue
from serve.config import Admission, Batch, Model
from serve.config import Pool as PoolSettings
from serve.embedding.pool import Pool
from serve.flows.batching import Batcher
from serve.flows.pending import Member
from serve.records import EmbedCall, EmbedReply, Klass


T = TypeVar("T")

Policy = Literal["fair", "fifo", "formula"]
POLICIES: tuple[Policy, ...] = get_args(Policy)

TOKENS_S = 60_000
"""Padded tokens that the simulated device takes in a second, on top of 6 ms a batch."""
DEVICE = Model(
    id="simulated",
    engine="fake",
    dimensions=8,
    tokens_max=2048,
    fake_ms_per_batch=6,
    fake_ms_per_token=1e3 / TOKENS_S,
)
BATCH = Batch(target_ms=50, tokens_max=4096, queue_tokens_max=10**9, queue_items_max=10**7)
"""The queue is unbounded here: this measures order, not refusal."""


class Target(Protocol):
    """What the tenants load: a batcher here, a cluster's embedder elsewhere."""

    async def embed(self, call: EmbedCall) -> EmbedReply:
        """See `serve.ports.Embedder`."""
        ...

    def handout_ms(self) -> Sequence[float]:
        """CPU time of each hand-out so far; empty where it cannot be seen."""
        ...


class TimedBatcher(Batcher):
    """The service's batcher, with a stopwatch about its hand-outs and, if need be, another queue."""

    timed_ms: Sequence[float] = ()

    def reorder(self, policy: Policy) -> None:
        """Take the policy's queue; nothing may wait yet."""
        if policy == "formula":
            self._queue = FormulaQueue(monotonic)

    def _hand_out(self) -> list[Member]:
        began = perf_counter()
        members = super()._hand_out()
        if members:
            self.timed_ms = [*self.timed_ms, (perf_counter() - began) * 1e3]
        return members
