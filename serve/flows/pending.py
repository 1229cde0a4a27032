"""What `serve.flows.batching` keeps of a call between its arrival and its answer."""

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Self

import numpy as np

from serve import tracing
from serve.admission.fairness import Entry
from serve.errors import DeadlineExceeded, ServiceError
from serve.records import EmbedCall, EmbedReply, Vector
from serve.telemetry import NONE, Samples


@dataclass(slots=True, eq=False)
class Pending:
    """A call on its way: rows fill in as batches return, into what is made once it is queued.

    `left` inputs have no outcome yet; `unbegun` of them the model has not seen.
    """

    call: EmbedCall
    done: asyncio.Future[EmbedReply]
    arrived: float
    expires: float
    left: int
    unbegun: int
    vectors: Vector = field(default_factory=lambda: np.zeros((0, 0), np.float32))
    started: float | None = None
    timer: asyncio.TimerHandle | None = None
    failures: list[tuple[int, ServiceError]] = field(default_factory=list)
    entries: list[Entry["Slice"]] = field(default_factory=list)

    @classmethod
    def of(cls, call: EmbedCall, own_s: float, now: float) -> Self:
        """A call that arrives, whose own work takes so many seconds."""
        patience_s = call.deadline_s + 2 * own_s  # 2: its share may shrink while it works
        if call.limit_s is not None:
            patience_s = min(patience_s, call.limit_s)
        inputs = len(call.inputs)
        done: asyncio.Future[EmbedReply] = asyncio.get_running_loop().create_future()
        return cls(call, done, arrived=now, expires=now + patience_s, left=inputs, unbegun=inputs)

    def live(self, now: float) -> bool:
        """Whether its work should go on. An expired call is answered; a departed one needs none."""
        if now >= self.expires:
            own = self.call.limit_s is not None  # the client's: it would pass again
            message = "The deadline passed while the work was waiting."
            self.fail(DeadlineExceeded(message, retry_after_s=None if own else 1))
        return not self.done.done()

    def reweigh(self, weights: Mapping[str, float]) -> None:
        """Its tier has another weight now, or is not told of."""
        weight = weights.get(self.call.tier, self.call.weight)
        self.call = replace(self.call, weight=weight)

    def begin(self, now: float, tally: "Tally") -> None:
        """Something of it goes to the model."""
        if self.started is None:
            self.started = now
            tally.waits.add(now - self.arrived, self.call.klass, self.call.tier or NONE)
            if self.call.trace:
                tracing.past("headrace.queue", self.call.trace, now - self.arrived)

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

    @property
    def tokens(self) -> list[int]:
        """Of each of its inputs."""
        return [self.pending.call.tokens[index] for index in self.indices]


Member = tuple[Pending, int]
"""One input of a call: the call and the input's index."""


def tokens_of(member: Member) -> int:
    """Tokens of that input."""
    pending, index = member
    return pending.call.tokens[index]


@dataclass(slots=True)
class Tally:
    """Counts since start: what the model was given and how much of it was padding.

    `repeated` inputs were run again after a failure, `failed` ones were answered with an error of
    their own, `dropped` ones expired or lost their caller before the model saw them; `expired` are
    calls. `room` is the padded tokens that the batches could have held. Seconds, until they are read:
    `waits` of calls, by class and tier, `passes` of batches.
    """

    handouts: int = 0
    batches: int = 0
    inputs: int = 0
    tokens: int = 0
    padded: int = 0
    room: int = 0
    repeated: int = 0
    failed: int = 0
    dropped: int = 0
    expired: int = 0
    model_s: float = 0.0
    waits: Samples = field(default_factory=Samples)
    passes: Samples = field(default_factory=Samples)

    def counts(self) -> dict[str, float]:
        """By name."""
        values = ((one.name, getattr(self, one.name)) for one in fields(self))
        return {name: value for name, value in values if not isinstance(value, Samples)}
