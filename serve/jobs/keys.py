"""Statements of `ports.Keys`. Secrets are kept as SHA-256 only; a rotated key and its successors
are one family, of which at most two are live.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import sqlalchemy as sa

from serve.errors import Conflict, NotFound
from serve.jobs import audit, tenants
from serve.jobs.tables import keys
from serve.jobs.tables import tenants as tenants_table
from serve.records import Key


_FIELDS = sa.select(
    keys.c.id,
    keys.c.tenant,
    tenants_table.c.tier,
    keys.c.secret_sha256,
    keys.c.created_at,
    keys.c.role,
    keys.c.name,
    keys.c.family,
    keys.c.limits,
    tenants_table.c.limits,
    keys.c.expires_at,
).join(tenants_table, tenants_table.c.tenant == keys.c.tenant)
_IS_LIVE = sa.and_(
    keys.c.revoked_at.is_(None),
    sa.or_(keys.c.expires_at.is_(None), keys.c.expires_at > sa.bindparam("now")),
)
_LIVE = _FIELDS.where(_IS_LIVE)
_BY_ID = _LIVE.where(keys.c.id == sa.bindparam("key"))
_LISTED = _LIVE.where(keys.c.id > sa.bindparam("after")).order_by(keys.c.id)
_PAYERS = _LIVE.where(
    keys.c.tenant.in_(sa.bindparam("tenants", expanding=True)),
    keys.c.family.in_(sa.bindparam("families", expanding=True)),
).order_by(keys.c.id)
_COUNT = sa.select(sa.func.count()).select_from(keys).where(_IS_LIVE)
_ADMINS = (
    sa.select(keys.c.id)
    .where(keys.c.role == "admin", keys.c.revoked_at.is_(None))
    .order_by(keys.c.id)
    .with_for_update()
)


def find_key(conn: sa.Connection, key_id: str, now: float) -> Key | None:
    """The live key, with its tenant's tier and limits of now."""
    row = conn.execute(_BY_ID, {"key": key_id, "now": now}).one_or_none()
    return None if row is None else Key(*row)


def payers(
    conn: sa.Connection, families: Collection[tuple[str, str]], now: float
) -> dict[tuple[str, str], Key]:
    """Who pays, by tenant and family: a live key of the family, else its tenant alone.

    A job outlives the key that handed it over.
    """
    names = {
        "tenants": list({one for one, _ in families}),
        "families": [one for _, one in families],
    }
    found: dict[tuple[str, str], Key] = {}
    for row in conn.execute(_PAYERS, {**names, "now": now}):
        key = Key(*row)
        if (key.tenant, key.family) in families:
            found.setdefault((key.tenant, key.family), key)
    for tenant, family in families:
        if (tenant, family) not in found:
            found[tenant, family] = _tenant_alone(conn, tenant, family, now)
    return found


def _tenant_alone(conn: sa.Connection, tenant: str, family: str, now: float) -> Key:
    found = tenants.find_tenant(conn, tenant)
    return Key(
        id=family,
        tenant=tenant,
        tier="" if found is None else found.tier,
        secret_sha256="",
        created_at=now,
        family=family,
        tenant_limits={} if found is None else found.limits,
    )


def list_keys(
    conn: sa.Connection, tenant: str | None, after: str, limit: int, *, now: float
) -> Sequence[Key]:
    """Up to `limit` live keys, of one tenant or of all, by id: those after `after`."""
    some = _LISTED if tenant is None else _LISTED.where(keys.c.tenant == tenant)
    found = conn.execute(some.limit(limit), {"now": now, "after": after})
    return [Key(*row) for row in found]


def create_key(conn: sa.Connection, key: Key, *, keys_max: int, by: str, now: float) -> None:
    """Keep a key; makes its tenant when it is new, else sets its tier where the key has one.

    Raises Conflict (id taken, the tenant has `keys_max` live keys), NotFound (no tier and no such
    tenant).
    """
    tenants.set_tenant(conn, key.tenant, tier=key.tier, limits=None, by=by, now=now)
    mine = _COUNT.where(keys.c.tenant == key.tenant)
    count = conn.execute(mine, {"now": now}).scalar_one()
    if count >= keys_max:
        raise Conflict(
            f"Tenant {key.tenant!r} has {count} live keys, the most it may have: revoke one first.",
            code="too_many_keys",
        )
    made = _insert(conn, key)
    detail = audit.changes(_audited(made))
    _note(conn, now, by, action="key.create", key=made, detail=detail)


def rotate_key(
    conn: sa.Connection, key_id: str, successor: Key, *, overlap_s: float, by: str, now: float
) -> Key:
    """Keep `successor` with all but id, secret and creation from the old key, which expires.

    One that expires already may be rotated again once its successor was revoked: the reply with
    that one's secret may have been lost.

    Raises NotFound, Conflict when another of its family is live.
    """
    old = _held(conn, key_id, now)
    others = _family(old) & (keys.c.id != key_id)
    if conn.execute(_COUNT.where(others), {"now": now}).scalar_one():
        why = (
            f"The key that {key_id} replaces is still live: wait for it to expire or revoke it."
            if old.expires_at is None
            else f"Key {key_id} was rotated already and expires: to rotate it again, revoke its "
            "successor first."
        )
        raise Conflict(why, param="id")
    made = _insert(
        conn,
        replace(
            old,
            id=successor.id,
            secret_sha256=successor.secret_sha256,
            created_at=successor.created_at,
            expires_at=None,
        ),
    )
    expires_at = now + overlap_s
    conn.execute(sa.update(keys).where(keys.c.id == key_id).values(expires_at=expires_at))
    detail = {
        "new": {"id": made.id, "expires_at": made.expires_at},
        "old": {"id": old.id, "expires_at": expires_at},
    }
    _note(conn, now, by, action="key.rotate", key=old, detail=detail)
    return made


def change_key(
    conn: sa.Connection,
    key_id: str,
    *,
    name: str | None,
    limits: Mapping[str, Any] | None,
    by: str,
    now: float,
) -> Key:
    """Set name and limits of all live keys of the family, where not None. Raises NotFound."""
    old = _held(conn, key_id, now)
    new = replace(
        old,
        name=old.name if name is None else name,
        limits=old.limits if limits is None else dict(limits),
    )
    detail = audit.changes(_audited(new), _audited(old))
    if detail:
        conn.execute(sa.update(keys).where(_family(old)).values(name=new.name, limits=new.limits))
        _note(conn, now, by, action="key.change", key=old, detail=detail)
    return new


def revoke_key(conn: sa.Connection, key_id: str, *, by: str, now: float) -> None:
    """End a key at once.

    Raises NotFound; Conflict when no admin key would stay, unless it is done on the command line,
    which needs none.
    """
    old = _held(conn, key_id, now)
    if old.role == "admin" and not by.startswith("cli:"):
        if conn.dialect.name == "postgresql":  # of two who revoke each other's, one waits
            conn.execute(_ADMINS)
        stays = (keys.c.role == "admin") & keys.c.expires_at.is_(None) & (keys.c.id != key_id)
        if not conn.execute(_COUNT.where(stays), {"now": now}).scalar_one():
            raise Conflict(
                "This is the last admin key that stays live: make another first, or revoke it on "
                "the command line.",
                param="id",
                code="last_admin_key",
            )
    conn.execute(sa.update(keys).where(keys.c.id == key_id).values(revoked_at=now))
    detail = {"new": {"live": False}, "old": {"live": True, **_audited(old)}}
    _note(conn, now, by, action="key.revoke", key=old, detail=detail)


def _found(conn: sa.Connection, key_id: str, now: float) -> Key:
    found = find_key(conn, key_id, now)
    if found is None:
        raise NotFound(f"There is no live key {key_id!r}.", param="id")
    return found


def _held(conn: sa.Connection, key_id: str, now: float) -> Key:
    """A key of which no other transaction changes the family until this one ends. Raises NotFound."""
    tenants.hold(conn, _found(conn, key_id, now).tenant)
    return _found(conn, key_id, now)


def _family(key: Key) -> sa.ColumnElement[bool]:
    """Its keys that are not revoked; by the tenant's index."""
    mine = (keys.c.tenant == key.tenant) & keys.c.revoked_at.is_(None)
    return mine & (keys.c.family == key.family)


def _insert(conn: sa.Connection, key: Key) -> Key:
    """Keep a key as the first of its family unless it has one. Raises Conflict (id taken)."""
    taken = sa.select(keys.c.id).where(keys.c.id == key.id)
    if conn.execute(taken).first() is not None:
        raise Conflict(f"key {key.id} exists", param="id")
    made = replace(key, family=key.family or key.id, limits=dict(key.limits))
    conn.execute(
        sa.insert(keys).values(
            id=made.id,
            tenant=made.tenant,
            secret_sha256=made.secret_sha256,
            created_at=made.created_at,
            expires_at=made.expires_at,
            family=made.family,
            **_audited(made),
        )
    )
    return made


def _audited(key: Key) -> dict[str, Any]:
    return {"role": key.role, "name": key.name, "limits": key.limits}


def _note(
    conn: sa.Connection, now: float, by: str, *, action: str, key: Key, detail: Mapping[str, Any]
) -> None:
    audit.note(conn, now, by, action=action, tenant=key.tenant, subject=key.id, detail=detail)
