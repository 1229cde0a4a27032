"""What one replica holds of one limit, to spend without asking. Pure.

`leases` moves units between these accounts and the Ledger.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

from serve.config import Ledger
from serve.grants import Limit


BLOCKS_SHARE = 0.02
"""All replicas' blocks together are at most this part of a burst: by so much a window's admissions
can exceed its limit, and by so much below its limit a tenant can be refused."""

BLOCK_UNITS_MIN = 2
"""A block below this is none: such a limit is asked for per request, or a few requests that reach
several replicas would be refused what is allowed."""

MONTH_SHARE = 1e-3
"""The block of a month's limit: 43 minutes of an even use."""

SPARE_SHARE = 0.25
"""Of what is left of a level, all replicas together keep at most this part unused."""

EPSILON = 1e-6
"""Sums of floats: a unit has no parts."""

KNOWN_S = 10.0
"""How long what a replica was told of a limit still says something about others' use of it."""


@dataclass(frozen=True, slots=True)
class Terms:
    """What decides the size of blocks: the settings, and how many replicas share a limit."""

    settings: Ledger
    replicas: int

    def block(self, limit: Limit) -> float:
        """Units of a rate or a month that one replica holds at most; 0: it asks per request."""
        if limit.kind == "rate":
            even = self.settings.block_s / limit.interval_s
        else:
            even = limit.burst * MONTH_SHARE
        block = math.floor(min(even, limit.burst * BLOCKS_SHARE / self.replicas))
        return block if block >= BLOCK_UNITS_MIN else 0.0


LEVEL_KNOWN_S = 1.0
"""The same of a level: what others hold changes with every request of theirs."""


class Rate(NamedTuple):
    """The state of one limit: units left, and the seconds until all of them are (0: unknown).

    A tuple, because every reply makes one of each limit: 0.3 us instead of 1 us.
    """

    limit: Limit
    remaining: int
    reset_s: float


class Account:
    """Units of one limit in one replica: granted and not yet used.

    `balance` of a level is what was granted (`held`) and is not in use. The units of a rate come
    from two grants at most, used in order: `lot` of them have `mark`, the others `mark_next`. Where
    grants are put together the older mark counts: less is given back, never more.

    Attributes:
        low: a balance below it asks for another block.
        least: the smallest balance since the last look: no more was needed.
        pause_until: no block is asked for before: the last one was not granted whole.
        free: what the Ledger had left at `free_at`; None: it was not asked.
        recall_at: when to ask the Store what was used of a month; infinite once it is known.
        refused_at: when the Ledger refused it last.
        told_at: when the Ledger was last told what is held of a level.
    """

    __slots__ = (
        "__weakref__",
        "balance",
        "block",
        "by_token",
        "free",
        "free_at",
        "held",
        "is_level",
        "least",
        "limit",
        "lot",
        "low",
        "mark",
        "mark_next",
        "pause_until",
        "recall_at",
        "refused_at",
        "spare_share",
        "told_at",
        "used_at",
    )

    def __init__(self, limit: Limit, terms: Terms) -> None:
        self.balance = self.lot = self.mark = self.mark_next = 0.0
        self.held = self.least = 0.0
        self.used_at = self.free_at = self.pause_until = self.told_at = -math.inf
        self.refused_at = self.recall_at = -math.inf
        self.free: float | None = None
        self.by_token = limit.unit == "tokens"
        self.is_level = limit.kind == "level"
        self.limit = limit
        self.change(limit, terms)

    def change(self, limit: Limit, terms: Terms) -> None:
        """Go on under other figures, with the units used."""
        if self.free is not None:
            self.free += limit.burst - self.limit.burst
        self.limit = limit
        self.block = 0.0 if self.is_level else terms.block(limit)
        self.low = self.block / 2 if self.block else -math.inf
        self.spare_share = SPARE_SHARE / terms.replicas
        self.refused_at = -math.inf

    def take(self, units: float, now: float) -> float:
        """Use units of the balance; returns their mark."""
        mark = self.mark
        self.used_at = now
        self.balance -= units
        self.lot -= units
        if self.lot <= 0:
            self.lot, self.mark = self.balance, self.mark_next
        if self.balance < self.least:  # noqa: PLR1730  on the way of every request
            self.least = self.balance
        return mark

    def add(self, units: float, mark: float) -> None:
        """Put newly granted units into the balance."""
        if self.balance <= 0:
            self.lot, self.mark, self.mark_next = self.balance + units, mark, mark
        elif self.lot >= self.balance:
            self.mark_next = mark
        self.balance += units

    def put_back(self, units: float, mark: float) -> None:
        """Units that were taken are not needed after all."""
        if self.balance <= 0:
            self.add(units, mark)
        else:
            self.balance += units
            self.lot += units
            self.mark = min(self.mark, mark)

    def shed(self, units: float) -> bool:
        """Part with unused units of a level, as far as there are any; whether there were."""
        units = min(units, self.balance)
        if units <= 0:
            return False
        self.balance -= units
        self.held -= units
        if self.free is not None:
            self.free += units
        return True

    def drop(self) -> list[tuple[float, float]]:
        """Part with all units of a rate or a month; returns them with their marks."""
        lots = [(self.lot, self.mark), (self.balance - self.lot, self.mark_next)]
        self.balance = self.lot = 0.0
        return [(units, mark) for units, mark in lots if units > 0]

    def learn(self, free: float, now: float) -> None:
        """The Ledger said what is left."""
        self.free, self.free_at = free, now

    def recall(self, used: float, now: float) -> None:
        """The Store said what was used of a month, perhaps after the Ledger said what is left."""
        left = self.limit.burst - used
        self.learn(left if self.free is None else min(self.free, left), now)
        self.recall_at = math.inf

    def free_now(self, now: float) -> float | None:
        """What the Ledger has left if nobody else asked since."""
        free, limit = self.free, self.limit
        if free is None or limit.kind != "rate":
            return free
        return min(free + (now - self.free_at) / limit.interval_s, limit.burst)

    def hint(self, now: float) -> float | None:
        """What to tell a Ledger that may have lost its books."""
        if self.is_level and now - self.free_at > LEVEL_KNOWN_S:
            return None
        return self.free_now(now)

    def owes(self, now: float) -> bool:
        """Whether more is known of it than that all of it is left."""
        free = self.free_now(now)
        return free is not None and free < self.limit.burst

    def rate(self, now: float, month_left_s: float) -> Rate:
        """What is left here and, as far as this replica knows, elsewhere."""
        limit, free = self.limit, self.free
        burst, kind = limit.burst, limit.kind
        if free is None:
            left = burst
        elif kind == "rate":
            left = self.balance + free + (now - self.free_at) / limit.interval_s
        else:
            left = self.balance + free
        left = min(left, burst)
        reset_s = month_left_s if kind == "month" else (burst - left) * limit.interval_s
        return Rate(limit, int(left + EPSILON) if left > 0 else 0, reset_s)

    def in_use(self) -> float:
        """Of a level."""
        return self.held - self.balance

    def spare(self) -> float:
        """How many unused units of a level may stay here, as far as this replica knows."""
        return math.floor((self.free or 0.0) * self.spare_share)

    def wanted(self, need: float) -> float:
        """What to ask for when `need` is missing: a block, or as much again as is in use."""
        if self.is_level:
            return need + min(max(self.in_use(), need), self.spare())
        return need + max(self.block - max(self.balance, 0.0), 0.0)
