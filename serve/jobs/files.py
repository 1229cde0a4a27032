"""Statements of `job_ports.Files`. A file whose time is over is found by nobody, and then forgotten."""

from collections.abc import Sequence
from dataclasses import asdict

import sqlalchemy as sa

from serve.errors import QuotaExceeded
from serve.items import FileRoom, Order, StoredFile
from serve.jobs import tenants
from serve.jobs.file_tables import files


_MINE = sa.and_(files.c.tenant == sa.bindparam("tenant"), files.c.id == sa.bindparam("id"))
_LIVE = files.c.expires_at > sa.bindparam("now")
_ONE = sa.select(files).where(_MINE, _LIVE)
_DELETE = sa.delete(files).where(_MINE)
_UPLOADED = sa.select(
    sa.func.count(), sa.func.coalesce(sa.func.sum(files.c.size), sa.literal_column("0"))
).where(files.c.tenant == sa.bindparam("tenant"), files.c.purpose == "batch", _LIVE)
_EXPIRED = (
    sa.select(files)
    .where(files.c.expires_at <= sa.bindparam("now"))
    .order_by(files.c.expires_at)
    .limit(sa.bindparam("most"))
)


def create(conn: sa.Connection, file: StoredFile, room: FileRoom | None, now: float) -> StoredFile:
    """Keep a file; one of the same id is replaced. Raises QuotaExceeded when there is no room."""
    if room is not None:
        tenants.hold(conn, file.tenant)
        count, size = conn.execute(_UPLOADED, {"tenant": file.tenant, "now": now}).one()
        if count >= room.files:
            raise QuotaExceeded(
                f"You have {count} files already; {room.files} are allowed.", code="stored_files"
            )
        if size + file.size > room.size:
            raise QuotaExceeded(
                f"You have {size} bytes of files, and this one has {file.size} more; "
                f"{room.size} are allowed.",
                code="stored_bytes",
            )
    conn.execute(_DELETE, {"tenant": file.tenant, "id": file.id})
    conn.execute(sa.insert(files).values(**asdict(file)))
    return file


def find(conn: sa.Connection, tenant: str, file: str, now: float) -> StoredFile | None:
    """The tenant's file of that id, unless its time is over."""
    row = conn.execute(_ONE, {"tenant": tenant, "id": file, "now": now}).one_or_none()
    return None if row is None else StoredFile(*row)


def listed(
    conn: sa.Connection,
    tenant: str,
    *,
    purpose: str | None,
    order: Order,
    after: str,
    limit: int,
    now: float,
) -> list[StoredFile]:
    """The tenant's files by age, those behind the id `after`: ids sort by time."""
    some = sa.select(files).where(files.c.tenant == tenant, files.c.expires_at > now)
    if purpose is not None:
        some = some.where(files.c.purpose == purpose)
    if after:
        some = some.where(files.c.id < after if order == "desc" else files.c.id > after)
    some = some.order_by(files.c.id.desc() if order == "desc" else files.c.id)
    return [StoredFile(*row) for row in conn.execute(some.limit(limit))]


def delete(conn: sa.Connection, tenant: str, file: str) -> bool:
    """Forget a file; returns whether there was one."""
    return conn.execute(_DELETE, {"tenant": tenant, "id": file}).rowcount == 1


def expired(conn: sa.Connection, limit: int, now: float) -> Sequence[StoredFile]:
    """Up to `limit` files of all tenants whose time is over."""
    return [StoredFile(*row) for row in conn.execute(_EXPIRED, {"now": now, "most": limit})]
