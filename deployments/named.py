"""Calls to named actors, without Ray Serve: an actor that only calls others is spared its import,
0.7 s of a core and 50 MB.

`str(error)` of a Ray task error is a traceback; what the far side raised is its `cause`.
"""

import asyncio
import logging
from collections.abc import Sequence
from typing import Any

import ray
from ray.exceptions import ActorDiedError, ActorUnavailableError, RayActorError, RayTaskError

from deployments.actors import NAMESPACE, living, name_of
from serve.config import Settings
from serve.errors import Internal, ServiceError


log = logging.getLogger("headrace.handles")

LOOK_AGAIN_S = 0.1
"""Between two look-ups of an actor that is restarting."""


def caused(error: RayTaskError) -> ServiceError:
    """What the far side raised; anything but our own errors is a fault of ours, and is logged."""
    cause = error.cause
    if isinstance(cause, ServiceError):
        return cause
    log.error("the far side failed: %s", error)
    return Internal(f"{type(cause).__name__} in a worker.")


class Named:
    """Calls to a named actor: looked up again after it died, repeated until the time is up.

    Every call is idempotent (reads, or changes with an operation id), so a repeat is safe.
    """

    def __init__(self, role: str, settings: Settings, unavailable: type[ServiceError]) -> None:
        self._role = role
        self._name = name_of(role, settings)
        self._unavailable = unavailable
        self._actor: Any = None

    async def call(self, method: str, *args: Any, timeout_s: float) -> Any:
        """Call a method. Raises what it raises, or `unavailable` after `timeout_s`."""
        try:
            async with asyncio.timeout(timeout_s):
                return await self._insist(method, args)
        except TimeoutError:
            raise self._unavailable(f"The {self._role} is away.", retry_after_s=2) from None

    async def _insist(self, method: str, args: Sequence[Any]) -> Any:
        while True:
            try:
                actor = self._actor or await asyncio.to_thread(self._find)
                self._actor = actor
                return await getattr(actor, method).remote(*args)
            except RayTaskError as error:
                raise caused(error) from None
            except (ActorDiedError, ActorUnavailableError, ValueError):
                self._actor = None
                await asyncio.sleep(LOOK_AGAIN_S)

    async def ask(self, method: str, *args: Any, timeout_s: float) -> Any:
        """Call a method that need not be waited for: an actor that restarts is away at once.

        Repeated only when the actor has made place for a successor. Raises what it raises, or
        `unavailable`.
        """
        try:
            async with asyncio.timeout(timeout_s):
                try:
                    return await self._once(method, args)
                except ActorDiedError:
                    self._actor = None
                    return await self._once(method, args)
        except RayTaskError as error:
            raise caused(error) from None
        except (TimeoutError, RayActorError, ValueError):
            raise self._unavailable(f"The {self._role} is away.", retry_after_s=1) from None

    async def _once(self, method: str, args: Sequence[Any]) -> Any:
        """Without Ray's own repeats, which would act after we have given up."""
        self._actor = self._actor or await asyncio.to_thread(self._find)
        return await getattr(self._actor, method).options(max_task_retries=0).remote(*args)

    def _find(self) -> Any:
        """Our own deployment's actor, else its successor's. Raises ValueError when none lives."""
        names = living(self._role)
        if not names:
            raise ValueError(self._role)
        return ray.get_actor(self._name if self._name in names else names[-1], NAMESPACE)
