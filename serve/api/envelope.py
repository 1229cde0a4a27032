"""What surrounds every request, as plain ASGI: request id, bounded body, headers of the reply."""

import re
import uuid
from collections.abc import Callable

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.api.problems import respond
from serve.api.service import Service
from serve.api.wire import rate_headers
from serve.errors import TooLarge
from serve.records import Klass


_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")


class Envelope:
    """Sets `x-request-id` (the caller's own when it is well formed), refuses bodies above
    `body_bytes_max` before they are read whole, and adds rate and timing headers.
    """

    def __init__(self, app: ASGIApp, *, service: Callable[[], Service]) -> None:
        self._app = app
        self._service = service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        context = self._service().context
        began = context.clock()
        headers = Headers(scope=scope)
        given = headers.get("x-request-id", "")
        request_id = given if _REQUEST_ID.fullmatch(given) else f"req_{uuid.uuid4().hex}"
        state = scope.setdefault("state", {})
        state["request_id"] = request_id

        async def answer(message: Message) -> None:
            if message["type"] == "http.response.start":
                out = MutableHeaders(scope=message)
                out["x-request-id"] = request_id
                out["openai-processing-ms"] = str(round((context.clock() - began) * 1e3))
                if (who := state.get("caller")) is not None:
                    klass: Klass = state.get("klass", "interactive")
                    rates = context.quotas.rates(who, klass, context.clock())
                    for name, value in rate_headers(rates).items():
                        out[name] = value
            await send(message)

        bytes_max = context.settings.limits.body_bytes_max
        length = headers.get("content-length", "")
        if length.isdigit() and int(length) > bytes_max:
            await respond(_too_large(bytes_max), scope["path"])(scope, receive, answer)
            return
        await self._app(scope, _bounded(receive, bytes_max), answer)


def _bounded(receive: Receive, bytes_max: int) -> Receive:
    """`receive` that raises TooLarge once more than `bytes_max` came."""
    left = bytes_max

    async def bounded() -> Message:
        nonlocal left
        message = await receive()
        left -= len(message.get("body", b""))
        if left < 0:
            raise _too_large(bytes_max)
        return message

    return bounded


def _too_large(bytes_max: int) -> TooLarge:
    return TooLarge(f"The body exceeds {bytes_max} bytes.", param="body")
