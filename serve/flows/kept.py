"""Answers that serve several askers: of routes that are not charged, where each look costs the Store
a transaction.
"""

import asyncio
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from typing import Generic, TypeVar

from serve.errors import ServiceError


T = TypeVar("T")

ANSWERS_MAX = 1000
"""Answers kept of each kind, one a tenant; of the others only the call under way is shared."""


class Kept(Generic[T]):
    """Answers to questions, each kept for `kept_s` from when it was asked, failures too.

    Who asks while an answer is under way shares it.
    """

    def __init__(self, clock: Callable[[], float], kept_s: float) -> None:
        self._clock = clock
        self._kept_s = kept_s
        self._answers: OrderedDict[
            tuple[str, ...], tuple[float, asyncio.Task[T | ServiceError]]
        ] = OrderedDict()

    async def get(self, question: tuple[str, ...], ask: Callable[[], Awaitable[T]]) -> T:
        """The answer of the last `kept_s`, or a new one. Raises what `ask` raises."""
        now = self._clock()
        at, task = self._answers.get(question, (now, None))
        if task is None or (task.done() and now - at >= self._kept_s):
            task = asyncio.create_task(_outcome(ask))
            self._answers[question] = now, task
            self._answers.move_to_end(question)
            if len(self._answers) > ANSWERS_MAX:
                self._answers.popitem(last=False)
        # Shielded: a caller who leaves must not take the answer from the others.
        answer = await asyncio.shield(task)
        if isinstance(answer, ServiceError):
            raise answer
        return answer


async def _outcome(ask: Callable[[], Awaitable[T]]) -> T | ServiceError:
    """A failure is a result, so that none goes unseen when all have left."""
    try:
        return await ask()
    except ServiceError as error:
        return error
