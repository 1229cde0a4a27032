"""What workers do with the lines of a batch file: read, tokenise, embed together, write their answers
as one segment. If the batch names a collection, the vectors land there before a line is settled.
"""

import asyncio
import math
from collections import defaultdict
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

from serve.admission.limits import caller_of
from serve.content.blobs import LocalBlobs
from serve.content.documents import Document
from serve.errors import Internal, ServiceError
from serve.flows.attempts import attempts
from serve.flows.batch_file import Request, done_line, read_line, request_id
from serve.flows.context import Context, Timing, new_op
from serve.flows.embed import Cut, Embedded, EmbedFlow, Work, cut, named, size_of
from serve.flows.exchange import answer
from serve.flows.lander import Lander, Landing
from serve.flows.landing import Prepared, records
from serve.flows.models import Served
from serve.flows.sheet import input_blob
from serve.items import Claim, Item, Job, Settlement
from serve.jobs.faults import Retries, settled
from serve.ports import Upserter
from serve.records import Caller, Chunk, Collection, Key, TokenIds, Vector


@dataclass(frozen=True, slots=True)
class Line:
    """A line of a file with the token ids of its inputs; `size` is that of its vectors."""

    item: Item
    request: Request
    served: Served
    ids: Sequence[TokenIds]
    cuts: tuple[Cut, ...]
    size: int

    @property
    def tokens(self) -> int:
        """Over all inputs: what is paid for."""
        return sum(len(row) for row in self.ids)


Fate = Embedded | ServiceError
"""What became of a line: its vectors, or why there are none."""


class RequestWork:
    """Handler of the task `request`."""

    def __init__(
        self,
        context: Context,
        embed: EmbedFlow,
        *,
        upserter: Upserter,
        blobs: LocalBlobs,
        retries: Retries,
    ) -> None:
        self._settings = context.settings
        self._models = context.models
        self._quotas = context.quotas
        self._threads = context.threads
        self._embed = embed
        self._lander = Lander(upserter, context.settings)
        self._blobs = blobs
        self._retries = retries

    async def request(self, items: Sequence[Item], claim: Claim) -> list[Settlement]:
        """Lines of each job side by side; what befalls one job leaves the others alone."""
        by_job: dict[str, list[Item]] = defaultdict(list)
        for item in items:
            by_job[item.job].append(item)
        parts = await asyncio.gather(
            *(self._one_job(claim.jobs[job], claim, some) for job, some in by_job.items())
        )
        return [settlement for part in parts for settlement in part]

    async def _one_job(self, job: Job, claim: Claim, items: Sequence[Item]) -> list[Settlement]:
        try:
            caller = self._caller(claim.payers[job.id])
            lines, fates = await self._lines(job, items)
            for group in _groups(lines, _at_once(caller, job)):
                fates |= await self._embedded(job, caller, group)
            collection = claim.collections.get(job.collection)
            if collection is not None:
                fates |= await self._landed(collection, lines, fates)
            return await self._written(job, items, lines, fates)
        except ServiceError as error:
            return [settled(item, error, self._retries) for item in items]

    def _caller(self, payer: Key) -> Caller:
        """Raises Internal: only an operator can cure it, and the items wait until then."""
        tier = self._settings.admission.tiers.get(payer.tier)
        try:
            if tier is not None:
                return caller_of(payer, tier)
        except ValueError:
            pass
        raise Internal(f"The limits of tenant {payer.tenant!r}, or its tier, are not valid.")

    async def _lines(self, job: Job, items: Sequence[Item]) -> tuple[list[Line], dict[int, Fate]]:
        """The items' lines, tokenised; and those that cannot be. Raises NotFound (the file)."""
        ranges = [(item.payload["start"], item.payload["length"]) for item in items]
        raws = await self._blobs.read(input_blob(job.id), ranges)
        found = await asyncio.gather(
            *(self._line(item, raw) for item, raw in zip(items, raws, strict=True))
        )
        lines = [one for one in found if isinstance(one, Line)]
        errors: dict[int, Fate] = {
            item.id: one
            for item, one in zip(items, found, strict=True)
            if isinstance(one, ServiceError)
        }
        return lines, errors

    async def _line(self, item: Item, raw: bytes) -> Line | ServiceError:
        loop = asyncio.get_running_loop()
        try:
            request = await loop.run_in_executor(self._threads, read_line, raw, self._settings)
            served = self._models.find(request.wanted.model)
            size = size_of(served, request.wanted.dimensions)
            ids, cuts = await self._embed.tokenise(served, request.wanted)
        except ServiceError as error:
            return error
        return Line(item, request, served, ids, cuts, size)

    async def _embedded(self, job: Job, caller: Caller, group: Sequence[Line]) -> dict[int, Fate]:
        """Embed lines together; each has its own fate."""
        try:
            async for attempt in attempts():
                with attempt:
                    fates = await self._embed_once(job, caller, group)
        except ServiceError as error:
            return {line.item.id: error for line in group}
        return fates

    async def _embed_once(self, job: Job, caller: Caller, group: Sequence[Line]) -> dict[int, Fate]:
        tokens = sum(line.tokens for line in group)
        ids = [row for line in group for row in line.ids]
        charged = self._quotas.admitted(caller, job.klass, tokens=tokens, requests=0)
        async with charged as permit:
            reply = await self._embed.run(self._work(job, caller, group[0]), group[0].served, ids)
            fates: dict[int, Fate] = {}
            start = 0
            for line in group:
                stop = start + len(line.ids)
                own = [(index - start, e) for index, e in reply.failures if start <= index < stop]
                fates[line.item.id] = _fate(line, reply.vectors[start:stop], own)
                start = stop
            paid = (line.tokens for line in group if not _ours(fates[line.item.id]))
            self._quotas.settle(permit, tokens=sum(paid))
        return fates

    def _work(self, job: Job, caller: Caller, first: Line) -> Work:
        limits = self._settings.limits
        waits_s = {"bulk": limits.bulk_deadline_s, "interactive": limits.interactive_deadline_s}
        name = request_id(job.id, first.item.seq)
        return Work(caller, name, job.klass, waits_s[job.klass], None, job.priority)

    async def _landed(
        self, collection: Collection, lines: Sequence[Line], fates: Mapping[int, Fate]
    ) -> dict[int, Fate]:
        """Land the vectors that there are; returns the fates of lines that did not land."""
        landings = []
        for line in lines:
            done = fates[line.item.id]
            if isinstance(done, Embedded) and not line.item.superseded:
                made = records(collection, _prepared(line), line.item.generation, done.vectors)
                landings.append(Landing(line.item, made))
        async for attempt in attempts():
            with attempt:
                refused = await self._lander.land(collection, landings)
        return {item: error for item, error in refused.items() if error is not None}

    async def _written(
        self,
        job: Job,
        items: Sequence[Item],
        lines: Sequence[Line],
        fates: Mapping[int, Fate],
    ) -> list[Settlement]:
        """Write a segment of what is done, durably, before anything is settled."""
        segment = f"{job.id}/{new_op()}"
        answered = [(line, fates[line.item.id]) for line in lines]
        done = [(line, fate) for line, fate in answered if isinstance(fate, Embedded)]
        pieces = await asyncio.get_running_loop().run_in_executor(
            self._threads, lambda: [_answer(job, line, fate) for line, fate in done]
        )
        if pieces:
            await self._blobs.put(segment, _each(pieces))
        settlements = [
            self._failed(item, fate)
            for item in items
            if isinstance(fate := fates[item.id], ServiceError)
        ]
        start = 0
        for (line, fate), piece in zip(done, pieces, strict=True):
            place = {"segment": segment, "start": start, "length": len(piece)}
            settlements.append(_done(line, fate, place, lands=bool(job.collection)))
            start += len(piece)
        return settlements

    def _failed(self, item: Item, error: ServiceError) -> Settlement:
        """With what the error file says of a request that was refused."""
        settlement = settled(item, error, self._retries)
        if settlement.word != "dead":
            return settlement
        return replace(settlement, result={"status": error.status, "param": error.param})


def _at_once(caller: Caller, job: Job) -> float:
    """The most tokens that the payer's limits ever let through together."""
    bursts = [
        limit.burst
        for limit in caller.limits.get(job.klass, ())
        if limit.unit == "tokens" and limit.kind != "month"
    ]
    return min(bursts, default=math.inf)


def _groups(lines: Sequence[Line], tokens_max: float) -> list[list[Line]]:
    """Consecutive lines of at most `tokens_max` together; a larger one goes alone."""
    made: list[list[Line]] = []
    room = 0.0
    for line in lines:
        if not made or line.tokens > room:
            made.append([])
            room = tokens_max
        made[-1].append(line)
        room -= line.tokens
    return made


def _fate(line: Line, vectors: Vector, failures: Sequence[tuple[int, ServiceError]]) -> Fate:
    """The line's vectors, or the failure of its first input that has none."""
    if failures:
        index, failure = failures[0]
        return named(failure, line.request.wanted.param.format(index))
    try:
        return Embedded(cut(vectors, line.size), line.tokens, Timing(), line.cuts)
    except ServiceError as error:
        return error


def _ours(fate: Fate) -> bool:
    """Whether it failed by our fault."""
    return isinstance(fate, ServiceError) and fate.refundable


def _prepared(line: Line) -> Prepared:
    """The line as a document: each input is a chunk, one after the other."""
    texts = line.request.wanted.texts or ()
    ends = list(accumulate(len(text) for text in texts))
    chunks = tuple(
        Chunk(ordinal, text, end - len(text), end)
        for ordinal, (text, end) in enumerate(zip(texts, ends, strict=True))
    )
    document = Document(line.request.custom_id, "".join(texts), {})
    return Prepared(document, chunks, tuple(line.ids))


def _answer(job: Job, line: Line, done: Embedded) -> bytes:
    request = line.request
    body = answer(done, request.encoding, request.wanted.model)
    return done_line(request_id(job.id, line.item.seq), request.custom_id, body)


def _done(line: Line, done: Embedded, place: Mapping[str, Any], *, lands: bool) -> Settlement:
    chunks = len(line.ids) if lands and not line.item.superseded else None
    item = line.item
    return Settlement(item.id, item.lease, "done", tokens=done.tokens, result=place, chunks=chunks)


async def _each(pieces: Sequence[bytes]) -> AsyncIterator[bytes]:
    for piece in pieces:
        yield piece
