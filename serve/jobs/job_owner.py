"""The ports of jobs over one `Committer`: who claims waits here, and is woken by what is stored."""

import asyncio
import logging
import math
from collections.abc import Awaitable, Callable, Collection, Iterator, Mapping, Sequence
from functools import partial
from typing import TypeVar

import sqlalchemy as sa

from serve.config import Jobs as Rules
from serve.errors import ServiceError
from serve.items import (
    Accepted,
    Change,
    Claim,
    Effort,
    Event,
    ItemState,
    ItemView,
    Job,
    JobState,
    JobView,
    Kind,
    NewItem,
    Once,
    Replay,
    Settlement,
    Stage,
    Stats,
)
from serve.job_ports import Events, Jobs, Queue
from serve.jobs import census as counted
from serve.jobs import claims, deliveries, efforts, handed, operations, progress, settling, submit
from serve.jobs.bell import Bell, heard, noted
from serve.jobs.book import EVENTS
from serve.jobs.committer import Committer, Work
from serve.jobs.operations import ACCEPTED, COUNT, JOB, Codec
from serve.jobs.postgres import Postgres
from serve.records import Klass
from serve.telemetry import Census


T = TypeVar("T")

TICK_ROWS = 1000
"""Rows of one kind that a tick moves in one transaction, about 30 ms: others wait behind it."""

Chore = Callable[[sa.Connection, float, int], int]
"""Does up to so many rows of what is due, given `now`; returns how many."""

LOOK_S = 1.0
"""Who waits looks so often by himself: a ring may be lost, with the caller who was to ring, or on its way
from another process."""

log = logging.getLogger(__name__)


class JobOwner(Jobs, Queue, Events):
    """Implements the ports of jobs for one process; a call is acknowledged after its commit."""

    def __init__(
        self, committer: Committer | Postgres, rules: Rules, shares: Mapping[Klass, float]
    ) -> None:
        """`shares` are those of the classes."""
        self._committer = committer
        self._loop: asyncio.AbstractEventLoop | None = None
        self._rules = rules
        self._shares = shares
        self._bell = Bell()
        self._answered_at: float | None = None
        self._room = submit.Room(rules.open_jobs_max, rules.open_items_max, rules.open_tokens_max)

    async def submit_job(
        self, op: str, job: Job, items: Sequence[NewItem], once: Once | None = None
    ) -> Accepted:
        """See Handover."""

        def work(conn: sa.Connection, now: float) -> Accepted:
            return submit.submit(conn, job, items, once, room=self._room, now=now)

        return await self._once(op, "submit_job", ACCEPTED, work)

    async def first_job(self, tenant: str, once: Once) -> Job | None:
        """See Handover."""
        return await self._do(lambda conn, now: submit.first(conn, tenant, once, now))

    async def find_job(self, tenant: str, job: str) -> JobView | None:
        """See Jobs."""
        return await self._do(lambda conn, _now: handed.find(conn, tenant, job))

    async def list_jobs(
        self, tenant: str, kind: Kind | None, states: Sequence[JobState], after: str, limit: int
    ) -> Sequence[Job]:
        """See Jobs."""
        return await self._do(
            lambda conn, _now: handed.listed(
                conn, tenant, kind=kind, states=states, after=after, limit=limit
            )
        )

    async def list_items(
        self, tenant: str, job: str, states: Sequence[ItemState], after: int, limit: int
    ) -> Sequence[ItemView]:
        """See Jobs."""
        return await self._do(
            lambda conn, _now: handed.list_items(
                conn, tenant, job, states=states, after=after, limit=limit
            )
        )

    async def change_job(self, op: str, tenant: str, job: str, change: Change) -> Job:
        """See Jobs."""
        return await self._once(
            op, "change_job", JOB, lambda conn, now: handed.change(conn, tenant, job, change, now)
        )

    async def retry_items(self, op: str, tenant: str, job: str, replay: Replay) -> int:
        """See Jobs."""

        def work(conn: sa.Connection, now: float) -> int:
            return handed.retry(conn, tenant, job, replay, now)

        return await self._once(op, "retry_items", COUNT, work)

    async def claim(
        self, owner: str, stage: Stage, items_max: int, cost_max: float, wait_s: float
    ) -> Claim:
        """See Queue."""

        def work(conn: sa.Connection, now: float) -> Claim | None:
            return claims.claim(
                conn,
                owner,
                stage,
                wanted=claims.Wanted(items_max, cost_max),
                shares=self._shares,
                lease_s=self._rules.lease_s,
                now=now,
            )

        found = await self._wait(
            stage, lambda: self._do(work), lambda claim: claim is None or claim.items, wait_s
        )
        return found or Claim()

    async def keep(self, owner: str, held: Sequence[int]) -> frozenset[int]:
        """See Queue."""
        lease_s = self._rules.lease_s
        return await self._do(
            lambda conn, now: claims.keep(conn, owner, held, lease_s=lease_s, now=now)
        )

    async def settle(self, settlements: Sequence[Settlement]) -> Sequence[bool]:
        """See Queue."""
        most = self._rules.attempts_max
        return await self._do(
            lambda conn, now: settling.settle(conn, settlements, attempts_max=most, now=now)
        )

    async def add_items(self, item: int, lease: int, start: int, items: Sequence[NewItem]) -> bool:
        """See Queue."""
        return await self._do(
            lambda conn, now: submit.add_items(
                conn, item, lease, start=start, new=items, room=self._room, now=now
            )
        )

    async def leave(self, owner: str) -> None:
        """See Queue."""
        await self._do(lambda conn, now: claims.leave(conn, owner, now))

    async def events(self, after: int, limit: int, wait_s: float) -> Sequence[Event]:
        """See Events."""
        return await self._wait(
            EVENTS,
            lambda: self._do(lambda conn, _now: handed.events(conn, after, limit)),
            lambda events: events,
            wait_s,
        )

    async def job_events(self, tenant: str, job: str, after: int, limit: int) -> Sequence[Event]:
        """See Events."""
        return await self._do(lambda conn, _now: handed.job_log(conn, tenant, job, after, limit))

    async def job_stats(self, tenant: str) -> Stats:
        """See Events."""
        return await self._do(lambda conn, _now: handed.stats(conn, tenant))

    async def list_efforts(self, tenant: str, days: int) -> Sequence[Effort]:
        """See Events."""
        return await self._do(lambda conn, now: efforts.listed(conn, tenant, days, now))

    async def census(self) -> Census:
        """See Events."""
        return await self._do(counted.taken)

    async def tick(self) -> None:
        """What is due becomes ready, what silent owners had goes back, what is over ends.

        Somebody calls this every `jobs.tick_s`. What fails keeps nothing else from being done; the
        first failure is raised at the end.
        """
        await self._spare_after_absence()
        failures: list[ServiceError] = []
        for chore in self._due():
            try:
                while await self._do(chore) >= TICK_ROWS:
                    pass
                self._answered_at = asyncio.get_running_loop().time()
            except ServiceError as error:
                log.warning("a chore of the Store failed: %s", error)
                failures.append(error)
        if failures:
            raise failures[0]

    async def _spare_after_absence(self) -> None:
        """Nobody could say that he lives while the Store was away, and who was silent is no dead one.

        The owner of a file was away until it started, other processes on Postgres were not.
        """
        lease_s, now = self._rules.lease_s, asyncio.get_running_loop().time()
        if self._answered_at is None and isinstance(self._committer, Postgres):
            self._answered_at = now
        absence_s = math.inf if self._answered_at is None else now - self._answered_at
        if absence_s > self._rules.tick_s + lease_s / 2:
            await self._do(partial(claims.spare, lease_s=lease_s))

    def _due(self) -> Iterator[Work[int]]:
        leases = claims.Leases(self._rules.lease_s, self._rules.crashes_max)
        chores: tuple[Chore, ...] = (
            settling.due,
            partial(claims.reap, leases=leases),
            progress.go_on_moving,
            handed.expire,
            progress.tell_rest,
            partial(handed.purge, kept_s=self._rules.kept_s),
            submit.purge_idempotency,
            deliveries.due,
            partial(deliveries.purge, kept_s=self._rules.kept_s),
            efforts.purge,
        )
        for chore in chores:
            yield self._limited(chore)
        if isinstance(self._committer, Postgres):
            yield self._limited(self._committer.keep_up)

    def _limited(self, chore: Chore) -> Work[int]:
        def work(conn: sa.Connection, now: float) -> int:
            if isinstance(self._committer, Postgres) and not self._committer.is_alone(conn):
                return 0  # another process is at it
            return chore(conn, now, TICK_ROWS)

        return work

    async def _wait(
        self,
        what: str,
        look: Callable[[], Awaitable[T]],
        found: Callable[[T], object],
        wait_s: float,
    ) -> T:
        """Look, and again when it rings, until something is found or the time is up."""
        loop = self._hear_others()
        until = loop.time() + wait_s
        waiter = self._bell.listen(what)
        try:
            while True:
                seen = await look()
                left_s = until - loop.time()
                if found(seen) or left_s <= 0:
                    return seen
                if await heard(waiter, min(left_s, LOOK_S)):
                    waiter = self._bell.listen(what)  # a new one, before looking again
        except BaseException:
            self._bell.ring(what)  # the ring that we came for is somebody else's
            raise
        finally:
            self._bell.leave(what, waiter)

    def _ring(self, words: Collection[str]) -> None:
        for word in words:
            self._bell.ring(word, everybody=word == EVENTS)
        if words and isinstance(self._committer, Postgres):
            self._committer.ring(words)

    def _hear_others(self) -> asyncio.AbstractEventLoop:
        """Be woken by what other processes store, where there are any."""
        loop = asyncio.get_running_loop()
        if self._loop is None:
            self._loop = loop
            if isinstance(self._committer, Postgres):
                self._committer.listen(self._heard)
        return loop

    def _heard(self, word: str) -> None:
        """Another process has rung; called from a thread."""
        if self._loop is not None and not self._loop.is_closed():
            ring = partial(self._bell.ring, word, everybody=word == EVENTS)
            self._loop.call_soon_threadsafe(ring)

    async def _do(self, work: Work[T]) -> T:
        def told(conn: sa.Connection, now: float) -> tuple[T, frozenset[str]]:
            return work(conn, now), noted(conn)

        value, words = await asyncio.wrap_future(self._committer.submit(told))
        self._ring(words)
        return value

    async def _once(self, op: str, method: str, codec: Codec[T], work: Work[T]) -> T:
        def kept(conn: sa.Connection, now: float) -> T:
            return operations.once(conn, op, codec, lambda: work(conn, now), method=method, now=now)

        return await self._do(kept)
