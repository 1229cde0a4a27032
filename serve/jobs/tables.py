"""Tables of the Store that are not about jobs (see `job_tables`). The statements of a port stand in the
module of its name: `keys`, `tenants`, `usage`, `catalog`, `generations`, `fence`, `operations`.

Only SQL that SQLite and Postgres share. Times are epoch seconds of the Store's clock.
"""

import sqlalchemy as sa


metadata = sa.MetaData()


def partial_index(name: str, condition: str, *columns: str) -> sa.Index:
    """An index of the rows that meet a condition: all literals, since a bound value matches none."""
    where = sa.text(condition)
    return sa.Index(name, *columns, sqlite_where=where, postgresql_where=where)


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
    sa.Column("sha256", sa.String, nullable=False, server_default=""),
    sa.Column("sent_at", sa.Double, nullable=False, server_default=sa.text("0")),
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
