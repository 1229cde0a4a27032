"""How the Store's ports reach its actor: by its one method `call`."""

from typing import Any, cast

from deployments.actors import STORE
from deployments.named import Named
from serve import tracing
from serve.config import Settings
from serve.errors import StoreUnavailable


class StoreCalls:
    """Calls to the Store's actor. Each also raises StoreUnavailable."""

    def __init__(self, settings: Settings) -> None:
        self._named = Named(STORE, settings, StoreUnavailable)
        self._timeout_s = settings.actors.call_timeout_s

    async def _call(self, method: str, *args: Any, wait_s: float = 0.0) -> Any:
        """One method; `wait_s` is how long it may wait for something by itself."""
        with tracing.part("headrace.store", method=method):
            return await self._named.call("call", method, *args, timeout_s=self._timeout_s + wait_s)

    async def ready(self, timeout_s: float) -> bool:
        """Whether it answers."""
        return cast("bool", await self._named.call("ready", timeout_s=timeout_s))
