"""Tables of the Store, their version, and the steps from one version to the next. Neighbours:
`sqlite` opens the file; `keys`, `tenants`, `usage`, `catalog`, `generations` and `fence` hold the
statements of one port each, `audit` those that the first two share.

Only SQL that SQLite and Postgres share. Times are epoch seconds of the Store's clock.
"""

import uuid
from collections.abc import Mapping, Sequence

import sqlalchemy as sa
from sqlalchemy.schema import CreateIndex, CreateTable

from serve.errors import StoreUnavailable


VERSION = 2

metadata = sa.MetaData()

store = sa.Table(
    "store",
    metadata,
    sa.Column("one", sa.Integer, primary_key=True),
    sa.Column("version", sa.Integer, nullable=False),
    sa.Column("identity", sa.String, nullable=False),
    sa.Column("created_at", sa.Double, nullable=False),
)

tenants = sa.Table(
    "tenants",
    metadata,
    sa.Column("tenant", sa.String, primary_key=True),
    sa.Column("tier", sa.String, nullable=False),
    sa.Column("created_at", sa.Double, nullable=False),
    sa.Column("limits", sa.JSON, nullable=False, server_default="{}"),
)

keys = sa.Table(
    "keys",
    metadata,
    sa.Column("id", sa.String, primary_key=True),
    sa.Column("tenant", sa.String, nullable=False),
    sa.Column("secret_sha256", sa.String, nullable=False),
    sa.Column("created_at", sa.Double, nullable=False),
    sa.Column("revoked_at", sa.Double),
    sa.Column("role", sa.String, nullable=False, server_default="user"),
    sa.Column("name", sa.String, nullable=False, server_default=""),
    sa.Column("family", sa.String, nullable=False, server_default=""),
    sa.Column("limits", sa.JSON, nullable=False, server_default="{}"),
    sa.Column("expires_at", sa.Double),
)

_not_revoked = keys.c.revoked_at.is_(None)
sa.Index("ix_keys_tenant", keys.c.tenant, sqlite_where=_not_revoked, postgresql_where=_not_revoked)

audit = sa.Table(
    "audit",
    metadata,
    # Given by the database: SQLite does so for INTEGER only, and never twice with AUTOINCREMENT.
    sa.Column("number", sa.BigInteger().with_variant(sa.Integer, "sqlite"), primary_key=True),
    sa.Column("at", sa.Double, nullable=False, index=True),
    sa.Column("by", sa.String, nullable=False),
    sa.Column("action", sa.String, nullable=False),
    sa.Column("tenant", sa.String, nullable=False),
    sa.Column("subject", sa.String, nullable=False),
    sa.Column("detail", sa.JSON, nullable=False),
    sa.Index("ix_audit_tenant", "tenant", "number"),
    sqlite_autoincrement=True,
)

usage_month = sa.Table(
    "usage_month",
    metadata,
    sa.Column("month", sa.String, primary_key=True),
    sa.Column("tenant", sa.String, primary_key=True),
    sa.Column("key", sa.String, primary_key=True),
    sa.Column("klass", sa.String, primary_key=True),
    sa.Column("session", sa.String, primary_key=True),
    sa.Column("requests", sa.BigInteger, nullable=False),
    sa.Column("tokens", sa.BigInteger, nullable=False),
    sa.Column("refused", sa.BigInteger, nullable=False),
    sa.Column("updated_at", sa.Double, nullable=False),
    sqlite_with_rowid=False,
)

# Literal: a bound value cannot be matched with the condition of a partial index.
OF_A_SESSION = usage_month.c.session != sa.literal_column("''")
"""Not yet folded into the session with no name."""

sa.Index(
    "ix_usage_month_session",
    usage_month.c.updated_at,
    sqlite_where=OF_A_SESSION,
    postgresql_where=OF_A_SESSION,
)

collections = sa.Table(
    "collections",
    metadata,
    sa.Column("uuid", sa.String, primary_key=True),
    sa.Column("tenant", sa.String, nullable=False),
    sa.Column("name", sa.String, nullable=False),
    sa.Column("model", sa.String, nullable=False),
    sa.Column("revision", sa.String, nullable=False),
    sa.Column("dimensions", sa.Integer, nullable=False),
    sa.Column("created_at", sa.Double, nullable=False),
    sa.Column("deleted_at", sa.Double),
)

_live = collections.c.deleted_at.is_(None)
_deleted = collections.c.deleted_at.is_not(None)
sa.Index(
    "ix_collections_live",
    collections.c.tenant,
    collections.c.name,
    unique=True,
    sqlite_where=_live,
    postgresql_where=_live,
)
sa.Index(
    "ix_collections_deleted",
    collections.c.deleted_at,
    sqlite_where=_deleted,
    postgresql_where=_deleted,
)

documents = sa.Table(
    "documents",
    metadata,
    sa.Column("collection", sa.String, primary_key=True),
    sa.Column("document", sa.String, primary_key=True),
    sa.Column("generation", sa.BigInteger, nullable=False),
    sa.Column("chunks_max", sa.Integer, nullable=False),
    sa.Column("chunks", sa.Integer, nullable=False),
    sa.Column("tombstone", sa.Boolean, nullable=False),
    sa.Column("updated_at", sa.Double, nullable=False),
    # The key is most of the row: one tree instead of two. Other databases ignore the option.
    sqlite_with_rowid=False,
)

epochs = sa.Table(
    "epochs",
    metadata,
    sa.Column("name", sa.String, primary_key=True),
    sa.Column("deploy_seq", sa.BigInteger, nullable=False),
    sa.Column("epoch", sa.BigInteger, nullable=False),
)

operations = sa.Table(
    "operations",
    metadata,
    sa.Column("op", sa.String, primary_key=True),
    sa.Column("method", sa.String, nullable=False),
    sa.Column("result", sa.JSON, nullable=False),
    sa.Column("at", sa.Double, nullable=False, index=True),
)


def _added(table: str, *columns: str) -> list[sa.Executable]:
    return [sa.text(f"ALTER TABLE {table} ADD COLUMN {column}") for column in columns]


def _made(table: sa.Table) -> list[sa.Executable]:
    return [CreateTable(table), *_indexed(table)]


def _indexed(table: sa.Table) -> list[sa.Executable]:
    return [CreateIndex(index) for index in sorted(table.indexes, key=lambda each: str(each.name))]


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
