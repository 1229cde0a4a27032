"""Tables of jobs: what was handed over, its items, the fair order of their claims, and who works.

States are short strings, see `serve.items`. What waits for a later moment stands outside the index
that claims read. Times are epoch seconds of the Store's clock. JSON stands last in a row: what is
read often is found before it.
"""

import sqlalchemy as sa

from serve.jobs.tables import metadata, partial_index


BIG_ID = sa.BigInteger().with_variant(sa.Integer, "sqlite")
"""Given by the database: SQLite does so for INTEGER only, and never twice with AUTOINCREMENT."""


def _text(name: str, default: str = "") -> sa.Column[str]:
    return sa.Column(name, sa.String, nullable=False, server_default=default)


def _count(name: str, kind: type[sa.Integer] = sa.Integer) -> sa.Column[int]:
    return sa.Column(name, kind, nullable=False, server_default="0")


def _json(name: str, default: str = "{}", key: str | None = None) -> sa.Column[object]:
    return sa.Column(name, sa.JSON, nullable=False, server_default=default, key=key or name)


JOB_IS_OPEN = "finished_at IS NULL"

jobs = sa.Table(
    "jobs",
    metadata,
    sa.Column("id", sa.String, primary_key=True),
    sa.Column("tenant", sa.String, nullable=False),
    sa.Column("klass", sa.String, nullable=False),
    sa.Column("priority", sa.Integer, nullable=False),
    sa.Column("state", sa.String, nullable=False),
    sa.Column("paused", sa.Boolean, nullable=False),
    _count("total"),
    _count("done"),
    _count("skipped"),
    _count("dead"),
    _count("cancelled"),
    _count("tokens", sa.BigInteger),
    sa.Column("cost_left", sa.Double, nullable=False, server_default="0"),
    sa.Column("weight", sa.Double, nullable=False),
    sa.Column("created_at", sa.Double, nullable=False),
    sa.Column("expires_at", sa.Double),
    sa.Column("finished_at", sa.Double),
    sa.Column("told_at", sa.Double, nullable=False),
    sa.Column("untold", sa.Boolean, nullable=False),
    sa.Column("moving", sa.Boolean, nullable=False),
    sa.Column("key", sa.String, nullable=False),
    sa.Column("kind", sa.String, nullable=False),
    sa.Column("collection", sa.String, nullable=False),
    sa.Column("on_error", sa.String, nullable=False),
    sa.Column("webhook", sa.String, nullable=False),
    _json("spec"),
    _json("metadata", key="notes"),
    _json("files"),
    _json("times"),
    _json("errors", "[]"),
    sa.Index("ix_jobs_listed", "tenant", "kind", "state", "id"),
    partial_index("ix_jobs_open", JOB_IS_OPEN, "tenant", "klass", "priority"),
    partial_index("ix_jobs_moving", "moving", "id"),
    partial_index("ix_jobs_untold", "untold", "told_at"),
    partial_index("ix_jobs_expiry", f"{JOB_IS_OPEN} AND expires_at IS NOT NULL", "expires_at"),
    partial_index("ix_jobs_finished", "finished_at IS NOT NULL", "finished_at"),
)
"""`told_at`: of its last progress event. `untold`: its counts have changed since. `moving`: not all of
its items have followed yet when it was stopped, paused or resumed."""

items = sa.Table(
    "items",
    metadata,
    sa.Column("id", BIG_ID, primary_key=True),
    sa.Column("job", sa.String, nullable=False),
    sa.Column("seq", sa.Integer, nullable=False),
    sa.Column("klass", sa.String, nullable=False),
    sa.Column("stage", sa.String, nullable=False),
    sa.Column("state", sa.String, nullable=False),
    sa.Column("tag", sa.Double, nullable=False),
    sa.Column("cost", sa.Double, nullable=False),
    sa.Column("run_at", sa.Double),
    _count("attempts"),
    _count("crashes"),
    sa.Column("owner", sa.String),
    _count("lease", sa.BigInteger),
    sa.Column("leased_at", sa.Double),
    sa.Column("updated_at", sa.Double, nullable=False),
    sa.Column("task", sa.String, nullable=False),
    sa.Column("name", sa.String, nullable=False),
    _count("generation", sa.BigInteger),
    _text("sha256"),
    _count("tokens", sa.BigInteger),
    _text("error_kind"),
    _text("error_code"),
    _text("error_text"),
    _json("payload"),
    _json("result"),
    sa.UniqueConstraint("job", "seq", name="uq_items"),
    partial_index("ix_items_ready", "state = 'ready'", "stage", "klass", "tag", "id"),
    partial_index("ix_items_delayed", "state = 'delayed'", "run_at"),
    partial_index("ix_items_leased", "state = 'leased'", "owner"),
    partial_index("ix_items_dead", "state = 'dead'", "job", "seq"),
    sa.Index("ix_items_count", "job", "stage", "state", "seq"),
    sqlite_autoincrement=True,
)
"""What a job says of all its items (tenant, priority, collection) stands there only; `klass` is here
too, for the order of claims."""

IS_UNIT = sa.text("+seq >= 0")
"""Not one of the job's own items. The plus: else SQLite would look for it by number, through rows of
all stages and states."""

flows = sa.Table(
    "flows",
    metadata,
    sa.Column("stage", sa.String, primary_key=True),
    sa.Column("klass", sa.String, primary_key=True),
    sa.Column("tenant", sa.String, primary_key=True),
    sa.Column("weight", sa.Double, nullable=False),
    sa.Column("finish", sa.Double, nullable=False),
    sa.Index("ix_flows_finish", "stage", "klass", "finish"),
    sqlite_with_rowid=False,
)

vclock = sa.Table(
    "vclock",
    metadata,
    sa.Column("stage", sa.String, primary_key=True),
    sa.Column("klass", sa.String, primary_key=True),
    sa.Column("v", sa.Double, nullable=False),
    sa.Column("root", sa.Double, nullable=False),
    sqlite_with_rowid=False,
)

owners = sa.Table(
    "owners",
    metadata,
    sa.Column("owner", sa.String, primary_key=True),
    sa.Column("alive_until", sa.Double, nullable=False, index=True),
    sa.Column("gone", sa.Boolean, nullable=False),
)
"""`gone`: it has ended by itself and gets nothing any more."""

job_totals = sa.Table(
    "job_totals",
    metadata,
    sa.Column("tenant", sa.String, primary_key=True),
    _count("open"),
    _count("total", sa.BigInteger),
    _count("done", sa.BigInteger),
    _count("skipped", sa.BigInteger),
    _count("dead", sa.BigInteger),
    _count("cancelled", sa.BigInteger),
    sa.Column("cost_left", sa.Double, nullable=False, server_default="0"),
    sqlite_with_rowid=False,
)
"""Sums over the jobs of a tenant, of which there may be 100,000; `open` is how many have not ended."""

efforts = sa.Table(
    "efforts",
    metadata,
    sa.Column("day", sa.Integer, primary_key=True),
    sa.Column("tenant", sa.String, primary_key=True),
    sa.Column("task", sa.String, primary_key=True),
    sa.Column("stage", sa.String, primary_key=True),
    sa.Column("word", sa.String, primary_key=True),
    sa.Column("tries", sa.BigInteger, nullable=False),
    sa.Column("seconds", sa.Double, nullable=False),
    sqlite_with_rowid=False,
)
"""`day` is since the epoch, UTC; `seconds` from claim to settlement, over all `tries`."""

job_events = sa.Table(
    "job_events",
    metadata,
    sa.Column("number", BIG_ID, primary_key=True),
    sa.Column("job", sa.String, nullable=False),
    sa.Column("tenant", sa.String, nullable=False),
    sa.Column("at", sa.Double, nullable=False),
    sa.Column("type", sa.String, nullable=False),
    sa.Column("data", sa.JSON, nullable=False),
    sa.Index("ix_job_events_job", "job", "number"),
    sqlite_autoincrement=True,
)

idempotency = sa.Table(
    "idempotency",
    metadata,
    sa.Column("tenant", sa.String, primary_key=True),
    sa.Column("key", sa.String, primary_key=True),
    sa.Column("fingerprint", sa.String, nullable=False),
    sa.Column("job", sa.String, nullable=False),
    sa.Column("expires_at", sa.Double, nullable=False, index=True),
    sqlite_with_rowid=False,
)

tokens = sa.Table(
    "tokens",
    metadata,
    sa.Column("owner", sa.String, primary_key=True),
    sa.Column("token", sa.BigInteger, nullable=False),
    sqlite_with_rowid=False,
)
"""How far into the index's log what landed of a job reaches, or of a collection's documents: `owner` is the
id of either. Only of an index whose searches lag behind its writes."""

ALL = (jobs, items, flows, vclock, owners, job_totals, efforts, job_events, idempotency)
