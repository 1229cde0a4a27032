"""What tries of items came to, summed by day, tenant, task, stage and word: how often each succeeds and how
long it takes, without a look at the items.
"""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import sqlalchemy as sa

from serve.items import Effort
from serve.jobs.job_tables import efforts


KEPT_DAYS = 90
"""Days before today that are kept."""

_KEY = ("day", "tenant", "task", "stage", "word")
_THIS = [efforts.c[name] == sa.bindparam(f"_{name}") for name in _KEY]
_ADD = (
    sa.update(efforts)
    .where(*_THIS)
    .values(
        tries=efforts.c.tries + sa.bindparam("_tries"),
        seconds=efforts.c.seconds + sa.bindparam("_seconds"),
    )
)
_NEW = sa.insert(efforts)
_OF_DAYS = (
    sa.select(
        efforts.c.task,
        efforts.c.stage,
        efforts.c.word,
        sa.func.sum(efforts.c.tries),
        sa.func.sum(efforts.c.seconds),
    )
    .where(
        # One by one: they stand first in the key, so each is a seek.
        efforts.c.day.in_(sa.bindparam("days", expanding=True)),
        efforts.c.tenant == sa.bindparam("tenant"),
    )
    .group_by(efforts.c.task, efforts.c.stage, efforts.c.word)
    .order_by(efforts.c.task, efforts.c.stage, efforts.c.word)
)

DAY_S = 86_400


class Efforts:
    """Of one transaction."""

    def __init__(self, now: float) -> None:
        self._now = now
        self._sums: defaultdict[tuple[Any, ...], list[float]] = defaultdict(lambda: [0, 0.0])

    def add(self, tenant: str, row: Any, word: str) -> None:
        """A try of a leased item has ended with this word."""
        total = self._sums[_day(self._now), tenant, row.task, row.stage, word]
        total[0] += 1
        total[1] += max(self._now - (row.leased_at or self._now), 0.0)

    def write(self, conn: sa.Connection) -> None:
        """Add them to those that are there, in one order for all: no deadlock on Postgres."""
        for key, (tries, seconds) in sorted(self._sums.items()):
            place = dict(zip(_KEY, key, strict=True))
            values = {f"_{name}": value for name, value in place.items()}
            added = conn.execute(_ADD, {**values, "_tries": tries, "_seconds": seconds})
            if added.rowcount == 0:
                conn.execute(_NEW, {**place, "tries": tries, "seconds": seconds})


def listed(conn: sa.Connection, tenant: str, days: int, now: float) -> Sequence[Effort]:
    """A tenant's tries of today and of the days before, `days` in all."""
    today = _day(now)
    values = {"days": [*range(today - days + 1, today + 1)], "tenant": tenant}
    return [Effort(*row[:3], int(row[3]), float(row[4])) for row in conn.execute(_OF_DAYS, values)]


def purge(conn: sa.Connection, now: float, rows_max: int) -> int:
    """Forget up to `rows_max` sums of days that are no longer kept; returns how many."""
    old = (
        sa.select(*(efforts.c[name] for name in _KEY))
        .where(efforts.c.day < _day(now) - KEPT_DAYS)
        .limit(rows_max)
    )
    rows = [
        {f"_{name}": value for name, value in zip(_KEY, row, strict=True)}
        for row in conn.execute(old)
    ]
    if rows:
        conn.execute(sa.delete(efforts).where(*_THIS), rows)
    return len(rows)


def _day(now: float) -> int:
    """Days since the epoch, UTC."""
    return int(now // DAY_S)
