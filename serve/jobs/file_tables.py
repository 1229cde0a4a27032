"""Table of the files that tenants keep. Their bytes are blobs and stand elsewhere."""

import sqlalchemy as sa

from serve.jobs.tables import metadata


files = sa.Table(
    "files",
    metadata,
    sa.Column("id", sa.String, primary_key=True),
    sa.Column("tenant", sa.String, nullable=False),
    sa.Column("purpose", sa.String, nullable=False),
    sa.Column("filename", sa.String, nullable=False),
    sa.Column("size", sa.BigInteger, nullable=False),
    sa.Column("sha256", sa.String, nullable=False),
    sa.Column("created_at", sa.Double, nullable=False),
    sa.Column("expires_at", sa.Double, nullable=False, index=True),
    sa.Index("ix_files_listed", "tenant", "id"),
)
