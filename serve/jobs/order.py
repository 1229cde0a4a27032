"""The fair order of claims: start-time fair queueing as a stored tag (Goyal, Vin, Cheng 1996).

A tenant's items get tags one after the other, each `cost / weight` behind the one before; claims
take the least tags, and the clock of their stage and class follows. Between the classes the one
with the least `root` is next. `serve.admission.fairness` is the same rule in memory.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

from serve.items import STAGES, Job, Stage
from serve.jobs.bell import note
from serve.jobs.job_tables import IS_UNIT, JOB_IS_OPEN, flows, items, jobs, vclock
from serve.records import KLASSES, Klass


REORDER_MAX = 2000
"""Waiting items of one tenant that still make place for others, or close up: each has its tag moved,
about 5 us, and others wait behind it. If there are more they stay where they are."""

BY_NAME: tuple[Stage, ...] = tuple(sorted(STAGES))
"""The order in which a tenant's flows of several stages are locked: no deadlock on Postgres."""

READY = items.c.state == sa.literal_column("'ready'")
"""Literal, so that the partial index is found."""


@dataclass(frozen=True, slots=True)
class Line:
    """Where a tenant's items of one stage and class wait."""

    stage: Stage
    klass: Klass
    tenant: str


@dataclass(frozen=True, slots=True)
class Served:
    """So much of a class was handed out, up to the tag `last`: `took` is its cost by its share.

    `start` is its root, or that of the class served last: idle time earns no credit.
    """

    klass: Klass
    start: float
    took: float
    last: float


def _param(name: str) -> sa.BindParameter[Any]:
    return sa.bindparam(name)


_CLOCK = sa.select(vclock.c.v).where(vclock.c.stage == _param("s"), vclock.c.klass == _param("k"))
_FLOW = (
    sa.select(flows.c.weight, flows.c.finish)
    .where(
        flows.c.stage == _param("s"), flows.c.klass == _param("k"), flows.c.tenant == _param("t")
    )
    .with_for_update()
)
_FLOWS = sa.select(flows.c.stage, flows.c.klass, flows.c.weight, flows.c.finish).where(
    flows.c.stage.in_(STAGES), flows.c.klass.in_(KLASSES), flows.c.tenant == _param("t")
)
_FLOWS_LOCKED = _FLOWS.order_by(flows.c.stage, flows.c.klass).with_for_update()
_HOLD = (
    sa.select(flows.c.tenant)
    .where(
        flows.c.stage.in_(STAGES),
        flows.c.klass.in_(KLASSES),
        flows.c.tenant.in_(sa.bindparam("tenants", expanding=True)),
    )
    .order_by(flows.c.stage, flows.c.klass, flows.c.tenant)
    .with_for_update()
)
_SET_FLOW = (
    sa.update(flows)
    .where(
        flows.c.stage == _param("s"), flows.c.klass == _param("k"), flows.c.tenant == _param("t")
    )
    .values(weight=_param("w"), finish=_param("f"))
)
_ADD_FLOW = sa.insert(flows)

_OPEN = sa.select(jobs.c.id).where(
    jobs.c.tenant == _param("t"), jobs.c.klass == _param("k"), sa.text(JOB_IS_OPEN)
)
_LOWER_JOBS = _OPEN.where(jobs.c.priority < _param("p"))
_OTHER_JOBS = _OPEN.where(jobs.c.id != _param("j"))
_OF_ALL, _OF_LOWER = items.c.job.in_(_OPEN), items.c.job.in_(_LOWER_JOBS)


def _waiting(of: sa.ColumnElement[bool]) -> sa.ColumnElement[bool]:
    """Ready items of these jobs in one stage, by `ix_items_count`."""
    return sa.and_(of, items.c.stage == _param("s"), READY, IS_UNIT)


def _few(of: sa.ColumnElement[bool]) -> sa.Select[int, Any, Any]:
    """Their number, which is above `REORDER_MAX` if it is at all; least tag and cost of so many."""
    some = sa.select(items.c.tag, items.c.cost).where(_waiting(of)).limit(REORDER_MAX + 1)
    few = some.subquery()
    return sa.select(
        sa.func.count().label("number"),
        sa.func.min(few.c.tag).label("first"),
        sa.func.sum(few.c.cost).label("cost"),
    ).select_from(few)


def _not_below(bound: sa.ColumnElement[float], value: Any) -> sa.Case[float]:
    """The greater one: it has another name in each database."""
    return sa.case((value < bound, bound), else_=value)


def _free(of: sa.ColumnElement[bool]) -> sa.ColumnElement[bool]:
    """Those that on Postgres nobody has locked: a claim may be waiting for who moves them.

    What is about to be worked on needs no other place. A CTE, so that it runs once whatever the plan.
    """
    free = sa.select(items.c.id).where(_waiting(of)).with_for_update(skip_locked=True).cte("free")
    return items.c.id.in_(sa.select(free.c.id))


_LOWER = _few(_OF_LOWER)
_SHIFT = sa.update(items).where(_free(_OF_LOWER)).values(tag=items.c.tag + _param("by"))
_ALL = _few(_OF_ALL)
_RESCALE = (
    sa.update(items)
    .where(_free(_OF_ALL))
    .values(tag=_param("v") + (items.c.tag - _param("v")) * _param("ratio"))
)
_OTHERS = _few(items.c.job.in_(_OTHER_JOBS))
_THESE = _few(items.c.job == _param("j"))
_LEAVING = (
    sa.select(
        items.c.id,
        items.c.job,
        sa.func.sum(sa.case((items.c.job == _param("j"), items.c.cost), else_=0.0))
        .over(order_by=(items.c.tag, items.c.id))
        .label("cost"),
    )
    .where(_waiting(_OF_ALL))
    .subquery()
)
"""A line's items, each with the leaving cost that stands before it."""
_CLOSE_UP = (
    sa.update(items)
    .where(
        items.c.id == _LEAVING.c.id,
        _LEAVING.c.job != _param("j"),
        _LEAVING.c.cost > 0,
        _free(_OF_ALL),
    )
    .values(tag=_not_below(_param("v"), items.c.tag - _LEAVING.c.cost / _param("w")))
)

_CLASSES = sa.select(vclock.c.klass, vclock.c.root).where(vclock.c.stage == _param("s"))
_ADD_CLASS = sa.insert(vclock)
_THIS_CLASS = (vclock.c.stage == _param("s"), vclock.c.klass == _param("k"))
_SERVE = (
    sa.update(vclock)
    .where(*_THIS_CLASS)
    .values(
        root=_not_below(_param("start"), vclock.c.root) + _param("took"),
        v=_not_below(_param("at"), vclock.c.v),
    )
)
_LAST = (
    sa.select(sa.func.max(flows.c.finish))
    .where(flows.c.stage == _param("s"), flows.c.klass == _param("k"))
    .scalar_subquery()
)
_WAITS = sa.exists().where(items.c.stage == _param("s"), items.c.klass == _param("k"), READY)
_LEVEL = sa.update(vclock).where(*_THIS_CLASS, vclock.c.v < _LAST, sa.not_(_WAITS)).values(v=_LAST)


def tags(
    conn: sa.Connection, line: Line, *, weight: float, costs: Sequence[float], priority: int
) -> list[float]:
    """Tags for items that begin to wait now, in their order; what they cost is noted.

    They go before the tenant's own waiting items of lower priority, which move back by as much:
    nobody else's place changes. `weight` is that of a tenant of whom nothing has waited so far;
    from then on `reweigh` changes it.
    """
    note(conn, line.stage)
    where = {"s": line.stage, "k": line.klass, "t": line.tenant}
    clock = clock_of(conn, line.stage, line.klass)
    row = conn.execute(_FLOW, where).one_or_none()
    if row is None:
        known = conn.execute(_FLOWS, {"t": line.tenant}).first()
        weight, finish = weight if known is None else known.weight, clock
    else:
        weight, finish = row.weight, max(clock, row.finish)
    took = sum(costs) / weight
    at = finish
    if finish > clock:
        lower = conn.execute(_LOWER, {**where, "p": priority}).one()
        if 0 < lower.number <= REORDER_MAX:
            conn.execute(_SHIFT, {**where, "p": priority, "by": took})
            at = max(clock, lower.first)
    given = []
    for cost in costs:
        given.append(at)
        at += cost / weight
    if row is None:
        flow = {"stage": line.stage, "klass": line.klass, "tenant": line.tenant}
        conn.execute(_ADD_FLOW, {**flow, "weight": weight, "finish": finish + took})
    else:
        conn.execute(_SET_FLOW, {**where, "w": weight, "f": finish + took})
    return given


def reweigh(conn: sa.Connection, tenant: str, weight: float) -> None:
    """Charge a tenant at another weight from now on, also for what it is ahead by."""
    if all(row.weight == weight for row in conn.execute(_FLOWS, {"t": tenant}).all()):
        return  # as nearly always, and nobody waits for anybody
    for row in conn.execute(_FLOWS_LOCKED, {"t": tenant}).all():
        if row.weight == weight:
            continue
        where = {"s": row.stage, "k": row.klass, "t": tenant}
        clock, finish = clock_of(conn, row.stage, row.klass), row.finish
        if finish > clock and conn.execute(_ALL, where).one().number <= REORDER_MAX:
            ratio = row.weight / weight
            conn.execute(_RESCALE, {**where, "v": clock, "ratio": ratio})
            finish = clock + (finish - clock) * ratio
        conn.execute(_SET_FLOW, {**where, "w": weight, "f": finish})


def withdraw(conn: sa.Connection, job: Job) -> None:
    """A job's ready items are about to leave: its tenant's other ones close up.

    What will not be worked on is not held against the tenant; nobody comes before the clock.
    """
    for stage in BY_NAME:
        where = {"s": stage, "k": job.klass, "t": job.tenant}
        these = conn.execute(_THESE, {"s": stage, "j": job.id}).one()
        if not these.number:
            continue
        clock = clock_of(conn, stage, job.klass)
        row = conn.execute(_FLOW, where).one_or_none()
        if row is None or row.finish <= clock:
            continue
        others = conn.execute(_OTHERS, {**where, "j": job.id}).one().number
        if these.number + others <= REORDER_MAX:
            if others:
                conn.execute(_CLOSE_UP, {**where, "j": job.id, "v": clock, "w": row.weight})
            finish = row.finish - these.cost / row.weight
        elif others:
            continue
        else:  # nothing is left to close up: what comes next may stand where these did
            finish = min(row.finish, these.first)
        conn.execute(_SET_FLOW, {**where, "w": row.weight, "f": max(clock, finish)})


def hold(conn: sa.Connection, tenants: Collection[str]) -> None:
    """Lock the flows of tenants of whom several jobs are about to move: one after the other they would be
    locked in any order, and deadlocks on Postgres come of that.
    """
    if tenants and conn.dialect.name == "postgresql":
        conn.execute(_HOLD, {"tenants": [*tenants]}).all()


def clock_of(conn: sa.Connection, stage: Stage, klass: Klass) -> float:
    """The least tag that an item may get that comes to wait."""
    return conn.execute(_CLOCK, {"s": stage, "k": klass}).scalar_one_or_none() or 0.0


def roots(conn: sa.Connection, stage: Stage, shares: Mapping[Klass, float]) -> dict[str, float]:
    """By class how much it was given, divided by its share; of the class "" the one served last."""
    found = {row.klass: row.root for row in conn.execute(_CLASSES, {"s": stage})}
    for klass in ("", *shares):
        if klass not in found:
            conn.execute(_ADD_CLASS, {"stage": stage, "klass": klass, "v": 0.0, "root": 0.0})
            found[klass] = 0.0
    return found


def follow(
    conn: sa.Connection, stage: Stage, served: Sequence[Served], empty: Collection[Klass]
) -> None:
    """The clocks of a stage follow a claim, which served classes in this order, and found nothing
    more of the `empty` ones. If nothing of such a one waits at all (on Postgres others may hold it
    for the moment), everybody starts level in its next busy period.

    Call it last: who claims after this one on Postgres waits here for its commit.
    """
    if served:
        last = {"s": stage, "k": "", "start": served[-1].start, "took": 0.0, "at": 0.0}
        conn.execute(_SERVE, last)
    by_class = {each.klass: each for each in served}
    for klass in sorted({*by_class, *empty}):  # one order for all: no deadlock
        this = {"s": stage, "k": klass}
        if klass in by_class:
            one = by_class[klass]
            conn.execute(_SERVE, {**this, "start": one.start, "took": one.took, "at": one.last})
        if klass in empty:
            conn.execute(_LEVEL, this)
