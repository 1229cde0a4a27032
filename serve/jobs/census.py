"""How many jobs and items there are, of all tenants together: for figures and autoscaling, asked every few
seconds.

Of the items that only wait, of which there may be millions, some thousands are read at most, in an index:
what is on its way is counted in small ones, the rest is what the tenants' sums leave.
"""

from typing import Any, get_args

import sqlalchemy as sa

from serve.items import Stage
from serve.jobs.job_tables import IS_UNIT, JOB_IS_OPEN, items, job_totals, jobs
from serve.jobs.order import READY
from serve.scaling import READY_COUNTED_MAX
from serve.telemetry import Census


_OPEN = sa.select(jobs.c.state, sa.func.count()).where(sa.text(JOB_IS_OPEN)).group_by(jobs.c.state)
_OLDEST = (
    sa.select(jobs.c.klass, sa.func.min(jobs.c.created_at))
    .where(sa.text(JOB_IS_OPEN), sa.not_(jobs.c.paused))
    .group_by(jobs.c.klass)
)
_UNDER_WAY = [
    sa.select(sa.func.count())
    .select_from(items)
    .where(items.c.state == sa.literal_column(f"'{state}'"), IS_UNIT)
    for state in ("delayed", "leased")
]
_MODEL = sa.func.coalesce(jobs.c.spec["model"].as_string(), "").label("model")
_TOKENS = (
    sa.select(_MODEL, sa.func.sum(jobs.c.cost_left))
    .where(sa.text(JOB_IS_OPEN), sa.not_(jobs.c.paused))
    .group_by("model")
)
_READY = {
    stage: sa.select(sa.func.count()).select_from(
        sa.select(items.c.id)
        .where(items.c.stage == stage, READY)
        .limit(READY_COUNTED_MAX)
        .subquery()
    )
    for stage in get_args(Stage)
}
_LEASED = (
    sa.select(items.c.stage, sa.func.count())
    .where(items.c.state == sa.literal_column("'leased'"))
    .group_by(items.c.stage)
)
_ENDED = ("done", "skipped", "dead", "cancelled")
_SUMS = sa.select(
    *(sa.func.coalesce(sa.func.sum(job_totals.c[name]), 0) for name in ("total", *_ENDED))
)


def taken(conn: sa.Connection, now: float) -> Census:
    """See `job_ports.Events`."""
    total, *ended = (int(one) for one in conn.execute(_SUMS).one())
    delayed, leased = (int(conn.execute(one).scalar_one()) for one in _UNDER_WAY)
    waiting = max(total - sum(ended) - delayed - leased, 0)
    return Census(
        jobs=_by(conn, _OPEN),
        oldest_s={klass: max(now - at, 0.0) for klass, at in _by(conn, _OLDEST).items()},
        items={
            "waiting": waiting,
            "delayed": delayed,
            "leased": leased,
            **dict(zip(_ENDED, ended, strict=True)),
        },
        tokens=_by(conn, _TOKENS),
        stages=_stages(conn),
    )


def _stages(conn: sa.Connection) -> dict[str, int]:
    leased = _by(conn, _LEASED)
    return {
        stage: int(conn.execute(ready).scalar_one()) + leased.get(stage, 0)
        for stage, ready in _READY.items()
    }


def _by(conn: sa.Connection, select: sa.Select[Any]) -> dict[str, Any]:
    return {row[0]: row[1] for row in conn.execute(select)}
