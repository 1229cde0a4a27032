"""`/v1/collections/{name}/vectors`: vectors that a user has computed, written, and
fetched by id; and deletes by filter, of documents too.

A raw vector is a document of one chunk that is not embedded. The Store keeps its generation and nothing
else of it: a write is answered once the index has it, so there is no item to lose, and what dies
half-way is repeated by its caller. Hence a raw vector never takes the id of a document: should it die
half-way, it must not have superseded a write that was accepted.
"""

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from serve.config import Limits
from serve.content.documents import check_id
from serve.content.vectors import RawVector, SentVector, checked
from serve.errors import BadInput, Conflict, IndexUnavailable, ServiceError
from serve.flows.collections import CollectionFlow
from serve.flows.context import Context, left, within
from serve.flows.ingest import MORE, Chosen, IngestFlow, Taken, Terms
from serve.flows.items import delete_item
from serve.flows.lander import offered
from serve.flows.landing import chunk_id
from serve.flows.raw_receipts import RawReceipt
from serve.flows.room import check
from serve.flows.scans import scanned
from serve.freshness import Level, latest
from serve.index.checks import vector_problem
from serve.index.filters import parse
from serve.index.probes import Probes
from serve.ports import Index, Upserter, Vectors
from serve.pressure import Sender
from serve.records import Caller, Collection, Filter, Outcome, Record


@dataclass(frozen=True, slots=True)
class VectorResult:
    """What became of one vector. `error` is set when `status` is `failed`."""

    status: Literal["indexed", "superseded", "failed"]
    generation: int = 0
    error: ServiceError | None = None


@dataclass(frozen=True, slots=True)
class Written:
    """What became of vectors, in their order, and how far those that have landed have come.

    There is no receipt where none has landed.
    """

    results: Sequence[VectorResult]
    level: Level
    receipt: RawReceipt | None


@dataclass(frozen=True, slots=True)
class Fetched:
    """Records in the order of the ids that were asked for, and the ids that have none."""

    records: Sequence[Record]
    missing: Sequence[str]


@dataclass(frozen=True, slots=True)
class _Granted:
    """A vector and its record, with the generation that the Store granted."""

    raw: RawVector
    record: Record


@dataclass(frozen=True, slots=True)
class _Seen:
    """Generations by document, and whether more documents match."""

    versions: Mapping[str, int]
    more: bool


@dataclass(frozen=True, slots=True)
class VectorsLanded:
    """Results by position, and the token of all that has landed."""

    results: Mapping[int, VectorResult]
    token: int | None


class VectorFlow:
    """Raw vectors of one collection of the caller.

    Each call counts as a request: a write or a delete at class `bulk`, a fetch at `interactive`. All
    raise BadInput (names the field), NotFound (collection), QuotaExceeded, DeadlineExceeded.
    """

    def __init__(
        self,
        context: Context,
        collections: CollectionFlow,
        store: Vectors,
        *,
        upserter: Upserter,
        index: Index,
        ingest: IngestFlow,
        probes: Probes,
    ) -> None:
        self._limits = context.settings.limits
        self._items_max = context.settings.index.max_items
        self._quotas = context.quotas
        self._threads = context.threads
        self._clock = context.clock
        self._collections = collections
        self._store = store
        self._upserter = upserter
        self._index = index
        self._ingest = ingest
        self._probes = probes
        self._wall = context.wall

    async def write(
        self,
        caller: Caller,
        name: str,
        sent: Sequence[SentVector | ServiceError],
        until: float | None = None,
        wait: Level | None = None,
    ) -> Written:
        """Write vectors, one result each, in their order; a fault of one leaves the others alone.

        `sent` has, in the place of what could not be read, why. Nothing is accepted before the index has
        it, so no `wait` is less than to `indexed`. Also raises StoreUnavailable, and Overloaded or
        IndexUnavailable where none was written. Then, as after DeadlineExceeded, some may land all the
        same; a repeat overwrites them.
        """
        _check_count(len(sent), self._limits, "vectors")
        admitted = self._quotas.admitted(caller, "bulk", tokens=0, param="vectors")
        async with within(until, self._clock), admitted:
            collection = await self._collections.find(caller, name)
            found = await asyncio.get_running_loop().run_in_executor(
                self._threads, _checked, sent, collection, self._limits
            )
            results = {
                at: _failed(one) for at, one in found.items() if isinstance(one, ServiceError)
            }
            good = {at: one for at, one in found.items() if isinstance(one, RawVector)}
            landed = await self.land(caller, collection, good, until)
        results |= landed.results
        ordered = [results[at] for at in range(len(sent))]
        done = sum(result.status == "indexed" for result in ordered)
        if not done:
            return Written(ordered, "indexed", None)
        failed = sum(result.status == "failed" for result in ordered)
        at_ms = int(self._wall() * 1e3)
        receipt = RawReceipt(collection.uuid, at_ms, len(ordered), failed, landed.token)
        return Written(ordered, await self._level(receipt, wait, until), receipt)

    async def _level(self, receipt: RawReceipt, wait: Level | None, until: float | None) -> Level:
        """How far the vectors have come, waiting for searches to see them where that is asked."""
        if receipt.token is not None and wait != "searchable":
            return "indexed"
        waits_s = self._limits.bulk_deadline_s if until is None else until - self._clock()
        sees = await self._probes.sees(receipt.collection, receipt.token, waits_s)
        return "searchable" if sees else "indexed"

    async def land(
        self,
        caller: Caller,
        collection: Collection,
        good: Mapping[int, RawVector],
        until: float | None = None,
    ) -> VectorsLanded:
        """Write vectors that fit the collection, each id once; what became of them, by their numbers.

        Raises as `write` does. Not charged: that is the caller's part.
        """
        if not good:
            return VectorsLanded({}, None)
        await check(self._upserter, caller.tenant)
        names = [one.id for one in good.values()]
        sent = [one.sent_at for one in good.values()]
        granted = await self._store.grant_vectors(collection.uuid, names, sent)
        results: dict[int, VectorResult] = {}
        writes: dict[int, _Granted] = {}
        for (at, one), generation in zip(good.items(), granted, strict=True):
            if generation:
                writes[at] = _Granted(one, _record(collection, one, generation))
            elif generation is None:
                results[at] = VectorResult("superseded")
            else:
                results[at] = _failed(_taken(one))
        sender = Sender(caller.tenant, caller.weight)
        landed = await self._landed(sender, collection, writes, until)
        return replace(landed, results={**results, **landed.results})

    async def fetch(
        self, caller: Caller, name: str, ids: Sequence[str], until: float | None = None
    ) -> Fetched:
        """What the index holds under these ids; of a document its first chunk.

        Also raises IndexUnavailable.
        """
        _check_count(len(ids), self._limits, "ids")
        for position, one in enumerate(ids):
            check_id(one, f"ids[{position}]", self._limits)
        admitted = self._quotas.admitted(caller, "interactive", tokens=0, param="ids")
        async with within(until, self._clock), admitted:
            collection = await self._collections.find(caller, name)
            wanted = {one: chunk_id(collection, one, 0) for one in ids}
            records = await self._index.fetch(collection.uuid, list(wanted.values()))
        held = {record.id: record for record in records}
        return Fetched(
            [held[each] for each in wanted.values() if each in held],
            [one for one, each in wanted.items() if each not in held],
        )

    async def delete_matching(
        self, caller: Caller, name: str, where: Mapping[str, Any], terms: Terms
    ) -> Taken:
        """Hand over the deletes of vectors and documents that satisfy a filter, by their metadata.

        Up to `documents_max` at once; `MORE` in the job's `spec` tells whether there are more. What is
        written meanwhile stays: each delete reaches the version that was seen, and nothing newer.
        Raises what `IngestFlow.delete` and the index raise, BadInput also for a filter that matches all.
        """
        tree = parse(where, terms_max=self._limits.filter_terms_max)
        if tree is None:
            raise BadInput("The filter must hold a condition.", param="filter")

        async def matching(collection: Collection) -> Chosen:
            seen = await self._seen(collection, tree, self._limits.documents_max)
            items = [delete_item(one, seen.versions[one]) for one in seen.versions]
            return Chosen(items, {MORE: seen.more})

        return await self._ingest.delete_chosen(caller, name, matching, terms)

    async def _seen(self, collection: Collection, tree: Filter, most: int) -> _Seen:
        """Up to `most` documents with a record that matches, and the newest generation of those."""
        versions: dict[str, int] = {}
        async with scanned(self._index, collection.uuid, tree) as parts:
            async for part in parts:
                for record in part:
                    if len(versions) == most and record.document not in versions:
                        return _Seen(versions, more=True)
                    known = versions.get(record.document, 0)
                    versions[record.document] = max(record.generation, known)
        return _Seen(versions, more=False)

    async def _landed(
        self,
        sender: Sender,
        collection: Collection,
        writes: Mapping[int, _Granted],
        until: float | None,
    ) -> VectorsLanded:
        """Offer them, a bulk upsert's worth at a time.

        A fault is raised while nothing has landed; from then on it is the result of what has not.
        """
        results: dict[int, VectorResult] = {}
        tokens: list[int | None] = []
        waiting = list(writes.items())
        for start in range(0, len(waiting), self._items_max):
            part = waiting[start : start + self._items_max]
            try:
                some = [one.record for _, one in part]
                outcomes = await self._offer(sender, collection, some, until)
            except ServiceError as error:
                if not any(one.status == "indexed" for one in results.values()):
                    raise
                results |= {at: _failed(error) for at, _ in waiting[start:]}
                break
            for (at, one), outcome in zip(part, outcomes, strict=True):
                results[at] = _result(one, outcome)
            tokens += [outcome.token for outcome in outcomes]
        return VectorsLanded(results, latest(tokens))

    async def _offer(
        self,
        sender: Sender,
        collection: Collection,
        records: Sequence[Record],
        until: float | None,
    ) -> Sequence[Outcome]:
        """Raises IndexUnavailable where the writer has given all of it back."""
        waits_s = self._limits.bulk_deadline_s
        if until is not None:
            waits_s = min(waits_s, left(until, self._clock))
        outcomes = await offered(self._upserter, sender, collection, records, waits_s)
        if all(outcome.word == "released" for outcome in outcomes):
            raise _released()
        return outcomes


def _check_count(count: int, limits: Limits, name: str) -> None:
    most = limits.vectors_max
    if not 1 <= count <= most:
        raise BadInput(f"Between 1 and {most} {name} are allowed, not {count}.", param=name)


def _checked(
    sent: Sequence[SentVector | ServiceError], collection: Collection, limits: Limits
) -> dict[int, RawVector | ServiceError]:
    """What can be written of what was sent, by position, and why the rest cannot. Slow: for a thread."""
    found: dict[int, RawVector | ServiceError] = {}
    first: dict[str, int] = {}
    for at, one in enumerate(sent):
        if isinstance(one, ServiceError):
            found[at] = one
            continue
        try:
            found[at] = fitting(checked(one, f"vectors[{at}]", limits), collection)
        except BadInput as error:
            found[at] = error
        if first.setdefault(one.id, at) != at:
            found[at] = BadInput(
                f"vectors[{first[one.id]}] has the same id.", param=f"vectors[{at}].id"
            )
    return found


def fitting(raw: RawVector, collection: Collection) -> RawVector:
    """Raises BadInput for a vector that cannot be compared with the collection's."""
    param, count = f"{raw.param}.vector", len(raw.vector)
    if count != collection.dimensions:
        raise BadInput(
            f"It has {count} dimensions, the collection {collection.dimensions}.", param=param
        )
    problem = vector_problem(raw.vector, collection.dimensions)
    if problem is not None:
        raise BadInput(f"The vector {problem}.", param=param)
    return raw


def _record(collection: Collection, raw: RawVector, generation: int) -> Record:
    return Record(
        id=chunk_id(collection, raw.id, 0),
        document=raw.id,
        generation=generation,
        ordinal=0,
        vector=raw.vector,
        text=raw.text,
        start=0,
        end=len(raw.text),
        metadata=raw.metadata,
    )


def _result(one: _Granted, outcome: Outcome) -> VectorResult:
    if outcome.word == "landed":
        return VectorResult("indexed", one.record.generation)
    if outcome.word == "superseded":
        return VectorResult("superseded", one.record.generation)
    if outcome.word == "released":
        return _failed(_released())
    return _failed(BadInput(f"The index refused it: {outcome.reason}", param=one.raw.param))


def _failed(error: ServiceError) -> VectorResult:
    return VectorResult("failed", error=error)


def _released() -> IndexUnavailable:
    return IndexUnavailable("The index did not take it in time.", retry_after_s=1)


def _taken(raw: RawVector) -> Conflict:
    return Conflict(
        "A document has this id, or is being deleted: delete it first, and wait for that.",
        param=f"{raw.param}.id",
        code="id_of_document",
    )
