"""A conduit: one connection from an ingress or a worker to one embedder replica, the callers' end.

Ray's handles choose, start, watch and replace replicas, and say where each of them listens (`outlet`);
calls then take this way: a handle's costs several ms of CPU each, this some 0.05 (docs/adr/0016).
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from itertools import count
from typing import cast

from deployments.frames import (
    Frame,
    Malformed,
    Splitter,
    Word,
    pack_call,
    read_refusal,
    read_reply,
)
from deployments.outlet import LOOPBACK, Address
from serve.errors import ServiceError
from serve.records import EmbedCall, EmbedReply


log = logging.getLogger("headrace.conduit")

CONNECT_S_MAX = 2.0
LOOK_EVERY_S = 2.0
LOOK_AGAIN_S = 0.1
"""After a connection was lost."""
UNREAD_BYTES_MAX = 4 * 2**20
"""What waits to be sent to a replica, but for one more call: 64 of the largest of `slice_tokens` 16,384."""


class ConduitLost(Exception):
    """The replica has gone, perhaps in the middle of the call: it may be made again elsewhere."""


class ReplicaLeaves(Exception):
    """The replica has not begun the call, and takes no more: it is for another one."""


class Conduit(asyncio.Protocol):
    """One connection to one replica. `load` is the tokens of the calls that are under way; it is `stuck`
    while the replica does not read what it was sent.
    """

    def __init__(self, address: Address) -> None:
        self.address = address
        self.load = 0
        self.lost = False
        self.stuck = False
        self._frames = Splitter()
        self._numbers = count(1)
        self._waiting: dict[int, asyncio.Future[EmbedReply]] = {}
        self._transport: asyncio.Transport | None = None

    @classmethod
    async def connect(cls, address: Address) -> "Conduit":
        """Raises OSError, TimeoutError."""
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(CONNECT_S_MAX):
            _, conduit = await loop.create_connection(
                lambda: cls(address), address.host, address.port
            )
        return conduit

    async def embed(self, call: EmbedCall) -> EmbedReply:
        """See `serve.ports.Embedder`; cancelling this drops the call.

        Raises ConduitLost and ReplicaLeaves, too.
        """
        if self.lost or self._transport is None:
            raise ConduitLost
        number, tokens = next(self._numbers), sum(call.tokens)
        packed = Frame(number, Word.CALL, pack_call(call)).packed()
        answer: asyncio.Future[EmbedReply] = asyncio.get_running_loop().create_future()
        self._waiting[number] = answer
        self.load += tokens
        try:
            self._transport.write(packed)
            return await answer
        except asyncio.CancelledError:
            if not self.lost:
                self._transport.write(Frame(number, Word.CANCEL).packed())
            raise
        finally:
            self.load -= tokens
            self._waiting.pop(number, None)

    def close(self) -> None:
        """Hang up; what still waits is lost."""
        if self._transport is not None:
            self._transport.close()

    @property
    def idle(self) -> bool:
        """Nobody waits for an answer."""
        return not self._waiting

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Say the secret."""
        self._transport = cast("asyncio.Transport", transport)  # uvloop's is no subclass
        self._transport.set_write_buffer_limits(UNREAD_BYTES_MAX)
        self._transport.write(Frame(0, Word.HELLO, self.address.token.encode()).packed())

    def data_received(self, data: bytes) -> None:
        """Answers, or parts of them."""
        try:
            for frame in self._frames.feed(data):
                self._answer(frame)
        except Malformed as error:
            log.warning("an embedder speaks another language: %s", error)
            if self._transport is not None:
                self._transport.abort()  # closing would wait until it has read what we sent

    def pause_writing(self) -> None:
        """More than UNREAD_BYTES_MAX waits; callers that leave do not take back what they sent."""
        self.stuck = True

    def resume_writing(self) -> None:
        """The replica reads again."""
        self.stuck = False

    def connection_lost(self, _error: Exception | None) -> None:
        """Whoever waits may ask another replica."""
        self.lost = True
        for answer in self._waiting.values():
            if not answer.done():
                answer.set_exception(ConduitLost())

    def _answer(self, frame: Frame) -> None:
        answer = self._waiting.get(frame.number)
        if answer is None or answer.done():  # its caller has left
            return
        if frame.word is Word.REPLY:
            answer.set_result(read_reply(frame.body))
        elif frame.word is Word.REFUSAL:
            answer.set_exception(read_refusal(frame.body))
        elif frame.word is Word.LEAVING:
            answer.set_exception(ReplicaLeaves())
        else:
            raise Malformed(f"{frame.word.name} from an embedder")


class Conduits:
    """To every replica of one pool, as they come and go.

    `find` asks all replicas where they listen; None: not for us. They are used while every replica
    can be reached from this `node`: else some would get no work.
    """

    def __init__(self, find: Callable[[], Awaitable[Sequence[Address | None]]], node: str) -> None:
        self._find = find
        self._node = node
        self._open: dict[Address, Conduit] = {}
        self._leaving: set[Conduit] = set()
        self._whole = False
        """Whether there is one to each replica, as far as was seen."""
        self._stale = asyncio.Event()

    def best(self) -> Conduit | None:
        """To the replica with least to do, as far as is known here; None: use the handle.

        Of equals the one that was chosen longest ago: else all ingresses would choose the first.
        """
        if not self._whole:
            return None
        alive = [one for one in self._open.values() if not one.lost]
        if len(alive) < len(self._open):
            self._stale.set()
        reading = (one for one in alive if not one.stuck)
        best = min(reading, key=lambda one: one.load, default=None)
        if best is not None:
            self._open[best.address] = self._open.pop(best.address)  # to the end
        return best

    def lose(self, conduit: Conduit) -> None:
        """It is lost, or sends calls away: ask nothing more of it."""
        if self._open.get(conduit.address) is conduit:  # not the one that was opened after it
            del self._open[conduit.address]
        self._leaving.add(conduit)
        self._stale.set()

    async def run(self) -> None:
        """Follow the replicas until cancelled."""
        try:
            while True:
                self._stale.clear()
                await self._look()
                try:
                    async with asyncio.timeout(LOOK_EVERY_S):
                        await self._stale.wait()
                except TimeoutError:
                    continue
                await asyncio.sleep(LOOK_AGAIN_S)
        finally:
            for conduit in (*self._open.values(), *self._leaving):
                conduit.close()

    async def _look(self) -> None:
        """Connect to new replicas, and hang up on those that are gone once they have answered."""
        try:
            found = await self._find()
        except (ServiceError, TimeoutError) as error:
            log.info("the replicas did not say where they listen: %r", error)
            return  # what is open goes on
        except Exception:  # a named rim: nothing is replaced because of a shorter way
            log.exception("the replicas could not be asked where they listen")
            return
        wanted = [one for one in found if one is not None and self._reachable(one)]
        if len(wanted) < len(found):
            wanted = []
        for address in self._open.keys() - set(wanted):
            self._leaving.add(self._open.pop(address))
        held = {address for address, one in self._open.items() if not one.lost}
        # Side by side: one that does not answer must not keep us from the others.
        await asyncio.gather(*(self._connect(one) for one in wanted if one not in held))
        self._whole = self._open.keys() >= set(wanted)
        for conduit in tuple(self._leaving):
            if conduit.lost or conduit.idle:
                conduit.close()
                self._leaving.discard(conduit)

    def _reachable(self, address: Address) -> bool:
        return address.host != LOOPBACK or address.node == self._node

    async def _connect(self, address: Address) -> None:
        self._open.pop(address, None)
        try:
            self._open[address] = await Conduit.connect(address)
        except (OSError, TimeoutError) as error:
            log.warning("the embedder at %s:%d: %r", address.host, address.port, error)
