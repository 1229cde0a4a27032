"""Statements of `job_ports.Webhooks`. All but `is_active` and `tried` are scoped to one tenant."""

from dataclasses import asdict

import sqlalchemy as sa

from serve.errors import NotFound, QuotaExceeded
from serve.jobs import tenants
from serve.jobs.webhook_tables import webhooks
from serve.webhooks import Tried, Webhook


_MINE = sa.and_(webhooks.c.tenant == sa.bindparam("owner"), webhooks.c.id == sa.bindparam("hook"))
_ONE = sa.select(webhooks).where(_MINE)
_ALL = sa.select(webhooks).where(webhooks.c.tenant == sa.bindparam("owner")).order_by(webhooks.c.id)
_COUNT = sa.select(sa.func.count()).where(webhooks.c.tenant == sa.bindparam("owner"))
_ACTIVE = sa.select(webhooks.c.id).where(
    webhooks.c.id == sa.bindparam("hook"), webhooks.c.active.is_(sa.true())
)
_ROTATE = (
    sa.update(webhooks)
    .where(_MINE)
    .values(
        secret=sa.bindparam("fresh"),
        previous=webhooks.c.secret,
        previous_until=sa.bindparam("until"),
    )
    .returning(*webhooks.c)
)
_ENABLE = (
    sa.update(webhooks)
    .where(_MINE)
    .values(active=True, disabled_reason="", failing_since=None, hold_until=None)
    .returning(*webhooks.c)
)
_WELL = (
    sa.update(webhooks)
    .where(webhooks.c.id == sa.bindparam("hook"), webhooks.c.failing_since.is_not(None))
    .values(failing_since=None)
)
_FAILING = (
    sa.update(webhooks)
    .where(webhooks.c.id == sa.bindparam("hook"), webhooks.c.failing_since.is_(None))
    .values(failing_since=sa.bindparam("now"))
)
_HOLD = (
    sa.update(webhooks)
    .where(
        webhooks.c.id == sa.bindparam("hook"),
        sa.func.coalesce(webhooks.c.hold_until, 0.0) < sa.bindparam("until"),
    )
    .values(hold_until=sa.bindparam("until"))
)
_DISABLE = (
    sa.update(webhooks)
    .where(webhooks.c.id == sa.bindparam("hook"), webhooks.c.active.is_(sa.true()))
    .values(active=False, disabled_reason=sa.bindparam("why"))
)


def create(conn: sa.Connection, webhook: Webhook, most: int) -> Webhook:
    """Keep a webhook. Raises QuotaExceeded when its tenant has `most`."""
    tenants.hold(conn, webhook.tenant)
    count = conn.execute(_COUNT, {"owner": webhook.tenant}).scalar_one()
    if count >= most:
        raise QuotaExceeded(
            f"You have {count} webhooks already; {most} are allowed.", code="webhooks"
        )
    conn.execute(sa.insert(webhooks).values(**asdict(webhook)))
    return webhook


def find(conn: sa.Connection, tenant: str, webhook: str) -> Webhook | None:
    """The tenant's webhook of that id."""
    row = conn.execute(_ONE, {"owner": tenant, "hook": webhook}).one_or_none()
    return None if row is None else Webhook(*row)


def mine(conn: sa.Connection, tenant: str, webhook: str) -> Webhook:
    """The tenant's webhook of that id. Raises NotFound."""
    found = find(conn, tenant, webhook)
    if found is None:
        raise NotFound(
            f"You have no webhook {webhook!r}.", param="webhook", code="webhook_not_found"
        )
    return found


def is_active(conn: sa.Connection, webhook: str) -> bool:
    """Whether there is a webhook of that id, whoever's, and it is not disabled."""
    return conn.execute(_ACTIVE, {"hook": webhook}).one_or_none() is not None


def listed(conn: sa.Connection, tenant: str) -> list[Webhook]:
    """The tenant's webhooks, oldest first."""
    return [Webhook(*row) for row in conn.execute(_ALL, {"owner": tenant})]


def rotate(
    conn: sa.Connection, tenant: str, webhook: str, *, secret: str, overlap_s: float, now: float
) -> Webhook:
    """Sign with a new secret, and for `overlap_s` with the one before too. Raises NotFound."""
    values = {"owner": tenant, "hook": webhook, "fresh": secret, "until": now + overlap_s}
    row = conn.execute(_ROTATE, values).one_or_none()
    return mine(conn, tenant, webhook) if row is None else Webhook(*row)


def enable(conn: sa.Connection, tenant: str, webhook: str) -> Webhook:
    """Make a webhook active, as if it had never failed. Raises NotFound."""
    row = conn.execute(_ENABLE, {"owner": tenant, "hook": webhook}).one_or_none()
    return mine(conn, tenant, webhook) if row is None else Webhook(*row)


def delete(conn: sa.Connection, tenant: str, webhook: str) -> bool:
    """Forget a webhook; whether there was one. What waits for it is given up by the next tick."""
    gone = sa.delete(webhooks).where(_MINE)
    return conn.execute(gone, {"owner": tenant, "hook": webhook}).rowcount == 1


def tried(conn: sa.Connection, webhook: str, one: Tried, now: float) -> None:
    """Note on a webhook what a try says of its receiver."""
    if one.word == "delivered":
        conn.execute(_WELL, {"hook": webhook})
        return
    conn.execute(_FAILING, {"hook": webhook, "now": now})
    if one.hold_s > 0:
        conn.execute(_HOLD, {"hook": webhook, "until": now + one.hold_s})
    if one.word == "disabled":
        conn.execute(_DISABLE, {"hook": webhook, "why": one.disabled})
