"""Wakes who waits for something to be stored, within one event loop. What a transaction has stored it
notes at its connection, and who ran it rings when it has committed.
"""

import asyncio
from collections import defaultdict, deque
from collections.abc import Hashable

import sqlalchemy as sa


_NOTED = "rings"


def note(conn: sa.Connection, word: str) -> None:
    """Something of this word is stored by the transaction of `conn`."""
    conn.info.setdefault(_NOTED, set()).add(word)


def noted(conn: sa.Connection) -> frozenset[str]:
    """What was noted since this was last asked."""
    return frozenset(conn.info.pop(_NOTED, ()))


class Bell:
    """Waiters by what they wait for. A ring wakes the one that has waited longest, or all."""

    def __init__(self) -> None:
        self._waiting: defaultdict[Hashable, deque[asyncio.Future[None]]] = defaultdict(deque)

    def listen(self, what: Hashable) -> asyncio.Future[None]:
        """Begin to wait; do so before looking, or a ring in between is missed."""
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting[what].append(waiter)
        return waiter

    def leave(self, what: Hashable, waiter: asyncio.Future[None]) -> None:
        """Wait no more. A ring that came meanwhile was for somebody: it is passed on."""
        if waiter.done():
            self.ring(what)
        else:
            self._waiting[what].remove(waiter)

    def ring(self, what: Hashable, *, everybody: bool = False) -> None:
        """There may be something."""
        waiting = self._waiting[what]
        while waiting:
            waiting.popleft().set_result(None)
            if not everybody:
                return


async def heard(waiter: asyncio.Future[None], seconds: float) -> bool:
    """Whether it rang within so many seconds; the waiter stays as it is."""
    done, _ = await asyncio.wait([waiter], timeout=seconds)
    return bool(done)
