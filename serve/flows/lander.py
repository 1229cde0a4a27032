"""Lands records of items in a collection, then removes the chunks that earlier versions had more."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice

from serve.config import Settings
from serve.errors import ServiceError
from serve.flows.landing import all_landed, chunk_id, unlanded
from serve.items import Item
from serve.ports import Upserter
from serve.records import Collection, Outcome, Record, Tombstone, Write


@dataclass(frozen=True, slots=True)
class Landing:
    """All records of one item's document. None of them: the document is deleted."""

    item: Item
    records: Sequence[Record]


class Lander:
    """Offers writes to the one writer of the index, a bulk upsert's worth at a time."""

    def __init__(self, upserter: Upserter, settings: Settings) -> None:
        self._upserter = upserter
        self._items_max = settings.index.max_items
        self._deadline_s = settings.limits.bulk_deadline_s

    async def land(
        self, collection: Collection, landings: Sequence[Landing]
    ) -> dict[int, ServiceError | None]:
        """Land them; returns the items that did not, with why (None: superseded).

        Raises Overloaded, IndexUnavailable, DeadlineExceeded: then all of it can be repeated.
        """
        writes = [record for one in landings for record in one.records]
        owners = [one.item.id for one in landings for _ in one.records]
        fates: dict[int, ServiceError | None] = {}
        outcomes = await self._offer(collection, writes)
        for item, outcome in zip(owners, outcomes, strict=True):
            if outcome.word != "landed":
                fates.setdefault(item, unlanded(outcome))
        stale = (
            Tombstone(
                chunk_id(collection, one.item.name, ordinal), one.item.name, one.item.generation
            )
            for one in landings
            if one.item.id not in fates
            for ordinal in range(len(one.records), one.item.chunks_max)
        )
        all_landed(await self._offer(collection, stale))
        return fates

    async def _offer(self, collection: Collection, writes: Iterable[Write]) -> list[Outcome]:
        outcomes: list[Outcome] = []
        waiting = iter(writes)
        while part := list(islice(waiting, self._items_max)):
            outcomes += await self._upserter.offer(collection.uuid, part, self._deadline_s)
        return outcomes
