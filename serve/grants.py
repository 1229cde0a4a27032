"""What replicas and the Ledger say to each other: limits, draws and what was granted. Values only."""

from dataclasses import dataclass
from typing import Literal


LimitKind = Literal["rate", "level", "month"]
Unit = Literal["requests", "tokens"]


@dataclass(frozen=True, slots=True)
class Limit:
    """One limit of one owner, a tenant or a key.

    rate: `burst` units at once, one more each `interval_s`; over a window T that is
    burst + T / interval_s. level: at most `burst` units held at a time. month: `burst` units in
    a calendar month (UTC). `interval_s` is 0 but for a rate.

    Attributes:
        owner: `t/<tenant>` or `k/<tenant>/<key family>`.
        name: what errors and headers call it, for example `tenant_tokens_per_minute`.
    """

    owner: str
    name: str
    kind: LimitKind
    unit: Unit
    burst: float
    interval_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Line:
    """A part of a draw: at least `need` units of a limit, at best `want` (>= need).

    `hint` is how many units were free as the asker last knew, brought forward to now; a ledger
    that holds no state for the limit starts from it, and from a full limit when it is None.
    """

    limit: Limit
    need: float
    want: float
    hint: float | None = None


@dataclass(frozen=True, slots=True)
class Draw:
    """Units wanted for one request: every line gets its need, or none gets anything."""

    lines: tuple[Line, ...]


@dataclass(frozen=True, slots=True)
class Return:
    """Units given back.

    rate, month: `units` that were not used; below zero they were used without a draw and are
    charged, whatever the limit says. `mark` is the one of the draw they came from: what of it has
    been refilled since is not given back. month with `units` 0: at least `mark` units were used.
    level: `units` is what the replica holds in all now.
    """

    limit: Limit
    units: float
    mark: float = 0.0


@dataclass(frozen=True, slots=True)
class Grant:
    """The answer to a draw, one value a line.

    `units` are all zero when it was refused: then `refused` is the line that waits longest and
    `wait_s` how long its need has to wait (infinite for what the limit can never hold, and for a
    level: nobody knows). `free` is what is left after the grant; `marks` are for `Return`.
    """

    units: tuple[float, ...]
    free: tuple[float, ...]
    marks: tuple[float, ...]
    refused: int | None = None
    wait_s: float = 0.0
