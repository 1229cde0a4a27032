"""`POST /v1/collections/{name}/documents`: chunk -> accept -> embed -> land -> settle.

Answered after the write is in the index. The Store raises each document's generation before any
work is done, the index keeps the highest generation of a record, and chunks that a shorter new
version no longer has are deleted after the new ones have landed. A repeat overwrites itself.
"""

import asyncio
from collections.abc import Iterable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from functools import partial
from itertools import islice

from serve.admission.quotas import Permit
from serve.content.documents import Document, validate_documents
from serve.errors import BadInput, DeadlineExceeded, ServiceError
from serve.flows.collections import CollectionFlow
from serve.flows.context import Context, Timing, left, new_op, within
from serve.flows.embed import EmbedFlow, Work
from serve.flows.landing import (
    DocumentResult,
    Prepared,
    all_landed,
    chunk_id,
    failed,
    groups,
    prepare,
    records,
    result,
)
from serve.flows.models import Served
from serve.ports import Documents, Upserter
from serve.records import (
    Caller,
    Collection,
    DocumentVersion,
    DocumentWrite,
    Outcome,
    Record,
    Tombstone,
    Write,
)


@dataclass(frozen=True, slots=True)
class Landed:
    """What became of one group of documents, with how long its embedder call waited and ran."""

    results: Sequence[DocumentResult]
    queue_ms: float = 0.0
    infer_ms: float = 0.0


@dataclass(frozen=True, slots=True)
class Written:
    """One result a document, in their order."""

    results: Sequence[DocumentResult]
    timing: Timing


@dataclass(frozen=True, slots=True)
class Target:
    """Where a request's documents go, and for whom."""

    work: Work
    collection: Collection
    served: Served


class IngestFlow:
    """Writes and deletes documents of one collection."""

    def __init__(
        self,
        context: Context,
        collections: CollectionFlow,
        embed: EmbedFlow,
        store: Documents,
        upserter: Upserter,
    ) -> None:
        self._settings = context.settings
        self._models = context.models
        self._quotas = context.quotas
        self._threads = context.threads
        self._clock = context.clock
        self._collections = collections
        self._embed = embed
        self._store = store
        self._upserter = upserter

    async def write(
        self,
        caller: Caller,
        name: str,
        documents: Sequence[Document],
        request_id: str,
        *,
        until: float | None = None,
        priority: int = 0,
    ) -> Written:
        """Write documents at class `bulk`; `priority` orders them among the caller's own.

        A document that fails leaves the others alone; what is not in the index in time fails.
        Raises NotFound, BadInput (names the document), QuotaExceeded, DeadlineExceeded; and the
        common error when every document failed by our fault.
        """
        validate_documents(documents, self._settings.limits)
        deadline_s = self._settings.limits.bulk_deadline_s
        work = Work(caller, request_id, "bulk", deadline_s, until, priority)
        admitted = partial(self._quotas.admitted, caller, "bulk", param="documents")
        async with AsyncExitStack() as stack:
            async with within(until, self._clock):
                await stack.enter_async_context(admitted(tokens=0))  # chunking is work, too
                target = await self._target(work, name)
                began = self._clock()
                prepared = await self._prepare(target.served, documents)
                tokenise_ms = (self._clock() - began) * 1e3
                tokens = sum(one.tokens for one in prepared)
                permit = await stack.enter_async_context(admitted(tokens=tokens, requests=0))
                versions = await self._store.begin_documents(
                    new_op(),
                    target.collection.uuid,
                    [DocumentWrite(one.document.id, len(one.chunks)) for one in prepared],
                )
            landed = await self._land_all(target, list(zip(prepared, versions, strict=True)))
            self._charge(permit, prepared, landed)
        return Written(
            [one for part in landed for one in part.results],
            Timing(
                tokenise_ms,
                max(part.queue_ms for part in landed),
                max(part.infer_ms for part in landed),
            ),
        )

    def _charge(
        self, permit: Permit, prepared: Sequence[Prepared], landed: Sequence[Landed]
    ) -> None:
        """Charge what was done, not what failed by our fault.

        Raises the common error when that was everything.
        """
        results = [result for part in landed for result in part.results]
        ours = {r.document: r.error for r in results if r.error and r.error.refundable}
        if len(ours) == len(results):
            raise next(iter(ours.values()))
        paid = sum(one.tokens for one in prepared if one.document.id not in ours)
        self._quotas.settle(permit, tokens=paid)

    async def delete(
        self,
        caller: Caller,
        name: str,
        documents: Sequence[str],
        *,
        until: float | None = None,
    ) -> list[DocumentResult]:
        """Delete documents by id; `absent` for those that did not exist.

        Raises NotFound, QuotaExceeded, DeadlineExceeded: then it can be repeated.
        """
        async with within(until, self._clock):
            collection = await self._collections.find(caller, name)
            async with self._quotas.admitted(caller, "bulk", tokens=0):
                versions = await self._store.delete_documents(new_op(), collection.uuid, documents)
                await self._erase(collection, [(version, 0) for version in versions], until)
                gone = [version for version in versions if version.generation > 0]
                await self._store.settle_documents(
                    collection.uuid, [(version.document, version.generation, 0) for version in gone]
                )
        return [
            DocumentResult(
                version.document,
                "deleted" if version.existed else "absent",
                version.generation,
            )
            for version in versions
        ]

    # --- the steps, in order --------------------------------------------------------------

    async def _target(self, work: Work, name: str) -> Target:
        collection = await self._collections.find(work.caller, name)
        self._collections.servable(collection)
        return Target(work, collection, self._models.find(collection.model))

    async def _prepare(self, served: Served, documents: Sequence[Document]) -> list[Prepared]:
        """Chunk and tokenise in a thread; a bound on the chunks of one request."""
        loop = asyncio.get_running_loop()
        prepared: list[Prepared] = []
        chunks = 0
        for index, document in enumerate(documents):
            one = await loop.run_in_executor(
                self._threads, prepare, served, document, self._settings
            )
            if not one.chunks:
                raise BadInput(
                    f"documents[{index}].text holds nothing that the model can read.",
                    param=f"documents[{index}].text",
                )
            chunks += len(one.chunks)
            if chunks > self._settings.limits.chunks_max:
                raise BadInput(
                    f"The documents come to more than {self._settings.limits.chunks_max} chunks; "
                    "send fewer at a time.",
                    param="documents",
                    code="too_many_chunks",
                )
            prepared.append(one)
        return prepared

    async def _land_all(
        self, target: Target, work: Sequence[tuple[Prepared, DocumentVersion]]
    ) -> list[Landed]:
        """Groups of about one embedder call each, a few at once, all under one deadline."""
        gate = asyncio.Semaphore(self._settings.ingress.slices_in_flight_max)
        ends = asyncio.get_running_loop().time() + self._left(target.work.until)

        async def guarded(group: Sequence[tuple[Prepared, DocumentVersion]]) -> Landed:
            try:
                async with asyncio.timeout_at(ends), gate:
                    return await self._land(target, group)
            except TimeoutError:
                error: ServiceError = DeadlineExceeded("It was not written in time.")
            except ServiceError as failure:
                error = failure
            return Landed([failed(one, version, error) for one, version in group])

        async with asyncio.TaskGroup() as tasks:
            running = [
                tasks.create_task(guarded(group))
                for group in groups(work, self._settings.ingress.slice_tokens)
            ]
        return [task.result() for task in running]

    def _left(self, until: float | None) -> float:
        """Seconds of the client's deadline, else of ours. Raises DeadlineExceeded."""
        if until is None:
            return self._settings.limits.bulk_deadline_s
        return left(until, self._clock)

    async def _land(
        self, target: Target, group: Sequence[tuple[Prepared, DocumentVersion]]
    ) -> Landed:
        """Embed a group, land its records, then remove stale chunks and settle."""
        ids = [row for one, _ in group for row in one.ids]
        reply = await self._embed.run(target.work, target.served, ids)
        broken = dict(reply.failures)
        results: dict[str, DocumentResult] = {}
        writes: list[Record] = []
        row = 0
        for one, version in group:
            span = range(row, row + len(one.ids))
            row = span.stop
            error = next((broken[index] for index in span if index in broken), None)
            if error is not None:
                results[one.document.id] = failed(one, version, error)
            else:
                writes += records(target.collection, one, version, reply.vectors[span.start :])
        outcomes = await self._offer(target.collection, writes, target.work.until)
        by_document: dict[str, list[Outcome]] = {}
        for write, outcome in zip(writes, outcomes, strict=True):
            by_document.setdefault(write.document, []).append(outcome)
        for one, version in group:
            if one.document.id not in results:
                mine = by_document.get(one.document.id, [])
                results[one.document.id] = result(one, version, mine)
        await self._settle(target, group, results)
        done = [results[one.document.id] for one, _ in group]
        return Landed(done, reply.queue_ms, reply.infer_ms)

    async def _settle(
        self,
        target: Target,
        group: Sequence[tuple[Prepared, DocumentVersion]],
        results: dict[str, DocumentResult],
    ) -> None:
        """Remove what landed documents no longer have, then tell the Store."""
        collection = target.collection
        landed = [
            (one, version) for one, version in group if results[one.document.id].status == "indexed"
        ]
        stale = [(version, len(one.chunks)) for one, version in landed]
        await self._erase(collection, stale, target.work.until)
        await self._store.settle_documents(
            collection.uuid,
            [(one.document.id, version.generation, len(one.chunks)) for one, version in landed],
        )

    async def _erase(
        self,
        collection: Collection,
        stale: Sequence[tuple[DocumentVersion, int]],
        until: float | None,
    ) -> None:
        """Delete every ordinal from the one given that an earlier generation may have left."""
        stones = (
            Tombstone(
                chunk_id(collection, version.document, ordinal),
                version.document,
                version.generation,
            )
            for version, start in stale
            for ordinal in range(start, version.chunks_max)
        )
        all_landed(await self._offer(collection, stones, until))

    async def _offer(
        self, collection: Collection, writes: Iterable[Write], until: float | None
    ) -> list[Outcome]:
        """Land writes, one bulk upsert's worth after the other: a document may have 20,000 chunks,
        and a delete may name a thousand such documents.
        """
        outcomes: list[Outcome] = []
        waiting = iter(writes)
        while part := list(islice(waiting, self._settings.index.max_items)):
            outcomes += await self._upserter.offer(collection.uuid, part, self._left(until))
        return outcomes
