"""The Store's owner as a named actor: the one process that opens the SQLite file."""

import asyncio
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray

from deployments.actors import STORE, State, ended, leave, starting, watch
from deployments.observed import observe
from deployments.stores import tick
from serve.config import Settings
from serve.errors import Internal
from serve.job_ports import Deliveries, Erasure, Events, Files, Handover, Jobs, Queue, Webhooks
from serve.ports import Collections, Fence, Keys, Tenants, Usage, Vectors


if TYPE_CHECKING:
    from serve.jobs.owner import StoreOwner

PORTS = (
    *(Keys, Tenants, Usage, Collections, Vectors, Fence),
    *(Handover, Jobs, Queue, Events, Files, Webhooks, Deliveries, Erasure),
)
CALLS = frozenset(name for port in PORTS for name in vars(port) if name[0] != "_")
"""The methods of the Store's ports: what `call` may call."""


@ray.remote
class StoreActor:
    """Holds the only connection. Everything it acknowledged is committed."""

    async def __init__(self, settings: Settings, _deploy_seq: int) -> None:  # type: ignore[misc]
        """Open the file, waiting for a predecessor's lock. `settings.data_dir` is absolute."""
        observe("store", settings.logs)
        self._leaving = False
        async with starting(STORE, settings):
            self._owner = await asyncio.to_thread(_open, settings)
        self._ticking = asyncio.create_task(tick(self._owner, settings.jobs.tick_s))
        self._watch = asyncio.create_task(
            watch(self._state, self.retire, grace_s=settings.actors.orphan_grace_s)
        )

    def _state(self) -> State:
        if self._leaving:  # closing makes it unhealthy: that is no reason to be restarted
            return "leaving"
        return "works" if self._owner.healthy and not ended(self._ticking) else "failed"

    async def ready(self) -> bool:
        """Whether it can commit."""
        return self._owner.healthy

    async def call(self, method: str, *args: Any) -> Any:
        """One method of the ports. Raises ServiceError."""
        if method not in CALLS:
            raise Internal(f"The Store has no method {method!r}.")
        return await getattr(self._owner, method)(*args)

    async def retire(self) -> None:
        """Finish what is queued, release the lock and end for good."""
        self._leaving = True
        self._ticking.cancel()
        try:
            await asyncio.to_thread(self._owner.close)
        finally:
            leave()


def _open(settings: Settings) -> "StoreOwner":
    # Here: SQL takes 0.4 s of a core, and who builds the application imports this module.
    from serve.jobs.owner import StoreOwner  # noqa: PLC0415

    return StoreOwner(
        Path(settings.data_dir) / settings.store.path,
        settings.store,
        time.time,
        collections_max=settings.limits.collections_max,
        jobs=settings.jobs,
        shares=settings.admission.shares,
    )
