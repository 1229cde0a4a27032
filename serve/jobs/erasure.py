"""Statements of `job_ports.Erasure`: what is kept of a tenant goes, a bounded number of rows at a time.

A job's row goes last, after its items and events: an erasure that was interrupted finds it again.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import sqlalchemy as sa

from serve.items import JOB_ENDS, Erased
from serve.jobs import audit, order, progress, tokens
from serve.jobs.book import JOBS, Book, Sums
from serve.jobs.job_tables import efforts, idempotency, items, job_events, jobs
from serve.jobs.webhook_tables import deliveries, webhooks


ROWS_MAX = 2000
"""Rows deleted in one transaction, about 20 ms: others wait behind it."""

_STOPPED = (*JOB_ENDS, "cancelling")
_OF_THESE: sa.BindParameter[str] = sa.bindparam("ids", expanding=True)
_OWNER: sa.BindParameter[str] = sa.bindparam("owner")
_MOST: sa.BindParameter[int] = sa.bindparam("most")
_MINE = JOBS.where(jobs.c.id.in_(_OF_THESE), jobs.c.tenant == _OWNER).order_by(jobs.c.id)
_MINE_LOCKED = _MINE.with_for_update()
# On Postgres who settles an item has locked it and waits for its job, which is locked here: that one
# is left until he is done.
_ITEMS = (sa.select(items.c.id).where(items.c.job.in_(_OF_THESE)).limit(_MOST)).with_for_update(
    skip_locked=True
)
_AN_ITEM = sa.select(items.c.id).where(items.c.job.in_(_OF_THESE)).limit(1)
_EVENTS = sa.select(job_events.c.number).where(job_events.c.job.in_(_OF_THESE)).limit(_MOST)
_DELIVERIES = sa.select(deliveries.c.id).where(deliveries.c.tenant == _OWNER).limit(_MOST)


def erase_jobs(conn: sa.Connection, tenant: str, ids: Sequence[str], now: float) -> Erased:
    """Stop these jobs of a tenant, or forget them once they are: items, events, themselves."""
    values: dict[str, Any] = {"ids": list(ids), "owner": tenant, "most": ROWS_MAX}
    rows = conn.execute(_MINE_LOCKED, values).all()
    running = [row.id for row in rows if row.state not in _STOPPED]
    if running:
        _stop(conn, tenant, running, now)
        return Erased(more=True)
    values["ids"] = [row.id for row in rows]
    gone = conn.execute(_ITEMS, values).scalars().all()
    conn.execute(sa.delete(items).where(items.c.id.in_(gone)))
    if conn.execute(_AN_ITEM, values).first() is not None:
        return Erased(items=len(gone), more=True)
    events = conn.execute(sa.delete(job_events).where(job_events.c.number.in_(_EVENTS)), values)
    if events.rowcount == ROWS_MAX:
        return Erased(items=len(gone), more=True)
    tokens.forget(conn, values["ids"])
    conn.execute(sa.delete(jobs).where(jobs.c.id.in_(values["ids"])))
    sums = Sums()
    for row in rows:
        sums.add(row, -1)
    sums.write(conn)
    return Erased(jobs=len(rows), items=len(gone))


def erase_rest(conn: sa.Connection, tenant: str) -> Erased:
    """Webhooks with their deliveries, idempotency keys, and what tries of items came to."""
    mine = {"owner": tenant, "most": ROWS_MAX}
    hooks = conn.execute(sa.delete(webhooks).where(webhooks.c.tenant == tenant)).rowcount
    sent = conn.execute(sa.delete(deliveries).where(deliveries.c.id.in_(_DELIVERIES)), mine)
    for table in (idempotency, efforts):
        conn.execute(sa.delete(table).where(table.c.tenant == tenant))
    return Erased(webhooks=hooks, more=sent.rowcount == ROWS_MAX)


def note(conn: sa.Connection, tenant: str, by: str, detail: Mapping[str, Any], now: float) -> None:
    """An entry of the audit log."""
    audit.note(conn, now, by, action="tenant.erase", tenant=tenant, detail=audit.changes(detail))


def _stop(conn: sa.Connection, tenant: str, ids: Sequence[str], now: float) -> None:
    """What waits of them is cancelled; workers may finish what they have, and find no item."""
    book = Book(conn, now)
    book.open(ids)
    order.hold(conn, {tenant})
    room = progress.MOVE_ROWS
    for job_id in ids:
        room -= progress.stop(book, job_id, "cancelling", room)
    book.close()
