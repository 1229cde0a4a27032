"""An outlet: where one embedder replica takes calls that come through conduits."""

import asyncio
import logging
import secrets
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from hmac import compare_digest
from typing import cast

from deployments.frames import (
    BODY_BYTES_MAX,
    HELLO_BYTES_MAX,
    Frame,
    Malformed,
    Splitter,
    Word,
    pack_refusal,
    pack_reply,
    read_call,
)
from serve.errors import Internal, Overloaded, ServiceError
from serve.records import EmbedCall, EmbedReply


log = logging.getLogger("headrace.outlet")

LOOPBACK = "127.0.0.1"
HELLO_S_MAX = 10.0
FLUSH_S_MAX = 5.0
"""For answers that the kernel has not taken yet, from callers that read slowly."""

STRANGERS_MAX = 64
"""Connections that have not said the secret yet. Whoever knows it says it at once."""

Embed = Callable[[EmbedCall], Awaitable[EmbedReply]]


@dataclass(frozen=True, slots=True)
class Address:
    """Where a replica listens, and the secret that it wants to hear first."""

    node: str
    host: str
    port: int
    token: str = field(repr=False)  # it must not come into a log


class Outlet:
    """Takes calls in one embedder replica, at most `calls_max` at once; `calls` counts them."""

    def __init__(self, embed: Embed, *, calls_max: int) -> None:
        self._embed = embed
        self._calls_max = calls_max
        self._token = secrets.token_hex(16)
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._strangers: dict[Peer, None] = {}  # the oldest first
        self._peers: set[Peer] = set()
        self._hung_up = asyncio.Event()
        self._leaving = False
        self.calls = 0

    async def open(self, node: str, host: str = LOOPBACK) -> Address:
        """Listen on a free port of `host`. Raises OSError."""
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(lambda: Peer(self, self._token), host, 0)
        port = self._server.sockets[0].getsockname()[1]
        return Address(node, host, port, self._token)

    async def close(self, drain_s: float) -> None:
        """Send new calls elsewhere, let those under way end, for so long."""
        self._leaving = True
        if self._server is not None:
            self._server.close()
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=drain_s)
        for task in self._tasks:
            task.cancel()
        for peer in (*self._peers, *self._strangers):
            peer.close()
        # The process ends soon: what was answered last must have left it.
        with suppress(TimeoutError):
            async with asyncio.timeout(FLUSH_S_MAX):
                while self._peers:
                    self._hung_up.clear()
                    await self._hung_up.wait()

    def met(self, peer: "Peer") -> None:
        """A connection was made. Of too many strangers the oldest is cut off."""
        self._strangers[peer] = None
        if len(self._strangers) > STRANGERS_MAX:
            oldest = next(iter(self._strangers))
            del self._strangers[oldest]
            oldest.close()

    def joined(self, peer: "Peer") -> None:
        """A connection has said the secret."""
        self._strangers.pop(peer, None)
        self._peers.add(peer)

    def left(self, peer: "Peer") -> None:
        """A connection is gone."""
        self._strangers.pop(peer, None)
        self._peers.discard(peer)
        self._hung_up.set()

    def begin(self, peer: "Peer", frame: Frame) -> asyncio.Task[None] | None:
        """Work on a call, unless this replica is leaving. Raises Malformed."""
        if self._leaving:
            peer.say(frame.number, Word.LEAVING)
            return None
        if len(self._tasks) >= self._calls_max:
            full = Overloaded("The embedder takes no more calls.", retry_after_s=1)
            peer.say(frame.number, Word.REFUSAL, pack_refusal(full))
            return None
        call = read_call(frame.body)
        self.calls += 1
        task = asyncio.create_task(self._serve(peer, frame.number, call))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _serve(self, peer: "Peer", number: int, call: EmbedCall) -> None:
        try:
            body = pack_reply(await self._embed(call))
        except ServiceError as error:
            peer.say(number, Word.REFUSAL, pack_refusal(error))
        except Exception:  # a named rim: the caller is told, and the connection lives on
            log.exception("request %s failed in the embedder", call.request_id)
            peer.say(number, Word.REFUSAL, pack_refusal(Internal("A fault in the embedder.")))
        else:
            peer.say(number, Word.REPLY, body)


class Peer(asyncio.Protocol):
    """One connection at the embedder's end; with it go the calls that came through it."""

    def __init__(self, outlet: Outlet, token: str) -> None:
        self._outlet = outlet
        self._token = token
        self._frames = Splitter(HELLO_BYTES_MAX)  # until it has said the secret
        self._tasks: dict[int, asyncio.Task[None]] = {}
        self._transport: asyncio.Transport | None = None
        self._known = False
        self._patience: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Wait for the secret, not for ever."""
        self._transport = cast("asyncio.Transport", transport)  # uvloop's is no subclass
        self._patience = asyncio.get_running_loop().call_later(HELLO_S_MAX, self._unheard)
        self._outlet.met(self)

    def data_received(self, data: bytes) -> None:
        """Frames, or parts of them. Who sends anything else is cut off."""
        try:
            for frame in self._frames.feed(data):
                self._take(frame)
        except Malformed as error:
            log.warning("a connection is cut off: %s", error)
            self.close()

    def connection_lost(self, _error: Exception | None) -> None:
        """Nobody waits for its calls any more."""
        if self._patience is not None:
            self._patience.cancel()
        self._outlet.left(self)
        for task in self._tasks.values():
            task.cancel()

    def say(self, number: int, word: Word, body: bytes = b"") -> None:
        """Answer, if anybody is still there."""
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(Frame(number, word, body).packed())

    def close(self) -> None:
        """Hang up once what was said has gone out."""
        if self._transport is not None:
            self._transport.close()

    def _unheard(self) -> None:
        if not self._known:
            self.close()

    def _take(self, frame: Frame) -> None:
        if not self._known:
            self._greet(frame)
        elif frame.word is Word.CALL:
            task = self._outlet.begin(self, frame)
            if task is not None:
                self._tasks[frame.number] = task
                task.add_done_callback(lambda _: self._tasks.pop(frame.number, None))
        elif frame.word is Word.CANCEL:
            if frame.number in self._tasks:
                self._tasks[frame.number].cancel()
        else:
            raise Malformed(f"{frame.word.name} from a caller")

    def _greet(self, frame: Frame) -> None:
        if frame.word is not Word.HELLO or not compare_digest(frame.body, self._token.encode()):
            raise Malformed("it does not know the secret")
        self._known = True
        self._frames.bytes_max = BODY_BYTES_MAX
        self._outlet.joined(self)
