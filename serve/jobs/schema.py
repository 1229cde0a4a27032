"""Tables of the Store, and their version. Neighbours: `sqlite` opens the file; `tenants`, `catalog`,
`generations` and `fence` hold the statements of one port each.

Only SQL that SQLite and Postgres share. Times are epoch seconds of the Store's clock.
"""

import uuid

import sqlalchemy as sa

from serve.errors import StoreUnavailable


VERSION = 1

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
)

keys = sa.Table(
    "keys",
    metadata,
    sa.Column("id", sa.String, primary_key=True),
    sa.Column("tenant", sa.String, nullable=False),
    sa.Column("secret_sha256", sa.String, nullable=False),
    sa.Column("created_at", sa.Double, nullable=False),
    sa.Column("revoked_at", sa.Double),
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


def create(conn: sa.Connection, now: float) -> str:
    """Make the tables in an empty database; returns its new identity."""
    metadata.create_all(conn)
    made = uuid.uuid4().hex
    conn.execute(
        sa.insert(store).values(one=1, version=VERSION, identity=made, created_at=now),
    )
    return made
