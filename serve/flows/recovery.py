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
from typing import ParamSpec, Protocol, TypeVar

from serve.config import Batch
from serve.embedding.guard import checked
from serve.embedding.packing import Pace, padded
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

    def engine(self, model_id: str) -> Engine:
        """The loaded engine. Raises NotFound."""
        ...

    def warm_times(self, model_id: str) -> Sequence[tuple[int, float]]:
        """(padded tokens, seconds) of its warm-up batches."""
        ...

    def probe(self, model_id: str) -> None:
        """One forward pass on a known good input. Raises what the engine raises."""
        ...


@dataclass(slots=True)
class Ran:
    """What a batch came to: inputs that were run again, once for each time, and because of whom."""

    repeated: list[Member] = field(default_factory=list)
    guilty: list[Member] = field(default_factory=list)


class Runner:
    """Runs batches on the model's thread, one at a time.

    `budget` is the padded tokens of a batch: it shrinks when the device runs out of memory.
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
        self._least = min(batch.tokens_min, batch.tokens_max)
        self._executor = executor
        self._clock = clock
        self._tally = tally
        self.budget = batch.tokens_max

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
            if _out_of_memory(error):
                self._shrink(padded([tokens_of(member) for member in members]))
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

    def _shrink(self, tokens: int) -> None:
        """A batch of that many padded tokens was too large for the device's memory."""
        self.budget = max(self._least, min(self.budget, tokens) // 2)

    async def _works(self, model: str) -> bool:
        """Whether the model still answers a known good input."""
        loop = asyncio.get_running_loop()
        try:
            await loop.run_in_executor(self._executor, _called, self._engines.probe, model)
        except Exception:
            log.exception("model %s fails on its warm-up input", model)
            return False
        return True

    def _answer(self, member: Member, error: ServiceError, ran: Ran) -> None:
        pending, index = member
        ran.guilty.append(member)
        pending.put(index, error)
        pending.finish(self._clock())

    async def _forward(self, members: list[Member]) -> tuple[Vector, frozenset[int]]:
        """Run the model in its thread. Returns the rows and those that are not usable."""
        model = members[0][0].call.model
        engine = self._engines.engine(model)
        tokens = [tokens_of(member) for member in members]
        inputs = [pending.call.inputs[index] for pending, index in members]
        began = self._clock()
        loop = asyncio.get_running_loop()
        vectors, bad = await loop.run_in_executor(self._executor, _called, checked, engine, inputs)
        took_s = self._clock() - began
        self._paces[model].learn(padded(tokens), took_s)
        self._tally.batches += 1
        self._tally.inputs += len(members)
        self._tally.tokens += sum(tokens)
        self._tally.padded += padded(tokens)
        self._tally.model_s += took_s
        return vectors, bad


def _called(function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
    """Call it in the model's thread; StopIteration, which no Future can carry, would hang us."""
    try:
        return function(*args, **kwargs)
    except StopIteration as error:
        raise RuntimeError("the engine raised StopIteration") from error


def gone() -> ModelUnavailable:
    """What callers are told when nothing will be served any more."""
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
