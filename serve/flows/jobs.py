"""`/v1/jobs`: hand work over, see how far it is, change it, and read what became of it.

What a job's items ask of a worker stands in `serve.flows.document_work`. All is scoped to the
caller's tenant: another's job is not found.
"""

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass, field, replace
from typing import Literal

from serve import tracing
from serve.content.documents import Document, validate_documents
from serve.errors import BadInput, NotFound, ServiceError
from serve.flows.collections import CollectionFlow
from serve.flows.context import Context, new_op
from serve.flows.files import FileFlow
from serve.flows.items import document_item
from serve.flows.kept import Kept
from serve.flows.models import Served
from serve.items import (
    ENDS,
    Accepted,
    Change,
    Effort,
    ItemState,
    ItemView,
    Job,
    JobState,
    Kind,
    NewItem,
    Once,
    Replay,
    StageCount,
    Stats,
    new_id,
)
from serve.job_ports import Events, Jobs
from serve.ports import Queues
from serve.records import Caller, Collection, Klass, QueueReport


RESULTS_PAGE = 500
"""Ended items read from the Store at once: a stream of results holds about 200 KB."""

RETRIED_ITEMS = 2000
"""Numbers of items among which the dead ones are tried again in one transaction, about 40 ms: others
wait behind it."""

REPORTS_KEPT_S = 0.5
"""Predictions are some seconds old anyway."""


@dataclass(frozen=True, slots=True)
class JobRequest:
    """Documents to be written to a collection in the background.

    Attributes:
        file: id of an uploaded file of documents instead of `documents`; empty: none.
        expires_s: seconds after which what has not ended is given up; None: as long as allowed.
        webhook: id of one that is told of the job's end; empty: none.
    """

    collection: str
    documents: Sequence[Document] = ()
    file: str = ""
    klass: Klass = "bulk"
    priority: int = 50
    on_error: Literal["continue", "stop"] = "continue"
    expires_s: float | None = None
    webhook: str = ""
    metadata: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class JobSeen:
    """A job, with its counts by stage where it was asked for alone.

    `eta_s` is when its last item is expected to end, in seconds; None where nothing is known.
    """

    job: Job
    counts: Sequence[StageCount] | None
    eta_s: float | None


class JobFlow:
    """Jobs of the caller's tenant. `submit`, `retry`, pausing and resuming count as requests."""

    def __init__(
        self,
        context: Context,
        collections: CollectionFlow,
        store: Jobs,
        events: Events,
        *,
        queues: Queues,
        files: FileFlow,
    ) -> None:
        """Of the context's settings the pools tell which embedders a model's work waits for."""
        settings = context.settings
        self._settings = settings
        self._models = context.models
        self._quotas = context.quotas
        self._threads = context.threads
        self._wall = context.wall
        self._collections = collections
        self._store = store
        self._events = events
        self._queues = queues
        self._files = files
        self._pools = {model.id: pool.name for pool in settings.pools for model in pool.models}
        self._stats = Kept[Stats](context.clock, settings.jobs.stats_s)
        self._reports = Kept[Sequence[QueueReport]](context.clock, REPORTS_KEPT_S)

    async def submit(
        self, caller: Caller, request: JobRequest, once: Once | None = None
    ) -> Accepted:
        """Keep a job; all or nothing, and once for each idempotency key.

        Raises NotFound (collection, file), BadInput (names the field), QuotaExceeded, Mismatch,
        StoreUnavailable.
        """
        self._check(request)
        async with self._quotas.admitted(caller, "bulk", tokens=0):
            if once is not None and (earlier := await self._store.first_job(caller.tenant, once)):
                return Accepted(earlier, replayed=True)
            collection = await self._collections.find(caller, request.collection)
            self._collections.servable(collection)
            job = self._job(caller, collection, request)
            if request.file:
                file = await self._files.find(caller, request.file, param="file")
                return await self._files.hand_over(file, job, once, jobs=self._store)
            served = self._models.find(collection.model)
            items = await asyncio.get_running_loop().run_in_executor(
                self._threads, self._items, served, request.documents
            )
            return await self._store.submit_job(new_op(), job, items, once)

    def _check(self, request: JobRequest) -> None:
        rules = self._settings.jobs
        if bool(request.file) == bool(request.documents):
            raise BadInput("Give either items or a file of them.", param="items")
        if not request.file:
            validate_documents(
                request.documents, self._settings.limits, name="items", count_max=rules.items_max
            )
        if request.expires_s is not None and request.expires_s > rules.expires_s_max:
            raise BadInput(
                f"expires_in may be {rules.expires_s_max:.0f} s at most.", param="expires_in"
            )

    def _items(self, served: Served, documents: Sequence[Document]) -> list[NewItem]:
        return [document_item(served, self._settings, one) for one in documents]

    def _job(self, caller: Caller, collection: Collection, request: JobRequest) -> Job:
        now = self._wall()
        most_s = self._settings.jobs.expires_s_max
        return Job(
            new_id("job", now),
            caller.tenant,
            caller.key,
            "documents",
            request.klass,
            caller.weight,
            now,
            priority=request.priority,
            collection=collection.uuid,
            on_error=request.on_error,
            webhook=request.webhook,
            spec={"collection": collection.name, "model": collection.model, **tracing.kept()},
            metadata=request.metadata,
            files={"input": request.file} if request.file else {},
            expires_at=now + (most_s if request.expires_s is None else request.expires_s),
        )

    async def find(self, caller: Caller, job_id: str) -> JobSeen:
        """One job with its counts by stage. Raises NotFound."""
        view = await self._store.find_job(caller.tenant, job_id)
        if view is None:
            raise NotFound(f"You have no job {job_id[:128]!r}.", param="id")
        return JobSeen(view.job, view.counts, await self._eta_s(view.job))

    async def list(
        self,
        caller: Caller,
        *,
        kind: Kind | None,
        states: Sequence[JobState],
        after: str,
        limit: int,
    ) -> Sequence[JobSeen]:
        """Up to `limit` jobs, newest first, those that are older than the job `after`."""
        jobs = await self._store.list_jobs(caller.tenant, kind, states, after, limit)
        return [JobSeen(job, None, await self._eta_s(job)) for job in jobs]

    async def items(
        self,
        caller: Caller,
        job_id: str,
        *,
        states: Sequence[ItemState],
        after: int,
        limit: int,
    ) -> Sequence[ItemView]:
        """Up to `limit` items by number, those above `after`. Raises NotFound."""
        items = await self._store.list_items(caller.tenant, job_id, states, after, limit)
        if not items:
            await self.find(caller, job_id)
        return items

    async def results(self, caller: Caller, job_id: str) -> AsyncIterator[Sequence[ItemView]]:
        """Every item that has ended, by number, in parts. Raises StoreUnavailable."""
        after = -1
        while some := await self._store.list_items(
            caller.tenant, job_id, ENDS, after, RESULTS_PAGE
        ):
            yield some
            after = some[-1].seq

    async def change(self, caller: Caller, job_id: str, change: Change) -> JobSeen:
        """Cancel, pause or resume; a repeat changes nothing. Raises NotFound, Conflict, QuotaExceeded.

        Pausing and resuming count as requests: they move thousands of items. Cancelling is free.
        """
        async with AsyncExitStack() as stack:
            if change != "cancel":
                await stack.enter_async_context(self._quotas.admitted(caller, "bulk", tokens=0))
            job = await self._store.change_job(new_op(), caller.tenant, job_id, change)
        return JobSeen(job, None, await self._eta_s(job))

    async def retry(self, caller: Caller, job_id: str, replay: Replay) -> int:
        """Try dead items again; returns how many, or would be. Raises NotFound, Conflict.

        A large job comes in parts: when it fails half-way, some are tried and a repeat does the rest.
        """
        async with self._quotas.admitted(caller, "bulk", tokens=0):
            view = await self._store.find_job(caller.tenant, job_id)
            total = 1 if view is None or replay.seq is not None else view.job.total
            count = 0
            for first in range(0, max(total, 1), RETRIED_ITEMS):
                part = replace(replay, part=(first, first + RETRIED_ITEMS))
                count += await self._store.retry_items(new_op(), caller.tenant, job_id, part)
            return count

    async def stats(self, caller: Caller) -> Stats:
        """The tenant's items by how far they are, up to `jobs.stats_s` old."""
        tenant = caller.tenant
        return await self._stats.get((tenant,), lambda: self._events.job_stats(tenant))

    async def efforts(self, caller: Caller, days: int) -> Sequence[Effort]:
        """What tries of the tenant's items came to, today and in the days before, `days` in all."""
        return await self._events.list_efforts(caller.tenant, days)

    async def _eta_s(self, job: Job) -> float | None:
        """What is left of a job, at the pace that the model's replicas give its tenant."""
        if job.ended:
            return 0.0
        if job.paused or job.state == "validating":  # who knows for how long; more may come
            return None
        tenant, pool = job.tenant, self._pools.get(job.spec.get("model", ""))
        reports: Sequence[QueueReport] = ()
        with suppress(ServiceError):  # a prediction is not worth a failure
            reports = await self._reports.get((tenant,), lambda: self._queues.queue_reports(tenant))
        pace = sum(_pace(one, job.klass) for one in reports if one.pool == pool)
        return job.cost_left / pace if pace > 0 else None


def _pace(report: QueueReport, klass: Klass) -> float:
    """Cost a second that a tenant gets from one replica.

    While nothing of it waits there, an even share among those who wait is the guess.
    """
    if report.cost_s <= 0:
        return 0.0
    shares = [place.share for place in report.places if place.klass == klass]
    share = sum(shares) if shares else 1 / (report.tenants + 1)
    return share / report.cost_s
