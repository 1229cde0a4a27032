"""What workers do with documents: chunk (`prepare`), then embed, land and clean up (`embed`), or delete.

The accepting half is `serve.flows.ingest`. The Store granted each write its generation; the index
keeps the highest one of a record, so a repeat overwrites itself. Chunks that a shorter version no
longer has are deleted after the new ones have landed, and only then is the item settled.
"""

import asyncio
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from serve.admission.limits import caller_of
from serve.content.documents import Document
from serve.errors import BadInput, Conflict, NotFound, ServiceError
from serve.flows.attempts import attempts
from serve.flows.context import Context
from serve.flows.embed import EmbedFlow, Work
from serve.flows.lander import Lander, Landing
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
    """Where the items of one job go, and for whom."""

    job: Job
    caller: Caller
    collection: Collection
    served: Served


Cut = tuple[Item, Prepared]


class DocumentWork:
    """Handlers of the tasks `document` and `delete`."""

    def __init__(
        self, context: Context, embed: EmbedFlow, upserter: Upserter, retries: Retries
    ) -> None:
        self._settings = context.settings
        self._models = context.models
        self._quotas = context.quotas
        self._threads = context.threads
        self._embed = embed
        self._lander = Lander(upserter, context.settings)
        self._retries = retries

    def handlers(self) -> Mapping[Task, Handler]:
        """By task, for the Runner."""
        return {"document": self.work, "delete": self.work}

    async def work(self, items: Sequence[Item], claim: Claim) -> list[Settlement]:
        """Items of each job side by side; what befalls one job leaves the others alone."""
        by_job: dict[str, list[Item]] = defaultdict(list)
        settlements: list[Settlement] = []
        for item in items:
            if item.superseded:
                settlements.append(_superseded(item))
            else:
                by_job[item.job].append(item)
        parts = await asyncio.gather(
            *(self._one_job(job, some, claim) for job, some in by_job.items())
        )
        return [*settlements, *(one for part in parts for one in part)]

    async def _one_job(self, job: str, items: Sequence[Item], claim: Claim) -> list[Settlement]:
        try:
            target = self._target(claim, job)
        except ServiceError as error:
            return [settled(item, error, self._retries) for item in items]
        if items[0].task == "delete":
            return await self._erased(target, items)
        if items[0].stage == "prepare":
            return [await self._prepared(target, item) for item in items]
        return await self._embedded(target, items)

    def _target(self, claim: Claim, job_id: str) -> Target:
        """Raises NotFound (model), Conflict (another revision of it), QuotaExceeded never."""
        job, key = claim.jobs[job_id], claim.payers[job_id]
        collection = claim.collections[job.collection]
        served = self._models.find(collection.model)
        if served.revision != collection.revision:
            raise Conflict(
                f"The collection {collection.name} was made by another revision of the model."
            )
        tier = self._settings.admission.tiers.get(key.tier)
        if tier is None:
            raise NotFound(f"There is no tier {key.tier!r}.")
        return Target(job, caller_of(key, tier), collection, served)

    # --- prepare ------------------------------------------------------------------------------

    async def _prepared(self, target: Target, item: Item) -> Settlement:
        """Chunk one document in a thread; its true cost is known from here on."""
        loop = asyncio.get_running_loop()
        document = _document(item)
        try:
            one = await loop.run_in_executor(
                self._threads, prepare, target.served, document, self._settings
            )
            self._check(one)
        except ServiceError as error:
            return settled(item, error, self._retries)
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
        gate = asyncio.Semaphore(self._settings.ingress.slices_in_flight_max)

        async def one(group: Sequence[Cut]) -> list[Settlement]:
            try:
                async with gate:
                    return await self._tried(target, group)
            except ServiceError as error:
                return [settled(item, error, self._retries) for item, _ in group]

        groups = _groups(cuts, self._together(target))
        done = await asyncio.gather(*(one(group) for group in groups))
        return [settlement for part in done for settlement in part]

    def _together(self, target: Target) -> int:
        """Tokens of a group: one embedder call, and no more than a limit can hold at once."""
        limits = target.caller.limits.get(target.job.klass, ())
        bursts = [int(limit.burst) for limit in limits if limit.unit == "tokens"]
        return min([self._settings.ingress.slice_tokens, *bursts])

    async def _tried(self, target: Target, group: Sequence[Cut]) -> list[Settlement]:
        async for attempt in attempts():
            with attempt:
                settlements = await self._land(target, group)
        return settlements

    async def _land(self, target: Target, group: Sequence[Cut]) -> list[Settlement]:
        """Embed a group, land its records, then remove stale chunks."""
        tokens = sum(one.tokens for _, one in group)
        charged = self._quotas.admitted(
            target.caller, target.job.klass, tokens=tokens, requests=0, param="documents"
        )
        async with charged as permit:
            ids = [row for _, one in group for row in one.ids]
            reply = await self._embed.run(self._work(target.job, target.caller), target.served, ids)
            fates, spans = _fates(group, dict(reply.failures))
            paid = (one.tokens for item, one in group if not _ours(fates.get(item.id)))
            self._quotas.settle(permit, tokens=sum(paid))
        whole = [(item, one) for item, one in group if item.id not in fates]
        landings = [
            Landing(
                item,
                records(target.collection, one, item.generation, reply.vectors[spans[item.id]]),
            )
            for item, one in whole
        ]
        fates |= await self._lander.land(target.collection, landings)
        return [self._written(item, one, fates) for item, one in group]

    def _written(
        self, item: Item, one: Prepared, fates: Mapping[int, ServiceError | None]
    ) -> Settlement:
        if item.id not in fates:
            chunks = len(one.chunks)
            result = {"status": "indexed", "chunks": chunks}
            return Settlement(
                item.id, item.lease, "done", tokens=one.tokens, result=result, chunks=chunks
            )
        fate = fates[item.id]
        return _superseded(item) if fate is None else settled(item, fate, self._retries)

    def _work(self, job: Job, caller: Caller) -> Work:
        """For the embedder: how long others may make it wait depends on the class."""
        limits = self._settings.limits
        waits_s = {"bulk": limits.bulk_deadline_s, "interactive": limits.interactive_deadline_s}
        return Work(caller, job.id, job.klass, waits_s[job.klass], None, job.priority)

    # --- delete -------------------------------------------------------------------------------

    async def _erased(self, target: Target, items: Sequence[Item]) -> list[Settlement]:
        try:
            async for attempt in attempts():
                with attempt:
                    await self._lander.land(
                        target.collection, [Landing(item, ()) for item in items]
                    )
        except ServiceError as error:
            return [settled(item, error, self._retries) for item in items]
        return [
            Settlement(
                item.id,
                item.lease,
                "done",
                result={"status": "deleted" if item.payload.get("existed") else "absent"},
                chunks=0,
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
        cuts.append((item, Prepared(document, chunks, tuple(ids))))
    return cuts


def _groups(cuts: Sequence[Cut], tokens_max: int) -> list[list[Cut]]:
    """Consecutive documents of at most `tokens_max` together; a larger one goes alone."""
    made: list[list[Cut]] = []
    room = 0
    for item, one in cuts:
        if not made or one.tokens > room:
            made.append([])
            room = tokens_max
        made[-1].append((item, one))
        room -= one.tokens
    return made


def _fates(
    group: Sequence[Cut], broken: Mapping[int, ServiceError]
) -> tuple[dict[int, ServiceError | None], dict[int, slice]]:
    """The first failure of each item that has one, and which rows of the reply are an item's."""
    fates: dict[int, ServiceError | None] = {}
    spans: dict[int, slice] = {}
    row = 0
    for item, one in group:
        spans[item.id] = slice(row, row + len(one.ids))
        row += len(one.ids)
        error = next(
            (broken[at] for at in range(*spans[item.id].indices(row)) if at in broken), None
        )
        if error is not None:
            fates[item.id] = error
    return fates, spans


def _ours(fate: ServiceError | None) -> bool:
    """Whether it failed by our fault."""
    return fate is not None and fate.refundable


def _superseded(item: Item) -> Settlement:
    """A newer write of the document was accepted, or its collection is gone."""
    return Settlement(item.id, item.lease, "skipped", result={"status": "superseded"})
