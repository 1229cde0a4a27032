"""What workers do with documents: chunk (`prepare`), then embed, land and clean up (`embed`), or delete.

The accepting half is `serve.flows.ingest`. The Store granted each write its generation; the index
keeps the highest one of a record, so a repeat overwrites itself. Chunks that a shorter version no
longer has are deleted after the new ones have landed, and only then is the item settled.
"""

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from serve.admission.metering import OPERATION
from serve.content.documents import Document
from serve.errors import BadInput, ServiceError
from serve.flows.attempts import tried
from serve.flows.bulk import (
    Failed,
    Part,
    by_job,
    check_revision,
    in_groups,
    one_by_one,
    paid,
    payer,
    rows_of,
    work_of,
    work_part,
)
from serve.flows.context import Context
from serve.flows.embed import EmbedFlow
from serve.flows.lander import Lander, Landfall, Landing, sender_of
from serve.flows.landing import Prepared, prepare, records
from serve.flows.models import Served
from serve.items import Claim, Item, Job, Settlement, Task
from serve.jobs.faults import Retries, settled
from serve.jobs.runner import Handler
from serve.ports import Upserter
from serve.records import Caller, Chunk, Collection


CHUNK_OVERHEAD = 32
"""Tokens that stand for the fixed work of an input in its cost, as `batch.item_overhead_tokens`."""


@dataclass(frozen=True, slots=True)
class Target:
    """Where the writes of one job go, and for whom."""

    job: Job
    caller: Caller
    collection: Collection
    served: Served


@dataclass(frozen=True, slots=True)
class Cut(Part):
    """A document of a job, cut into chunks."""

    one: Prepared


class DocumentWork:
    """Handlers of the tasks `document` and `delete`."""

    def __init__(
        self, context: Context, embed: EmbedFlow, upserter: Upserter, retries: Retries
    ) -> None:
        self._settings = context.settings
        self._live = context.live
        self._models = context.models
        self._quotas = context.quotas
        self._threads = context.threads
        self._wall = context.wall
        self._embed = embed
        self._lander = Lander(upserter, context.settings)
        self._failed: Failed = partial(settled, retries=retries)

    def handlers(self) -> Mapping[Task, Handler]:
        """By task, for the Runner."""
        return {"document": self.write, "delete": self.delete}

    async def write(self, items: Sequence[Item], claim: Claim) -> list[Settlement]:
        """Versions of documents: chunk them, or embed and land them, as their stage says."""
        return await self._by_job(items, partial(self._written, claim))

    async def delete(self, items: Sequence[Item], claim: Claim) -> list[Settlement]:
        """Deletes need the collection only: neither a model nor room in a limit."""
        return await self._by_job(items, partial(self._deleted, claim))

    async def _by_job(
        self,
        items: Sequence[Item],
        act: Callable[[Sequence[Item]], Awaitable[Sequence[Settlement]]],
    ) -> list[Settlement]:
        over = [_superseded(item) for item in items if item.superseded]
        rest = [item for item in items if not item.superseded]
        return [*over, *await by_job(rest, act, self._failed)]

    async def _written(self, claim: Claim, items: Sequence[Item]) -> list[Settlement]:
        with work_part(claim, items):
            return await self._worked(claim, items)

    async def _worked(self, claim: Claim, items: Sequence[Item]) -> list[Settlement]:
        target = self._target(claim, items[0].job)
        if items[0].stage == "prepare":
            return await one_by_one(items, partial(self._prepared, target), self._failed)
        return await self._embedded(target, items)

    def _target(self, claim: Claim, job_id: str) -> Target:
        """Raises NotFound (model), Conflict (another revision of it), QuotaExceeded (no limits)."""
        job = claim.jobs[job_id]
        collection = claim.collections[job.collection]
        served = self._models.find(collection.model)
        check_revision(collection, served)
        caller = payer(claim.payers[job_id], self._live.now.admission.tiers)
        return Target(job, caller, collection, served)

    # --- prepare ------------------------------------------------------------------------------

    async def _prepared(self, target: Target, item: Item) -> Settlement:
        """Chunk one document in a thread; its true cost is known from here on. Raises BadInput."""
        loop = asyncio.get_running_loop()
        document = _document(item)
        one = await loop.run_in_executor(
            self._threads, prepare, target.served, document, self._settings
        )
        self._check(one)
        return Settlement(
            item.id,
            item.lease,
            "advance",
            stage="embed",
            cost=float(one.tokens + CHUNK_OVERHEAD * len(one.chunks)),
            payload={**item.payload, "spans": [[piece.start, piece.end] for piece in one.chunks]},
            chunks=len(one.chunks),
        )

    def _check(self, one: Prepared) -> None:
        """Raises BadInput for a text of which nothing is left, or too much."""
        most = self._settings.limits.chunks_max
        if not one.chunks:
            raise BadInput("The text holds nothing that the model can read.", param="text")
        if len(one.chunks) > most:
            raise BadInput(
                f"The document comes to {len(one.chunks)} chunks; at most {most} are allowed.",
                param="text",
                code="too_many_chunks",
            )

    # --- embed --------------------------------------------------------------------------------

    async def _embedded(self, target: Target, items: Sequence[Item]) -> list[Settlement]:
        """Groups of about one embedder call each, a few at once."""
        loop = asyncio.get_running_loop()
        cuts = await loop.run_in_executor(self._threads, _cut, target.served, items)
        return await in_groups(
            cuts,
            partial(self._charged, target),
            self._failed,
            caller=target.caller,
            klass=target.job.klass,
            ingress=self._settings.ingress,
        )

    async def _charged(self, target: Target, group: Sequence[Cut]) -> list[Settlement]:
        """Charge for a group until it has landed: what fails by our fault is given back."""
        await self._lander.hold(sender_of(target.job))
        OPERATION.set(f"job_{target.job.kind}")  # of this group's task
        charged = self._quotas.admitted(
            target.caller,
            target.job.klass,
            tokens=sum(cut.tokens for cut in group),
            requests=0,
            param="documents",
            model=target.served.model.id,
        )
        async with charged as permit:
            landfall = await self._landed(target, group)
            self._quotas.settle(permit, tokens=paid(group, landfall.fates))
        return [self._settled(cut, landfall) for cut in group]

    async def _landed(self, target: Target, group: Sequence[Cut]) -> Landfall:
        """Embed a group, land its records, then remove stale chunks."""
        work = work_of(self._settings.limits, target.caller, target.job, target.job.id)
        ids = [row for cut in group for row in cut.ids]
        reply = await tried(lambda: self._embed.run(work, target.served, ids))
        fates: dict[int, ServiceError | None] = {}
        landings: list[Landing] = []
        since = target.job.created_at
        for cut, vectors, failures in rows_of(group, reply):
            item = cut.item
            if failures:
                fates[item.id] = failures[0][1]
            else:
                made = records(
                    target.collection, cut.one, item.generation, vectors, accepted_at=since
                )
                landings.append(Landing(item, made, since))
        landfall = await tried(
            lambda: self._lander.land(sender_of(target.job), target.collection, landings)
        )
        return Landfall({**fates, **landfall.fates}, landfall.token)

    def _settled(self, cut: Cut, landfall: Landfall) -> Settlement:
        item, one = cut.item, cut.one
        if item.id not in landfall.fates:
            chunks = len(one.chunks)
            return Settlement(
                item.id,
                item.lease,
                "done",
                tokens=one.tokens,
                result={"status": "indexed", "chunks": chunks},
                chunks=chunks,
                token=landfall.token,
            )
        fate = landfall.fates[item.id]
        return _superseded(item) if fate is None else self._failed(item, fate)

    # --- delete -------------------------------------------------------------------------------

    async def _deleted(self, claim: Claim, items: Sequence[Item]) -> list[Settlement]:
        job = claim.jobs[items[0].job]
        collection = claim.collections[job.collection]
        landings = [Landing(item, (), job.created_at) for item in items]
        with work_part(claim, items):
            await self._lander.hold(sender_of(job))
            landfall = await tried(lambda: self._lander.land(sender_of(job), collection, landings))
        return [
            Settlement(
                item.id,
                item.lease,
                "done",
                result={"status": "deleted" if item.payload.get("existed") else "absent"},
                chunks=0,
                token=landfall.token,
            )
            for item in items
        ]


def _document(item: Item) -> Document:
    return Document(item.name, item.payload["text"], item.payload.get("metadata", {}))


def _cut(served: Served, items: Sequence[Item]) -> list[Cut]:
    """Documents with their chunks as `prepare` cut them, tokenised again: ids are not kept. Slow."""
    prefix = served.model.document_prefix
    cuts: list[Cut] = []
    for item in items:
        document = _document(item)
        chunks = tuple(
            Chunk(ordinal, document.text[start:end], start, end)
            for ordinal, (start, end) in enumerate(item.payload["spans"])
        )
        ids = served.tokenizer.encode([prefix + one.text for one in chunks])
        cuts.append(Cut(item, ids, Prepared(document, chunks, tuple(ids))))
    return cuts


def _superseded(item: Item) -> Settlement:
    """A newer write of the document was accepted, or its collection is gone."""
    return Settlement(item.id, item.lease, "skipped", result={"status": "superseded"})
