"""Replies that are sent bit by bit: they end by themselves, and hold a place of their tenant's meanwhile.
Server-sent events are some of them.

FastAPI brings the wire form; `sse-starlette` would patch the server class on import and poll for its
shutdown, which it cannot see in a Ray replica.
"""

import asyncio
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import AbstractContextManager, aclosing, suppress
from typing import Any

import orjson
from fastapi.sse import KEEPALIVE_COMMENT, format_sse_event
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from serve.errors import DeadlineExceeded


HEADERS = {"cache-control": "no-store", "x-accel-buffering": "no"}

RETRY_MS = 2000
"""When a reader whose connection ended comes again."""

STUCK_S = 15.0
"""How long after its end a stream may wait for a reader that takes nothing."""

PING = KEEPALIVE_COMMENT

Responses = dict[int | str, dict[str, Any]]

_EVENT = {
    "type": "object",
    "description": "One event; the data is JSON.",
    "required": ["event", "data"],
    "properties": {
        "event": {"type": "string"},
        "data": {"type": "string"},
        "id": {"type": "string"},
        "retry": {"type": "integer"},
    },
}
STREAMED: Responses = {200: {"content": {"text/event-stream": {"schema": _EVENT}}}}
"""`responses` of a route that streams events."""


class HeldStream(StreamingResponse):
    """Sends what `pieces` yields until its end. `place` is held meanwhile.

    `pieces` is told when to end, on the loop's clock, which is what `place` yields. What `place`
    raises is answered as any other failure.
    """

    def __init__(
        self,
        place: AbstractContextManager[float],
        pieces: Callable[[float], AsyncGenerator[bytes, None]],
        *,
        status: int = 200,
        headers: Mapping[str, str] | None = None,
        media_type: str | None = None,
    ) -> None:
        super().__init__((), status, headers, media_type)
        self._place = place
        self._pieces = pieces

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        with self._place as until, suppress(TimeoutError):
            async with aclosing(self._pieces(until)) as pieces:
                self.body_iterator = await self._begun(pieces, until)
                async with asyncio.timeout_at(until + STUCK_S):
                    await super().__call__(scope, receive, send)

    async def _begun(
        self, pieces: AsyncGenerator[bytes, None], _until: float
    ) -> AsyncGenerator[bytes, None]:
        """What is sent; whatever it raises before that is answered as any other failure."""
        return pieces


class CheckedStream(HeldStream):
    """Sends nothing before it has the first piece: a fault until then is a status, not a cut reply."""

    async def _begun(
        self, pieces: AsyncGenerator[bytes, None], until: float
    ) -> AsyncGenerator[bytes, None]:
        try:
            async with asyncio.timeout_at(until):
                first = await anext(pieces, b"")
        except TimeoutError:
            raise DeadlineExceeded("Nothing came in time.", retry_after_s=1) from None
        return _joined(first, pieces)


async def _joined(first: bytes, rest: AsyncGenerator[bytes, None]) -> AsyncGenerator[bytes, None]:
    yield first
    async for piece in rest:
        yield piece


class EventStream(HeldStream):
    """Sends events, each made by `message`."""

    media_type = "text/event-stream"

    def __init__(
        self,
        place: AbstractContextManager[float],
        messages: Callable[[float], AsyncGenerator[bytes, None]],
    ) -> None:
        super().__init__(place, messages, headers=HEADERS)


def message(kind: str, data: Any, number: int | None = None, *, first: bool = False) -> bytes:
    """One event; `number` is where a reader resumes, `first` tells it when to come again."""
    return format_sse_event(
        event=kind,
        data_str=orjson.dumps(data).decode(),
        id=None if number is None else str(number),
        retry=RETRY_MS if first else None,
    )
