"""Tenants that load a target: light ones that wait for answers, floods, and unequal demands.

Everything is seeded; sizes of floods are lognormal about 200 tokens. Each phase wants an idle
target and leaves nothing waiting in it.
"""

import asyncio
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from time import monotonic

import numpy as np

from bench.policies import BATCH, DEVICE, TOKENS_S, Target
from serve.records import EmbedCall, Input, Klass


TIERS: Mapping[str, float] = {"free": 1.0, "premium": 4.0, "enterprise": 16.0}
LIGHT_RATE = 20.0
"""Calls a second of a light tenant, each a single query: below a twentieth of the device."""
LIGHT_TOKENS = (8, 20)
FLOODS: Mapping[str, str] = {word: f"flood-{word}" for word in (*TIERS, "bulk")}
"""The tenants that never let up; the bulk one is of tier premium."""
FLOOD_TOKENS = 220
"""Mean of the lognormal sizes."""
BULK_INPUTS = 4
"""Of a bulk call, sized like the others: a policy that serves less bulk serves no other work."""
DEMANDS = (0.3, 0.6, 1.0, 1.6, 2.5, 4.0)
"""Of six tenants of one tier, in parts of the device: all above a sixth, so all are backlogged."""
DEMAND_TOKENS = (64, 2000, 256, 1024, 128, 512)
ASKERS = tuple(f"demand-{part}" for part in DEMANDS)
DEADLINE_S = 3600.0
DRAIN_S_MAX = 8.0
"""After a flood's end the light calls still under way are awaited this long, and then counted
with their age.
"""
_IDS = np.ones(DEVICE.tokens_max, np.int32)


@dataclass(frozen=True, slots=True)
class Tenant:
    """Who asks."""

    name: str
    tier: str
    klass: Klass = "interactive"

    def call(self, tokens: Sequence[int]) -> EmbedCall:
        """A call of inputs of these sizes, with a deadline that never bites."""
        return EmbedCall(
            request_id=self.name,
            tenant=self.name,
            weight=TIERS[self.tier],
            klass=self.klass,
            model=DEVICE.id,
            inputs=tuple(Input(ids=_IDS[:size]) for size in tokens),
            tokens=tuple(tokens),
            deadline_s=DEADLINE_S,
        )


@dataclass(slots=True)
class Waits:
    """What the light tenant of one tier met: whole calls, and their time in the queue."""

    call_ms: list[float] = field(default_factory=list)
    queue_ms: list[float] = field(default_factory=list)
    unanswered: int = 0


@dataclass(slots=True)
class Phase:
    """What came of one phase: waits by tier, and what each tenant was served."""

    seconds: float = 0.0
    waits: dict[str, Waits] = field(default_factory=lambda: {tier: Waits() for tier in TIERS})
    tokens: dict[str, int] = field(default_factory=dict)
    cost: dict[str, int] = field(default_factory=dict)
    handout_ms: Sequence[float] = ()
    open: bool = True

    @property
    def tokens_s(self) -> float:
        """Tokens answered in a second."""
        return sum(self.tokens.values()) / self.seconds

    def served(self, tenant: Tenant, tokens: Sequence[int]) -> None:
        """Count an answer, while the phase lasts."""
        if self.open:
            cost = sum(tokens) + BATCH.item_overhead_tokens * len(tokens)
            self.tokens[tenant.name] = self.tokens.get(tenant.name, 0) + sum(tokens)
            self.cost[tenant.name] = self.cost.get(tenant.name, 0) + cost


async def flood(target: Target, seed: int, *, seconds: float, backlog_s: float) -> Phase:
    """A light tenant of each tier; beside it one of each tier and a bulk one that never let up.

    Each of those keeps `backlog_s` of the device's work waiting, 0 for a quiet device.
    """
    rng, phase = random.Random(seed), Phase()
    floods: list[asyncio.Task[None]] = []
    for tenant, tokens in _floods(rng, backlog_s):
        floods.append(asyncio.create_task(_repeat(target, tenant, tokens, phase)))
    await asyncio.sleep(0)
    began = monotonic()
    light = [
        asyncio.create_task(_light(target, tier, random.Random(f"{seed} {tier}"), phase, seconds))
        for tier in TIERS
    ]
    await asyncio.sleep(seconds)
    phase.seconds, phase.open = monotonic() - began, False
    phase.handout_ms = list(target.handout_ms)
    await asyncio.gather(*light)
    await _end(floods)
    return phase


async def demand(target: Target, *, seconds: float) -> Phase:
    """Six tenants of one tier who ask for different amounts in different sizes."""
    phase = Phase()
    asking = [
        asyncio.create_task(_ask(target, Tenant(name, "premium"), part, size, phase))
        for name, part, size in zip(ASKERS, DEMANDS, DEMAND_TOKENS, strict=True)
    ]
    await asyncio.sleep(seconds)
    phase.seconds, phase.open = seconds, False
    await _end(asking)
    return phase


async def drain(target: Target, seed: int, *, backlog_s: float) -> Phase:
    """The floods' calls, all at once and each only once: every policy does the same work."""
    phase, began = Phase(), monotonic()
    async with asyncio.TaskGroup() as group:
        for tenant, tokens in _floods(random.Random(seed), backlog_s):
            group.create_task(target.embed(tenant.call(tokens)))
            phase.served(tenant, tokens)
    phase.seconds = monotonic() - began
    return phase


def _floods(rng: random.Random, backlog_s: float) -> list[tuple[Tenant, tuple[int, ...]]]:
    """The calls that flooding tenants keep waiting, in no order."""
    count = int(backlog_s * TOKENS_S) // FLOOD_TOKENS
    tenants = [Tenant(FLOODS[tier], tier) for tier in TIERS]
    bulk = Tenant(FLOODS["bulk"], "premium", "bulk")
    calls = [(tenant, _sizes(rng, 1)) for tenant in tenants for _ in range(count)]
    calls += [(bulk, _sizes(rng, BULK_INPUTS)) for _ in range(count // BULK_INPUTS)]
    rng.shuffle(calls)
    return calls


def _sizes(rng: random.Random, count: int) -> tuple[int, ...]:
    """Lognormal about 200 tokens."""
    return tuple(int(min(max(rng.lognormvariate(5.3, 0.5), 8), 512)) for _ in range(count))


async def _repeat(target: Target, tenant: Tenant, tokens: Sequence[int], phase: Phase) -> None:
    """One of a flood's calls, sent again as soon as it is answered."""
    while True:
        await target.embed(tenant.call(tokens))
        phase.served(tenant, tokens)


async def _light(
    target: Target, tier: str, rng: random.Random, phase: Phase, seconds: float
) -> None:
    """Calls at random moments, whatever became of those before; then wait for the last."""
    tenant, until = Tenant(f"light-{tier}", tier), monotonic() + seconds
    under_way: dict[asyncio.Task[None], float] = {}
    at = monotonic()
    while (at := at + rng.expovariate(LIGHT_RATE)) < until:
        await asyncio.sleep(max(at - monotonic(), 0))
        task = asyncio.create_task(_once(target, tenant, (rng.randint(*LIGHT_TOKENS),), phase))
        under_way[task] = monotonic()
    await asyncio.sleep(max(until - monotonic(), 0))
    if under_way:
        _, late = await asyncio.wait(under_way, timeout=DRAIN_S_MAX)
        waits, now = phase.waits[tier], monotonic()
        waits.unanswered += len(late)
        waits.call_ms += [(now - under_way[task]) * 1e3 for task in late]
        waits.queue_ms += [(now - under_way[task]) * 1e3 for task in late]
        await _end(list(under_way))


async def _once(target: Target, tenant: Tenant, tokens: Sequence[int], phase: Phase) -> None:
    began = monotonic()
    reply = await target.embed(tenant.call(tokens))
    phase.waits[tenant.tier].call_ms.append((monotonic() - began) * 1e3)
    phase.waits[tenant.tier].queue_ms.append(reply.queue_ms)
    phase.served(tenant, tokens)


async def _ask(target: Target, tenant: Tenant, part: float, tokens: int, phase: Phase) -> None:
    """Equal calls at equal distances, whatever became of those before."""

    async def one() -> None:
        await target.embed(tenant.call((tokens,)))
        phase.served(tenant, (tokens,))

    async with asyncio.TaskGroup() as group:
        at = monotonic()
        while True:
            group.create_task(one())
            at += tokens / (part * TOKENS_S)
            await asyncio.sleep(max(at - monotonic(), 0))


async def _end(tasks: Sequence[asyncio.Task[None]]) -> None:
    """Cancel what still runs. Raises what a task raised: a refused call is no measurement."""
    for task in tasks:
        task.cancel()
    for outcome in await asyncio.gather(*tasks, return_exceptions=True):
        if isinstance(outcome, Exception):
            raise outcome
