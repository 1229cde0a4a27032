"""Redis in the Ledger's place: one round trip an exchange, one script call for each tenant in it.

`exchange.lua` does what `bank` does. A tenant's keys begin with `headrace:{<tenant>}:`, so they
share a slot; the client is for one server, or for a proxy that sends every call to its slot.
"""

import asyncio
import hashlib
import math
import struct
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from importlib import resources
from typing import Any

from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import NoScriptError, RedisError

from serve.admission.limits import month_of
from serve.config import Ledger as LedgerSettings
from serve.errors import LedgerUnavailable
from serve.grants import Draw, Grant, Limit, LimitKind, Return
from serve.ports import Ledger


SCRIPT = resources.files(__package__).joinpath("exchange.lua").read_text(encoding="utf-8")
"""Its reply and its arguments are described at its top."""

SCRIPT_SHA = hashlib.sha1(SCRIPT.encode()).hexdigest()  # noqa: S324 - Redis' name for it

CONNECTIONS_MAX = 16
"""A replica exchanges in the background and for a few small tenants; more wait for a connection."""

_DOUBLE = struct.calcsize("<d")

_KINDS: dict[LimitKind, float] = {"rate": 0, "level": 1, "month": 2}


def _blob(values: Sequence[float]) -> bytes:
    return struct.pack(f"<{len(values)}d", *values)


@dataclass(slots=True)
class _Part:
    """One tenant's part of an exchange, as the script takes it."""

    tenant: str
    month: str
    numbers: dict[str, int] = field(default_factory=dict)
    figures: list[float] = field(default_factory=list)
    returns: list[float] = field(default_factory=list)
    lines: list[float] = field(default_factory=list)
    places: list[int] = field(default_factory=list)
    draws: list[Draw] = field(default_factory=list)

    def take(self, one: Return) -> None:
        """Add a return."""
        self.returns += (self._number(one.limit), one.units, one.mark)

    def ask(self, place: int, draw: Draw) -> None:
        """Add a draw, the `place`th of the exchange."""
        self.places.append(place)
        self.draws.append(draw)
        self.lines.append(len(draw.lines))
        for line in draw.lines:
            hint = math.nan if line.hint is None else line.hint
            self.lines += (self._number(line.limit), line.need, line.want, hint)

    def arguments(self, op: str, replica: str, lease_s: float) -> list[bytes | str | float]:
        """What follows the script in a call of it."""
        keys = [self._key(f"op/{op}"), *self.numbers]
        blobs = (_blob(self.figures), _blob(self.returns), _blob(self.lines))
        return [len(keys), *keys, replica, lease_s, *blobs]

    def _number(self, limit: Limit) -> int:
        """The limit's place among the script's keys; its latest figures hold for all of it."""
        month = f"/{self.month}" if limit.kind == "month" else ""
        key = self._key(f"{limit.owner}/{limit.name}{month}")
        number = self.numbers.setdefault(key, len(self.numbers))
        figures = (_KINDS[limit.kind], limit.burst, limit.interval_s)
        self.figures[3 * number : 3 * number + 3] = figures
        return number

    def _key(self, name: str) -> str:
        return f"headrace:{{{self.tenant}}}:{name}"


def _by_tenant(returns: Sequence[Return], draws: Sequence[Draw], month: str) -> Collection[_Part]:
    parts: dict[str, _Part] = {}

    def part(limits: Sequence[Limit]) -> _Part:
        tenants = {limit.owner.split("/", 2)[1] for limit in limits} or {""}
        (tenant,) = tenants  # a draw is one request's, so one tenant's
        return parts.setdefault(tenant, _Part(tenant, month))

    for one in returns:
        part([one.limit]).take(one)
    for place, draw in enumerate(draws):
        part([line.limit for line in draw.lines]).ask(place, draw)
    return parts.values()


def _grants(reply: bytes, draws: Sequence[Draw]) -> Iterator[Grant]:
    """The answers to a tenant's draws."""
    values = struct.unpack(f"<{len(reply) // _DOUBLE}d", reply)
    at = 1  # after the server's clock
    for draw in draws:
        refused, wait_s = values[at : at + 2]
        ends = at + 2 + 3 * len(draw.lines)
        units, free, marks = (values[at + 2 + part : ends : 3] for part in range(3))
        yield Grant(units, free, marks, None if refused < 0 else int(refused), wait_s)
        at = ends


class RedisLedger(Ledger):
    """The limits of all replicas in one Redis; `url` may hold a password.

    `wall` gives epoch seconds, for the calendar month only: all else goes by the server's clock.
    The answers to one tenant's draws do not depend on those to another's.
    """

    def __init__(self, url: str, settings: LedgerSettings, *, wall: Callable[[], float]) -> None:
        self._wall = wall
        self._lease_s = settings.lease_s
        self._timeout_s = settings.timeout_s
        pool = BlockingConnectionPool.from_url(
            url,
            max_connections=CONNECTIONS_MAX,
            timeout=None,  # one deadline for the whole exchange holds for these
            socket_timeout=None,
            socket_connect_timeout=None,
            retry=Retry(NoBackoff(), 0),
            protocol=2,  # with 3 the client asks the server for notices of its maintenance
        )
        self._redis = Redis.from_pool(pool)

    async def exchange(
        self, op: str, replica: str, returns: Sequence[Return], draws: Sequence[Draw]
    ) -> Sequence[Grant]:
        """See `serve.ports.Ledger`; an operation is known for one lease.

        A tenant's returns and draws are one atomic call, in order.
        """
        tenants = _by_tenant(returns, draws, month_of(self._wall()))
        calls = [one.arguments(op, replica, self._lease_s) for one in tenants]
        try:
            async with asyncio.timeout(self._timeout_s):
                replies = await self._call(calls)
        except (RedisError, OSError) as error:  # which a TimeoutError is
            message = f"Redis is away ({type(error).__name__})."
            raise LedgerUnavailable(message, retry_after_s=1) from error
        grants: dict[int, Grant] = {}
        for one, reply in zip(tenants, replies, strict=True):
            grants.update(zip(one.places, _grants(reply, one.draws), strict=True))
        return [grants[place] for place in range(len(draws))]

    async def aclose(self) -> None:
        """Close the connections."""
        await self._redis.aclose()

    async def _call(self, calls: Sequence[Sequence[bytes | str | float]]) -> list[bytes]:
        """One script call each, in one round trip; in another one where the script is not known."""
        replies = await self._send("EVALSHA", SCRIPT_SHA, calls)
        lost = [at for at, reply in enumerate(replies) if isinstance(reply, NoScriptError)]
        if lost:
            again = await self._send("EVAL", SCRIPT, [calls[at] for at in lost])
            for at, reply in zip(lost, again, strict=True):
                replies[at] = reply
        for reply in replies:
            if isinstance(reply, Exception):
                raise reply
        return replies

    async def _send(
        self, command: str, script: str, calls: Sequence[Sequence[bytes | str | float]]
    ) -> list[Any]:
        async with self._redis.pipeline(transaction=False) as pipeline:
            for arguments in calls:
                pipeline.execute_command(command, script, *arguments)
            return await pipeline.execute(raise_on_error=False)
