"""`POST /v1/collections/{name}/documents`: chunk -> accept -> embed -> land -> settle.

Answered after the write is in the index. The Store raises each document's generation before any
work is done, the index keeps the highest generation of a record, and chunks that a shorter new
version no longer has are deleted after the new ones have landed. A repeat overwrites itself.
"""

import asyncio
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Literal

from serve.config import Settings
from serve.content.chunking import chunk
from serve.content.documents import Document, validate_documents
from serve.errors import BadInput, DeadlineExceeded, Internal, ServiceError
from serve.flows.collections import CollectionFlow
from serve.flows.context import Context, new_op
from serve.flows.embed import EmbedFlow, Work
from serve.flows.models import Served
from serve.ports import Documents, Upserter
from serve.records import (
    Caller,
    Chunk,
    Collection,
    DocumentVersion,
    DocumentWrite,
    Outcome,
    Record,
    TokenIds,
    Tombstone,
    Vector,
    Write,
    record_id,
)


log = logging.getLogger("headrace.ingest")

Status = Literal["indexed", "superseded", "failed", "deleted", "absent"]


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
class Prepared:
    """A document cut into chunks, with the token ids the model will see."""

    document: Document
    chunks: tuple[Chunk, ...]
    ids: tuple[TokenIds, ...]

    @property
    def tokens(self) -> int:
        """Tokens over all chunks: what is paid for."""
        return sum(len(row) for row in self.ids)


@dataclass(frozen=True, slots=True)
class Target:
    """Where a request's documents go."""

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
        self, caller: Caller, name: str, documents: Sequence[Document], request_id: str
    ) -> list[DocumentResult]:
        """Write documents at class `bulk`; one result each, in order.

        A document that fails leaves the others alone. Raises NotFound, BadInput (names the
        document), QuotaExceeded; and the common error when every document failed by our fault.
        """
        validate_documents(documents, self._settings.limits)
        target = await self._target(caller, name, request_id)
        prepared = await self._prepare(target.served, documents)
        tokens = sum(one.tokens for one in prepared)
        with self._quotas.admitted(caller, "bulk", tokens=tokens, now=self._clock()) as permit:
            versions = await self._store.begin_documents(
                new_op(),
                target.collection.uuid,
                [DocumentWrite(one.document.id, len(one.chunks)) for one in prepared],
            )
            results = await self._land_all(target, list(zip(prepared, versions, strict=True)))
            ours = {r.document: r.error for r in results if r.error and r.error.refundable}
            if len(ours) == len(results):
                raise next(iter(ours.values()))
            paid = sum(one.tokens for one in prepared if one.document.id not in ours)
            self._quotas.settle(permit, tokens=paid)
        return results

    async def delete(
        self, caller: Caller, name: str, documents: Sequence[str]
    ) -> list[DocumentResult]:
        """Delete documents by id; `absent` for those that did not exist."""
        collection = await self._collections.find(caller, name)
        with self._quotas.admitted(caller, "bulk", tokens=0, now=self._clock()):
            versions = await self._store.delete_documents(new_op(), collection.uuid, documents)
            await self._erase(collection, [(version, 0) for version in versions])
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

    async def _target(self, caller: Caller, name: str, request_id: str) -> Target:
        collection = await self._collections.find(caller, name)
        self._collections.servable(collection)
        work = Work(caller, request_id, "bulk", self._settings.limits.bulk_deadline_s)
        return Target(work, collection, self._models.find(collection.model))

    async def _prepare(self, served: Served, documents: Sequence[Document]) -> list[Prepared]:
        """Chunk and tokenise in a thread; a bound on the chunks of one request."""
        loop = asyncio.get_running_loop()
        prepared: list[Prepared] = []
        chunks = 0
        for index, document in enumerate(documents):
            one = await loop.run_in_executor(
                self._threads, partial(_prepare, served, document, self._settings)
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
    ) -> list[DocumentResult]:
        """Groups of about one embedder call each, a few at once, all under one deadline."""
        gate = asyncio.Semaphore(self._settings.ingress.slices_in_flight_max)
        until = asyncio.get_running_loop().time() + self._settings.limits.bulk_deadline_s

        async def guarded(
            group: Sequence[tuple[Prepared, DocumentVersion]],
        ) -> list[DocumentResult]:
            try:
                async with asyncio.timeout_at(until), gate:
                    return await self._land(target, group)
            except TimeoutError:
                error: ServiceError = DeadlineExceeded("It was not written in time.")
            except ServiceError as failure:
                error = failure
            return [_failed(one, version, error) for one, version in group]

        async with asyncio.TaskGroup() as tasks:
            running = [
                tasks.create_task(guarded(group))
                for group in _groups(work, self._settings.ingress.slice_tokens)
            ]
        return [result for task in running for result in task.result()]

    async def _land(
        self, target: Target, group: Sequence[tuple[Prepared, DocumentVersion]]
    ) -> list[DocumentResult]:
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
                results[one.document.id] = _failed(one, version, error)
            else:
                writes += _records(target.collection, one, version, reply.vectors[span.start :])
        outcomes = await self._offer(target.collection, writes)
        by_document: dict[str, list[Outcome]] = {}
        for write, outcome in zip(writes, outcomes, strict=True):
            by_document.setdefault(write.document, []).append(outcome)
        for one, version in group:
            if one.document.id not in results:
                mine = by_document.get(one.document.id, [])
                results[one.document.id] = _result(one, version, mine)
        await self._settle(target.collection, group, results)
        return [results[one.document.id] for one, _ in group]

    async def _settle(
        self,
        collection: Collection,
        group: Sequence[tuple[Prepared, DocumentVersion]],
        results: dict[str, DocumentResult],
    ) -> None:
        """Remove what landed documents no longer have, then tell the Store."""
        landed = [
            (one, version) for one, version in group if results[one.document.id].status == "indexed"
        ]
        await self._erase(collection, [(version, len(one.chunks)) for one, version in landed])
        await self._store.settle_documents(
            collection.uuid,
            [(one.document.id, version.generation, len(one.chunks)) for one, version in landed],
        )

    async def _erase(
        self, collection: Collection, stale: Sequence[tuple[DocumentVersion, int]]
    ) -> None:
        """Delete every ordinal from the one given that an earlier generation may have left."""
        stones = (
            Tombstone(
                _record_id(collection, version.document, ordinal),
                version.document,
                version.generation,
            )
            for version, start in stale
            for ordinal in range(start, version.chunks_max)
        )
        _all_landed(await self._offer(collection, stones))

    async def _offer(self, collection: Collection, writes: Iterable[Write]) -> list[Outcome]:
        """Land writes, one bulk upsert's worth after the other: a document may have 20,000 chunks,
        and a delete may name a thousand such documents.
        """
        outcomes: list[Outcome] = []
        waiting = iter(writes)
        deadline_s = self._settings.limits.bulk_deadline_s
        while part := list(islice(waiting, self._settings.index.max_items)):
            outcomes += await self._upserter.offer(collection.uuid, part, deadline_s)
        return outcomes


def _prepare(served: Served, document: Document, settings: Settings) -> Prepared:
    prefix = served.model.document_prefix
    room = served.tokens_max - served.tokenizer.special_tokens - served.tokenizer.count(prefix)
    fitting = settings.chunking.fitting(room)
    chunks = tuple(chunk(document.text, served.tokenizer, fitting))
    ids = served.tokenizer.encode([prefix + one.text for one in chunks])
    return Prepared(document, chunks, tuple(ids))


def _groups(
    work: Sequence[tuple[Prepared, DocumentVersion]], tokens_max: int
) -> list[list[tuple[Prepared, DocumentVersion]]]:
    """Consecutive documents of at most `tokens_max` together; a larger one goes alone."""
    groups: list[list[tuple[Prepared, DocumentVersion]]] = []
    room = 0
    for one, version in work:
        if not groups or one.tokens > room:
            groups.append([])
            room = tokens_max
        groups[-1].append((one, version))
        room -= one.tokens
    return groups


def _record_id(collection: Collection, document: str, ordinal: int) -> str:
    return record_id(collection.tenant, collection.uuid, document, ordinal, collection.revision)


def _records(
    collection: Collection, one: Prepared, version: DocumentVersion, vectors: Vector
) -> list[Record]:
    return [
        Record(
            id=_record_id(collection, one.document.id, piece.ordinal),
            document=one.document.id,
            generation=version.generation,
            ordinal=piece.ordinal,
            vector=vectors[position],
            text=piece.text,
            start=piece.start,
            end=piece.end,
            metadata=one.document.metadata,
        )
        for position, piece in enumerate(one.chunks)
    ]


def _result(one: Prepared, version: DocumentVersion, outcomes: Sequence[Outcome]) -> DocumentResult:
    """One document's outcome from its records' outcomes: the worst of them."""
    words = {outcome.word: outcome.reason for outcome in outcomes}
    if "rejected" in words:
        error: ServiceError = BadInput(f"The index refused it: {words['rejected']}")
        return _failed(one, version, error)
    if "released" in words:
        error = DeadlineExceeded(
            f"It was not written in time. {words['released']}".strip(), retry_after_s=1
        )
        return _failed(one, version, error)
    status: Status = "superseded" if "superseded" in words else "indexed"
    return DocumentResult(one.document.id, status, version.generation, len(one.chunks), one.tokens)


def _failed(one: Prepared, version: DocumentVersion, error: ServiceError) -> DocumentResult:
    return DocumentResult(one.document.id, "failed", version.generation, error=error)


def _all_landed(outcomes: Sequence[Outcome]) -> None:
    """Deletes land or are given back. Raises DeadlineExceeded, Internal."""
    for outcome in outcomes:
        if outcome.word == "released":
            raise DeadlineExceeded("The delete was not done in time; repeat it.", retry_after_s=1)
        if outcome.word == "rejected":
            raise Internal(f"The index refused a delete: {outcome.reason}")
