"""What `serve.flows.batching` keeps of a call between its arrival and its answer."""

import asyncio
from dataclasses import dataclass, field

from serve.admission.fairness import Entry
from serve.errors import ServiceError
from serve.records import EmbedCall, EmbedReply, Vector


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
"""One input of a call: the call and the input's index."""


@dataclass(slots=True)
class Tally:
    """Counts since start: what the model was given and how much of it was padding.

    `failed` are inputs answered with an error of their own, `dropped` slices that expired or
    whose caller left before the model saw them.
    """

    batches: int = 0
    inputs: int = 0
    tokens: int = 0
    padded: int = 0
    failed: int = 0
    dropped: int = 0
    model_s: float = 0.0
