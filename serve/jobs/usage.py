"""Statements of `ports.Usage`: what each replica counted in each of its sessions, in months.

A session's counts only rise. Long after its last report it is added to the session with no name,
so that a month keeps one row per key family and class.
"""

from collections import defaultdict
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

import sqlalchemy as sa

from serve.jobs.tables import OF_A_SESSION
from serve.jobs.tables import usage_month as usage
from serve.records import UsageRow


OVER_S = 10 * 86_400.0
"""After so long without a report a session reports no more, and may be folded.

A session lasts a UTC day at most, and a replica that cannot reach the Store keeps the 8 that ended
last (`SESSIONS_MAX` in `serve/admission/usage.py`): the last report comes less than 9 days after
the first moment of its day. One that came after the fold would be counted twice.
"""

MONTHS_KEPT = 13
"""Before the month of now: the same month of last year, whole."""

OVER = ""
"""The session into which those that ended are folded."""

_COUNTS = ("requests", "tokens", "refused")
_PLACE = ("month", "tenant", "key", "klass", "session")
_THIS = [usage.c[name] == sa.bindparam(f"_{name}") for name in _PLACE]
# First a row for each place, then the counts: a portable upsert that runs as two executemany.
_ENSURE = sa.insert(usage).from_select(
    [*_PLACE, *_COUNTS, "updated_at"],
    sa.select(
        *(sa.bindparam(f"_{name}", type_=sa.String).label(name) for name in _PLACE),
        *(sa.literal_column("0").label(name) for name in _COUNTS),
        sa.bindparam("_at", type_=sa.Double).label("updated_at"),
    ).where(~sa.exists().where(*_THIS)),
)


def _risen(name: str) -> sa.ColumnElement[int]:
    reported = sa.bindparam(f"_{name}", type_=sa.BigInteger)
    return sa.case((usage.c[name] < reported, reported), else_=usage.c[name])


_RAISE = (
    sa.update(usage)
    .where(*_THIS)
    .values({**{name: _risen(name) for name in _COUNTS}, "updated_at": sa.bindparam("_at")})
)
_ADD = (
    sa.update(usage)
    .where(*_THIS)
    .values({name: usage.c[name] + sa.bindparam(f"_{name}") for name in _COUNTS})
)
_REMOVE = sa.delete(usage).where(*_THIS)
_ENDED = (
    sa.select(*(usage.c[name] for name in (*_PLACE, *_COUNTS)))
    .where(OF_A_SESSION, usage.c.updated_at < sa.bindparam("before"))
    .limit(sa.bindparam("rows_max"))
)
_OLD = (
    sa.select(*(usage.c[name] for name in _PLACE))
    .where(usage.c.month < sa.bindparam("before"))
    .limit(sa.bindparam("rows_max"))
)
_SUMS = (
    sa.select(
        usage.c.month,
        usage.c.tenant,
        usage.c.key,
        usage.c.klass,
        *(sa.func.sum(usage.c[name]) for name in _COUNTS),
    )
    .where(usage.c.tenant == sa.bindparam("tenant"), usage.c.month == sa.bindparam("month"))
    .group_by(usage.c.month, usage.c.tenant, usage.c.key, usage.c.klass)
    .order_by(usage.c.key, usage.c.klass)
)


def report(conn: sa.Connection, session: str, rows: Sequence[UsageRow], now: float) -> None:
    """Raise a session's counts to those of `rows`; a lower one changes nothing."""
    values = [
        {
            **_place(row.month, row.tenant, row.key, row.klass, session),
            **_counts(row.requests, row.tokens, row.refused),
            "_at": now,
        }
        for row in rows
    ]
    if values:
        conn.execute(_ENSURE, values)
        conn.execute(_RAISE, values)


def month(conn: sa.Connection, tenant: str, month: str) -> Sequence[UsageRow]:
    """A tenant's month: one row per key family and class, over all sessions."""
    rows = conn.execute(_SUMS, {"tenant": tenant, "month": month})
    return [UsageRow(*row[:4], *(int(count) for count in row[4:])) for row in rows]


def fold(conn: sa.Connection, now: float, rows_max: int) -> int:
    """Add up to `rows_max` rows of ended sessions to those without one; returns how many."""
    ended = conn.execute(_ENDED, {"before": now - OVER_S, "rows_max": rows_max}).all()
    sums: dict[tuple[str, ...], list[int]] = defaultdict(lambda: [0] * len(_COUNTS))
    for row in ended:
        total = sums[*row[:4], OVER]
        for position, count in enumerate(row[5:]):
            total[position] += count
    if ended:
        added = [
            {**_place(*place), **_counts(*counts), "_at": now} for place, counts in sums.items()
        ]
        conn.execute(_ENSURE, added)
        conn.execute(_ADD, added)
        conn.execute(_REMOVE, [_place(*row[:5]) for row in ended])
    return len(ended)


def purge(conn: sa.Connection, now: float, rows_max: int) -> int:
    """Forget up to `rows_max` rows of months that are no longer kept; returns how many."""
    today = datetime.fromtimestamp(now, UTC)
    months = 12 * today.year + today.month - 1 - MONTHS_KEPT
    before = f"{months // 12:04}-{months % 12 + 1:02}"
    old = conn.execute(_OLD, {"before": before, "rows_max": rows_max}).all()
    if old:
        conn.execute(_REMOVE, [_place(*row) for row in old])
    return len(old)


def _place(*values: str) -> dict[str, Any]:
    return {f"_{name}": value for name, value in zip(_PLACE, values, strict=True)}


def _counts(*values: int) -> dict[str, Any]:
    return {f"_{name}": value for name, value in zip(_COUNTS, values, strict=True)}
