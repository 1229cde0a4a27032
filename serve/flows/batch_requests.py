"""What workers do with the lines of a batch file: read, tokenise, embed together, write their answers
as segments. If the batch names a collection, the vectors land there before a line is settled.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate
from typing import Any

from serve.admission.metering import OPERATION
from serve.content.blobs import LocalBlobs
from serve.content.documents import Document
from serve.errors import ServiceError
from serve.flows.attempts import tried
from serve.flows.batch_file import Request, done_line, read_line, request_id
from serve.flows.bulk import (
    Part,
    by_job,
    check_revision,
    in_groups,
    paid,
    payer,
    rows_of,
    work_of,
    work_part,
)
from serve.flows.context import Context, Timing, new_op
from serve.flows.embed import Cut, Embedded, EmbedFlow, cut, named, size_of
from serve.flows.exchange import answer
from serve.flows.lander import Lander, Landing, sender_of
from serve.flows.landing import Prepared, records
from serve.flows.models import Served
from serve.flows.sheet import input_blob
from serve.items import Claim, Item, Job, Settlement
from serve.jobs.faults import Retries, settled
from serve.ports import Upserter
from serve.records import Caller, Chunk, Collection, Vector


log = logging.getLogger("headrace.worker")


@dataclass(frozen=True, slots=True)
class Target:
    """Whose lines these are, and where their vectors land; None: nowhere."""

    job: Job
    caller: Caller
    collection: Collection | None


@dataclass(frozen=True, slots=True)
class Line(Part):
    """A line of a file; `size` is that of its vectors."""

    request: Request
    served: Served
    cuts: tuple[Cut, ...]
    size: int


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
        self._live = context.live
        self._models = context.models
        self._quotas = context.quotas
        self._threads = context.threads
        self._embed = embed
        self._lander = Lander(upserter, context.settings)
        self._blobs = blobs
        self._retries = retries

    async def request(self, items: Sequence[Item], claim: Claim) -> list[Settlement]:
        """Lines of each job side by side; what befalls one job leaves the others alone."""
        return await by_job(items, partial(self._one_job, claim), self._failed)

    async def _one_job(self, claim: Claim, items: Sequence[Item]) -> list[Settlement]:
        with work_part(claim, items):
            return await self._worked(claim, items)

    async def _worked(self, claim: Claim, items: Sequence[Item]) -> list[Settlement]:
        job = claim.jobs[items[0].job]
        caller = payer(claim.payers[job.id], self._live.now.admission.tiers)
        target = Target(job, caller, claim.collections.get(job.collection))
        lines, broken = await self._lines(target, items)
        done = await in_groups(
            lines,
            partial(self._charged, target),
            self._failed,
            caller=caller,
            klass=job.klass,
            ingress=self._settings.ingress,
        )
        return [*done, *(self._failed(item, error) for item, error in broken)]

    async def _lines(
        self, target: Target, items: Sequence[Item]
    ) -> tuple[list[Line], list[tuple[Item, Exception]]]:
        """The items' lines, tokenised; and those that cannot be. Raises NotFound (the file)."""
        ranges = [(item.payload["start"], item.payload["length"]) for item in items]
        raws = await self._blobs.read(input_blob(target.job.id), ranges)
        found = await asyncio.gather(
            *(self._line(target, item, raw) for item, raw in zip(items, raws, strict=True))
        )
        lines = [one for one in found if isinstance(one, Line)]
        broken = [
            (item, one)
            for item, one in zip(items, found, strict=True)
            if isinstance(one, Exception)
        ]
        return lines, broken

    async def _line(self, target: Target, item: Item, raw: bytes) -> Line | Exception:
        loop = asyncio.get_running_loop()
        try:
            request = await loop.run_in_executor(self._threads, read_line, raw, self._settings)
            served = self._models.find(request.wanted.model)
            if target.collection is not None:
                check_revision(target.collection, served)
            size = size_of(served, request.wanted)
            ids, cuts = await self._embed.tokenise(served, request.wanted)
        except ServiceError as error:
            return error
        except Exception as error:  # the rim of each line: the others go on
            log.exception("the line %d of %s cannot be read", item.seq, target.job.id)
            return error
        return Line(item, ids, request, served, cuts, size)

    async def _charged(self, target: Target, group: Sequence[Line]) -> list[Settlement]:
        """Charge for a group until its answers are kept: what fails by our fault is given back."""
        if target.collection is not None:
            await self._lander.hold(sender_of(target.job))
        OPERATION.set(f"job_{target.job.kind}")  # of this group's task
        charged = self._quotas.admitted(
            target.caller,
            target.job.klass,
            tokens=sum(line.tokens for line in group),
            requests=0,
            model=group[0].served.model.id,
        )
        async with charged as permit:
            fates = await self._embedded(target, group)
            if target.collection is not None:
                fates |= await self._landed(target.job, target.collection, group, fates)
            settlements = await self._written(target.job, group, fates)
            self._quotas.settle(permit, tokens=paid(group, fates))
        return settlements

    async def _embedded(self, target: Target, group: Sequence[Line]) -> dict[int, Fate]:
        """Embed lines together; each has its own fate."""
        first = group[0]
        name = request_id(target.job.id, first.item.seq)
        work = work_of(self._settings.limits, target.caller, target.job, name)
        ids = [row for line in group for row in line.ids]
        reply = await tried(lambda: self._embed.run(work, first.served, ids))
        return {
            line.item.id: _fate(line, vectors, failures)
            for line, vectors, failures in rows_of(group, reply)
        }

    async def _landed(
        self,
        job: Job,
        collection: Collection,
        group: Sequence[Line],
        fates: Mapping[int, Fate],
    ) -> dict[int, Fate]:
        """Land the vectors that there are; returns the fates of lines that did not land."""
        landings = []
        for line in group:
            done = fates[line.item.id]
            if isinstance(done, Embedded) and not line.item.superseded:
                made = records(collection, _prepared(line), line.item.generation, done.vectors)
                landings.append(Landing(line.item, made))
        landfall = await tried(lambda: self._lander.land(sender_of(job), collection, landings))
        return {item: error for item, error in landfall.fates.items() if error is not None}

    async def _written(
        self, job: Job, group: Sequence[Line], fates: Mapping[int, Fate]
    ) -> list[Settlement]:
        """Write a segment of what is done, durably, before anything is settled."""
        segment = f"{job.id}/{new_op()}"
        settlements: list[Settlement] = []
        done: list[tuple[Line, Embedded]] = []
        for line in group:
            fate = fates[line.item.id]
            if isinstance(fate, Embedded):
                done.append((line, fate))
            else:
                settlements.append(self._failed(line.item, fate))
        pieces = await asyncio.get_running_loop().run_in_executor(
            self._threads, lambda: [_answer(job, line, fate) for line, fate in done]
        )
        if pieces:
            await tried(lambda: self._blobs.put(segment, _each(pieces)))
        start = 0
        for (line, fate), piece in zip(done, pieces, strict=True):
            place = {"segment": segment, "start": start, "length": len(piece)}
            settlements.append(_done(line, fate, place, lands=bool(job.collection)))
            start += len(piece)
        return settlements

    def _failed(self, item: Item, error: Exception) -> Settlement:
        """With what the error file says of a request that was refused."""
        settlement = settled(item, error, self._retries)
        if settlement.word != "dead" or not isinstance(error, ServiceError):
            return settlement
        return replace(settlement, result={"status": error.status, "param": error.param})


def _fate(line: Line, vectors: Vector, failures: Sequence[tuple[int, ServiceError]]) -> Fate:
    """The line's vectors, or the failure of its first input that has none."""
    if failures:
        index, failure = failures[0]
        return named(failure, line.request.wanted.param.format(index))
    try:
        return Embedded(cut(vectors, line.size), line.tokens, Timing(), line.cuts)
    except ServiceError as error:
        return error


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
    body = answer(done, request.wanted, request.encoding, line.served.model)
    return done_line(request_id(job.id, line.item.seq), request.custom_id, body)


def _done(line: Line, done: Embedded, place: Mapping[str, Any], *, lands: bool) -> Settlement:
    chunks = len(line.ids) if lands and not line.item.superseded else None
    item = line.item
    return Settlement(item.id, item.lease, "done", tokens=done.tokens, result=place, chunks=chunks)


async def _each(pieces: Sequence[bytes]) -> AsyncIterator[bytes]:
    for piece in pieces:
        yield piece
