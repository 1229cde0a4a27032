"""Statements of `job_ports.Queue` that give items to workers and take them back. An owner's leases hold
while it says that it lives; an item that comes back from a dead one has crashed, not failed.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import sqlalchemy as sa

from serve.items import VERSION, Claim, Item, Job, Stage
from serve.jobs import catalog, keys, order, progress, settling
from serve.jobs.bell import note
from serve.jobs.book import Book, read
from serve.jobs.job_tables import items, owners
from serve.jobs.settling import ALONE_FROM
from serve.jobs.tables import documents
from serve.records import Collection, Klass


CLAIM_MAX = 500
"""Items of one claim: they are named in one statement."""

GONE_S = 60.0
"""How long an owner that has left is remembered: a claim of it may still be under way."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """The most that one claim takes: items, and their cost if they are more than one."""

    items: int
    cost: float


@dataclass(frozen=True, slots=True)
class Leases:
    """How long a silent owner keeps its items, and after how many crashes one is given up."""

    lease_s: float
    crashes_max: int


_OF_THE_ROW = tuple(each.name for each in fields(Item) if each.name in items.c)
_OWNER: sa.BindParameter[str] = sa.bindparam("who")
_HEAD = (
    sa.select(items.c.id, items.c.tag, items.c.cost, items.c.crashes)
    .where(items.c.stage == sa.bindparam("s"), items.c.klass == sa.bindparam("k"), order.READY)
    .order_by(items.c.tag, items.c.id)
    .limit(sa.bindparam("most"))
    .with_for_update(skip_locked=True)
)
_LEASE = (
    sa.update(items)
    .where(items.c.id.in_(sa.bindparam("ids", expanding=True)))
    .values(
        state="leased",
        owner=_OWNER,
        lease=items.c.lease + 1,
        leased_at=sa.bindparam("now"),
        updated_at=sa.bindparam("now"),
    )
    .returning(*(items.c[name] for name in _OF_THE_ROW))
)
_HELD = sa.select(items.c.id, items.c.leased_at, items.c.crashes).where(
    items.c.owner == _OWNER, items.c.state == sa.literal_column("'leased'")
)
_ALIVE = (
    sa.update(owners)
    .where(owners.c.owner == _OWNER, sa.not_(owners.c.gone))
    .values(alive_until=sa.bindparam("until"))
)
_FIND_OWNER = sa.select(owners.c.gone).where(owners.c.owner == _OWNER)
_ADD_OWNER = sa.insert(owners)
_LEAVE = (
    sa.update(owners)
    .where(owners.c.owner == _OWNER)
    .values(gone=True, alive_until=sa.bindparam("until"))
)
_SILENT = (
    sa.select(owners.c.owner)
    .where(owners.c.alive_until < sa.bindparam("now"))
    .order_by(owners.c.alive_until)
    .limit(sa.bindparam("most"))
    .with_for_update(skip_locked=True)
)
_FORGET = sa.delete(owners).where(owners.c.owner == _OWNER)
_SPARE = (
    sa.update(owners)
    .where(owners.c.alive_until < sa.bindparam("until"))
    .values(alive_until=sa.bindparam("until"))
)
_VERSIONS = sa.select(documents.c.document, documents.c.generation, documents.c.chunks_max).where(
    documents.c.collection == sa.bindparam("c"),
    documents.c.document.in_(sa.bindparam("names", expanding=True)),
)


@dataclass(slots=True)
class _Pick:
    """Rows to lease in their order, what each class was given, which were left empty, and whether there
    may be more for another claim.
    """

    rows: list[Any] = field(default_factory=list)
    given: list[order.Served] = field(default_factory=list)
    empty: list[Klass] = field(default_factory=list)
    more: bool = False


def claim(
    conn: sa.Connection,
    owner: str,
    stage: Stage,
    *,
    wanted: Wanted,
    shares: Mapping[Klass, float],
    lease_s: float,
    now: float,
) -> Claim | None:
    """Lease the next items of a stage in fair order, see `job_ports.Queue`. None: the owner has left."""
    pick = _pick(conn, owner, stage, wanted, shares)
    if pick.rows:
        alive = _alive(conn, owner, now + lease_s)
        if pick.more or not alive:
            note(conn, stage)  # for another
        if not alive:
            return None
        leased = _leased(conn, owner, pick.rows, now)
        found = _filled(conn, owner, leased, alone=_is_alone(pick.rows), now=now)
    else:
        found = Claim()
    order.follow(conn, stage, pick.given, pick.empty)
    return found


def keep(
    conn: sa.Connection, owner: str, held: Sequence[int], *, lease_s: float, now: float
) -> frozenset[int]:
    """The owner lives; returns what it does not hold any more. What it lost goes back."""
    if not _alive(conn, owner, now + lease_s):
        return frozenset(held)
    rows = {row.id: row.leased_at for row in conn.execute(_HELD, {"who": owner})}
    works_on = frozenset(held)
    lost = [each for each, since in rows.items() if each not in works_on and since < now - lease_s]
    settling.requeue(conn, owner, lost, now)
    return works_on - frozenset(rows)


def leave(conn: sa.Connection, owner: str, now: float) -> None:
    """The owner ends by itself: no crash.

    It is gone first: a claim of it on Postgres is either seen below, or sees that.
    """
    until = now + GONE_S
    if conn.execute(_LEAVE, {"who": owner, "until": until}).rowcount == 0:
        conn.execute(_ADD_OWNER, {"owner": owner, "alive_until": until, "gone": True})
    settling.requeue(conn, owner, _ids_of(conn, owner), now)


def reap(conn: sa.Connection, now: float, rows_max: int, *, leases: Leases) -> int:
    """Take back what silent owners have, until it is `rows_max` items or more; returns how many owners
    and items that were.

    An owner that comes back later finds its leases over.
    """
    held: dict[str, Sequence[int]] = {}
    count = 0
    for owner in conn.execute(_SILENT, {"now": now, "most": rows_max}).scalars().all():
        if count >= rows_max:
            break
        held[owner] = _ids_of(conn, owner)
        count += 1 + len(held[owner])
    # In one book: who has written events holds their lock, and must not wait for jobs after that.
    settling.crashed(conn, held, crashes_max=leases.crashes_max, now=now)
    for owner in held:
        conn.execute(_FORGET, {"who": owner})
    return count


def spare(conn: sa.Connection, now: float, *, lease_s: float) -> None:
    """The Store was away: nobody could say that he lives, and everybody gets the time to."""
    conn.execute(_SPARE, {"until": now + lease_s})


def _alive(conn: sa.Connection, owner: str, until: float) -> bool:
    """Note that an owner lives; False when it has left."""
    if conn.execute(_ALIVE, {"who": owner, "until": until}).rowcount:
        return True
    if conn.execute(_FIND_OWNER, {"who": owner}).first() is not None:
        return False
    conn.execute(_ADD_OWNER, {"owner": owner, "alive_until": until, "gone": False})
    return True


def _pick(
    conn: sa.Connection, owner: str, stage: Stage, wanted: Wanted, shares: Mapping[Klass, float]
) -> _Pick:
    pick = _Pick()
    room, cost_left = min(wanted.items, CLAIM_MAX), wanted.cost
    roots = order.roots(conn, stage, shares)
    for klass in sorted(shares, key=lambda klass: max(roots[klass], roots[""])):
        head = conn.execute(_HEAD, {"s": stage, "k": klass, "most": room}).all()
        taken = _fitting(head, cost_left, first=not pick.rows)
        if _is_alone(taken) and _has_one_alone(conn, owner):
            pick.more = True
            break
        if taken:
            cost = sum(row.cost for row in taken)
            start, took = max(roots[klass], roots[""]), cost / shares[klass]
            roots[""] = start
            pick.given.append(order.Served(klass, start, took, taken[-1].tag))
            pick.rows += taken
            cost_left -= cost
        if len(taken) < len(head) or len(taken) == room or _is_alone(taken):
            pick.more = True
            break
        pick.empty.append(klass)
        room -= len(taken)
    return pick


def _fitting(head: Sequence[Any], cost_max: float, *, first: bool) -> list[Any]:
    """The first rows of at most that cost; one at least if nothing was taken before."""
    taken: list[Any] = []
    for row in head:
        cost_max -= row.cost
        if (taken or not first) and (cost_max < 0 or row.crashes >= ALONE_FROM):
            break
        taken.append(row)
        if row.crashes >= ALONE_FROM:
            break
    return taken


def _is_alone(taken: Sequence[Any]) -> bool:
    return bool(taken) and taken[0].crashes >= ALONE_FROM


def _has_one_alone(conn: sa.Connection, owner: str) -> bool:
    """Such an item waits until its owner works on nothing else, so one is enough."""
    return any(row.crashes >= ALONE_FROM for row in conn.execute(_HELD, {"who": owner}))


def _leased(conn: sa.Connection, owner: str, rows: Sequence[Any], now: float) -> list[Any]:
    """Let an owner have what was picked; whole rows, in its order."""
    ids = [row.id for row in rows]
    leased = conn.execute(_LEASE, {"ids": ids, "who": owner, "now": now}).all()
    by_id = {row[0]: row for row in leased}
    return [by_id[each] for each in ids]


def _ids_of(conn: sa.Connection, owner: str) -> list[int]:
    """What an owner has leased, as far as is committed."""
    return [row.id for row in conn.execute(_HELD, {"who": owner})]


def _filled(
    conn: sa.Connection, owner: str, rows: Sequence[Any], *, alone: bool, now: float
) -> Claim:
    """Leased rows with all that a worker needs beside them."""
    jobs = read(conn, {row.job for row in rows})
    late = [row.id for row in rows if _is_late(row, jobs[row.job])]
    if late:
        # Who holds a job may wait for items that this claim holds, so it waits for no job.
        settling.requeue(conn, owner, late, now, if_free=True)
        gone = frozenset(late)
        rows = [row for row in rows if row.id not in gone]
        jobs = {row.job: jobs[row.job] for row in rows}
    if not rows:
        return Claim()
    collections = catalog.by_uuid(conn, {job.collection for job in jobs.values() if job.collection})
    payers = keys.payers(conn, {(job.tenant, job.key) for job in jobs.values()}, now)
    versions = _versions(conn, rows, jobs)
    begun = _begun(conn, jobs, now)
    return Claim(
        tuple(_item(row, jobs[row.job].collection, versions, collections) for row in rows),
        jobs | begun,
        collections,
        {job.id: payers[job.tenant, job.key] for job in jobs.values()},
        alone,
    )


def _is_late(row: Any, job: Job) -> bool:
    """Its job was stopped or paused, and no tick has come to the item yet."""
    held = progress.stopping(job) or job.paused
    return held and row.seq >= 0


def _begun(conn: sa.Connection, jobs: Mapping[str, Job], now: float) -> dict[str, Job]:
    """Those of which these are the first items, now running."""
    book = Book(conn, now)
    book.open((each for each, job in jobs.items() if job.state == "queued"), if_free=True)
    begun: dict[str, Job] = {}
    for job_id in jobs:
        job = book.find(job_id)
        if job is not None and job.state == "queued":
            begun[job_id] = progress.turn(book, job_id, "running")
    book.close()
    return begun


def _item(
    row: Any,
    collection: str,
    versions: Mapping[tuple[str, str], tuple[int, int]],
    collections: Mapping[str, Collection],
) -> Item:
    generation, chunks_max = versions.get((collection, row.name), (row.generation, 0))
    gone = bool(collection) and collection not in collections
    values: dict[str, Any] = dict(zip(_OF_THE_ROW, row, strict=True))
    of_a_version = row.task == "delete" and VERSION in row.payload
    superseded = gone or (generation > row.generation and not of_a_version)
    return Item(**values, chunks_max=chunks_max, superseded=superseded)


def _versions(
    conn: sa.Connection, rows: Sequence[Any], jobs: Mapping[str, Job]
) -> dict[tuple[str, str], tuple[int, int]]:
    """Generation and bound of chunks of the documents that are written, as they are now."""
    names: dict[str, set[str]] = {}
    for row in rows:
        if row.generation:
            names.setdefault(jobs[row.job].collection, set()).add(row.name)
    return {
        (collection, name): (generation, chunks_max)
        for collection, some in names.items()
        for name, generation, chunks_max in conn.execute(
            _VERSIONS, {"c": collection, "names": list(some)}
        ).all()
    }
