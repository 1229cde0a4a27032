"""From waiting calls to vectors: fair queue -> hand-out -> packed batches -> model.

One `Batcher` stands in each embedder replica, in front of one model slot. A hand-out is formed
only when the model is free, so batches grow by themselves under load and nothing lingers when
there is none. `deployments.embedder` owns its task and watches `healthy`.
"""

import asyncio
import logging
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from serve.admission.fairness import Entry, FairQueue
from serve.config import Admission, Batch
from serve.embedding.guard import checked
from serve.embedding.packing import Pace, pack, padded
from serve.errors import (
    BadInput,
    DeadlineExceeded,
    ModelUnavailable,
    Overloaded,
    PoisonInput,
    QuotaExceeded,
    ServiceError,
)
from serve.ports import Engine
from serve.records import EmbedCall, EmbedReply, Vector


log = logging.getLogger("headrace.batching")

SUSPECT_AFTER = 8
"""Single inputs that fail in a row before the model itself is put to a test."""


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


@dataclass(slots=True, eq=False)
class Pending:
    """A call on its way: rows fill in as batches return."""

    call: EmbedCall
    done: asyncio.Future[EmbedReply]
    arrived: float
    expires: float
    vectors: Vector
    left: int
    started: float | None = None
    failures: list[tuple[int, ServiceError]] = field(default_factory=list)
    entries: list[Entry["Slice"]] = field(default_factory=list)

    def put(self, index: int, row: Vector | ServiceError) -> None:
        """Keep one input's outcome."""
        if isinstance(row, ServiceError):
            self.failures.append((index, row))
        else:
            self.vectors[index] = row
        self.left -= 1

    def finish(self, now: float) -> None:
        """Answer the caller once every row is there."""
        if self.left == 0 and not self.done.done():
            started = self.started if self.started is not None else now
            self.done.set_result(
                EmbedReply(
                    self.vectors,
                    tuple(sorted(self.failures, key=lambda failure: failure[0])),
                    queue_ms=(started - self.arrived) * 1e3,
                    infer_ms=(now - started) * 1e3,
                )
            )

    def fail(self, error: ServiceError) -> None:
        """Answer the caller with an error for the whole call."""
        if not self.done.done():
            self.done.set_exception(error)


@dataclass(frozen=True, slots=True, eq=False)
class Slice:
    """Some inputs of one call, queued as one item: large calls do not block others."""

    pending: Pending
    indices: tuple[int, ...]
    tokens: int


Member = tuple[Pending, int]


@dataclass(slots=True)
class Tally:
    """Counts since start: what the model was given and how much of it was padding."""

    batches: int = 0
    inputs: int = 0
    tokens: int = 0
    padded: int = 0
    failed: int = 0
    dropped: int = 0
    model_s: float = 0.0


class Batcher:
    """Orders calls fairly, batches them by tokens, isolates what fails."""

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
        self._budget = batch.tokens_max
        self._wake = asyncio.Event()
        self._failed_in_row = 0
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
        for part in self._slices(pending):
            cost = part.tokens + self._batch.item_overhead_tokens * len(part.indices)
            pending.entries.append(
                self._queue.push(call.klass, call.tenant, weight=call.weight, cost=cost, item=part)
            )
        self._wake.set()
        try:
            return await pending.done
        finally:
            self._withdraw(pending)

    def _admit(self, call: EmbedCall) -> float:
        """Refuse what cannot be served in time; else the seconds of the call's own work."""
        if not self.healthy:
            raise ModelUnavailable("The model has failed; its replica restarts.", retry_after_s=5)
        cost = sum(call.tokens) + self._batch.item_overhead_tokens * len(call.inputs)
        second = self._pace[call.model].seconds(1000) / 1000
        if self._queue.backlog(call.tenant) + cost > max(call.queued_tokens_max, cost):
            raise QuotaExceeded(
                "Too many of your tokens are waiting already.",
                code="queued_tokens",
                retry_after_s=max(self._wait_s(call, second), 1),
            )
        full = (
            self._queue.cost + cost > max(self._batch.queue_tokens_max, cost)
            or self._queue.items >= self._batch.queue_items_max
        )
        wait_s = self._wait_s(call, second)
        if full or wait_s > call.deadline_s:
            raise Overloaded(
                f"The predicted wait of {wait_s:.1f} s exceeds the deadline of "
                f"{call.deadline_s:g} s."
                if not full
                else "The queue is full.",
                retry_after_s=max(wait_s - call.deadline_s, 1),
            )
        return cost * second / self._queue.share(call.klass, call.tenant, call.weight)

    def _wait_s(self, call: EmbedCall, second: float) -> float:
        """Predicted seconds until the call's first slice is handed out."""
        return self._queue.ahead(call.klass, call.tenant, weight=call.weight) * second

    def _slices(self, pending: Pending) -> list[Slice]:
        """Cut a call into queue items of like length, each about one hand-out at most."""
        tokens = pending.call.tokens
        groups = pack(tokens, tokens_max=self._batch.tokens_min, items_max=self._batch.items_max)
        return [
            Slice(pending, tuple(group), sum(tokens[index] for index in group)) for group in groups
        ]

    def _withdraw(self, pending: Pending) -> None:
        """Whatever still waits of a call that ended is dropped and its cost given back."""
        for entry in pending.entries:
            if entry.waiting:
                self.tally.dropped += 1
                self._queue.cancel(entry)

    # --- the model's side -----------------------------------------------------------------

    async def run(self) -> None:
        """Serve until cancelled. One task runs this; nothing of a batch's failure ends it."""
        while True:
            members = self._hand_out()
            if members:
                await self._serve(members)
            else:
                self._wake.clear()
                await self._wake.wait()
            await asyncio.sleep(0)  # arrivals of the same turn of the loop join the hand-out

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
            part.pending.started = part.pending.started or now
        return [(part.pending, index) for part in slices for index in part.indices]

    def _live(self, part: Slice) -> bool:
        """Departed callers are not; an expired call is answered and is not either."""
        if part.pending.done.done():
            return False
        if self._clock() <= part.pending.expires:
            return True
        part.pending.fail(DeadlineExceeded("The deadline passed while the work was waiting."))
        self.tally.dropped += 1
        return False

    async def _serve(self, members: list[Member]) -> None:
        tokens = [pending.call.tokens[index] for pending, index in members]
        for batch in pack(tokens, tokens_max=self._budget, items_max=self._batch.items_max):
            await self._embed([members[position] for position in batch])
            await asyncio.sleep(0)

    async def _embed(self, members: list[Member]) -> None:
        """One batch; a failed one is split and retried, a failing single input is answered."""
        members = [(pending, index) for pending, index in members if not pending.done.done()]
        if not members:
            return
        try:
            vectors, bad = await self._forward(members)
        except Exception as error:  # noqa: BLE001  a named rim: any runtime may raise anything
            await self._split(members, error)
            return
        self._failed_in_row = 0
        now = self._clock()
        for row, (pending, index) in enumerate(members):
            if row not in bad:
                pending.put(index, vectors[row])
                pending.finish(now)
        for row in bad:
            await self._not_finite(members[row], alone=len(members) == 1)

    async def _not_finite(self, member: Member, *, alone: bool) -> None:
        """A row with NaN or Inf: once more alone, then it is the input's fault."""
        if alone:
            message = "The model returned a vector that is not finite for this input."
            self._answer(member, PoisonInput(message, code="vector_not_finite"))
        else:
            await self._embed([member])

    async def _split(self, members: list[Member], error: Exception) -> None:
        oom = isinstance(error, MemoryError) or "OutOfMemory" in type(error).__name__
        if oom:
            self._budget = max(self._batch.tokens_min, self._budget // 2)
        log.warning("batch of %d failed: %r", len(members), error)
        if len(members) > 1:
            middle = len(members) // 2
            await self._embed(members[:middle])
            await self._embed(members[middle:])
            return
        self.tally.failed += 1
        if isinstance(error, BadInput):
            self._answer(members[0], error)
            return
        await self._suspect()
        if not self.healthy:
            self._answer(members[0], ModelUnavailable("The model has failed.", retry_after_s=5))
        elif oom:
            message = "The device has too little memory for this input."
            self._answer(members[0], PoisonInput(message, code="out_of_memory"))
        else:
            self._answer(members[0], PoisonInput("The model failed on this input."))

    async def _suspect(self) -> None:
        """Tell a poisonous input from a broken model: now and then try a known good input."""
        self._failed_in_row += 1
        if self._failed_in_row < SUSPECT_AFTER:
            return
        self._failed_in_row = 0
        loop = asyncio.get_running_loop()
        for model in self._pace:
            try:
                await loop.run_in_executor(self._executor, self._engines.probe, model)
            except Exception:
                log.exception("model %s fails on its warm-up input", model)
                self.healthy = False

    def _answer(self, member: Member, error: ServiceError) -> None:
        pending, index = member
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
        vectors, bad = await loop.run_in_executor(self._executor, checked, engine, inputs)
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
        """Slices that wait."""
        return self._queue.items
