"""The Store's schema: its version, and the steps from one version to the next. `tables`,
`job_tables`, `file_tables` and `webhook_tables` hold it as it is now.
"""

import uuid
from collections.abc import Mapping, Sequence

import sqlalchemy as sa
from sqlalchemy.schema import CreateIndex, CreateTable

from serve.errors import StoreUnavailable
from serve.jobs import job_tables, webhook_tables
from serve.jobs.file_tables import files
from serve.jobs.tables import audit, keys, metadata, store, usage_month


VERSION = 6


def _added(table: str, *columns: str) -> list[sa.Executable]:
    return [sa.text(f"ALTER TABLE {table} ADD COLUMN {column}") for column in columns]


def _made(table: sa.Table) -> list[sa.Executable]:
    return [CreateTable(table), *_indexed(table)]


def _indexed(table: sa.Table) -> list[sa.Executable]:
    """All indexes that it had from the beginning."""
    indexes = sorted(table.indexes, key=lambda each: str(each.name))
    return [CreateIndex(index) for index in indexes if index.name not in _LISTED]


_LISTED = ("ix_jobs_listed", "ix_files_listed", "ix_deliveries_listed")
"""Since version 4."""

_LISTED_BEFORE = {
    "ix_jobs_tenant": "jobs (tenant, id)",
    "ix_files_tenant": "files (tenant, created_at, id)",
    "ix_deliveries_webhook": "deliveries (webhook, id)",
}
"""Version 3 had these in their place."""

STEPS: Mapping[int, Sequence[sa.Executable]] = {
    2: (
        *_added(
            "keys",
            "role VARCHAR DEFAULT 'user' NOT NULL",
            "name VARCHAR DEFAULT '' NOT NULL",
            "family VARCHAR DEFAULT '' NOT NULL",
            "limits JSON DEFAULT '{}' NOT NULL",
            "expires_at DOUBLE PRECISION",
        ),
        sa.text("UPDATE keys SET family = id"),
        *_indexed(keys),
        *_added("tenants", "limits JSON DEFAULT '{}' NOT NULL"),
        *_made(audit),
        *_made(usage_month),
    ),
    3: (
        *_added("documents", "sha256 VARCHAR DEFAULT '' NOT NULL"),
        *(statement for table in job_tables.ALL for statement in _made(table)),
        *_made(files),
        *(statement for table in webhook_tables.ALL for statement in _made(table)),
        *(sa.text(f"CREATE INDEX {name} ON {on}") for name, on in _LISTED_BEFORE.items()),
    ),
    4: (
        *(sa.text(f"DROP INDEX {name}") for name in _LISTED_BEFORE),
        *(
            CreateIndex(index)
            for table in (job_tables.jobs, files, webhook_tables.deliveries)
            for index in table.indexes
            if index.name in _LISTED
        ),
    ),
    5: (*_made(job_tables.tokens),),
    6: (*_added("documents", "sent_at DOUBLE PRECISION DEFAULT 0 NOT NULL"),),
}
"""What leads to each version from the one before. A table made here is made as it is now: when a
later version changes it, write out here what it was, or its own step would be done twice. A test
holds an upgraded file against a new one."""


def identity(conn: sa.Connection) -> str | None:
    """The database's identity; None when it holds no Store yet.

    Raises StoreUnavailable when a newer version of the program made it: writing into tables
    whose meaning has changed would damage them.
    """
    if not sa.inspect(conn).has_table(store.name):
        return None
    row = conn.execute(sa.select(store.c.version, store.c.identity)).one()
    if row.version > VERSION:
        raise StoreUnavailable(
            f"the store has schema {row.version}, this program knows up to {VERSION}: "
            "run the newer program, or restore a backup from before the upgrade"
        )
    return str(row.identity)


def upgrade(conn: sa.Connection) -> int:
    """Bring an older Store's tables to this version; returns the version it had."""
    had = int(conn.execute(sa.select(store.c.version)).scalar_one())
    for version in range(had + 1, VERSION + 1):
        for statement in STEPS[version]:
            conn.execute(statement)
    if had < VERSION:
        conn.execute(sa.update(store).values(version=VERSION))
    return had


def create(conn: sa.Connection, now: float) -> str:
    """Make the tables in an empty database; returns its new identity."""
    metadata.create_all(conn)
    made = uuid.uuid4().hex
    conn.execute(
        sa.insert(store).values(one=1, version=VERSION, identity=made, created_at=now),
    )
    return made
