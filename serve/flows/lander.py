"""Lands records of items in a collection, then removes the chunks that earlier versions had more."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice

from serve import tracing
from serve.config import Settings
from serve.errors import BadInput, IndexUnavailable, Internal, ServiceError
from serve.flows.landing import chunk_id
from serve.flows.room import hold
from serve.freshness import latest
from serve.items import Item, Job
from serve.ports import Upserter
from serve.pressure import Sender
from serve.records import Collection, Outcome, Record, Tombstone, Write


@dataclass(frozen=True, slots=True)
class Landing:
    """All records of one item's document. None of them: the document is deleted.

    `accepted_at` as a record's.
    """

    item: Item
    records: Sequence[Record]
    accepted_at: float = 0.0


Fates = Mapping[int, ServiceError | None]
"""By item, of those that did not land: why; None: superseded."""


@dataclass(frozen=True, slots=True)
class Landfall:
    """What became of landings, and the token of all that has landed (see `records.Outcome`)."""

    fates: Fates
    token: int | None = None


class Lander:
    """Offers writes to the one writer of the index, a bulk upsert's worth at a time."""

    def __init__(self, upserter: Upserter, settings: Settings) -> None:
        self._upserter = upserter
        self._items_max = settings.index.max_items
        self._deadline_s = settings.limits.bulk_deadline_s

    async def hold(self, sender: Sender) -> None:
        """Raises Overloaded while the index should not be brought more of this tenant."""
        await hold(self._upserter, sender.tenant)

    async def land(
        self, sender: Sender, collection: Collection, landings: Sequence[Landing]
    ) -> Landfall:
        """Land them.

        Raises Overloaded, TooLarge, Internal, and IndexUnavailable, also where writes came back
        untried: then all of it can be repeated.
        """
        writes = [record for one in landings for record in one.records]
        owners = [one.item.id for one in landings for _ in one.records]
        fates: dict[int, ServiceError | None] = {}
        outcomes = await self._offer(sender, collection, writes)
        for item, outcome in zip(owners, outcomes, strict=True):
            if outcome.word == "superseded":
                fates.setdefault(item, None)
            elif outcome.word == "rejected":
                fates.setdefault(item, BadInput(f"The index refused it: {outcome.reason}"))
        stale = (
            Tombstone(
                chunk_id(collection, one.item.name, ordinal),
                one.item.name,
                one.item.generation,
                one.accepted_at,
            )
            for one in landings
            if one.item.id not in fates
            for ordinal in range(len(one.records), one.item.chunks_max)
        )
        removed = await self._offer(sender, collection, stale)
        for outcome in removed:
            if outcome.word == "rejected":
                raise Internal(f"The index refused a delete: {outcome.reason}")
        return Landfall(fates, latest(outcome.token for outcome in (*outcomes, *removed)))

    async def _offer(
        self, sender: Sender, collection: Collection, writes: Iterable[Write]
    ) -> list[Outcome]:
        """Raises IndexUnavailable when the writer gave some back: it leaves, or ran out of time."""
        outcomes: list[Outcome] = []
        waiting = iter(writes)
        while part := list(islice(waiting, self._items_max)):
            some = await offered(self._upserter, sender, collection, part, self._deadline_s)
            if any(outcome.word == "released" for outcome in some):
                raise IndexUnavailable("The index did not take it in time.", retry_after_s=1)
            outcomes += some
        return outcomes


async def offered(
    upserter: Upserter,
    sender: Sender,
    collection: Collection,
    writes: Sequence[Write],
    deadline_s: float,
) -> Sequence[Outcome]:
    """Offer them with the span in which that is done, to which their flush will link."""
    with tracing.part("headrace.offer", writes=len(writes)):
        if trace := tracing.carrier():
            writes = [replace(one, trace=trace) for one in writes]
        return await upserter.offer(sender, collection.uuid, writes, deadline_s)


def sender_of(job: Job) -> Sender:
    """Whose writes a job's are."""
    return Sender(job.tenant, job.weight)
