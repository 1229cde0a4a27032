"""What workers do with OpenAI batches: `expand` reads the file of any job, here; `request` embeds its lines
(`batch_requests`), `finish` writes the output files (`batch_finish`). `batch` is the accepting half.

Texts stay in the file and vectors go into segments: blobs of output lines, one for each group. The
Store holds neither. A job's own blobs, the file and its segments, are named after the job.
"""

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from functools import partial
from typing import Protocol

from serve.content.blobs import LocalBlobs
from serve.errors import NotFound
from serve.flows.batch_file import BatchSheet
from serve.flows.batch_finish import FinishWork
from serve.flows.batch_requests import RequestWork
from serve.flows.bulk import FILES_AT_ONCE, Failed, one_by_one, work_part
from serve.flows.context import Context
from serve.flows.document_file import DocumentSheet, items_of, parts
from serve.flows.embed import EmbedFlow
from serve.flows.sheet import Sheet, input_blob
from serve.items import Claim, Fault, Item, Job, NewItem, Settlement, Task
from serve.job_ports import Files, Jobs, Queue
from serve.jobs.faults import Retries, settled
from serve.jobs.runner import Handler
from serve.ports import Upserter
from serve.records import Collection


ADDED = 500
"""Items added in one transaction, about 10 ms: others wait behind it."""


Lot = tuple[int, list[NewItem]]
"""Items to be added, with the number of the first."""


class BatchStore(Queue, Jobs, Files, Protocol):
    """The Store's ports that the work on batches needs."""


def batch_handlers(
    context: Context,
    embed: EmbedFlow,
    store: BatchStore,
    *,
    upserter: Upserter,
    blobs: LocalBlobs,
    retries: Retries,
) -> Mapping[Task, Handler]:
    """By task, for the Runner."""
    return {
        "expand": ExpandWork(context, store, blobs, retries).expand,
        "request": RequestWork(
            context, embed, upserter=upserter, blobs=blobs, retries=retries
        ).request,
        "finish": FinishWork(context, store, store, blobs, retries).finish,
    }


class ExpandWork:
    """Handler of the task `expand`."""

    def __init__(self, context: Context, queue: Queue, blobs: LocalBlobs, retries: Retries) -> None:
        self._settings = context.settings
        self._models = context.models
        self._threads = context.threads
        self._queue = queue
        self._blobs = blobs
        self._failed: Failed = partial(settled, retries=retries)

    async def expand(self, items: Sequence[Item], claim: Claim) -> list[Settlement]:
        """Check the whole file; if every line is right, they become items, else the job fails."""
        act = partial(self._expanded, claim)
        return await one_by_one(items, act, self._failed, at_once=FILES_AT_ONCE)

    async def _expanded(self, claim: Claim, item: Item) -> Settlement:
        """Raises NotFound, StoreUnavailable."""
        with work_part(claim, [item]):
            return await self._items_of(claim, item)

    async def _items_of(self, claim: Claim, item: Item) -> Settlement:
        job = claim.jobs[item.job]
        collection = claim.collections.get(job.collection)
        sheet: Sheet
        if job.kind == "documents":
            sheet, lots = self._documents(job, collection)
        else:
            sheet, lots = self._requests(collection)
        await self._read(job, sheet)
        if sheet.faults:
            return _refused(item, sheet)
        async for start, some in lots:
            if not await self._queue.add_items(item.id, item.lease, start, some):
                break  # the lease is over, or the job was stopped
        return Settlement(item.id, item.lease, "done")

    def _requests(self, collection: Collection | None) -> tuple[Sheet, AsyncIterator[Lot]]:
        """A batch's lines: the texts stay in the file."""
        sheet = BatchSheet(self._settings, self._models, collection)

        async def lots() -> AsyncIterator[Lot]:
            for start in range(0, sheet.count, ADDED):
                yield start, [entry.item() for entry in sheet.entries[start : start + ADDED]]

        return sheet, lots()

    def _documents(
        self, job: Job, collection: Collection | None
    ) -> tuple[Sheet, AsyncIterator[Lot]]:
        """Documents, read once more when the whole file is known to be right.

        Raises NotFound when the collection is gone.
        """
        if collection is None:
            raise NotFound("The collection does not exist any more.", param="collection")
        sheet, served = DocumentSheet(self._settings), self._models.find(collection.model)
        loop = asyncio.get_running_loop()

        async def lots() -> AsyncIterator[Lot]:
            for start, spans in parts(sheet.spans, ADDED):
                ranges = [(span.start, span.length) for span in spans]
                lines = await self._blobs.read(input_blob(job.id), ranges)
                yield (
                    start,
                    await loop.run_in_executor(
                        self._threads, items_of, lines, served, self._settings
                    ),
                )

        return sheet, lots()

    async def _read(self, job: Job, sheet: Sheet) -> None:
        """Check the whole file. Raises NotFound, StoreUnavailable."""
        loop = asyncio.get_running_loop()
        async for piece in self._blobs.stream(input_blob(job.id)):
            await loop.run_in_executor(self._threads, sheet.feed, piece)
            if sheet.stopped:
                break
        await loop.run_in_executor(self._threads, sheet.close)


def _refused(item: Item, sheet: Sheet) -> Settlement:
    first = sheet.faults[0]
    return Settlement(
        item.id,
        item.lease,
        "dead",
        fault=Fault("invalid", first["code"], first["message"]),
        result={"errors": sheet.faults},
    )
