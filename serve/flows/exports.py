"""`GET /v1/collections/{name}/export`: all that a collection holds, read straight from the index.

A part is read when the one before has been sent, so that an export holds little, however large the
collection and however slow its reader.
"""

import asyncio
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import aclosing

from serve.errors import DeadlineExceeded
from serve.flows.collections import CollectionFlow
from serve.flows.context import Context
from serve.flows.scans import scanned
from serve.flows.streams import Exports
from serve.index.parquet import ParquetFile
from serve.ports import VectorIndex
from serve.records import Caller, Collection, Record


SLICE_BYTES = 256 * 1024
"""Estimated bytes of the records that are given at once: to write their 65,536 numbers as JSON takes
about 3 ms, in which the replica does nothing else.
"""

GROUP_BYTES = 4 * 2**20
"""Estimated bytes of a row group: an export as Parquet holds some three times that. Groups of a few
records would make the file slow to read.
"""

RECORD_BYTES = 100
"""What a record has beside its vector and its text, about."""


class ExportFlow:
    """Exports of the caller's collections. One counts as a request at class `bulk`.

    `places` bounds how many are sent at once; whoever sends one holds a place.
    """

    def __init__(self, context: Context, collections: CollectionFlow, index: VectorIndex) -> None:
        self._quotas = context.quotas
        self._collections = collections
        self._index = index
        self.places = Exports(context.settings)

    async def begin(self, caller: Caller, name: str) -> Collection:
        """What is to be exported. Raises NotFound, also for another tenant's; QuotaExceeded."""
        async with self._quotas.admitted(caller, "bulk", tokens=0):
            return await self._collections.find(caller, name)

    async def records(
        self, collection: Collection, until: float
    ) -> AsyncGenerator[Sequence[Record], None]:
        """All records, a few at a time and in no order; what is written meanwhile may be among them.

        Raises IndexUnavailable, and DeadlineExceeded at `until` on the loop's clock.
        """
        loop = asyncio.get_running_loop()
        async with scanned(self._index, collection.uuid) as parts:
            async for part in parts:
                for some in _slices(part):
                    if loop.time() >= until:
                        raise DeadlineExceeded("The export took too long.")
                    yield some
                    await asyncio.sleep(0)  # a reader who takes all at once never makes us wait

    async def parquet(self, collection: Collection, until: float) -> AsyncGenerator[bytes, None]:
        """The same as one Parquet file, a row group at a time. Also raises BadInput (no pyarrow)."""
        file = await asyncio.to_thread(ParquetFile, collection.dimensions)
        group: list[Record] = []
        size = 0
        async with aclosing(self.records(collection, until)) as parts:
            async for some in parts:
                group += some
                size += sum(_size(record) for record in some)
                if size >= GROUP_BYTES:
                    yield await asyncio.to_thread(file.add, group)
                    group, size = [], 0
        if group:
            yield await asyncio.to_thread(file.add, group)
        yield await asyncio.to_thread(file.end)


def _slices(part: Sequence[Record]) -> Iterator[Sequence[Record]]:
    """A part in slices of about `SLICE_BYTES`; one record at least."""
    start = size = 0
    for at, record in enumerate(part):
        size += _size(record)
        if size >= SLICE_BYTES:
            yield part[start : at + 1]
            start, size = at + 1, 0
    if start < len(part):
        yield part[start:]


def _size(record: Record) -> int:
    return record.vector.nbytes + len(record.text) + RECORD_BYTES
