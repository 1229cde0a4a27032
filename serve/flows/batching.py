"""From waiting calls to vectors: fair queue -> hand-out -> planned batches -> model.

One `Batcher` stands in each embedder replica, in front of the model's slots. A hand-out is formed
only when a slot is free, so batches grow by themselves under load, and only then. `recovery` runs
batches, `loading` loads models beside them; `deployments.embedder` owns `run` and asks `check`.
"""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor

import numpy as np

from serve.admission.fairness import FairQueue
from serve.admission.outlook import tenants_waiting
from serve.config import Admission, Batch
from serve.embedding.packing import Room, pack
from serve.errors import DeadlineExceeded, ModelUnavailable
from serve.flows.costs import Costs
from serve.flows.loading import Loads
from serve.flows.parking import Parked
from serve.flows.pending import Member, Pending, Slice, Tally, tokens_of
from serve.flows.recovery import Engines, Ran, Runner, gone
from serve.flows.refusals import admit
from serve.flows.slots import Slots
from serve.flows.turns import Rank, Waiting, outlook, waiting
from serve.records import EmbedCall, EmbedReply, QueueReport


class Batcher:
    """Orders calls fairly, batches them by tokens, isolates what fails.

    A model that fails on a known good input leaves its calls unanswered but for ModelUnavailable,
    and is loaded again. `healthy` turns false for good when that did not help or does not end and no
    other model works, when a pass does not return, or when `run` ends; from then on every call,
    waiting or new, is answered with ModelUnavailable. `loader` is the thread of loads; None is the event loop's own.
    `executor` has a thread for each of the engines' slots.
    """

    def __init__(
        self,
        engines: Engines,
        models: Sequence[str],
        *,
        admission: Admission,
        batch: Batch,
        executor: Executor,
        clock: Callable[[], float],
        loader: Executor | None = None,
    ) -> None:
        self._engines = engines
        self._holdings = engines.holdings
        self._batch = batch
        self._clock = clock
        self._queue: FairQueue[Slice] = FairQueue(
            {"interactive": admission.interactive_share, "bulk": admission.bulk_share}
        )
        self._parked = Parked()
        self._slots = Slots(engines.slots, beside_min=batch.tokens_min)
        overhead = batch.item_overhead_tokens
        self._costs = Costs(models, item_overhead_tokens=overhead, slots=engines.slots)
        self._wake = asyncio.Event()
        self._calls: set[Pending] = set()
        self.healthy = True
        self.tally = Tally()
        self._runner = Runner(
            engines,
            self._costs.paces,
            batch=batch,
            executor=executor,
            clock=clock,
            tally=self.tally,
        )
        self._loads = Loads(engines, executor=loader, clock=clock)
        for model in models:
            self._fit(model)

    # --- arriving -------------------------------------------------------------------------

    async def submit(self, call: EmbedCall) -> EmbedReply:
        """Wait for the call's vectors; cancelling this drops what has not started.

        Raises NotFound, BadInput (it exceeds a queue's cap by itself), QuotaExceeded (the tenant's
        queue is full), Overloaded (the queue is, or the predicted wait exceeds the deadline),
        DeadlineExceeded, ModelUnavailable.
        """
        if not self.healthy:
            raise gone()
        may_run = self._holdings.enter(call.model, self._clock())
        try:
            own_s = admit(
                call,
                self._queue,
                self._parked,
                batch=self._batch,
                costs=self._costs,
                busy_s=self._busy_s(),
            )
            pending = Pending.of(call, own_s, self._clock())
        except BaseException:
            self._leave(call.model, used=may_run)
            raise
        self._calls.add(pending)
        try:
            if may_run:
                self._enqueue(pending)
            else:
                self._park(pending)
            self._watch(pending)
            return await pending.done
        except DeadlineExceeded:
            self.tally.expired += 1
            raise
        finally:
            self._calls.discard(pending)
            self._withdraw(pending)

    def _park(self, pending: Pending) -> None:
        """Its model has to be loaded, or to leave and come back."""
        call = pending.call
        self._parked.add(pending, self._costs.cost(call.model, sum(call.tokens), len(call.inputs)))
        self._loads.look()

    def _enqueue(self, pending: Pending) -> None:
        """Cut a call into queue items of like length, each well below a hand-out."""
        call, batch = pending.call, self._batch
        dimensions = self._engines.engine(call.model).dimensions
        pending.vectors = np.zeros((len(call.inputs), dimensions), np.float32)
        pending.finish(self._clock())  # a call without inputs
        tokens_max = min(batch.tokens_min, batch.tokens_max)
        for group in pack(call.tokens, tokens_max=tokens_max, items_max=batch.items_max):
            tokens = sum(call.tokens[index] for index in group)
            entry = self._queue.push(
                call.klass,
                call.tenant,
                weight=call.weight,
                cost=self._costs.cost(call.model, tokens, len(group)),
                item=Slice(pending, tuple(group)),
                count=len(group),
                priority=call.priority,
            )
            pending.entries.append(entry)
        self._wake.set()

    def _watch(self, pending: Pending) -> None:
        """Answer a call as soon as it expires, unless all its work is done or at the model."""
        left_s = pending.expires - self._clock()
        if left_s > 0:
            loop = asyncio.get_running_loop()
            pending.timer = loop.call_later(left_s, self._watch, pending)
        elif pending.unbegun or not pending.call.inputs:  # one without inputs waits for its model
            pending.live(self._clock())

    def _withdraw(self, pending: Pending) -> None:
        """Whatever still waits of a call that ended is dropped and its cost given back."""
        if pending.timer is not None:
            pending.timer.cancel()
        for entry in pending.entries:
            if entry.waiting:
                self.tally.dropped += entry.count
                self._queue.cancel(entry)
        parked = self._parked.remove(pending)
        self.tally.dropped += pending.unbegun if parked else 0
        self._leave(pending.call.model, used=not parked)

    def _leave(self, model: str, *, used: bool) -> None:
        """A call has ended: its model may leave for others, or need not be loaded any more."""
        if used:
            self._holdings.leave(model, self._clock())
        elif not self._parked.waits(model):
            self._holdings.forget(model, self._clock())
            self._unpark()
        if not self._holdings.settled:
            self._loads.look()

    # --- models that come and go ----------------------------------------------------------

    async def _keep(self) -> None:
        """Load and unload what is wanted and what is not. One task runs this."""
        async for done in self._loads.run():
            if done.error is not None:
                self._refuse(done.step.model, done.error)
            elif done.step.word == "load":
                self._fit(done.step.model)
            for model in filter(self._holdings.is_open, done.broken):
                self._broke(model)
            self._unpark()

    def _fit(self, model: str) -> None:
        """Reckon with what was measured of a model, if it was."""
        profile = self._engines.profile(model)
        if profile is not None:
            self._costs.fit(model, profile.pace)
            self._runner.fit(model, profile.budget_tokens)

    def _unpark(self) -> None:
        """Queue the calls of every model that may run."""
        for model in self._parked.models:
            if self._holdings.is_open(model):
                for pending in self._parked.of(model):
                    self._parked.remove(pending)
                    self._holdings.enter(model, self._clock())
                    self._enqueue(pending)

    def _refuse(self, model: str, error: ModelUnavailable) -> None:
        """Answer every call of a model; give up when no model works any more."""
        for pending in self._calls:
            if pending.call.model == model:
                pending.fail(ModelUnavailable(error.message, retry_after_s=error.retry_after_s))
        if self._holdings.lost:
            self._give_up()

    def _broke(self, model: str) -> None:
        now = self._clock()
        self._holdings.broke(model, now)
        retry_s = self._holdings.retry_s(model, now)
        broken = "The model failed and is loaded again."
        self._refuse(model, ModelUnavailable(broken, retry_after_s=retry_s))
        self._loads.look()

    def check(self) -> None:
        """Raises ModelUnavailable when the replica is of no use any more; asked again and again."""
        try:
            self._runner.check()
            self._holdings.check(self._clock())
        except ModelUnavailable:
            self._give_up()
            raise
        if not self.healthy:
            raise ModelUnavailable("No model works.")

    # --- the model's side -----------------------------------------------------------------

    async def run(self) -> None:
        """Serve until cancelled. One task runs this; nothing of a batch's failure ends it.

        Should it end all the same, no caller is left waiting.
        """
        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(self._slots.number):
                    group.create_task(self._hand_outs())
                group.create_task(self._keep())
        finally:
            self._give_up()

    async def _hand_outs(self) -> None:
        while True:
            slices = self._hand_out() if self._slots.takes(self._queue.cost) else []
            if slices:
                await self._serve(slices, full=self._queue.items > 0)
            else:
                self._wake.clear()
                await self._wake.wait()
            await asyncio.sleep(0)  # arrivals of the same turn of the loop join the hand-out

    def _give_up(self) -> None:
        """Nothing will be served any more: say so to everyone who waits, and to the owner."""
        self.healthy = False
        for pending in self._calls:
            pending.fail(gone())

    def _hand_out(self) -> list[Slice]:
        """Slices of one model in fair order, bounded in predicted milliseconds."""
        now = self._clock()
        model = ""
        room: Room | None = None

        def admits(part: Slice) -> bool:
            nonlocal model, room
            if room is None:
                model = part.pending.call.model
                room = self._room(model)
            return part.pending.call.model == model and room.admits(part.tokens)

        def live(part: Slice) -> bool:
            alive = part.pending.live(now)
            self.tally.dropped += 0 if alive else len(part.indices)
            return alive

        slices = self._queue.take(admits, live)
        for part in slices:
            part.pending.begin(now, self.tally)
        return slices

    def _room(self, model: str) -> Room:
        """A hand-out of the target's time, or of `tokens_min` where those take longer."""
        pace, batch = self._costs.paces[model], self._batch
        return Room(
            overhead=pace.overhead,
            load_aim=max(pace.load_in(batch.target_ms / 1e3), pace.overhead + batch.tokens_min),
            tokens_max=self._runner.budget(model),
            items_max=batch.items_max,
            row_tokens=self._engines.engine(model).row_tokens,
        )

    async def _serve(self, slices: Sequence[Slice], *, full: bool) -> None:
        """Run a hand-out, the batch of the shortest inputs first: most callers wait least.

        A full one, after which something still waited, says what the queue's cost takes.
        """
        members = [(part.pending, index) for part in slices for index in part.indices]
        tokens = [tokens_of(member) for member in members]
        model = members[0][0].call.model
        pace, began, repeated = self._costs.paces[model], self._clock(), self.tally.repeated
        batches = self._runner.plan(model, tokens)
        visit = self._slots.enter(began + sum(pace.seconds(batch.padded) for batch in batches))
        self._holdings.hold(model)  # callers may leave while their work is at it
        for batch in reversed(batches):
            await self._run(model, [members[item] for item in batch.items])
        took_s = (self._clock() - began) / self._slots.busy  # others worked meanwhile
        self._slots.leave(visit)
        self._leave(model, used=True)
        self.tally.handouts += 1
        if full and self.tally.repeated == repeated:
            self._costs.rate.learn(self._costs.cost(model, sum(tokens), len(tokens)), took_s)

    async def _run(self, model: str, members: list[Member]) -> None:
        """One batch, of those who still wait for it; the rest is refunded."""
        now = self._clock()
        awaited = []
        for member in members:
            if member[0].live(now):
                member[0].unbegun -= 1
                awaited.append(member)
            else:
                self.tally.dropped += 1
                self._settle(member, -self._costs.cost(model, tokens_of(member)))
        try:
            ran = await self._runner.run(awaited)
        except ModelUnavailable:
            self._broke(model)
            return
        if ran.worked:
            self._holdings.worked(model)
        self._charge(ran)

    def _charge(self, ran: Ran) -> None:
        """Passes beyond the first are paid by those whose inputs caused them."""
        again = [self._costs.cost(one[0].call.model, tokens_of(one)) for one in ran.repeated]
        for member in ran.guilty:
            self._settle(member, sum(again) / len(ran.guilty))

    def _settle(self, member: Member, diff: float) -> None:
        call = member[0].call
        self._queue.settle(call.klass, call.tenant, diff)

    # --- settings that change ---------------------------------------------------------------

    def adapt(self, batch: Batch, weights: Mapping[str, float]) -> None:
        """Keep to these bounds from the next call and the next hand-out on, and to the weights by tier
        for what waits, too. Only live settings of `batch` may differ.
        """
        self._batch = batch
        self._runner.adapt(batch)
        for pending in self._calls:
            pending.reweigh(weights)
            self._queue.reweigh(pending.call.tenant, pending.call.weight)

    # --- what others ask ------------------------------------------------------------------

    def _busy_s(self) -> float:
        return self._slots.busy_s(self._clock(), self._queue.cost)

    @property
    def queued_tokens(self) -> float:
        """Cost that waits, also for a model to be loaded: for autoscaling."""
        return self._queue.cost + self._parked.cost

    @property
    def queued_items(self) -> int:
        """Inputs that wait."""
        return self._queue.items + self._parked.items

    @property
    def tokens_per_s(self) -> float:
        """Cost that all slots together take, as measured: for autoscaling."""
        return 1 / self._costs.rate.seconds(1)

    def report(self, pool: str, replica: str, places_max: int) -> QueueReport:
        """What waits: in all, and of the tenants that have most waiting in the queue itself."""
        pace_s, busy_s, now = self._costs.rate.seconds(1), self._busy_s(), self._clock()
        told = outlook(self._queue, pace_s=pace_s, busy_s=busy_s, places_max=places_max, now=now)
        items, cost, tenants = self.queued_items, self.queued_tokens, tenants_waiting(self._queue)
        return QueueReport(pool, replica, items, cost, pace_s, tenants, told)

    def waiting(self) -> Mapping[Rank, Waiting]:
        """What waits, also for a model to be loaded, by class and tier."""
        return waiting(self._queue, self._parked, self._clock())
