"""Statements of `ports.Keys`: tenants and their keys. Secrets are kept as SHA-256 only."""

from collections.abc import Sequence

import sqlalchemy as sa

from serve.errors import Conflict
from serve.jobs.schema import keys, tenants
from serve.records import Key


_LIVE = (
    sa.select(keys.c.id, keys.c.tenant, tenants.c.tier, keys.c.secret_sha256, keys.c.created_at)
    .join(tenants, tenants.c.tenant == keys.c.tenant)
    .where(keys.c.revoked_at.is_(None))
)
_BY_ID = _LIVE.where(keys.c.id == sa.bindparam("key"))


def find_key(conn: sa.Connection, key_id: str) -> Key | None:
    """The live key, with its tenant's tier of now."""
    row = conn.execute(_BY_ID, {"key": key_id}).one_or_none()
    return None if row is None else Key(*row)


def list_keys(conn: sa.Connection) -> Sequence[Key]:
    """Every live key, by tenant and age."""
    order = (keys.c.tenant, keys.c.created_at, keys.c.id)
    return [Key(*row) for row in conn.execute(_LIVE.order_by(*order))]


def create_key(conn: sa.Connection, key: Key, now: float) -> None:
    """Keep a key and set its tenant's tier. Raises Conflict when the id is taken."""
    taken = sa.select(keys.c.id).where(keys.c.id == key.id)
    if conn.execute(taken).first() is not None:
        raise Conflict(f"key {key.id} exists", param="id")
    tenant = sa.update(tenants).where(tenants.c.tenant == key.tenant).values(tier=key.tier)
    if conn.execute(tenant).rowcount == 0:
        new = {"tenant": key.tenant, "tier": key.tier, "created_at": now}
        conn.execute(sa.insert(tenants), new)
    conn.execute(
        sa.insert(keys).values(
            id=key.id,
            tenant=key.tenant,
            secret_sha256=key.secret_sha256,
            created_at=key.created_at,
        )
    )
