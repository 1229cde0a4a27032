"""The audit log: an entry in the transaction of each change to a tenant or a key. No secrets."""

from collections.abc import Mapping, Sequence
from typing import Any

import sqlalchemy as sa

from serve.jobs.tables import audit
from serve.records import AuditEntry


_ENTRIES = sa.select(audit).order_by(audit.c.number.desc())


def note(
    conn: sa.Connection,
    at: float,
    by: str,
    *,
    action: str,
    tenant: str,
    subject: str = "",
    detail: Mapping[str, Any],
) -> None:
    """Write an entry. `detail` is what `changes` gives."""
    conn.execute(
        sa.insert(audit).values(
            at=at, by=by, action=action, tenant=tenant, subject=subject, detail=dict(detail)
        )
    )


def changes(new: Mapping[str, Any], old: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Both values of each field that differs, under `new` and `old`; empty when none does."""
    if old is None:
        return {"new": dict(new), "old": {}}
    changed = [field for field in new if new[field] != old[field]]
    if not changed:
        return {}
    return {
        "new": {field: new[field] for field in changed},
        "old": {field: old[field] for field in changed},
    }


def listed(
    conn: sa.Connection, tenant: str | None, before: int | None, limit: int
) -> Sequence[AuditEntry]:
    """Up to `limit` entries, of one tenant or of all, newest first."""
    entries = _ENTRIES.limit(limit)
    if tenant is not None:
        entries = entries.where(audit.c.tenant == tenant)
    if before is not None:
        entries = entries.where(audit.c.number < before)
    return [AuditEntry(*row) for row in conn.execute(entries)]


def purge(conn: sa.Connection, before: float, rows_max: int) -> int:
    """Forget up to `rows_max` entries older than `before`; returns how many."""
    old = sa.select(audit.c.number).where(audit.c.at < before).limit(rows_max)
    return conn.execute(sa.delete(audit).where(audit.c.number.in_(old))).rowcount
