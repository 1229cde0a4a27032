"""What surrounds every request, as plain ASGI: request id, bounded body, headers of the reply, and
the rim that no fault of ours passes.
"""

import logging
import re
import uuid
from collections.abc import Callable

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.api.problems import respond
from serve.api.service import Service
from serve.api.wire import rate_headers
from serve.errors import Internal, TooLarge
from serve.records import Klass


log = logging.getLogger("headrace.api")

_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")
_LENGTH = re.compile(r"[0-9]{1,18}")


class Envelope:
    """Sets `x-request-id` (the caller's own when it is well formed), refuses bodies above
    `body_bytes_max` before they are read whole, and adds rate and timing headers.

    What nobody expected becomes a 500 here and not in Starlette's own outermost layer, whose reply
    would lack these headers and which raises the error again for the server.
    """

    def __init__(
        self, app: ASGIApp, *, service: Callable[[], Service], id_echoed: bool = False
    ) -> None:
        self._app = app
        self._service = service
        self._id_echoed = id_echoed

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        given = headers.get("x-request-id", "")
        request_id = given if _REQUEST_ID.fullmatch(given) else f"req_{uuid.uuid4().hex}"
        scope.setdefault("state", {})["request_id"] = request_id
        answer = _Answer(scope, send, self._service(), id_echoed=self._id_echoed)
        bytes_max = answer.context.settings.limits.body_bytes_max
        if _length(headers) > bytes_max:
            await respond(_too_large(bytes_max), scope["path"])(scope, receive, answer)
            return
        try:
            await self._app(scope, _bounded(receive, bytes_max), answer)
        except ClientDisconnect:
            log.info("request %s: the client left before its body was read", request_id)
        except Exception:  # a named rim: a 500 without a traceback
            log.exception("request %s failed", request_id)
            if answer.started:  # too late for a status: let the server cut the connection
                raise
            failure = Internal(f"Internal error; quote the request id {request_id}.")
            await respond(failure, scope["path"])(scope, receive, answer)


class _Answer:
    """`send` that adds our headers to the reply."""

    def __init__(self, scope: Scope, send: Send, service: Service, *, id_echoed: bool) -> None:
        self.context = service.context
        self.started = False
        self._state = scope["state"]
        self._id_echoed = id_echoed
        self._send = send
        self._began = self.context.clock()

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.started = True
            self._add(MutableHeaders(scope=message))
        await self._send(message)

    def _add(self, headers: MutableHeaders) -> None:
        now = self.context.clock()
        if not self._id_echoed:
            headers["x-request-id"] = self._state["request_id"]
        headers["openai-processing-ms"] = str(round((now - self._began) * 1e3))
        if (who := self._state.get("caller")) is not None:
            klass: Klass = self._state.get("klass", "interactive")
            headers.update(rate_headers(self.context.quotas.rates(who, klass, now)))


def _length(headers: Headers) -> int:
    """The announced length of the body; 0 when there is none, or none that a number is."""
    text = headers.get("content-length", "")
    return int(text) if _LENGTH.fullmatch(text) else 0


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
