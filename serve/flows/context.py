"""What every flow of one ingress replica shares, and what a request carries through them."""

import asyncio
import uuid
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Executor
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from serve.admission.quotas import Quotas
from serve.config import Settings
from serve.config.live import Live
from serve.errors import DeadlineExceeded
from serve.flows.answers import Answers
from serve.flows.models import Models


@dataclass(frozen=True, slots=True)
class Context:
    """Settings, models and quotas, the threads that tokenise, and a monotonic clock.

    `wall` is seconds since the epoch, only for times that people read. `answers` counts the replies.
    Whoever uses a live setting reads it anew from `live.now`, each time.
    """

    settings: Settings
    models: Models
    quotas: Quotas
    threads: Executor
    clock: Callable[[], float]
    wall: Callable[[], float]
    answers: Answers = field(default_factory=Answers)
    live: Live = field(init=False)

    def __post_init__(self) -> None:
        """The live settings begin as those at the start."""
        object.__setattr__(self, "live", Live(self.settings))


@dataclass(frozen=True, slots=True)
class Timing:
    """Milliseconds of a request: until it was tokenised, in the fair queue, in the model.

    Of work that was done in parts side by side, the longest part's.
    """

    tokenise_ms: float = 0.0
    queue_ms: float = 0.0
    infer_ms: float = 0.0

    def then(self, later: "Timing") -> "Timing":
        """Of work that was done after this one."""
        return Timing(
            self.tokenise_ms + later.tokenise_ms,
            self.queue_ms + later.queue_ms,
            self.infer_ms + later.infer_ms,
        )


@asynccontextmanager
async def within(until: float | None, clock: Callable[[], float]) -> AsyncIterator[None]:
    """End what is inside at `until` on `clock`, the client's own deadline if it has one.

    Raises DeadlineExceeded.
    """
    if until is None:
        yield
        return
    try:
        async with asyncio.timeout(left(until, clock)) as limit:
            yield
    except TimeoutError:
        if not limit.expired():  # somebody else's, from inside
            raise
        raise too_late() from None


def left(until: float, clock: Callable[[], float]) -> float:
    """Seconds until then. Raises DeadlineExceeded when there are none."""
    seconds = until - clock()
    if seconds <= 0:
        raise too_late()
    return seconds


def too_late() -> DeadlineExceeded:
    """The client's deadline has passed."""
    return DeadlineExceeded("The deadline passed before the work was done.")


def new_op() -> str:
    """The id of one change to the Store, so that a repeated call is applied once.

    Never the client's own request id: two requests that share it are two changes.
    """
    return uuid.uuid4().hex
