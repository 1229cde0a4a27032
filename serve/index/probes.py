"""Asks an index whether searches see what was written: one question at a time for each namespace, every
`probe_s`, and only while somebody waits for the answer.

Writes of a namespace are seen in the order of their tokens. So whoever came since the last look waits as
one group, for its highest token, and the group with the lowest is asked about: a steady stream of writes
costs two questions a look, and none of them waits for those that came after it.
"""

import asyncio
from bisect import insort
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field

from serve.capabilities import Capabilities
from serve.errors import ServiceError
from serve.freshness import UNPROVED
from serve.ports import Landed, VectorIndex


WAITING_MAX = 10_000
"""Who may wait in one process, about 2 MB: writes of an index that has shown nothing for an hour."""

GROUPS_MAX = 100
"""Groups of one namespace: an index so many looks behind is asked about more of its writes at once."""

UNSAID_MAX = 20
"""After so many looks in a row at which the index did not say, nobody waits for its word any more."""

Told = Callable[[bool], None]
"""Is called once: whether searches see it, or else that the index will not say."""


@dataclass(slots=True)
class _Group:
    token: int = 0
    told: set[Told] = field(default_factory=set)


@dataclass(slots=True)
class _Line:
    """Who waits for one namespace. `new` came since the last look, `groups` before it, lowest first."""

    groups: list[_Group] = field(default_factory=list)
    new: _Group = field(default_factory=_Group)
    seen: int = -1
    said: bool | None = False
    unsaid: int = 0

    @property
    def idle(self) -> bool:
        return not (self.groups or self.new.told)


class Probes:
    """`run` must be running, else nobody is ever told."""

    def __init__(self, index: VectorIndex, probe_s: float) -> None:
        self.at_once = index.caps.consistency == "strong"
        self._index = index
        self._probe_s = probe_s
        self._lines: dict[str, _Line] = {}
        self._opened: asyncio.Queue[str] = asyncio.Queue()
        self._waiting = 0

    def expect(self, ns: str, token: int, told: Told) -> bool:
        """Tell once searches see the write with this token, or that it will not be known.

        False, and nothing is told: there is no proof of it, or too many wait.
        """
        if token == UNPROVED or self._waiting >= WAITING_MAX:
            return False
        line = self._lines.get(ns)
        if line is None:
            line = self._lines[ns] = _Line()
            self._opened.put_nowait(ns)
        line.new.token = max(token, line.new.token)
        line.new.told.add(told)
        self._waiting += 1
        return True

    async def sees(self, ns: str, token: int | None, wait_s: float | None = None) -> bool | None:
        """Whether searches see a write, waiting so long until they do; None: nobody can say.

        Without `wait_s`: as long as an answer takes, or the one of a moment ago.
        """
        if token is None:
            return True
        line = self._lines.get(ns)
        if line is not None and token <= line.seen:
            return True
        heard: list[bool] = []
        bell = asyncio.Event()

        def told(seen: bool) -> None:  # noqa: FBT001  a Told
            heard.append(seen)
            bell.set()

        if not self.expect(ns, token, told):
            return None
        line = self._lines[ns]
        try:
            with suppress(TimeoutError):
                wait_s = 2 * self._probe_s if wait_s is None else wait_s
                await asyncio.wait_for(bell.wait(), wait_s)
        finally:
            self._leave(line, told)
        said = heard[0] if heard else line.said is not None
        return bool(heard) if said else None

    async def run(self) -> None:
        """Look until cancelled."""
        async with asyncio.TaskGroup() as looks:
            while True:
                looks.create_task(self._follow(await self._opened.get()))

    async def _follow(self, ns: str) -> None:
        """Look after one namespace until nobody waits; a look lasts, also for who comes after it."""
        line = self._lines[ns]
        while True:
            self._gather(line)
            await self._look(ns, line)
            if line.unsaid >= UNSAID_MAX:
                self._give_up(line)
            await asyncio.sleep(self._probe_s)
            if line.idle:
                del self._lines[ns]
                return

    def _gather(self, line: _Line) -> None:
        """Those who came since the last look become a group."""
        if line.new.told:
            insort(line.groups, line.new, key=lambda group: group.token)
            line.new = _Group()
        if len(line.groups) > GROUPS_MAX:
            last = line.groups.pop()
            last.told |= line.groups.pop().told
            line.groups.append(last)

    async def _look(self, ns: str, line: _Line) -> None:
        """Tell groups, from the lowest on, until there is one that searches do not see yet."""
        while line.groups:
            group = line.groups[0]
            line.said = await self._ask(ns, group.token)
            line.unsaid = line.unsaid + 1 if line.said is None else 0
            if not line.said:
                return
            line.seen = max(line.seen, group.token)
            if line.groups and line.groups[0] is group:  # else all of it has left meanwhile
                del line.groups[0]
            self._tell(group, seen=True)

    async def _ask(self, ns: str, token: int) -> bool | None:
        try:
            return await self._index.reached(ns, str(token))
        except ServiceError:  # it is away: what it has not shown, nobody sees
            return False

    def _give_up(self, line: _Line) -> None:
        groups, line.groups = line.groups, []
        for group in groups:
            self._tell(group, seen=False)

    def _tell(self, group: _Group, *, seen: bool) -> None:
        self._waiting -= len(group.told)
        told, group.told = group.told, set()
        for one in told:
            one(seen)

    def _leave(self, line: _Line, told: Told) -> None:
        for group in (*line.groups, line.new):
            if told in group.told:
                group.told.discard(told)
                self._waiting -= 1
        line.groups = [group for group in line.groups if group.told]


def token_of(caps: Capabilities, landed: Landed) -> int | None:
    """The token of what has landed, as `records.Outcome` has it."""
    if caps.consistency == "strong":
        return None
    proved = landed.token is not None and landed.token.isascii() and landed.token.isdigit()
    return int(landed.token or 0) if proved else UNPROVED
