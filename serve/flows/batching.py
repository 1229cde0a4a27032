"""From waiting calls to vectors: fair queue -> hand-out -> planned batches -> model.

One `Batcher` stands in each embedder replica, in front of one model slot. A hand-out is formed
only when the model is free, so batches grow by themselves under load and nothing lingers when
there is none. `deployments.embedder` owns its task and watches `healthy`; `recovery` runs batches.
"""

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import Executor

import numpy as np

from serve.admission.fairness import FairQueue
from serve.admission.outlook import Place, places, tenants_waiting
from serve.config import Admission, Batch
from serve.embedding.packing import Pace, Room, pack, padded, plan
from serve.errors import (
    BadInput,
    DeadlineExceeded,
    Internal,
    ModelUnavailable,
    Overloaded,
    QuotaExceeded,
)
from serve.flows.pending import Member, Pending, Slice, Tally, tokens_of
from serve.flows.recovery import Engines, Ran, Runner, gone
from serve.records import EmbedCall, EmbedReply, QueuePlace, QueueReport


PROFILE_TOKENS = 1000
"""Models are compared, and the queue's pace is told, by a batch of this many padded tokens."""


class Batcher:
    """Orders calls fairly, batches them by tokens, isolates what fails.

    `healthy` turns false for good when a model fails on a known good input or `run` ends; from
    then on every call, waiting or new, is answered with ModelUnavailable.
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
    ) -> None:
        self._engines = engines
        self._batch = batch
        self._clock = clock
        self._queue: FairQueue[Slice] = FairQueue(
            {"interactive": admission.interactive_share, "bulk": admission.bulk_share}
        )
        self._paces = {model: Pace.fit(engines.warm_times(model)) for model in models}
        seconds = {model: pace.seconds(PROFILE_TOKENS) for model, pace in self._paces.items()}
        self._dearness = {model: took / seconds[models[0]] for model, took in seconds.items()}
        self._rate = Pace(overhead_s=0.0, token_s=seconds[models[0]] / PROFILE_TOKENS)
        self._free_at = 0.0
        self._wake = asyncio.Event()
        self._calls: set[Pending] = set()
        self.healthy = True
        self.tally = Tally()
        self._runner = Runner(
            engines, self._paces, batch=batch, executor=executor, clock=clock, tally=self.tally
        )

    # --- arriving -------------------------------------------------------------------------

    async def submit(self, call: EmbedCall) -> EmbedReply:
        """Wait for the call's vectors; cancelling this drops what has not started.

        Raises NotFound, BadInput (it exceeds a queue's cap by itself), QuotaExceeded (the tenant's
        queue is full), Overloaded (the queue is, or the predicted wait exceeds the deadline),
        DeadlineExceeded, ModelUnavailable.
        """
        engine = self._engines.engine(call.model)
        own_s = self._admit(call)
        now = self._clock()
        patience_s = call.deadline_s + 2 * own_s  # 2: its share may shrink while it works
        if call.limit_s is not None:
            patience_s = min(patience_s, call.limit_s)
        pending = Pending(
            call,
            asyncio.get_running_loop().create_future(),
            arrived=now,
            expires=now + patience_s,
            vectors=np.zeros((len(call.inputs), engine.dimensions), np.float32),
            left=len(call.inputs),
            unbegun=len(call.inputs),
        )
        self._calls.add(pending)
        try:
            self._enqueue(pending)
            pending.finish(now)  # a call without inputs
            self._watch(pending)
            return await pending.done
        except DeadlineExceeded:
            self.tally.expired += 1
            raise
        finally:
            self._calls.discard(pending)
            self._withdraw(pending)

    def _admit(self, call: EmbedCall) -> float:
        """Refuse what cannot be served in time; else the seconds of the call's own work."""
        if not self.healthy:
            raise gone()
        inputs = len(call.inputs)
        if len(call.tokens) != inputs:
            raise Internal(f"{len(call.tokens)} token counts for {inputs} inputs.")
        queue, batch = self._queue, self._batch
        cost = self._cost(call.model, sum(call.tokens), inputs)
        tokens_max = min(batch.tenant_tokens_max, batch.queue_tokens_max)
        items_max = min(batch.tenant_items_max, batch.queue_items_max)
        if cost > tokens_max or inputs > items_max:
            raise BadInput(
                f"This is {cost:.0f} tokens of work in {inputs} inputs; at most {tokens_max} in "
                f"{items_max} may wait.",
                param="input",
                code="tokens_exceed_queue",
            )
        ahead = queue.ahead(call.klass, call.tenant, weight=call.weight)
        wait_s = self._busy_s() + self._rate.seconds(ahead)
        retry_s = max(wait_s, 1)
        own, own_items = queue.backlog(call.tenant), queue.backlog_items(call.tenant)
        if own + cost > batch.tenant_tokens_max or own_items + inputs > batch.tenant_items_max:
            raise QuotaExceeded(
                f"{own:.0f} tokens of your work in {own_items} inputs wait already; this is "
                f"{cost:.0f} more in {inputs}, and {batch.tenant_tokens_max} in "
                f"{batch.tenant_items_max} may wait.",
                code="queue_full",
                retry_after_s=retry_s,
            )
        full = queue.cost + cost > batch.queue_tokens_max
        if full or queue.items + inputs > batch.queue_items_max:
            raise Overloaded("The queue is full.", retry_after_s=retry_s)
        deadline_s = call.deadline_s if call.limit_s is None else min(call.deadline_s, call.limit_s)
        if wait_s > max(deadline_s, 0):
            raise Overloaded(
                f"The predicted wait of {wait_s:.1f} s exceeds the deadline of {deadline_s:g} s.",
                retry_after_s=retry_s,
            )
        return self._rate.seconds(cost) / queue.share(call.klass, call.tenant, call.weight)

    def _cost(self, model: str, tokens: int, inputs: int = 1) -> float:
        """Tokens and a fixed part per input, in tokens of the first model's device time."""
        overhead = self._batch.item_overhead_tokens * inputs
        return self._dearness[model] * max(tokens + overhead, 1)

    def _enqueue(self, pending: Pending) -> None:
        """Cut a call into queue items of like length, each well below a hand-out."""
        call, batch = pending.call, self._batch
        tokens_max = min(batch.tokens_min, batch.tokens_max)
        for group in pack(call.tokens, tokens_max=tokens_max, items_max=batch.items_max):
            tokens = sum(call.tokens[index] for index in group)
            entry = self._queue.push(
                call.klass,
                call.tenant,
                weight=call.weight,
                cost=self._cost(call.model, tokens, len(group)),
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
        elif pending.unbegun:
            pending.live(self._clock())

    def _withdraw(self, pending: Pending) -> None:
        """Whatever still waits of a call that ended is dropped and its cost given back."""
        if pending.timer is not None:
            pending.timer.cancel()
        for entry in pending.entries:
            if entry.waiting:
                self.tally.dropped += entry.count
                self._queue.cancel(entry)

    # --- the model's side -----------------------------------------------------------------

    async def run(self) -> None:
        """Serve until cancelled. One task runs this; nothing of a batch's failure ends it.

        Should it end all the same, no caller is left waiting.
        """
        try:
            while True:
                slices = self._hand_out()
                if slices:
                    await self._serve(slices, full=self._queue.items > 0)
                else:
                    self._wake.clear()
                    await self._wake.wait()
                await asyncio.sleep(0)  # arrivals of the same turn of the loop join the hand-out
        finally:
            self._give_up()

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
            if part.pending.started is None:
                part.pending.started = now
        return slices

    def _room(self, model: str) -> Room:
        """A hand-out of the target's time, or of `tokens_min` where those take longer."""
        pace, batch = self._paces[model], self._batch
        return Room(
            overhead=pace.overhead,
            load_max=max(pace.load_in(batch.target_ms / 1e3), pace.overhead + batch.tokens_min),
            tokens_max=self._runner.budget,
            items_max=batch.items_max,
        )

    async def _serve(self, slices: Sequence[Slice], *, full: bool) -> None:
        """Run a hand-out, the batch of the shortest inputs first: most callers wait least.

        A full one, after which something still waited, says what the queue's cost takes.
        """
        members = [(part.pending, index) for part in slices for index in part.indices]
        tokens = [tokens_of(member) for member in members]
        model = members[0][0].call.model
        pace, began, repeated = self._paces[model], self._clock(), self.tally.repeated
        batches = plan(
            tokens,
            overhead=pace.overhead,
            tokens_max=self._runner.budget,
            items_max=self._batch.items_max,
        )
        sizes = [padded([tokens[position] for position in batch]) for batch in batches]
        self._free_at = began + sum(pace.seconds(size) for size in sizes)
        for batch in reversed(batches):
            await self._run([members[position] for position in batch])
        self._free_at = self._clock()
        self.tally.handouts += 1
        if full and self.tally.repeated == repeated:
            cost = self._cost(model, sum(tokens), len(tokens))
            self._rate.learn(cost, self._free_at - began)

    async def _run(self, members: list[Member]) -> None:
        """One batch, of those who still wait for it; the rest is refunded."""
        now = self._clock()
        awaited = []
        for member in members:
            if member[0].live(now):
                member[0].unbegun -= 1
                awaited.append(member)
            else:
                self.tally.dropped += 1
                self._settle(member, -self._cost(member[0].call.model, tokens_of(member)))
        try:
            ran = await self._runner.run(awaited)
        except ModelUnavailable:
            self._give_up()
        else:
            self._charge(ran)

    def _charge(self, ran: Ran) -> None:
        """Passes beyond the first are paid by those whose inputs caused them."""
        again = [self._cost(one[0].call.model, tokens_of(one)) for one in ran.repeated]
        for member in ran.guilty:
            self._settle(member, sum(again) / len(ran.guilty))

    def _settle(self, member: Member, diff: float) -> None:
        call = member[0].call
        self._queue.settle(call.klass, call.tenant, diff)

    # --- what others ask ------------------------------------------------------------------

    @property
    def queued_tokens(self) -> float:
        """Cost that waits, for autoscaling."""
        return self._queue.cost

    @property
    def queued_items(self) -> int:
        """Inputs that wait."""
        return self._queue.items

    def report(self, pool: str, replica: str, places_max: int) -> QueueReport:
        """What waits: in all, and of the tenants that have most waiting."""
        now, queue = self._clock(), self._queue
        return QueueReport(
            pool,
            replica,
            queue.items,
            queue.cost,
            self._rate.seconds(1),
            tenants_waiting(queue),
            tuple(self._placed(place, now) for place in places(queue, places_max)),
        )

    def _placed(self, place: Place[Slice], now: float) -> QueuePlace:
        busy_s, second = self._busy_s(), 1 / self._rate.seconds(1)
        done = min(place.cost / place.share, self._queue.cost)
        return QueuePlace(
            place.tenant,
            place.klass,
            place.weight,
            place.items,
            place.cost,
            place.share,
            place.ahead,
            busy_s + place.ahead / second,
            busy_s + max(done, place.ahead + place.cost) / second,
            now - place.oldest.pending.arrived,
            100 * second / (place.lead + second),
        )

    def _busy_s(self) -> float:
        """Predicted seconds until the hand-out in flight is done."""
        return max(self._free_at - self._clock(), 0.0)
