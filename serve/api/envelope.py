"""What surrounds every request, as plain ASGI: request id, bounded body, headers of the reply, and
the rim that no fault of ours passes.
"""

import logging
import re
import uuid
from collections.abc import Callable, Mapping
from typing import Any

from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve import tracing
from serve.api.problems import respond
from serve.api.rates import RawHeaders, rate_headers
from serve.api.service import Service
from serve.config import Settings
from serve.errors import Internal, TooLarge
from serve.flows.context import Context, Timing
from serve.logs import REQUEST
from serve.telemetry import NONE


UPLOADS = "/v1/files"
FORM_BYTES = 64 * 1024
"""What stands around the file in a form."""

log = logging.getLogger("headrace.api")

_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")
_LENGTH = re.compile(r"[0-9]{1,18}")


class Envelope:
    """Sets `x-request-id` (the caller's own when it is well formed), notes when the request arrived,
    refuses bodies above `body_bytes_max` (uploads: `files.bytes_max`) before they are read whole, and adds rate and timing
    headers.

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
        headers = dict(scope["headers"])  # Starlette's own look-up costs 20 us where there is none
        given = headers.get(b"x-request-id", b"").decode("latin-1")
        request_id = given if _REQUEST_ID.fullmatch(given) else f"req_{uuid.uuid4().hex}"
        REQUEST.set(request_id)  # of this task, which is the request's
        context = self._service().context
        state = scope.setdefault("state", {})
        state["request_id"], state["arrived"] = request_id, context.clock()
        answer = _Answer(state, send, context, id_echoed=self._id_echoed)
        bytes_max = _bytes_max(scope, context.settings)
        if _length(headers) > bytes_max:
            await respond(_too_large(bytes_max), scope)(scope, receive, answer)
            return
        with tracing.arrival(headers.get(b"traceparent", b""), request=request_id) as span:
            await self._answered(scope, _bounded(receive, bytes_max), answer)
            span.note(klass=state.get("klass", NONE), status=answer.status)

    async def _answered(self, scope: Scope, receive: Receive, answer: "_Answer") -> None:
        request_id = scope["state"]["request_id"]
        try:
            await self._app(scope, receive, answer)
        except ClientDisconnect:
            log.info("request %s: the client left before its body was read", request_id)
        except Exception:  # a named rim: a 500 without a traceback
            log.exception("request %s failed", request_id)
            if answer.started:  # too late for a status: let the server cut the connection
                raise
            failure = Internal(f"Internal error; quote the request id {request_id}.")
            await respond(failure, scope)(scope, receive, answer)


class _Answer:
    """`send` that adds our headers to the reply.

    What they say stands in the request's `state`: `caller` and `klass` from the door, `timing` from
    a route that used a model, `violated` from a refusal.
    """

    def __init__(
        self, state: Mapping[str, Any], send: Send, context: Context, *, id_echoed: bool
    ) -> None:
        self.started = False
        self.status = 0
        self._state = state
        self._send = send
        self._context = context
        self._id_echoed = id_echoed

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.started = True
            now = self._context.clock()
            self.status = message["status"]
            self._count(self.status, now)
            message["headers"] = [*message["headers"], *self._headers(now)]
        await self._send(message)

    def _count(self, status: int, now: float) -> None:
        state, answers = self._state, self._context.answers
        answers.add(state.get("klass", NONE), status, now - state["arrived"])
        if (timing := state.get("timing")) is not None:
            answers.tokenised.add(timing.tokenise_ms / 1e3)
            answers.encoded.add(now - state["timed_at"])

    def _headers(self, now: float) -> RawHeaders:
        state, context = self._state, self._context
        total_ms = (now - state["arrived"]) * 1e3
        headers = [(b"openai-processing-ms", b"%d" % round(total_ms))]
        if not self._id_echoed:
            headers.append((b"x-request-id", state["request_id"].encode()))
        if (timing := state.get("timing")) is not None:
            headers += _timing_headers(timing, total_ms)
        if (who := state.get("caller")) is not None:
            rates = context.quotas.rates(who, state.get("klass", "interactive"))
            headers += rate_headers(rates, now=context.wall(), violated=state.get("violated"))
        return headers


def _timing_headers(timing: Timing, total_ms: float) -> RawHeaders:
    """In milliseconds, under the names that Text Embeddings Inference gave them."""
    return [
        (b"x-tokenization-time", b"%.1f" % timing.tokenise_ms),
        (b"x-queue-time", b"%.1f" % timing.queue_ms),
        (b"x-inference-time", b"%.1f" % timing.infer_ms),
        (b"x-total-time", b"%.1f" % total_ms),
    ]


def _bytes_max(scope: Scope, settings: Settings) -> int:
    """Files are streamed to disk, all other bodies are held in memory."""
    if scope["method"] == "POST" and scope["path"] == UPLOADS:
        return settings.files.bytes_max + FORM_BYTES
    return settings.limits.body_bytes_max


def _length(headers: Mapping[bytes, bytes]) -> int:
    """The announced length of the body; 0 when there is none, or none that a number is."""
    text = headers.get(b"content-length", b"").decode("latin-1")
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
