"""Tables of webhooks and of what is delivered to them. Secrets stand here sealed only.

A delivery is *pending* while something is still to be done; a leased one is due again when its
lease is over, so `run_at` is either the next try or the end of the lease.
"""

import sqlalchemy as sa

from serve.jobs.tables import metadata, partial_index


# As the conditions of the partial indexes have them.
IS_PENDING = "state IN ('waiting', 'leased')"
IS_LEASED = "state = 'leased'"
IS_OVER = "state IN ('delivered', 'given_up')"

webhooks = sa.Table(
    "webhooks",
    metadata,
    sa.Column("id", sa.String, primary_key=True),
    sa.Column("tenant", sa.String, nullable=False),
    sa.Column("url", sa.String, nullable=False),
    sa.Column("secret", sa.String, nullable=False),
    sa.Column("created_at", sa.Double, nullable=False),
    sa.Column("previous", sa.String, nullable=False),
    sa.Column("previous_until", sa.Double),
    sa.Column("active", sa.Boolean, nullable=False),
    sa.Column("disabled_reason", sa.String, nullable=False),
    sa.Column("failing_since", sa.Double),
    sa.Column("hold_until", sa.Double),
    sa.Index("ix_webhooks_tenant", "tenant", "id"),
)
"""Columns in the order of `serve.webhooks.Webhook`."""

deliveries = sa.Table(
    "deliveries",
    metadata,
    sa.Column("id", sa.String, primary_key=True),
    sa.Column("webhook", sa.String, nullable=False),
    sa.Column("tenant", sa.String, nullable=False),
    sa.Column("job", sa.String, nullable=False),
    sa.Column("type", sa.String, nullable=False),
    sa.Column("payload", sa.String, nullable=False),
    sa.Column("created_at", sa.Double, nullable=False),
    sa.Column("updated_at", sa.Double, nullable=False),
    sa.Column("run_at", sa.Double),
    sa.Column("state", sa.String, nullable=False),
    sa.Column("attempts", sa.Integer, nullable=False),
    sa.Column("lease", sa.BigInteger, nullable=False),
    sa.Column("last_status", sa.Integer),
    sa.Column("last_error", sa.String, nullable=False),
    sa.Index("ix_deliveries_listed", "webhook", "state", "id"),
    partial_index("ix_deliveries_pending", IS_PENDING, "webhook", "run_at"),
    partial_index("ix_deliveries_leased", IS_LEASED, "tenant"),
    partial_index("ix_deliveries_over", IS_OVER, "updated_at"),
)
"""Columns in the order of `serve.webhooks.Delivery`."""

ALL = (webhooks, deliveries)
