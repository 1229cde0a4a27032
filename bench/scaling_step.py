"""A backlog arrives at once, the service's own policy makes replicas of it, and they leave.

The second part of `bench.scaling`. `stored` is a job in the Store, done by the service's worker and followed
to its end; `queued` are calls that all wait in the one replica there is, and leave once the others run:
what waits in a replica stays there, so that more of them cannot drain it.
"""

import asyncio
import contextlib
import json
import sys
import time
import urllib.request
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import numpy as np
import ray.serve
from ray.serve.schema import ReplicaState

from bench.processes import Clock
from bench.scaling_place import APPLICATION, CPUS, HandOut, Place, Start, handle_of
from deployments.handles import EmbedderPort, LedgerPort
from serve.config import Batch, Chunking, Ingress, Model, Pool, PoolScaling, Worker
from serve.records import EmbedCall, Input
from serve.scaling import Decision


Kind = Literal["stored", "queued"]
KINDS: tuple[Kind, ...] = get_args(Kind)
TOKENS, OVERHEAD = 256, 32
"""Of a document, and what its fixed work counts for (`batch.item_overhead_tokens`)."""
TOGETHER = 2
"""Documents of a batch."""
IN_A_CALL = 16
"""Documents of a call of a `queued` step: few calls, since each costs the handle ms of CPU."""
LOOK_S = 0.25
STEP_S_MAX = 600.0
CALLS_MAX = 64
"""Calls of a worker under way: some for each of ten replicas, while others' vectors land."""


@dataclass(frozen=True)
class Plan:
    """The rule, the device, and how often.

    A step is `part` of what the most replicas drain in the time that is aimed at. By `warm` documents
    before the first one the pool learns its pace.
    """

    steps: int = 2
    kinds: tuple[Kind, ...] = KINDS
    part: float = 0.95
    warm: int = 24
    most: int = 10
    drain_s: float = 20.0
    up_s: float = 2.0
    down_s: float = 5.0
    ms_per_batch: float = 300.0
    ms_per_token: float = 0.5

    @property
    def batch_s(self) -> float:
        """Of a full batch at the device."""
        return (self.ms_per_batch + self.ms_per_token * TOGETHER * TOKENS) / 1e3

    @property
    def documents(self) -> int:
        """Of a step."""
        pace = TOGETHER / self.batch_s
        return max(int(self.part * self.most * self.drain_s * pace), 1)

    @property
    def alone_s(self) -> float:
        """What one device needs for a step."""
        return self.documents / TOGETHER * self.batch_s


def pool_of(plan: Plan) -> Pool:
    """The pool that is scaled."""
    model = Model(
        id="simulated",
        engine="fake",
        dimensions=384,
        tokens_max=TOKENS,
        fake_ms_per_batch=plan.ms_per_batch,
        fake_ms_per_token=plan.ms_per_token,
    )
    rule = PoolScaling(
        min=1, max=plan.most, drain_s=plan.drain_s, up_s=plan.up_s, down_s=plan.down_s
    )
    batch = Batch(
        target_ms=plan.batch_s * 1e3, tokens_max=TOGETHER * TOKENS, item_overhead_tokens=OVERHEAD
    )
    return Pool(name="scaled", models=(model,), autoscaling=rule, cpus=CPUS, batch=batch)


def changes() -> dict[str, Any]:
    """Of the settings: calls of one batch each, many under way, a chunk for each document."""
    claims = 8
    return {
        "ingress": Ingress(
            slice_tokens=TOGETHER * TOKENS, slices_in_flight_max=CALLS_MAX // claims
        ),
        "workers": (Worker(claims_max=claims, items_max=TOGETHER * CALLS_MAX // claims),),
        "chunking": Chunking(tokens=TOKENS - 2, overlap=0),
    }


@dataclass(frozen=True, slots=True)
class Seen:
    """Replicas at a time: that are wanted (they start or run), and that run."""

    at: float
    wanted: int
    running: int


@dataclass(slots=True)
class Step:
    """One step. All times are of the machine's monotonic clock."""

    arrived: float
    seen: list[Seen] = field(default_factory=list)
    decisions: list[Decision] = field(default_factory=list)
    starts: dict[str, Start] = field(default_factory=dict)
    handouts: Sequence[HandOut] = ()
    done: float = 0.0
    cores: Mapping[str, float] = field(default_factory=dict)


class Watch:
    """Looks at the pool's replicas, and at what its policy tells, until it ends."""

    def __init__(self, place: Place, pool: Pool) -> None:
        self._deployment = f"embedder-{pool.name}"
        self._ledger = LedgerPort(place.settings)
        self.seen: list[Seen] = []
        self.decisions: list[Decision] = []

    @asynccontextmanager
    async def open(self) -> AsyncIterator["Watch"]:
        """Looking."""
        task = asyncio.create_task(self._look())
        try:
            yield self
        finally:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task

    async def until(self, holds: Callable[[Seen], bool]) -> Seen:
        """The first look from now on of which it holds. Raises TimeoutError."""
        at = len(self.seen)
        async with asyncio.timeout(STEP_S_MAX):
            while True:
                for one in self.seen[at:]:
                    if holds(one):
                        return one
                at = len(self.seen)
                await asyncio.sleep(LOOK_S)

    async def _look(self) -> None:
        while True:
            began = time.monotonic()
            self.seen.append(await asyncio.to_thread(self._count))
            for one in await self._ledger.decisions():
                if one.deployment == self._deployment and one not in self.decisions[-1:]:
                    self.decisions.append(one)
            await asyncio.sleep(max(began + LOOK_S - time.monotonic(), 0.0))

    def _count(self) -> Seen:
        at = time.monotonic()
        states = ray.serve.status().applications[APPLICATION].deployments[self._deployment]
        counts = states.replica_states
        running = counts.get(ReplicaState.RUNNING, 0)
        return Seen(at, running + counts.get(ReplicaState.STARTING, 0), running)


class Steps:
    """Steps of a backlog at one pool."""

    def __init__(self, place: Place, pool: Pool, plan: Plan) -> None:
        self._place, self._pool, self._plan = place, pool, plan
        self._handle = handle_of(pool)

    async def prepare(self) -> None:
        """A collection, and a pool that knows its pace."""
        await self._post("/v1/collections", {"name": "bench", "model": self._pool.models[0].id})
        await self._ended(await self._submit("warm", self._plan.warm))

    async def take(self, kind: Kind, number: int) -> Step:
        """One step, from the least replicas back to them."""
        async with Watch(self._place, self._pool).open() as watch:
            await watch.until(lambda one: one.wanted == one.running == 1)
            await self._of_all("handouts")
            before = Clock.read()
            if kind == "stored":
                step = await self._stored(watch, f"{number}")
            else:
                step = await self._queued(watch)
            step.cores = Clock.read().cores(before)
            await watch.until(lambda one: one.wanted == one.running == 1)
            step.seen = [one for one in watch.seen if one.at >= step.arrived]
            step.decisions = watch.decisions
            return step

    async def _stored(self, watch: Watch, name: str) -> Step:
        job = await self._submit(name, self._plan.documents)
        step = Step(time.monotonic())
        ending = asyncio.create_task(self._ended(job))
        try:
            await self._all_run(watch, step)
            step.done = await ending
        finally:
            ending.cancel()
        await self._ask(step)
        step.handouts = [one for some in await self._of_all("handouts") for one in some]
        return step

    async def _queued(self, watch: Watch) -> Step:
        port = EmbedderPort(self._handle, tokens_per_s_min=500)
        ids = tuple(Input(ids=np.ones(TOKENS, np.int32)) for _ in range(IN_A_CALL))
        step = Step(time.monotonic())
        calls = [
            asyncio.create_task(port.embed(self._call(n, ids)))
            for n in range(max(self._plan.documents // IN_A_CALL, 1))
        ]
        try:
            await self._all_run(watch, step)
        finally:
            for task in calls:
                task.cancel()
            await asyncio.gather(*calls, return_exceptions=True)
        step.done = time.monotonic()
        return step

    def _call(self, number: int, inputs: tuple[Input, ...]) -> EmbedCall:
        return EmbedCall(
            request_id=str(number),
            tenant="bench",
            weight=1.0,
            klass="bulk",
            model=self._pool.models[0].id,
            inputs=inputs,
            tokens=(TOKENS,) * len(inputs),
            deadline_s=1800,
        )

    async def _all_run(self, watch: Watch, step: Step) -> None:
        """Wait until more run than before, and as many as are wanted."""
        await watch.until(lambda one: 1 < one.wanted == one.running)
        await self._ask(step)

    async def _ask(self, step: Step) -> None:
        """How the replicas that run came up."""
        step.starts |= {one.replica: one for one in await self._of_all("start")}

    async def _of_all(self, method: str) -> list[Any]:
        return list(await self._handle.broadcast(method).results_async(timeout_s=60))

    async def _submit(self, name: str, documents: int) -> str:
        items = [
            {"id": f"{name}-{n}", "text": f"{name} {n} ".ljust(TOKENS - 2, "x")}
            for n in range(documents)
        ]
        body = {"kind": "documents", "collection": "bench", "items": items}
        made = await self._post("/v1/jobs", body)
        return str(made["id"])

    async def _ended(self, job: str) -> float:
        """When all its items are embedded and have landed. Raises RuntimeError when one has not."""
        while not (found := await self._get(f"/v1/jobs/{job}"))["is_complete"]:  # noqa: ASYNC110
            await asyncio.sleep(LOOK_S)
        if found["failed"]:
            raise RuntimeError(f"{found['failed']} documents failed")
        return time.monotonic()

    async def _post(self, path: str, body: Mapping[str, Any]) -> Any:
        return await asyncio.to_thread(self._http, path, json.dumps(body).encode())

    async def _get(self, path: str) -> Any:
        return await asyncio.to_thread(self._http, path, None)

    def _http(self, path: str, body: bytes | None) -> Any:
        headers = {
            "authorization": f"Bearer {self._place.key}",
            "content-type": "application/json",
        }
        request = urllib.request.Request(f"{self._place.url}{path}", body, headers)  # noqa: S310
        with urllib.request.urlopen(request, timeout=120) as reply:  # noqa: S310  our own server
            return json.load(reply)


async def measure(place: Place, pool: Pool, plan: Plan) -> dict[Kind, list[Step]]:
    """Steps of both kinds by turns."""
    steps = Steps(place, pool, plan)
    await steps.prepare()
    taken: dict[Kind, list[Step]] = {kind: [] for kind in plan.kinds}
    for number in range(plan.steps):
        for kind, found in taken.items():
            found.append(await steps.take(kind, number))
            print(f"decision: {kind} step {number + 1} done", file=sys.stderr, flush=True)
    return taken
