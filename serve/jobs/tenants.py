"""Statements of `ports.Tenants`: a tenant's tier, and what it has instead of the tier's limits."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import sqlalchemy as sa

from serve.errors import NotFound
from serve.jobs import audit
from serve.jobs.tables import tenants
from serve.records import Tenant


# One order for all: no deadlock.
_HELD = (
    sa.select(tenants.c.tenant)
    .where(tenants.c.tenant.in_(sa.bindparam("names", expanding=True)))
    .order_by(tenants.c.tenant)
    .with_for_update()
)


def hold(conn: sa.Connection, *names: str) -> None:
    """Let no other transaction in that holds one of these tenants, until this one ends.

    Before a bound of a tenant is checked, and before anything else is locked: of two that find room
    for one more, only one would be right. SQLite has one writer anyway.
    """
    if conn.dialect.name == "postgresql":
        conn.execute(_HELD, {"names": names})


def find_tenant(conn: sa.Connection, tenant: str) -> Tenant | None:
    """One tenant."""
    row = conn.execute(sa.select(tenants).where(tenants.c.tenant == tenant)).one_or_none()
    return None if row is None else Tenant(*row)


def list_tenants(conn: sa.Connection, after: str, limit: int) -> Sequence[Tenant]:
    """Up to `limit` tenants by name, those after `after`."""
    some = sa.select(tenants).where(tenants.c.tenant > after).order_by(tenants.c.tenant)
    return [Tenant(*row) for row in conn.execute(some.limit(limit))]


def set_tenant(
    conn: sa.Connection,
    name: str,
    *,
    tier: str | None,
    limits: Mapping[str, Any] | None,
    by: str,
    now: float,
) -> Tenant:
    """Make a tenant, or set its tier and limits where not None; an empty tier counts as none.

    Raises NotFound when it is new and has no tier.
    """
    hold(conn, name)
    old = find_tenant(conn, name)
    if old is None:
        if not tier:
            raise NotFound(f"There is no tenant {name!r}; a new one needs a tier.", param="tenant")
        new = Tenant(name, tier, now, dict(limits or {}))
        detail = audit.changes(_audited(new))
        conn.execute(sa.insert(tenants).values(tenant=name, created_at=now, **_audited(new)))
    else:
        new = replace(
            old,
            tier=tier or old.tier,
            limits=old.limits if limits is None else dict(limits),
        )
        detail = audit.changes(_audited(new), _audited(old))
        mine = sa.update(tenants).where(tenants.c.tenant == name)
        conn.execute(mine.values(**_audited(new)))
    if detail:
        audit.note(conn, now, by, action="tenant.set", tenant=name, detail=detail)
    return new


def _audited(tenant: Tenant) -> dict[str, Any]:
    return {"tier": tenant.tier, "limits": tenant.limits}
