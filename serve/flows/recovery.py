"""One batch through the model, whatever fails on the way: halved, repeated, and who is to blame.

`serve.flows.batching` decides what runs; here it is run to the end. A batch that fails is halved
until what fails is a single input. That one is tried twice, then a known good one is: if that
fails as well, the model is broken and nobody's input is to blame.
"""

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field
from functools import partial
from typing import ParamSpec, Protocol, TypeVar

from serve import tracing
from serve.config import Batch
from serve.embedding.budget import Budget
from serve.embedding.guard import checked, out_of_memory
from serve.embedding.holdings import Holdings
from serve.embedding.packing import Pace, plan
from serve.embedding.profiles import Profile
from serve.embedding.sharing import padded
from serve.errors import BadInput, ModelUnavailable, PoisonInput, ServiceError
from serve.flows.pending import Member, Tally, tokens_of
from serve.ports import Engine
from serve.records import Vector


log = logging.getLogger("headrace.batching")

UNUSABLE = "The model returned no usable vector for this input."

P = ParamSpec("P")
R = TypeVar("R")


class Engines(Protocol):
    """The pool, as the batcher sees it."""

    holdings: Holdings
    slots: int
    """Hand-outs that may be at the model at once."""

    def engine(self, model_id: str) -> Engine:
        """The loaded engine. Raises NotFound, ModelUnavailable."""
        ...

    def profile(self, model_id: str) -> Profile | None:
        """Its pace, budget and size, where they were measured. Raises NotFound."""
        ...

    def probe(self, model_id: str) -> None:
        """One forward pass on a known good input. Raises what the engine raises."""
        ...

    def load_one(self, model_id: str) -> Profile:
        """Load a model. Raises ModelUnavailable, and what a runtime raises."""
        ...

    def unload(self, model_id: str) -> None:
        """Close it and give its memory back."""
        ...

    def relieve(self) -> None:
        """Give back what an allocator keeps for later, after a batch ran out of memory."""
        ...


@dataclass(frozen=True, slots=True)
class Planned:
    """A batch by the numbers of its inputs, and its padded tokens."""

    items: Sequence[int]
    padded: int


@dataclass(slots=True)
class Ran:
    """What a batch came to: inputs that were run again, once for each time, and because of whom.

    `worked`: the model made a vector.
    """

    repeated: list[Member] = field(default_factory=list)
    guilty: list[Member] = field(default_factory=list)
    worked: bool = False


class Runner:
    """Runs batches on the model's threads, one on each.

    Each model has a budget, the padded tokens of a batch: it shrinks when the device runs out of
    memory, and grows back.
    """

    def __init__(
        self,
        engines: Engines,
        paces: Mapping[str, Pace],
        *,
        batch: Batch,
        executor: Executor,
        clock: Callable[[], float],
        tally: Tally,
    ) -> None:
        self._engines = engines
        self._paces = paces
        self._batch = batch
        self._budgets: dict[str, Budget] = {}
        self._best: dict[str, int] = {}
        self._begun: dict[object, float] = {}
        self._executor = executor
        self._clock = clock
        self._tally = tally

    def fit(self, model: str, tokens: int) -> None:
        """The warm-up says that its batches are best with so many padded tokens."""
        self._best[model] = tokens
        self._limit(model)

    def adapt(self, batch: Batch) -> None:
        """Batches keep to these bounds from now on; a model's never exceed what its warm-up found best."""
        self._batch = batch
        for model in self._budgets:
            self._limit(model)

    def _limit(self, model: str) -> None:
        most = self._batch.tokens_max
        self._budget(model).limit(min(self._best.get(model, most), most))

    def budget(self, model: str) -> int:
        """Padded tokens of one of its batches, at most."""
        return self._budget(model).tokens

    def plan(self, model: str, tokens: Sequence[int]) -> list[Planned]:
        """The batches of a hand-out, longest inputs first."""
        row_tokens = self._engines.engine(model).row_tokens
        batches = plan(
            tokens,
            overhead=self._paces[model].overhead,
            tokens_max=self.budget(model),
            items_max=self._batch.items_max,
            row_tokens=row_tokens,
        )
        return [
            Planned(batch, padded([tokens[item] for item in batch], row_tokens))
            for batch in batches
        ]

    def check(self) -> None:
        """Raises ModelUnavailable when a pass is at the model for so long that it never returns."""
        most_s = self._batch.forward_s_max
        if self._begun and self._clock() - min(self._begun.values()) > most_s:
            raise ModelUnavailable(f"A batch is at the model for more than {most_s:g} s.")

    async def run(self, members: list[Member]) -> Ran:
        """Give every input of a batch its outcome. Raises ModelUnavailable: the model is broken."""
        ran = Ran()
        await self._run(members, ran, again=False)
        self._tally.repeated += len(ran.repeated)
        self._tally.failed += len(ran.guilty)
        return ran

    async def _run(self, members: list[Member], ran: Ran, *, again: bool) -> None:
        """`again`: these inputs have failed before, in company or alone."""
        if again:
            now = self._clock()
            members = [member for member in members if member[0].live(now)]
            ran.repeated += members
        if not members:
            return
        try:
            vectors, bad = await self._forward(members)
        except Exception as error:  # noqa: BLE001  a named rim: any runtime may raise anything
            failure = error.with_traceback(None)  # its frames hold the batch's tensors
        else:
            await self._deliver(members, vectors, bad, ran, again=again)
            return
        await self._recover(members, failure, ran, again=again)

    async def _deliver(
        self, members: list[Member], vectors: Vector, bad: frozenset[int], ran: Ran, *, again: bool
    ) -> None:
        """Hand rows to their calls; a row without a usable vector is tried once more, alone."""
        now = self._clock()
        ran.worked = ran.worked or len(bad) < len(members)
        for row, (pending, index) in enumerate(members):
            if row not in bad:
                pending.put(index, vectors[row])
                pending.finish(now)
        for row in sorted(bad):
            if len(members) > 1:
                await self._run([members[row]], ran, again=True)
            else:
                unusable = PoisonInput(UNUSABLE, code="vector_not_finite")
                await self._recover(members, unusable, ran, again=again)

    async def _recover(
        self, members: list[Member], error: Exception, ran: Ran, *, again: bool
    ) -> None:
        """Halve a failed batch and repeat it; find out who is at fault for a single input."""
        log.warning("a batch of %d inputs failed: %r", len(members), error)
        if len(members) > 1:
            if out_of_memory(error):
                await self._shrink(members)
            middle = len(members) // 2
            await self._run(members[:middle], ran, again=True)
            await self._run(members[middle:], ran, again=True)
        elif isinstance(error, BadInput):
            self._answer(members[0], error, ran)
        elif not again:
            await self._run(members, ran, again=True)
        elif await self._works(members[0][0].call.model):
            self._answer(members[0], _blame(error), ran)
        else:
            raise gone()

    async def _shrink(self, members: list[Member]) -> None:
        """That batch was too large for the device's memory, what its allocator keeps given back."""
        self._budget(members[0][0].call.model).shrink(self._padded(members), self._clock())
        try:
            await self._on_device(self._engines.relieve)
        except Exception:  # a named rim: the next pass shows whether the model still works
            log.exception("the memory of the device could not be given back")

    def _padded(self, members: list[Member]) -> int:
        engine = self._engines.engine(members[0][0].call.model)
        return padded([tokens_of(member) for member in members], engine.row_tokens)

    def _budget(self, model: str) -> Budget:
        if model not in self._budgets:
            batch = self._batch
            self._budgets[model] = Budget(
                least=batch.tokens_min, most=batch.tokens_max, forget_s=batch.oom_forget_s
            )
        return self._budgets[model]

    async def _works(self, model: str) -> bool:
        """Whether the model still answers a known good input."""
        try:
            await self._on_device(self._engines.probe, model)
        except Exception:
            log.exception("model %s fails on its warm-up input", model)
            return False
        return True

    async def _on_device(self, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """Call it in one of the model's threads, under the eyes of `check`."""
        loop = asyncio.get_running_loop()
        visit = object()
        self._begun[visit] = self._clock()
        try:
            return await loop.run_in_executor(
                self._executor, partial(called, function, *args, **kwargs)
            )
        finally:
            del self._begun[visit]

    def _answer(self, member: Member, error: ServiceError, ran: Ran) -> None:
        pending, index = member
        ran.guilty.append(member)
        pending.put(index, error)
        pending.finish(self._clock())

    async def _forward(self, members: list[Member]) -> tuple[Vector, frozenset[int]]:
        """Run the model in its thread. Returns the rows and those that are not usable."""
        model = members[0][0].call.model
        engine = self._engines.engine(model)
        size, room = self._padded(members), self.budget(model)
        inputs = [pending.call.inputs[index] for pending, index in members]
        began = self._clock()
        traces = (pending.call.trace for pending, _ in members)
        with tracing.joint("headrace.batch", traces, model=model, inputs=len(inputs)):
            vectors, bad = await self._on_device(checked, engine, inputs)
        took_s = self._clock() - began
        self._paces[model].learn(size, took_s)
        self._budget(model).fits(size, began)
        self._tally.batches += 1
        self._tally.inputs += len(members)
        self._tally.tokens += sum(map(tokens_of, members))
        self._tally.padded += size
        self._tally.room += max(room, size)  # one input may be larger than the budget
        self._tally.model_s += took_s
        self._tally.passes.add(took_s)
        return vectors, bad


def called(function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
    """Call it in the model's thread; StopIteration, which no Future can carry, would hang us."""
    try:
        return function(*args, **kwargs)
    except StopIteration as error:
        raise RuntimeError("the engine raised StopIteration") from error


def gone() -> ModelUnavailable:
    """What callers are told when nothing will be served any more."""
    return ModelUnavailable("The model's replica has failed or is leaving.", retry_after_s=5)


def _blame(error: Exception) -> PoisonInput:
    """What the owner of an input that fails alone is told; the runtime's own words may leak."""
    if isinstance(error, PoisonInput):
        return error
    if out_of_memory(error):
        message = "The device has too little memory for this input."
        return PoisonInput(message, code="out_of_memory")
    return PoisonInput("The model failed on this input.")
