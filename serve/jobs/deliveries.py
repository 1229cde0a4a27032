"""Statements of `job_ports.Deliveries`: the messages to webhooks, from the end of a job until a receiver
has them. Inserted in the transaction that ends the job, so none is lost and none is made up.

Claims are fair between tenants, so that one whose receiver hangs cannot hold up the others': of the
webhooks that have something due, those of the tenant with the least under way come first, and no
tenant has more than its bound under way.
"""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, get_args

import sqlalchemy as sa

from serve.errors import Conflict, NotFound
from serve.items import Event, new_id
from serve.jobs import tenants, webhook_rows
from serve.jobs.bell import note
from serve.jobs.pages import newest
from serve.jobs.webhook_tables import IS_LEASED, IS_OVER, IS_PENDING, deliveries, webhooks
from serve.jobs.webhooks import payload
from serve.webhooks import Delivery, DeliveryState, Due, Share, Tried, Webhook


DELIVERIES = "deliveries"
"""What the bell is rung for when something may be due."""

PREFIX = "msg"
TEST = "webhook.test"

ENDED_AS: dict[str, DeliveryState] = {
    "delivered": "delivered",
    "retry": "waiting",
    "given_up": "given_up",
    "disabled": "given_up",
}

_PENDING = sa.text(IS_PENDING)
_now: sa.BindParameter[float] = sa.bindparam("now")

# One seek of the index per webhook that has something pending, however much that is.
_first = sa.select(sa.func.min(deliveries.c.webhook).label("id")).where(_PENDING)
_heads = _first.cte("heads", recursive=True)
_next = (
    sa.select(sa.func.min(deliveries.c.webhook))
    .where(_PENDING, deliveries.c.webhook > _heads.c.id)
    .scalar_subquery()
)
_heads = _heads.union_all(sa.select(_next).where(_heads.c.id.is_not(None)))
_due_at = (
    sa.select(sa.func.min(deliveries.c.run_at))
    .where(_PENDING, deliveries.c.webhook == _heads.c.id)
    .scalar_subquery()
)
_HEADS = (
    sa.select(_heads.c.id.label("head"), _due_at.label("due_at"), *webhooks.c)
    .select_from(_heads.outerjoin(webhooks, webhooks.c.id == _heads.c.id))
    .where(_heads.c.id.is_not(None))
)
# What is being sent still ends by itself.
_GIVE_UP = (
    sa.update(deliveries)
    .where(
        deliveries.c.id.in_(
            sa.select(deliveries.c.id)
            .where(
                _PENDING,
                deliveries.c.webhook == sa.bindparam("hook"),
                sa.or_(
                    deliveries.c.state == sa.literal_column("'waiting'"),
                    deliveries.c.run_at <= _now,
                ),
            )
            .limit(sa.bindparam("most"))
        )
    )
    .values(state="given_up", run_at=None, last_error=sa.bindparam("why"), updated_at=_now)
)
_UNDER_WAY = (
    sa.select(deliveries.c.tenant, sa.func.count().label("sends"))
    .where(sa.text(IS_LEASED), deliveries.c.run_at > _now)
    .group_by(deliveries.c.tenant)
)
_OLDEST = (
    sa.select(deliveries.c.id)
    .where(_PENDING, deliveries.c.webhook == sa.bindparam("hook"), deliveries.c.run_at <= _now)
    .order_by(deliveries.c.run_at)
    .limit(sa.bindparam("most"))
    .with_for_update(skip_locked=True)
)
_LEASE = (
    sa.update(deliveries)
    .where(
        deliveries.c.id.in_(sa.bindparam("ids", expanding=True)),
        _PENDING,
        deliveries.c.run_at <= _now,
    )
    .values(
        state="leased",
        lease=deliveries.c.lease + 1,
        run_at=sa.bindparam("until"),
        updated_at=_now,
    )
    .returning(*deliveries.c)
)
_SETTLE = (
    sa.update(deliveries)
    .where(
        deliveries.c.id == sa.bindparam("msg"),
        deliveries.c.lease == sa.bindparam("held"),
        sa.text(IS_LEASED),
    )
    .values(
        state=sa.bindparam("becomes"),
        attempts=deliveries.c.attempts + 1,
        run_at=sa.bindparam("again_at"),
        last_status=sa.bindparam("status"),
        last_error=sa.bindparam("error"),
        updated_at=_now,
    )
    .returning(deliveries.c.webhook)
)


@dataclass(frozen=True, slots=True)
class _Head:
    """A webhook's id, when the first of its pending deliveries is due, and itself if it exists."""

    id: str
    due_at: float
    webhook: Webhook | None


def announce(conn: sa.Connection, webhook: str, event: Event) -> None:
    """Let a webhook be told of an event, if it is there and active."""
    if webhook_rows.is_active(conn, webhook):
        _insert(conn, webhook, event, event.job)


def test(conn: sa.Connection, tenant: str, webhook: str, now: float) -> Delivery:
    """Let a webhook be told that this is a test. Raises NotFound, Conflict (it is disabled)."""
    found = _callable(conn, tenant, webhook)
    return _insert(conn, found.id, Event(0, found.id, tenant, now, TEST, {}), "")


def listed(
    conn: sa.Connection,
    tenant: str,
    webhook: str,
    *,
    states: Sequence[DeliveryState],
    after: str,
    limit: int,
) -> list[Delivery]:
    """A webhook's deliveries, newest first: ids sort by time. Raises NotFound."""
    webhook_rows.mine(conn, tenant, webhook)
    runs = [
        (deliveries.c.webhook == webhook, deliveries.c.state == state)
        for state in frozenset(states or get_args(DeliveryState))
    ]
    some = sa.select(deliveries).where(
        deliveries.c.id.in_(newest(deliveries.c.id, runs, after, limit))
    )
    return [Delivery(*row) for row in conn.execute(some.order_by(deliveries.c.id.desc()))]


def redeliver(
    conn: sa.Connection, tenant: str, webhook: str, delivery: str, now: float
) -> Delivery:
    """Send a delivery again, or now if it waits; its tries count anew.

    Raises NotFound, Conflict (the webhook is disabled, or it is being sent).
    """
    found = _callable(conn, tenant, webhook)
    that = (deliveries.c.id == delivery, deliveries.c.webhook == found.id)
    row = conn.execute(sa.select(deliveries).where(*that).with_for_update()).one_or_none()
    if row is None:
        raise NotFound(
            f"There is no delivery {delivery!r}.", param="delivery", code="delivery_not_found"
        )
    if row.state == "leased" and row.run_at > now:
        raise Conflict("It is being sent right now.", param="delivery", code="delivery_under_way")
    again = replace(Delivery(*row), state="waiting", attempts=0, run_at=now, updated_at=now)
    conn.execute(
        sa.update(deliveries)
        .where(*that)
        .values(state=again.state, attempts=0, run_at=now, updated_at=now)
    )
    note(conn, DELIVERIES)
    return again


def claim(conn: sa.Connection, share: Share, now: float) -> list[Due]:
    """Lease what is due, fairly between tenants and between the webhooks of each."""
    # Each of these has one at least.
    first = _served(_heads_of(conn), _under_way(conn, now), now)[: share.most]
    if not first:
        return []
    tenants.hold(conn, *{hook.tenant for hook in first})
    ids = _fair(conn, first, share, _under_way(conn, now), now)
    if not ids:
        return []
    values = {"ids": ids, "now": now, "until": now + share.lease_s}
    rows = {row.id: Delivery(*row) for row in conn.execute(_LEASE, values)}
    note(conn, DELIVERIES)  # there may be more: for the next who waits
    by_id = {hook.id: hook for hook in first}
    return [Due(rows[each], by_id[rows[each].webhook]) for each in ids if each in rows]


def settle(conn: sa.Connection, one: Tried, now: float) -> bool:
    """Note what became of a try; False when the lease was another's, or it was settled before."""
    values = {
        "msg": one.delivery,
        "held": one.lease,
        "becomes": ENDED_AS[one.word],
        "again_at": now + one.delay_s if one.word == "retry" else None,
        "status": one.status,
        "error": one.error,
        "now": now,
    }
    webhook = conn.execute(_SETTLE, values).scalar_one_or_none()
    if webhook is None:
        return False
    webhook_rows.tried(conn, webhook, one, now)
    note(conn, DELIVERIES)  # its tenant has room for another
    return True


def due(conn: sa.Connection, now: float, rows_max: int) -> int:
    """Wake the sender when something is due; give up what waits for webhooks that are gone or
    disabled. Returns how many of those.
    """
    count = 0
    for head in _heads_of(conn):
        if head.webhook is None or not head.webhook.active:
            why = "deleted" if head.webhook is None else "disabled"
            values = {"hook": head.id, "now": now, "most": rows_max - count}
            count += conn.execute(_GIVE_UP, {**values, "why": f"The webhook was {why}."}).rowcount
        elif head.due_at <= now:
            note(conn, DELIVERIES)
    return count


def purge(conn: sa.Connection, now: float, rows_max: int, *, kept_s: float) -> int:
    """Forget deliveries that ended so long ago; returns how many."""
    old = (
        sa.select(deliveries.c.id)
        .where(sa.text(IS_OVER), deliveries.c.updated_at < now - kept_s)
        .limit(rows_max)
    )
    return conn.execute(sa.delete(deliveries).where(deliveries.c.id.in_(old))).rowcount


def _insert(conn: sa.Connection, webhook: str, event: Event, job: str) -> Delivery:
    made = Delivery(
        new_id(PREFIX, event.at),
        webhook,
        event.tenant,
        job,
        event.type,
        payload(event).decode(),
        created_at=event.at,
        updated_at=event.at,
        run_at=event.at,
    )
    conn.execute(sa.insert(deliveries).values(**asdict(made)))
    note(conn, DELIVERIES)
    return made


def _callable(conn: sa.Connection, tenant: str, webhook: str) -> Webhook:
    found = webhook_rows.mine(conn, tenant, webhook)
    if not found.active:
        raise Conflict(
            f"Webhook {found.id} is disabled: enable it first.",
            param="webhook",
            code="webhook_disabled",
        )
    return found


def _under_way(conn: sa.Connection, now: float) -> dict[str, int]:
    """How many of each tenant are being sent."""
    return {row.tenant: row.sends for row in conn.execute(_UNDER_WAY, {"now": now})}


def _heads_of(conn: sa.Connection) -> list[_Head]:
    """Every webhook that has something pending."""
    return [
        _Head(row[0], row[1], None if row[2] is None else Webhook(*row[2:]))
        for row in conn.execute(_HEADS)
    ]


def _served(heads: Sequence[_Head], under_way: Mapping[str, int], now: float) -> list[Webhook]:
    """Webhooks that have something due and may be called: one of each tenant in turn, and first of
    those tenants that have the least under way.
    """
    ranks = Counter(under_way)
    ranked: list[tuple[int, float, str, Webhook]] = []
    for head in sorted(heads, key=lambda each: each.due_at):
        hook = head.webhook
        if hook is not None and hook.active and max(head.due_at, hook.hold_until or 0.0) <= now:
            ranked.append((ranks[hook.tenant], head.due_at, hook.id, hook))
            ranks[hook.tenant] += 1
    return [hook for _, _, _, hook in sorted(ranked, key=lambda each: each[:3])]


def _fair(
    conn: sa.Connection,
    hooks: Sequence[Webhook],
    share: Share,
    under_way: Mapping[str, int],
    now: float,
) -> list[str]:
    """Ids of what is due: one of each webhook of a tenant in turn, one of each tenant in turn."""
    by_tenant: dict[str, list[tuple[int, int, Any]]] = defaultdict(list)
    for rank, hook in enumerate(hooks):
        room = share.tenant_most - under_way.get(hook.tenant, 0)
        if room > 0:
            values = {"hook": hook.id, "now": now, "most": min(room, share.most)}
            rows = conn.execute(_OLDEST, values).scalars()
            by_tenant[hook.tenant] += [(place, rank, each) for place, each in enumerate(rows)]
    turns: list[tuple[int, int, str]] = []
    for tenant, some in by_tenant.items():
        begun = under_way.get(tenant, 0)
        some.sort()
        turns += [
            (begun + place, rank, each)
            for place, (_, rank, each) in enumerate(some[: share.tenant_most - begun])
        ]
    turns.sort()
    return [each for _, _, each in turns[: share.most]]
