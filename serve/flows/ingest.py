"""`/v1/collections/{name}/documents`: accepts writes and deletes of documents as jobs in the Store.

What it has accepted is not lost: workers do it (`serve.flows.document_work`), whether or not somebody
waits here for the end. Each document's generation is raised in the transaction that accepts the
job, so the last accepted write of a document wins, whenever it is done.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Literal

from serve import tracing
from serve.content.documents import Document, validate_documents
from serve.errors import BadInput, Internal, PoisonInput, ServiceError
from serve.flows.collections import CollectionFlow
from serve.flows.context import Context, new_op, within
from serve.flows.feed import Feed, Watch
from serve.flows.items import delete_item, document_item
from serve.flows.models import Served
from serve.freshness import Level
from serve.index.probes import Probes
from serve.items import ENDS, ItemView, Job, NewItem, Once, new_id
from serve.job_ports import Jobs
from serve.records import Caller, Collection


Status = Literal[
    "indexed",
    "unchanged",
    "superseded",
    "deleted",
    "absent",
    "failed",
    "cancelled",
    "accepted",
]

MORE = "has_more"
"""In the `spec` of a job of deletes that were chosen by a filter: whether more would have matched."""

log = logging.getLogger("headrace.ingest")


@dataclass(frozen=True, slots=True)
class Terms:
    """How documents are handed over.

    Attributes:
        wait: how far to wait; None: to the end, unless the write is a large one.
        until: the client's own deadline, on the service's clock.
        once: its Idempotency-Key.
        priority: 0..100, orders the tenant's own bulk work, higher first.
    """

    wait: Level | None = None
    until: float | None = None
    once: Once | None = None
    priority: int = 50


@dataclass(frozen=True, slots=True)
class DocumentResult:
    """What became of one document. `error` is set when `status` is `failed`."""

    document: str
    status: Status
    generation: int = 0
    chunks: int = 0
    tokens: int = 0
    error: ServiceError | None = None


@dataclass(frozen=True, slots=True)
class Taken:
    """Documents that were accepted as `job`, and how far they have come.

    `results` has one entry a document, in their order, when their end was waited for.
    """

    job: Job
    documents: int
    level: Level = "accepted"
    results: Sequence[DocumentResult] = ()
    replayed: bool = False


@dataclass(frozen=True, slots=True)
class Chosen:
    """Items to hand over, and what the job keeps of how they were chosen."""

    items: Sequence[NewItem]
    spec: Mapping[str, bool] = field(default_factory=dict)


class IngestFlow:
    """Accepts writes and deletes of documents of one collection, at class `bulk`.

    Both raise NotFound (collection), QuotaExceeded, Mismatch (the Idempotency-Key is another
    request's), StoreUnavailable, DeadlineExceeded: then nothing was accepted. Once accepted, nothing
    is raised any more: who cannot wait long enough gets what is known.
    """

    def __init__(
        self,
        context: Context,
        collections: CollectionFlow,
        jobs: Jobs,
        feed: Feed,
        probes: Probes,
    ) -> None:
        self._settings = context.settings
        self._models = context.models
        self._quotas = context.quotas
        self._threads = context.threads
        self._clock = context.clock
        self._wall = context.wall
        self._collections = collections
        self._jobs = jobs
        self._feed = feed
        self._probes = probes

    async def write(
        self, caller: Caller, name: str, documents: Sequence[Document], terms: Terms
    ) -> Taken:
        """Hand over writes. Also raises BadInput (names the document)."""
        validate_documents(documents, self._settings.limits)
        small = len(documents) <= self._settings.jobs.background_items
        level = terms.wait or ("indexed" if small else "accepted")
        loop = asyncio.get_running_loop()
        async with AsyncExitStack() as stack:
            first = await self._begun(stack, caller, terms)
            if first is not None:
                taken = Taken(first, len(documents), replayed=True)
                return await self._followed(taken, level, terms.until)
            async with within(terms.until, self._clock):
                collection = await self._collections.find(caller, name)
                self._collections.servable(collection)
                served = self._models.find(collection.model)
                items = await loop.run_in_executor(
                    self._threads, partial(self._items, served, documents)
                )
            return await self.hand_over(caller, collection, Chosen(items), terms, level)

    async def delete(
        self, caller: Caller, name: str, documents: Sequence[str], terms: Terms
    ) -> Taken:
        """Hand over deletes, by id; `absent` are those that did not exist."""

        async def all_of_them(_: Collection) -> Chosen:
            return Chosen([delete_item(document) for document in documents])

        return await self.delete_chosen(caller, name, all_of_them, terms)

    async def delete_chosen(
        self,
        caller: Caller,
        name: str,
        choose: Callable[[Collection], Awaitable[Chosen]],
        terms: Terms,
    ) -> Taken:
        """Hand over the deletes that `choose` finds in the collection. It may raise as this does."""
        level = terms.wait or "indexed"
        async with AsyncExitStack() as stack:
            first = await self._begun(stack, caller, terms)
            if first is not None:
                taken = Taken(first, first.total, replayed=True)
                return await self._followed(taken, level, terms.until)
            async with within(terms.until, self._clock):
                collection = await self._collections.find(caller, name)
                chosen = await choose(collection)
            return await self.hand_over(caller, collection, chosen, terms, level)

    async def hand_over(
        self,
        caller: Caller,
        collection: Collection,
        chosen: Chosen,
        terms: Terms,
        level: Level,
    ) -> Taken:
        """Make a job of items and follow it as far as `level`. Not charged: that is the caller's part."""
        now = self._wall()
        job = Job(
            id=new_id("job", now),
            tenant=caller.tenant,
            key=caller.key,
            kind="documents",
            klass="bulk",
            weight=caller.weight,
            created_at=now,
            priority=terms.priority,
            collection=collection.uuid,
            spec={
                "collection": collection.name,
                "model": collection.model,
                **chosen.spec,
                **tracing.kept(),
            },
            expires_at=now + self._settings.jobs.expires_s_max,
        )
        with self._feed.watch(job.id) as watch:
            accepted = await self._jobs.submit_job(new_op(), job, chosen.items, terms.once)
            taken = Taken(accepted.job, len(chosen.items), replayed=accepted.replayed)
            return await self._followed(taken, level, terms.until, watch)

    async def _begun(self, stack: AsyncExitStack, caller: Caller, terms: Terms) -> Job | None:
        """Charge the request itself: its tokens are charged where they are embedded.

        Returns the job that its Idempotency-Key has made, if any. Its collection may be gone.
        """
        async with within(terms.until, self._clock):
            admitted = self._quotas.admitted(caller, "bulk", tokens=0, param="documents")
            await stack.enter_async_context(admitted)
            once = terms.once
            return None if once is None else await self._jobs.first_job(caller.tenant, once)

    def _items(self, served: Served, documents: Sequence[Document]) -> list[NewItem]:
        return [document_item(served, self._settings, document) for document in documents]

    async def _followed(
        self, taken: Taken, level: Level, until: float | None, watch: Watch | None = None
    ) -> Taken:
        """Unless that it was accepted is enough: wait for the job's end, then tell what became of its
        items, or how far they are. A job that was just made is waited for by `watch`.

        When the Store cannot be asked, that they were accepted is all that is known.
        """
        if level == "accepted":
            return taken
        if until is None:
            until = self._clock() + self._settings.limits.bulk_deadline_s
        try:
            if watch is not None and not taken.replayed:
                ended = taken.job.ended or await watch.ended(until - self._clock())
            else:
                ended = await self._ended(taken.job, until - self._clock())
            views = await self._jobs.list_items(
                taken.job.tenant, taken.job.id, (), -1, taken.documents
            )
        except ServiceError as error:
            log.warning("what became of job %s is not known here: %s", taken.job.id, error)
            return taken
        results = [_result(view) for view in views]
        ended = ended or all(view.state in ENDS for view in views)
        reached = await self._reached(taken.job, level, until) if ended else "accepted"
        return replace(taken, level=reached, results=results)

    async def _reached(self, job: Job, level: Level, until: float) -> Level:
        """How far a job has come that has ended, waiting for searches to see it where that is asked.

        Nobody can say so in time, or at all: it is in the index.
        """
        if self._probes.at_once:
            return "searchable"
        if level == "indexed":
            return level
        try:
            view = await self._jobs.find_job(job.tenant, job.id)
        except ServiceError as error:
            log.warning("how far job %s has landed is not known here: %s", job.id, error)
            return "indexed"
        token = None if view is None else view.token
        sees = await self._probes.sees(job.collection, token, until - self._clock())
        return "searchable" if sees else "indexed"

    async def _ended(self, job: Job, seconds: float) -> bool:
        """Wait for the end of a job that an earlier request has made."""
        with self._feed.watch(job.id) as watch:
            found = await self._jobs.find_job(job.tenant, job.id)
            return found is None or found.job.ended or await watch.ended(seconds)


def _result(view: ItemView) -> DocumentResult:
    """What an item says of its document."""
    status: Status = "accepted"
    error = None
    if view.state in ("done", "skipped"):
        status = view.result["status"]
    elif view.state == "dead":
        status, error = "failed", error_of(view)
    elif view.state == "cancelled":
        status = "cancelled"
    chunks = int(view.result.get("chunks", 0))
    return DocumentResult(view.name, status, view.generation, chunks, view.tokens, error)


_KINDS: Mapping[str, type[ServiceError]] = {"invalid": BadInput, "poison": PoisonInput}
"""What the kind of an item's error was made from, where its code is a finer one."""


def error_of(view: ItemView) -> ServiceError:
    """The error that an item died of, as it was."""
    known = {one.code: one for one in ServiceError.__subclasses__()}
    made = known.get(view.error_code) or _KINDS.get(view.error_kind, Internal)
    return made(view.error_text, code=view.error_code)
