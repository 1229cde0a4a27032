"""What the Ledger holds: what was used of every limit, over all replicas. Pure but for its rim.

`leases` is its counterpart in a replica. A limit is one of three kinds: a rate is a `Gcra`, a
level is the sum of what the replicas hold, a month counts up and starts anew.
"""

import math
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from serve.admission.gcra import Gcra
from serve.admission.limits import month_of
from serve.config import Ledger
from serve.grants import Draw, Grant, Limit, Line, Return


EXTRA_SHARE = 0.25
"""Beyond its need a draw gets at most this part of what is left: the rest is for other replicas."""

PHANTOM_S = 1.0
"""After a loss of the books others are taken to hold what the first asker does not, for so long:
then each of them has reported what it holds."""

REPLIES_MAX = 20_000
"""Answers kept for repeats. A replica has one exchange under way, so this is ample."""

EPSILON = 1e-6
"""Sums of floats: a unit has no parts."""


@dataclass(slots=True)
class _Rate:
    gcra: Gcra

    def free(self, limit: Limit, now: float) -> float:
        self.gcra.change(limit.interval_s, now)
        return self.gcra.free(limit.burst, now)

    def wait(self, limit: Limit, units: float, now: float) -> float:
        if units > limit.burst:
            return math.inf
        return self.gcra.wait(limit.burst, units, now)

    def charge(self, _replica: str, units: float, now: float) -> float:
        return self.gcra.charge(units, now)

    def give_back(self, _replica: str, units: float, mark: float, now: float) -> None:
        if units < 0:
            self.gcra.charge(-units, now)
        else:
            self.gcra.give_back(units, mark)

    def lower(self, limit: Limit, free: float, now: float) -> None:
        self.gcra.lower(limit.burst, free, now)


@dataclass(slots=True)
class _Month:
    month: str
    used: float = 0.0

    def free(self, limit: Limit, _now: float) -> float:
        return limit.burst - self.used

    def wait(self, limit: Limit, units: float, _now: float) -> float:
        return math.inf if units > limit.burst - self.used else 0.0

    def charge(self, _replica: str, units: float, _now: float) -> float:
        self.used += units
        return 0.0

    def give_back(self, _replica: str, units: float, mark: float, _now: float) -> None:
        self.used = max(self.used - units, 0.0)
        if not units:  # so much was used at least: the Store counted it
            self.used = max(self.used, mark)

    def lower(self, limit: Limit, free: float, _now: float) -> None:
        self.used = max(self.used, limit.burst - free)


@dataclass(slots=True)
class _Level:
    """Units held and when that lapses, by replica; the nameless one stands for the unknown."""

    lease_s: float
    holds: dict[str, tuple[float, float]] = field(default_factory=dict)

    def free(self, limit: Limit, now: float) -> float:
        for replica in [name for name, (_, lapses) in self.holds.items() if lapses <= now]:
            del self.holds[replica]
        return limit.burst - sum(units for units, _ in self.holds.values())

    def wait(self, limit: Limit, units: float, now: float) -> float:
        return math.inf if units > self.free(limit, now) else 0.0

    def charge(self, replica: str, units: float, now: float) -> float:
        held = self.holds.get(replica, (0.0, 0.0))[0] + units
        if held > 0:
            self.holds[replica] = (held, now + self.lease_s)
        return 0.0

    def give_back(self, replica: str, units: float, _mark: float, now: float) -> None:
        unknown, lapses = self.holds.get("", (0.0, 0.0))
        if unknown > 0 and replica not in self.holds:
            self.holds[""] = (max(unknown - units, 0.0), lapses)
        self.holds.pop(replica, None)
        self.charge(replica, units, now)

    def known(self) -> float:
        return sum(units for replica, (units, _) in self.holds.items() if replica)

    def lower(self, limit: Limit, free: float, now: float) -> None:
        unknown = self.free(limit, now) - free
        if unknown > 0:
            before, _ = self.holds.get("", (0.0, 0.0))
            self.holds[""] = (before + unknown, now + PHANTOM_S)


_State = _Rate | _Month | _Level


@dataclass(slots=True)
class _Young:
    """A state of books that have just begun: units charged since, and who has told its hint."""

    charged: float = 0.0
    heard: set[str] = field(default_factory=set)


class Bank:
    """The state of at most `keys_max` limits; the longest unused is forgotten first.

    A forgotten limit starts full, hence the bound must exceed the limits in use. What a replica
    holds of a level lapses `lease_s` after it last said so.
    """

    def __init__(self, *, keys_max: int, lease_s: float) -> None:
        self._keys_max = keys_max
        self._lease_s = lease_s
        self._states: OrderedDict[tuple[str, str], _State] = OrderedDict()
        self._young: dict[tuple[str, str], _Young] | None = {}
        self._began: float | None = None

    def exchange(
        self,
        replica: str,
        returns: Sequence[Return],
        draws: Sequence[Draw],
        *,
        now: float,
        month: str,
    ) -> list[Grant]:
        """Take the returns, then answer the draws in order; all lines of a draw or none.

        `now` is monotonic, in seconds; `month` is the calendar month, for example `2026-11`.
        """
        if self._began is None:
            self._began = now
        if now > self._began + self._lease_s:
            self._young = None  # every replica has been heard
        for one in returns:
            self._take_back(replica, one, now, month)
        return [self._answer(replica, draw, now, month) for draw in draws]

    def free(self, limit: Limit, *, now: float, month: str) -> float | None:
        """Units left of a limit; None when there is no state."""
        state = self._states.get((limit.owner, limit.name))
        if state is None or (isinstance(state, _Month) and state.month != month):
            return None
        return state.free(limit, now)

    def _take_back(self, replica: str, one: Return, now: float, month: str) -> None:
        limit = one.limit
        uses = one.units > 0 if limit.kind == "level" else one.units < 0
        uses |= limit.kind == "month" and not one.units
        if not uses and (limit.owner, limit.name) not in self._states:
            return  # forgotten, so full: a return must not become a credit
        state = self._find(limit, now, month)
        state.give_back(replica, one.units, one.mark, now)
        young = self._of_young(limit)
        if young is not None and limit.kind != "level":
            young.charged -= min(one.units, 0.0)

    def _answer(self, replica: str, draw: Draw, now: float, month: str) -> Grant:
        states = [self._hinted(replica, line, now, month) for line in draw.lines]
        pairs = list(zip(states, draw.lines, strict=True))
        free = [state.free(line.limit, now) for state, line in pairs]
        waits = [
            state.wait(line.limit, line.need, now) if line.need else 0 for state, line in pairs
        ]
        longest = max(waits, default=0)
        none = (0.0,) * len(pairs)
        if longest > 0:
            return Grant(none, tuple(free), none, waits.index(longest), longest)
        units, marks = [], []
        for place, (state, line) in enumerate(pairs):
            granted = line.need + _extra(line, free[place] - line.need)
            marks.append(state.charge(replica, granted, now) if granted else 0.0)
            units.append(granted)
            free[place] -= granted
            young = self._of_young(line.limit)
            if young is not None:
                young.charged += granted
        return Grant(tuple(units), tuple(free), tuple(marks))

    def _find(self, limit: Limit, now: float, month: str) -> _State:
        """The limit's state, under its figures of now; a new one is full."""
        key = limit.owner, limit.name
        state = self._states.get(key)
        if state is None or (isinstance(state, _Month) and state.month != month):
            if limit.kind == "rate":
                state = _Rate(Gcra(limit.interval_s, now, now))
            elif limit.kind == "month":
                state = _Month(month)
            else:
                state = _Level(self._lease_s)
            self._states[key] = state
            if self._young is not None:
                self._young[key] = _Young()
            self._forget()
        self._states.move_to_end(key)
        if isinstance(state, _Rate):
            state.gcra.change(limit.interval_s, now)
        return state

    def _hinted(self, replica: str, line: Line, now: float, month: str) -> _State:
        """The state, lowered to what this replica knows of it from before the books were begun.

        Others may have been first: what was charged since is not in the hint.
        """
        limit = line.limit
        known = (limit.owner, limit.name) in self._states
        state = self._find(limit, now, month)
        young = self._of_young(limit)
        if line.hint is not None and (not known or (young and replica not in young.heard)):
            charged = young.charged if young else 0.0
            if isinstance(state, _Level):  # units come back to it
                charged = min(charged, state.known())
            state.lower(limit, min(line.hint, limit.burst) - charged, now)
        if young is not None:
            young.heard.add(replica)
        return state

    def _of_young(self, limit: Limit) -> _Young | None:
        return None if self._young is None else self._young.get((limit.owner, limit.name))

    def _forget(self) -> None:
        while len(self._states) > self._keys_max:
            key, _ = self._states.popitem(last=False)
            if self._young is not None:
                self._young.pop(key, None)


def _extra(line: Line, left: float) -> float:
    """Units beyond the need, in whole ones."""
    return max(math.floor(min(line.want - line.need, left * EXTRA_SHARE) + EPSILON), 0)


class BankLedger:
    """A bank with clocks, as a `ports.Ledger`: in the Ledger's process, and in tests.

    `clock` is monotonic, `wall` in epoch seconds.
    """

    def __init__(
        self,
        settings: Ledger,
        *,
        keys_max: int,
        clock: Callable[[], float],
        wall: Callable[[], float],
    ) -> None:
        self._bank = Bank(keys_max=keys_max, lease_s=settings.lease_s)
        self._lease_s = settings.lease_s
        self._clock = clock
        self._wall = wall
        self._replies: OrderedDict[str, tuple[float, Sequence[Grant]]] = OrderedDict()

    async def exchange(
        self, op: str, replica: str, returns: Sequence[Return], draws: Sequence[Draw]
    ) -> Sequence[Grant]:
        """See `serve.ports.Ledger`; an operation is known for one lease."""
        now = self._clock()
        while self._replies:
            oldest, (at, _) = next(iter(self._replies.items()))
            if at + self._lease_s >= now and len(self._replies) < REPLIES_MAX:
                break
            del self._replies[oldest]
        if op not in self._replies:
            month = month_of(self._wall())
            grants = self._bank.exchange(replica, returns, draws, now=now, month=month)
            self._replies[op] = now, grants
        return self._replies[op][1]
