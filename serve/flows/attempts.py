"""Tries inside a lease: what may pass in seconds is not sent back to the Store."""

from collections.abc import AsyncIterator, Awaitable, Callable
from typing import TypeVar

import stamina

from serve.errors import Overloaded, QuotaExceeded, ServiceError


T = TypeVar("T")

TRIES = 4
"""After 1, 2 and 4 s: together less than a lease, and a heartbeat keeps it anyway."""


def attempts() -> AsyncIterator[stamina.Attempt]:
    """Tries of one step of work. A refusal for lack of room is none here: it says when to come."""

    def passes(error: Exception) -> bool:
        refused = isinstance(error, QuotaExceeded | Overloaded)
        return isinstance(error, ServiceError) and error.retryable and not refused

    return aiter(
        stamina.retry_context(
            on=passes, attempts=TRIES, timeout=None, wait_initial=1.0, wait_max=4.0, wait_jitter=0.5
        )
    )


async def tried(step: Callable[[], Awaitable[T]]) -> T:
    """What the step comes to, after several tries if need be. Raises the error of the last one.

    One step each, so that a later one that fails does not repeat those before it.
    """
    async for attempt in attempts():
        with attempt:
            done = await step()
    return done
