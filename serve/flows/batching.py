"""From waiting calls to vectors: fair queue -> hand-out -> packed batches -> model.

One `Batcher` stands in each embedder replica, in front of one model slot. A hand-out is formed
only when the model is free, so batches grow by themselves under load and nothing lingers when
there is none. `deployments.embedder` owns its task and watches `healthy`.
"""

import asyncio
import logging
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from typing import ParamSpec, Protocol, TypeVar

import numpy as np

from serve.admission.fairness import FairQueue
from serve.config import Admission, Batch
from serve.embedding.guard import checked
from serve.embedding.packing import Pace, pack, padded
from serve.errors import (
    BadInput,
    DeadlineExceeded,
    Internal,
    ModelUnavailable,
    Overloaded,
    PoisonInput,
    QuotaExceeded,
    ServiceError,
)
from serve.flows.pending import Member, Pending, Slice, Tally
from serve.ports import Engine
from serve.records import EmbedCall, EmbedReply, Vector


log = logging.getLogger("headrace.batching")

PROFILE_TOKENS = 1000
"""Models are compared, and the queue's pace is told, by a batch of this many padded tokens."""

UNUSABLE = "The model returned no usable vector for this input."

P = ParamSpec("P")
R = TypeVar("R")


class Engines(Protocol):
    """The pool, as the batcher sees it."""

    def engine(self, model_id: str) -> Engine:
        """The loaded engine. Raises NotFound."""
        ...

    def warm_times(self, model_id: str) -> Sequence[tuple[int, float]]:
        """(padded tokens, seconds) of its warm-up batches."""
        ...

    def probe(self, model_id: str) -> None:
        """One forward pass on a known good input. Raises what the engine raises."""
        ...


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
        self._executor = executor
        self._clock = clock
        self._queue: FairQueue[Slice] = FairQueue(
            {"interactive": admission.interactive_share, "bulk": admission.bulk_share}
        )
        self._pace = {model: Pace.fit(engines.warm_times(model)) for model in models}
        seconds = {model: pace.seconds(PROFILE_TOKENS) for model, pace in self._pace.items()}
        self._dearness = {model: took / seconds[models[0]] for model, took in seconds.items()}
        self._budget = batch.tokens_max
        self._wake = asyncio.Event()
        self._calls: set[Pending] = set()
        self.healthy = True
        self.tally = Tally()

    # --- arriving -------------------------------------------------------------------------

    async def submit(self, call: EmbedCall) -> EmbedReply:
        """Wait for the call's vectors; cancelling this drops what has not started.

        Raises NotFound, QuotaExceeded (the tenant's queue is full), Overloaded (the queue is, or
        the predicted wait exceeds the deadline), DeadlineExceeded, ModelUnavailable.
        """
        engine = self._engines.engine(call.model)
        own_s = self._admit(call)
        now = self._clock()
        pending = Pending(
            call,
            asyncio.get_running_loop().create_future(),
            arrived=now,
            expires=now + call.deadline_s + 2 * own_s,  # 2: its share may shrink while it works
            vectors=np.zeros((len(call.inputs), engine.dimensions), np.float32),
            left=len(call.inputs),
        )
        self._calls.add(pending)
        try:
            self._enqueue(pending)
            pending.finish(now)  # a call without inputs
            return await pending.done
        finally:
            self._calls.discard(pending)
            self._withdraw(pending)

    def _admit(self, call: EmbedCall) -> float:
        """Refuse what cannot be served in time; else the seconds of the call's own work.

        A call above a cap may wait when nothing else does, for it could never pass otherwise.
        """
        if not self.healthy:
            raise _gone()
        if len(call.tokens) != len(call.inputs):
            raise Internal(f"{len(call.tokens)} token counts for {len(call.inputs)} inputs.")
        queue = self._queue
        cost = self._cost(call.model, sum(call.tokens), len(call.inputs))
        cost_s = self._pace[call.model].seconds(PROFILE_TOKENS) / PROFILE_TOKENS
        cost_s /= self._dearness[call.model]
        wait_s = queue.ahead(call.klass, call.tenant, weight=call.weight) * cost_s
        own = queue.backlog(call.tenant)
        if own and own + cost > call.queued_tokens_max:
            raise QuotaExceeded(
                f"{own:.0f} of your tokens are waiting already; with {cost:.0f} more they would "
                f"exceed the {call.queued_tokens_max} that may wait.",
                code="queued_tokens",
                retry_after_s=max(wait_s, 1),
            )
        items = queue.items + len(call.inputs)
        full = queue.cost + cost > self._batch.queue_tokens_max
        if queue.items and (full or items > self._batch.queue_items_max):
            raise Overloaded("The queue is full.", retry_after_s=max(wait_s, 1))
        if wait_s > call.deadline_s:
            raise Overloaded(
                f"The predicted wait of {wait_s:.1f} s exceeds the deadline of "
                f"{call.deadline_s:g} s.",
                retry_after_s=max(wait_s, 1),
            )
        return cost * cost_s / queue.share(call.klass, call.tenant, call.weight)

    def _cost(self, model: str, tokens: int, inputs: int) -> float:
        """Tokens and a fixed part per input, in tokens of the first model's device time."""
        overhead = self._batch.item_overhead_tokens * inputs
        return self._dearness[model] * max(tokens + overhead, 1)

    def _enqueue(self, pending: Pending) -> None:
        """Cut a call into queue items of like length, each about one hand-out at most."""
        call, batch = pending.call, self._batch
        for group in pack(call.tokens, tokens_max=batch.tokens_min, items_max=batch.items_max):
            tokens = sum(call.tokens[index] for index in group)
            entry = self._queue.push(
                call.klass,
                call.tenant,
                weight=call.weight,
                cost=self._cost(call.model, tokens, len(group)),
                item=Slice(pending, tuple(group), tokens),
                count=len(group),
            )
            pending.entries.append(entry)
        self._wake.set()

    def _withdraw(self, pending: Pending) -> None:
        """Whatever still waits of a call that ended is dropped and its cost given back."""
        for entry in pending.entries:
            if entry.waiting:
                self.tally.dropped += 1
                self._queue.cancel(entry)

    # --- the model's side -----------------------------------------------------------------

    async def run(self) -> None:
        """Serve until cancelled. One task runs this; nothing of a batch's failure ends it.

        Should it end all the same, no caller is left waiting.
        """
        try:
            while True:
                members = self._hand_out()
                if members:
                    await self._serve(members)
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
            pending.fail(_gone())

    def _hand_out(self) -> list[Member]:
        """Slices of one model in fair order, bounded in predicted milliseconds."""
        model: str | None = None
        room = items = 0

        def admits(part: Slice) -> bool:
            nonlocal model, room, items
            wanted = part.pending.call.model
            if model is None:
                model = wanted
                in_time = self._pace[wanted].tokens_in(self._batch.target_ms / 1e3)
                room, items = max(self._batch.tokens_min, in_time), self._batch.items_max
            elif wanted != model or part.tokens > room or len(part.indices) > items:
                return False
            room -= part.tokens
            items -= len(part.indices)
            return True

        slices = self._queue.take(admits, self._live)
        now = self._clock()
        for part in slices:
            if part.pending.started is None:
                part.pending.started = now
        return [(part.pending, index) for part in slices for index in part.indices]

    def _live(self, part: Slice) -> bool:
        """Departed callers are not; an expired call is answered and is not either."""
        if not part.pending.done.done() and self._clock() <= part.pending.expires:
            return True
        part.pending.fail(DeadlineExceeded("The deadline passed while the work was waiting."))
        self.tally.dropped += 1
        return False

    async def _serve(self, members: list[Member]) -> None:
        tokens = [pending.call.tokens[index] for pending, index in members]
        for batch in pack(tokens, tokens_max=self._budget, items_max=self._batch.items_max):
            await self._embed([members[position] for position in batch])

    async def _embed(self, members: list[Member], *, again: bool = False) -> None:
        """One batch. `again`: its inputs have failed before, in company or alone."""
        members = [(pending, index) for pending, index in members if not pending.done.done()]
        if not members:
            return
        try:
            vectors, bad = await self._forward(members)
        except Exception as error:  # noqa: BLE001  a named rim: any runtime may raise anything
            failure = error.with_traceback(None)  # its frames hold the batch's tensors
        else:
            await self._deliver(members, vectors, bad, again=again)
            return
        await self._recover(members, failure, again=again)

    async def _deliver(
        self, members: list[Member], vectors: Vector, bad: frozenset[int], *, again: bool
    ) -> None:
        """Hand rows to their calls; a row without a usable vector is tried once more, alone."""
        now = self._clock()
        for row, (pending, index) in enumerate(members):
            if row not in bad:
                pending.put(index, vectors[row])
                pending.finish(now)
        for row in sorted(bad):
            if len(members) > 1:
                await self._embed([members[row]], again=True)
            else:
                unusable = PoisonInput(UNUSABLE, code="vector_not_finite")
                await self._recover(members, unusable, again=again)

    async def _recover(self, members: list[Member], error: Exception, *, again: bool) -> None:
        """Halve a failed batch and repeat it; find out who is at fault for a single input.

        An input that fails alone is tried twice, then a known good one is: if that fails as
        well, the model is broken and nobody's input is to blame.
        """
        log.warning("a batch of %d inputs failed: %r", len(members), error)
        if len(members) > 1:
            if _out_of_memory(error):
                self._shrink(padded([pending.call.tokens[index] for pending, index in members]))
            middle = len(members) // 2
            await self._embed(members[:middle], again=True)
            await self._embed(members[middle:], again=True)
        elif isinstance(error, BadInput):
            self._answer(members[0], error)
        elif not again:
            await self._embed(members, again=True)
        elif await self._works(members[0][0].call.model):
            self._answer(members[0], _blame(error))
        else:
            self._give_up()

    def _shrink(self, tokens: int) -> None:
        """A batch of that many padded tokens was too large for the device's memory."""
        least = min(self._batch.tokens_min, self._batch.tokens_max)
        self._budget = max(least, min(self._budget, tokens) // 2)

    async def _works(self, model: str) -> bool:
        """Whether the model still answers a known good input."""
        loop = asyncio.get_running_loop()
        try:
            await loop.run_in_executor(self._executor, _called, self._engines.probe, model)
        except Exception:
            log.exception("model %s fails on its warm-up input", model)
            return False
        return True

    def _answer(self, member: Member, error: ServiceError) -> None:
        pending, index = member
        self.tally.failed += 1
        pending.put(index, error)
        pending.finish(self._clock())

    async def _forward(self, members: list[Member]) -> tuple[Vector, frozenset[int]]:
        """Run the model in its thread. Returns the rows and those that are not usable."""
        model = members[0][0].call.model
        engine = self._engines.engine(model)
        tokens = [pending.call.tokens[index] for pending, index in members]
        inputs = [pending.call.inputs[index] for pending, index in members]
        began = self._clock()
        loop = asyncio.get_running_loop()
        vectors, bad = await loop.run_in_executor(self._executor, _called, checked, engine, inputs)
        took_s = self._clock() - began
        self._pace[model].learn(padded(tokens), took_s)
        self.tally.batches += 1
        self.tally.inputs += len(members)
        self.tally.tokens += sum(tokens)
        self.tally.padded += padded(tokens)
        self.tally.model_s += took_s
        return vectors, bad

    # --- what others ask ------------------------------------------------------------------

    @property
    def queued_tokens(self) -> float:
        """Cost that waits, for autoscaling."""
        return self._queue.cost

    @property
    def queued_items(self) -> int:
        """Inputs that wait."""
        return self._queue.items


def _called(function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
    """Call it in the model's thread; StopIteration, which no Future can carry, would hang us."""
    try:
        return function(*args, **kwargs)
    except StopIteration as error:
        raise RuntimeError("the engine raised StopIteration") from error


def _gone() -> ModelUnavailable:
    return ModelUnavailable("The model's replica has failed or is leaving.", retry_after_s=5)


def _out_of_memory(error: Exception) -> bool:
    """Also torch's own, which is not imported here."""
    return isinstance(error, MemoryError) or "OutOfMemory" in type(error).__name__


def _blame(error: Exception) -> PoisonInput:
    """What the owner of an input that fails alone is told; the runtime's own words may leak."""
    if isinstance(error, PoisonInput):
        return error
    if _out_of_memory(error):
        message = "The device has too little memory for this input."
        return PoisonInput(message, code="out_of_memory")
    return PoisonInput("The model failed on this input.")
