"""Statements of `ports.Collections`: live, then deleted, then purged. The uuid never comes back."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict

import sqlalchemy as sa

from serve.errors import Conflict, QuotaExceeded
from serve.jobs import tenants, tokens
from serve.jobs.tables import collections, documents
from serve.records import Collection


_FIELDS = sa.select(*(column for column in collections.c if column.name != "deleted_at"))
_IS_LIVE = collections.c.deleted_at.is_(None)
_LIVE = _FIELDS.where(_IS_LIVE)
_BY_UUID = _LIVE.where(collections.c.uuid.in_(sa.bindparam("uuids", expanding=True)))
_COUNT = (
    sa.select(sa.func.count())
    .select_from(collections)
    .where(_IS_LIVE, collections.c.tenant == sa.bindparam("tenant"))
)


def create(conn: sa.Connection, collection: Collection, collections_max: int | None) -> Collection:
    """Keep a collection.

    Raises Conflict when the tenant has a live one of that name, QuotaExceeded when it has
    `collections_max` of them.
    """
    tenants.hold(conn, collection.tenant)
    if find(conn, collection.tenant, collection.name) is not None:
        raise Conflict(f"collection {collection.name} exists", param="name")
    live = conn.execute(_COUNT, {"tenant": collection.tenant}).scalar_one()
    if collections_max is not None and live >= collections_max:
        raise QuotaExceeded(f"You have {live} collections already.", code="collections")
    conn.execute(sa.insert(collections).values(**asdict(collection)))
    return collection


def find(conn: sa.Connection, tenant: str, name: str) -> Collection | None:
    """The tenant's live collection of that name."""
    mine = _LIVE.where(collections.c.tenant == tenant, collections.c.name == name)
    row = conn.execute(mine).one_or_none()
    return None if row is None else Collection(*row)


def by_uuid(conn: sa.Connection, uuids: Iterable[str]) -> dict[str, Collection]:
    """Those of these collections that live."""
    rows = conn.execute(_BY_UUID, {"uuids": list(uuids)})
    return {row.uuid: Collection(*row) for row in rows}


def listed(conn: sa.Connection, tenant: str) -> Sequence[Collection]:
    """The tenant's live collections, by name."""
    mine = _LIVE.where(collections.c.tenant == tenant).order_by(collections.c.name)
    return [Collection(*row) for row in conn.execute(mine)]


def delete(conn: sa.Connection, tenant: str, name: str, now: float) -> Collection | None:
    """Mark the live collection deleted; returns what it was, None when there is none."""
    found = find(conn, tenant, name)
    if found is not None:
        row = collections.c.uuid == found.uuid
        conn.execute(sa.update(collections).where(row).values(deleted_at=now))
    return found


def deleted(conn: sa.Connection) -> Sequence[Collection]:
    """Deleted but not purged, oldest first."""
    waiting = _FIELDS.where(collections.c.deleted_at.is_not(None))
    return [Collection(*row) for row in conn.execute(waiting.order_by(collections.c.deleted_at))]


def purge(conn: sa.Connection, uuid: str, rows_max: int) -> tuple[int, bool]:
    """Forget up to `rows_max` documents of a deleted collection, and it too once it has none.

    Returns how many of them had not been deleted, and whether none is left. Raises Conflict when the
    collection is live.
    """
    row = collections.c.uuid == uuid
    live = _LIVE.where(row)
    if conn.execute(live).first() is not None:
        raise Conflict(f"collection {uuid} is not deleted", param="collection")
    mine = documents.c.collection == uuid
    some = sa.select(documents.c.document).where(mine).limit(rows_max)
    forget = sa.delete(documents).where(mine, documents.c.document.in_(some))
    tombstones = conn.execute(forget.returning(documents.c.tombstone)).scalars().all()
    count = sum(not tombstone for tombstone in tombstones)
    if len(tombstones) == rows_max:
        return count, False
    tokens.forget(conn, [uuid])
    conn.execute(sa.delete(collections).where(row))
    return count, True
