"""The Store's ports of jobs over its actor."""

from collections.abc import Sequence
from typing import cast

from deployments.store_calls import StoreCalls
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
from serve.telemetry import Census


class JobPort(StoreCalls, Jobs, Queue, Events):
    """Implements them all by the actor's one method `call`. Each call also raises StoreUnavailable."""

    async def submit_job(
        self, op: str, job: Job, items: Sequence[NewItem], once: Once | None = None
    ) -> Accepted:
        """See Handover."""
        return cast("Accepted", await self._call("submit_job", op, job, items, once))

    async def first_job(self, tenant: str, once: Once) -> Job | None:
        """See Handover."""
        return cast("Job | None", await self._call("first_job", tenant, once))

    async def find_job(self, tenant: str, job: str) -> JobView | None:
        """See Jobs."""
        return cast("JobView | None", await self._call("find_job", tenant, job))

    async def list_jobs(
        self, tenant: str, kind: Kind | None, states: Sequence[JobState], after: str, limit: int
    ) -> Sequence[Job]:
        """See Jobs."""
        found = await self._call("list_jobs", tenant, kind, states, after, limit)
        return cast("Sequence[Job]", found)

    async def list_items(
        self, tenant: str, job: str, states: Sequence[ItemState], after: int, limit: int
    ) -> Sequence[ItemView]:
        """See Jobs."""
        found = await self._call("list_items", tenant, job, states, after, limit)
        return cast("Sequence[ItemView]", found)

    async def change_job(self, op: str, tenant: str, job: str, change: Change) -> Job:
        """See Jobs."""
        return cast("Job", await self._call("change_job", op, tenant, job, change))

    async def retry_items(self, op: str, tenant: str, job: str, replay: Replay) -> int:
        """See Jobs."""
        return cast("int", await self._call("retry_items", op, tenant, job, replay))

    async def claim(
        self, owner: str, stage: Stage, items_max: int, cost_max: float, wait_s: float
    ) -> Claim:
        """See Queue."""
        found = await self._call("claim", owner, stage, items_max, cost_max, wait_s, wait_s=wait_s)
        return cast("Claim", found)

    async def keep(self, owner: str, held: Sequence[int]) -> frozenset[int]:
        """See Queue."""
        return cast("frozenset[int]", await self._call("keep", owner, held))

    async def settle(self, settlements: Sequence[Settlement]) -> Sequence[bool]:
        """See Queue."""
        return cast("Sequence[bool]", await self._call("settle", settlements))

    async def add_items(self, item: int, lease: int, start: int, items: Sequence[NewItem]) -> bool:
        """See Queue."""
        return cast("bool", await self._call("add_items", item, lease, start, items))

    async def leave(self, owner: str) -> None:
        """See Queue."""
        await self._call("leave", owner)

    async def events(self, after: int, limit: int, wait_s: float) -> Sequence[Event]:
        """See Events."""
        found = await self._call("events", after, limit, wait_s, wait_s=wait_s)
        return cast("Sequence[Event]", found)

    async def job_events(self, tenant: str, job: str, after: int, limit: int) -> Sequence[Event]:
        """See Events."""
        return cast("Sequence[Event]", await self._call("job_events", tenant, job, after, limit))

    async def list_efforts(self, tenant: str, days: int) -> Sequence[Effort]:
        """See Events."""
        return cast("Sequence[Effort]", await self._call("list_efforts", tenant, days))

    async def census(self) -> Census:
        """See Events."""
        return cast("Census", await self._call("census"))

    async def job_stats(self, tenant: str) -> Stats:
        """See Events."""
        return cast("Stats", await self._call("job_stats", tenant))
