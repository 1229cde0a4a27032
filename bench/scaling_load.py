"""Closed loops on pools of one, two, five and ten replicas: what each replica's device comes to.

The first part of `bench.scaling`. Calls take Ray's handles (`handles`), whose router chooses the replica,
or the service's conduits (`conduits`), which choose the one with least to do.
"""

import asyncio
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any, Literal, get_args

import numpy as np

from bench.processes import Clock, median_cores
from bench.report import percentile, ratios, spread, table
from bench.scaling_place import CPUS, HandOut, handle_of
from deployments.handles import EmbedderPort
from serve.config import Batch, Model, Pool
from serve.records import EmbedCall, Input


Way = Literal["handles", "conduits"]
WAYS: tuple[Way, ...] = get_args(Way)
TENANTS = 8
INPUTS, TOKENS = 16, 64
"""Of a call: half a batch."""
CALLS = 12
"""Closed loops for each replica: six batches. The fair queue mixes tenants in a batch, so that calls end in
groups; with half as many the queue is empty now and then, and the next batch not full.
"""
BATCH_TOKENS = 2 * INPUTS * TOKENS
DEADLINE_S = 600.0
QUIET_S = 0.1


@dataclass(frozen=True)
class Plan:
    """How often, how long, and how slow the devices are."""

    replicas: tuple[int, ...] = (1, 2, 5, 10)
    rounds: int = 4
    warm_s: float = 2.0
    seconds: float = 12.0
    ms_per_batch: float = 300.0
    ms_per_token: float = 0.05

    @property
    def batch_ms(self) -> float:
        """Of a full batch at the device."""
        return self.ms_per_batch + self.ms_per_token * BATCH_TOKENS

    def device_s(self, one: HandOut) -> float:
        """What the device was busy for it."""
        return (self.ms_per_batch * one.batches + self.ms_per_token * one.padded) / 1e3


@dataclass(frozen=True, slots=True)
class Pace:
    """Of one replica: tokens a second, and the part of the time that its device worked."""

    tokens_s: float
    busy: float


@dataclass(frozen=True, slots=True)
class Turn:
    """What one pool came to in one round."""

    paces: Sequence[Pace]
    handouts: Sequence[HandOut]
    calls_s: float
    call_ms: Sequence[float]
    cores: Mapping[str, float]

    @property
    def tokens_s(self) -> float:
        """Of all replicas."""
        return sum(one.tokens_s for one in self.paces)


def pools_of(plan: Plan) -> list[Pool]:
    """One for each number of replicas, all of the same device."""
    batch = Batch(target_ms=plan.batch_ms, tokens_max=BATCH_TOKENS, items_max=2 * INPUTS)
    return [
        Pool(
            name=f"x{number}",
            models=(_device(plan, number),),
            replicas=number,
            cpus=CPUS,
            batch=batch,
        )
        for number in plan.replicas
    ]


def _device(plan: Plan, replicas: int) -> Model:
    return Model(
        id=f"simulated-x{replicas}",
        engine="fake",
        dimensions=384,
        tokens_max=TOKENS,
        fake_ms_per_batch=plan.ms_per_batch,
        fake_ms_per_token=plan.ms_per_token,
    )


def pace_of(handouts: Sequence[HandOut], plan: Plan, seconds: float) -> Pace:
    """From the beginning of the first hand-out to that of the last: whole ones, with what lies between.

    Where there are fewer than two, they count for all `seconds`.
    """
    if len(handouts) < 2:
        whole, passed = handouts, seconds
    else:
        whole, passed = handouts[:-1], handouts[-1].began - handouts[0].began
    return Pace(sum(one.tokens for one in whole) / passed, sum(map(plan.device_s, whole)) / passed)


class Crowd:
    """Closed loops on one pool, by one way."""

    def __init__(self, pool: Pool, way: Way, plan: Plan) -> None:
        self._pool, self._way, self._plan = pool, way, plan
        self._handle = handle_of(pool)
        self._port = EmbedderPort(self._handle, tokens_per_s_min=500)
        self._call_ms: list[float] = []
        self._numbers = count()
        self._ids = tuple(np.arange(at, at + TOKENS, dtype=np.int32) for at in range(4 * INPUTS))

    async def play(self) -> Turn:
        """Load it, wait until all is under way, measure, and leave nothing behind.

        Raises what a call raises, and RuntimeError when calls took another way.
        """
        plan, following = self._plan, []
        if self._way == "conduits":
            following.append(asyncio.create_task(self._port.run()))
        loops = [asyncio.create_task(self._ask()) for _ in range(CALLS * self._pool.replicas)]
        try:
            await self._pass(plan.warm_s, loops)
            await self._of_all("handouts")
            self._call_ms.clear()
            began, before = await self._conduit_calls(), Clock.read()
            await self._pass(plan.seconds, loops)
            cores = Clock.read().cores(before)
            calls_s = len(self._call_ms) / plan.seconds
            handouts: Sequence[Sequence[HandOut]] = await self._of_all("handouts")
            through = await self._conduit_calls() - began
        finally:
            for task in (*loops, *following):
                task.cancel()
            await asyncio.gather(*loops, *following, return_exceptions=True)
        if (through > 0) != (self._way == "conduits"):
            raise RuntimeError(f"{self._way}: {through:.0f} calls came through conduits")
        await self._settle()
        paces = [pace_of(some, plan, plan.seconds) for some in handouts]
        whole = [one for some in handouts for one in some]
        return Turn(paces, whole, calls_s, self._call_ms, cores)

    async def _pass(self, seconds: float, loops: Sequence[asyncio.Task[None]]) -> None:
        """Some time, unless a loop fails: then what it raised."""
        done, _ = await asyncio.wait(loops, timeout=seconds, return_when=asyncio.FIRST_EXCEPTION)
        for task in done:
            task.result()

    async def _ask(self) -> None:
        while True:
            began = time.monotonic()
            reply = await self._port.embed(self._call(next(self._numbers)))
            if reply.failures or reply.vectors.shape != (INPUTS, 384):
                raise RuntimeError(f"an answer of shape {reply.vectors.shape}: {reply.failures}")
            self._call_ms.append((time.monotonic() - began) * 1e3)

    def _call(self, number: int) -> EmbedCall:
        at = number * INPUTS % len(self._ids)
        return EmbedCall(
            request_id=str(number),
            tenant=f"t{number % TENANTS}",
            weight=1.0,
            klass="interactive",
            model=self._pool.models[0].id,
            inputs=tuple(Input(ids=row) for row in self._ids[at : at + INPUTS]),
            tokens=(TOKENS,) * INPUTS,
            deadline_s=DEADLINE_S,
        )

    async def _of_all(self, method: str) -> list[Any]:
        return list(await self._handle.broadcast(method).results_async(timeout_s=30))

    async def _conduit_calls(self) -> float:
        return sum(one["conduit_calls"] for one in await self._of_all("stats"))

    async def _settle(self) -> None:
        """What was at a device when the loops ended is done."""
        while any(one["queued_items"] for one in await self._of_all("stats")):  # noqa: ASYNC110
            await asyncio.sleep(QUIET_S)
        await asyncio.sleep(self._plan.batch_ms / 1e3)


Taken = Mapping[Way, Mapping[int, list[Turn]]]


async def measure(plan: Plan, pools: Sequence[Pool]) -> Taken:
    """Every pool by every way in every round, in the opposite order each second round."""
    taken: dict[Way, dict[int, list[Turn]]] = {
        way: {pool.replicas: [] for pool in pools} for way in WAYS
    }
    crowds = [(way, pool) for pool in pools for way in WAYS]
    for number in range(plan.rounds):
        for way, pool in crowds if number % 2 == 0 else crowds[::-1]:
            taken[way][pool.replicas].append(await Crowd(pool, way, plan).play())
        print(f"efficiency: round {number + 1} done", file=sys.stderr, flush=True)
    return taken


def summary(taken: Taken) -> dict[str, Any]:
    """By way and replicas; the efficiency is to the fewest replicas, round by round."""
    return {way: _of_way(found) for way, found in taken.items()}


def _of_way(found: Mapping[int, Sequence[Turn]]) -> dict[str, Any]:
    least = min(found)
    alone = [one.tokens_s / least for one in found[least]]
    return {str(number): _of_pool(number, turns, alone) for number, turns in found.items()}


def _of_pool(number: int, turns: Sequence[Turn], alone: Sequence[float]) -> dict[str, Any]:
    handouts = [one for turn in turns for one in turn.handouts]
    call_ms = [ms for turn in turns for ms in turn.call_ms]
    return {
        "efficiency": ratios([turn.tokens_s / number for turn in turns], alone),
        "tokens_s": spread([turn.tokens_s for turn in turns]),
        "device_busy": spread([pace.busy for turn in turns for pace in turn.paces]),
        "batch_ms": spread([(one.ended - one.began) * 1e3 / one.batches for one in handouts]),
        "batch_tokens": sum(one.tokens for one in handouts) / sum(one.batches for one in handouts),
        "calls_s": spread([turn.calls_s for turn in turns]),
        "call_ms": {f"p{part * 100:.0f}": percentile(call_ms, part) for part in (0.5, 0.95)},
        "cores": median_cores([turn.cores for turn in turns]),
    }


def shown(result: Mapping[str, Mapping[str, Any]]) -> str:
    """The result for people."""
    rows = [
        [
            f"{way}, {number}",
            one["efficiency"],
            one["tokens_s"],
            one["device_busy"],
            one["batch_tokens"],
            one["call_ms"]["p50"],
            one["calls_s"]["median"],
            one["cores"]["machine"],
        ]
        for way, found in result.items()
        for number, one in found.items()
    ]
    head = (
        "way, replicas",
        "efficiency",
        "tokens/s",
        "device busy",
        "tokens/batch",
        "call p50 ms",
        "calls/s",
        "cores",
    )
    return table(head, rows)
