"""The way in to every route that is charged, as plain ASGI: who asks, and may it go on?

It stands before FastAPI's routing because a tenant over its limit may send any number of requests:
refused here, before the body is read, one costs a fraction of what it would cost in a route.
"""

from collections.abc import Callable, Sequence
from re import Pattern

from starlette.types import ASGIApp, Receive, Scope, Send

from serve.admission.metering import OPERATION
from serve.api.problems import respond
from serve.api.service import Service
from serve.errors import ServiceError
from serve.records import Klass


Charged = tuple[frozenset[str], Pattern[str], Klass, str]
"""Methods and path of a route, the class it is charged to, and its operation."""


class Gate:
    """Notes the caller and the class of a charged route, or answers with the refusal."""

    def __init__(
        self, app: ASGIApp, *, service: Callable[[], Service], charged: Sequence[Charged]
    ) -> None:
        self._app = app
        self._service = service
        self._charged = tuple(charged)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        found = self._charge(scope) if scope["type"] == "http" else None
        if found is not None:
            klass, operation = found
            OPERATION.set(operation)  # of this task, which is the request's
            service, state = self._service(), scope["state"]
            state["klass"] = klass
            try:
                sent = dict(scope["headers"]).get(b"authorization", b"")
                who = state["caller"] = await service.door.caller(sent.decode("latin-1"))
                service.context.quotas.check(who, klass)
            except ServiceError as error:
                await respond(error, scope)(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _charge(self, scope: Scope) -> tuple[Klass, str] | None:
        method, path = scope["method"], scope["path"]
        for methods, pattern, klass, operation in self._charged:
            if method in methods and pattern.match(path):
                return klass, operation
        return None
