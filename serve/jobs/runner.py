"""Works on items: claims them, gives them to the handler of their task, settles what became of them.

Claims wait in the Store until there is something. What a worker holds is kept by a heartbeat of its
own task, which a busy handler cannot block. When the Store is away nothing is lost: a worker keeps what
it has to say until the Store is back, which gives all leases the time to be renewed; a settlement that
comes too late is refused there. Work of which the lease is over is stopped.
"""

import asyncio
import contextlib
import logging
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from serve.config import Jobs, Worker
from serve.errors import Internal, ServiceError
from serve.items import Claim, Item, Settlement, Stage, Task
from serve.job_ports import Queue
from serve.jobs.faults import Retries, fault_of, settled
from serve.telemetry import Samples


Handler = Callable[[Sequence[Item], Claim], Awaitable[Sequence[Settlement]]]
"""Works on items of one task and says what became of each. What it raises befalls all of them, but an
error that would end them for good is believed only of one that was tried by itself.
"""

Gate = Callable[[], Awaitable[float]]
"""For how many seconds nothing of a stage should be claimed; 0: it may be. Raises nothing."""

GATE_S_MAX = 1.0
"""A gate that is shut is asked so often: what it says is an estimate."""

CLAIM_WAIT_S = 20.0
"""How long a claim waits in the Store: an idle worker asks so often."""

AWAY_S = 0.5
"""Between two tries while the Store is away."""

log = logging.getLogger("headrace.worker")


@dataclass(slots=True)
class Done:
    """What a worker has done since it started.

    `words` counts settled items by task and word; `took` are the seconds of claims, by task, until they are
    read.
    """

    claimed: int = 0
    settled: int = 0
    lost: int = 0
    words: Counter[tuple[Task, str]] = field(default_factory=Counter)
    took: Samples = field(default_factory=Samples)


class Runner:
    """One worker process: for each of its stages a few claims at once."""

    def __init__(
        self,
        queue: Queue,
        handlers: Mapping[Task, Handler],
        *,
        owner: str,
        worker: Worker,
        rules: Jobs,
        retries: Retries,
        gates: Mapping[Stage, Gate],
    ) -> None:
        """`owner` is new with each process. `gates` are asked before each claim of their stage."""
        self._queue = queue
        self._handlers = handlers
        self._owner = owner
        self._worker = worker
        self._rules = rules
        self._retries = retries
        self._gates = gates
        self._held: dict[asyncio.Task[None], Claim] = {}
        self._serving: list[asyncio.Task[None]] = []
        self._turn = asyncio.Lock()
        self._working = 0
        self._rested = asyncio.Event()
        self._leaving = asyncio.Event()
        self._ended = asyncio.Event()
        self.done = Done()

    async def run(self) -> None:
        """Work until `drain`, or until cancelled. Raises only on a fault of this code."""
        try:
            async with asyncio.TaskGroup() as tasks:
                beating = tasks.create_task(self._beat())
                self._serving = [
                    tasks.create_task(self._serve(stage))
                    for stage in self._worker.stages
                    for _ in range(self._worker.claims_max)
                ]
                await asyncio.wait(self._serving)
                beating.cancel()
        finally:
            self._ended.set()

    async def drain(self, wait_s: float) -> None:
        """Claim no more, finish within `wait_s` what is held, give the rest back."""
        self._leaving.set()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._ended.wait(), wait_s)
        for task in self._serving:
            task.cancel()
        try:
            await self._queue.leave(self._owner)
        except ServiceError as error:
            log.warning("could not say that the worker leaves: %s", error)

    async def _serve(self, stage: Stage) -> None:
        while not self._leaving.is_set():
            if not await self._may_claim(stage):
                continue
            claim = await self._claim(stage)
            if not claim.items:
                continue
            self.done.claimed += len(claim.items)
            await self._hold(claim)

    async def _may_claim(self, stage: Stage) -> bool:
        """Whether the stage's gate is open; if not, after a wait or when the worker leaves."""
        gate = self._gates.get(stage)
        wait_s = 0.0 if gate is None else await gate()
        if wait_s > 0:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._leaving.wait(), min(wait_s, GATE_S_MAX))
        return wait_s <= 0

    async def _hold(self, claim: Claim) -> None:
        """Work on a claim, unless `_beat` learns that it is lost."""
        work = self._work_alone if claim.alone else self._work_beside
        async with asyncio.TaskGroup() as tasks:  # in which a task that was cancelled is no error
            task = tasks.create_task(work(claim))
            self._held[task] = claim
            task.add_done_callback(self._held.pop)

    async def _claim(self, stage: Stage) -> Claim:
        """The next items, or none when the worker leaves or the Store is away."""
        asking = asyncio.ensure_future(
            self._queue.claim(
                self._owner, stage, self._worker.items_max, self._worker.cost_max, CLAIM_WAIT_S
            )
        )
        leaving = asyncio.ensure_future(self._leaving.wait())
        try:
            await asyncio.wait([asking, leaving], return_when=asyncio.FIRST_COMPLETED)
            return asking.result() if asking.done() else Claim()
        except ServiceError as error:
            log.warning("cannot claim: %s", error)
            await asyncio.sleep(AWAY_S)
            return Claim()
        finally:
            asking.cancel()  # what it has leased all the same goes back when we `leave`
            leaving.cancel()

    async def _work_alone(self, claim: Claim) -> None:
        """While nothing else is worked on, so that it takes nothing else with it."""
        async with self._turn:
            while self._working:
                self._rested.clear()
                await self._rested.wait()
            await self._work(claim)

    async def _work_beside(self, claim: Claim) -> None:
        """Beside others, when none is alone or waits to be."""
        async with self._turn:
            self._working += 1
        try:
            await self._work(claim)
        finally:
            self._working -= 1
            self._rested.set()

    async def _work(self, claim: Claim) -> None:
        by_task: dict[Task, list[Item]] = {}
        for item in claim.items:
            by_task.setdefault(item.task, []).append(item)
        async with asyncio.TaskGroup() as tasks:
            for task, items in by_task.items():
                tasks.create_task(self._handle(task, items, claim))

    async def _handle(self, task: Task, items: Sequence[Item], claim: Claim) -> None:
        now = asyncio.get_running_loop().time
        began = now()
        try:
            settlements = list(await self._handlers[task](items, claim))
        except Exception as error:
            if not isinstance(error, ServiceError):
                log.exception("items of the task %s failed", task)
            if len(items) > 1 and fault_of(error).kind in ("invalid", "poison"):
                for item in items:
                    await self._handle(task, [item], claim)
                return
            settlements = [settled(item, error, self._retries) for item in items]
        told = {one.item for one in settlements}
        untold = [item for item in items if item.id not in told]
        if untold:
            log.error("nothing was said of %d items of the task %s", len(untold), task)
            settlements += [settled(item, Internal(), self._retries) for item in untold]
        await self._settle(task, settlements)
        self.done.took.add(now() - began, task)

    async def _settle(self, task: Task, settlements: Sequence[Settlement]) -> None:
        """Until the Store has it: while it is away, no lease ends there."""
        while True:
            try:
                applied = await self._queue.settle(settlements)
            except ServiceError as error:
                if not error.retryable:
                    await self._settle_each(task, settlements, error)
                    return
                log.warning("cannot settle %d items yet: %s", len(settlements), error)
                await asyncio.sleep(AWAY_S)
            else:
                kept = [one for one, is_kept in zip(settlements, applied, strict=True) if is_kept]
                self.done.settled += len(kept)
                self.done.lost += len(applied) - len(kept)
                self.done.words.update((task, one.word) for one in kept)
                return

    async def _settle_each(
        self, task: Task, settlements: Sequence[Settlement], error: ServiceError
    ) -> None:
        """The Store cannot keep what one of them says: that one has failed, not the others."""
        if len(settlements) > 1:
            for one in settlements:
                await self._settle(task, [one])
            return
        (one,) = settlements
        if one.fault == fault_of(error):
            log.error("cannot settle the item %d: %s", one.item, error)
            return
        log.error("cannot keep what became of the item %d: %s", one.item, error)
        blank = Settlement(one.item, one.lease, "retry", fault=fault_of(error))
        await self._settle(task, [replace(blank, delay_s=self._retries.after(1))])

    async def _beat(self) -> None:
        pause_s = self._rules.heartbeat_s
        while True:
            await asyncio.sleep(pause_s)
            pause_s = self._rules.heartbeat_s
            held = dict(self._held)  # not what is claimed meanwhile, perhaps of the same items
            try:
                ids = [item.id for claim in held.values() for item in claim.items]
                lost = await self._queue.keep(self._owner, ids)
            except ServiceError as error:
                log.warning("cannot keep the leases: %s", error)
                pause_s = min(AWAY_S, pause_s)  # a lost call and two whole pauses outlast a lease
            else:
                if lost:  # or their settlement is on its way back
                    log.info("%d items are not leased to this worker any more", len(lost))
                for task, claim in held.items():
                    if lost.issuperset(item.id for item in claim.items) and task.cancel():
                        self.done.lost += len(claim.items)
