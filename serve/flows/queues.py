"""`/v1/queues/{collection}`: batches of messages as a queue delivers them to its consumer.

Documents and deletes are handed over as a job (`serve.flows.ingest`), and count as done once it is in
the Store; vectors (`serve.flows.vectors`) once they are in the index. Until a message is acknowledged it
is the queue's, which delivers it again: so a message that cannot be done is never acknowledged, and one
that can never be done goes, by the queue's own rule, to the queue's dead letters.
"""

import asyncio
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

from serve.config import Limits
from serve.content.documents import Document, check_document, check_id
from serve.content.messages import Message, Removal, Wish, winners
from serve.content.vectors import RawVector, SentVector, checked
from serve.errors import BadInput, PoisonInput, QuotaExceeded, ServiceError, TooLarge
from serve.flows.collections import CollectionFlow
from serve.flows.context import Context, within
from serve.flows.ingest import Chosen, IngestFlow, Taken, Terms
from serve.flows.items import delete_item, document_item
from serve.flows.vectors import VectorFlow, VectorResult, fitting
from serve.items import NewItem
from serve.records import Caller, Collection


DELAY_S = 10.0
"""Before the second delivery of what failed without saying for how long; each further pause is twice
as long. Twenty deliveries then outlast an outage of days.
"""

DOUBLINGS_MAX = 20
"""Of that pause: more would come to more than any queue lets a message wait."""

CLOCKS_DIFFER_S_MAX = 3600.0
"""A message from further in the future has a wrong timestamp, and would beat all that is written until then."""

Status = Literal["accepted", "indexed", "superseded", "failed"]
"""accepted: in the Store, as an item of the job. indexed: in the index. superseded: a message or a write
that was sent later counts in its place.
"""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the queue is to do with a message. An `error` means: deliver it again after `delay_s`.

    `dead`: the next delivery will fail like this one.
    """

    status: Status
    error: ServiceError | None = None
    delay_s: int = 0
    dead: bool = False


@dataclass(frozen=True, slots=True)
class Consumed:
    """One verdict a message, in their order, and what was accepted as a job, if anything was."""

    verdicts: Sequence[Verdict]
    taken: Taken | None


@dataclass(frozen=True, slots=True)
class _Plan:
    """What is to be done, by the messages' numbers. `instead` names the message that counts for another."""

    items: Mapping[int, NewItem]
    vectors: Mapping[int, RawVector]
    instead: Mapping[int, int]
    faults: Mapping[int, ServiceError]


Fate = Status | ServiceError


class QueueFlow:
    """Consumes batches of messages for one collection of the caller."""

    def __init__(
        self,
        context: Context,
        collections: CollectionFlow,
        ingest: IngestFlow,
        vectors: VectorFlow,
    ) -> None:
        self._settings = context.settings
        self._models = context.models
        self._quotas = context.quotas
        self._threads = context.threads
        self._clock = context.clock
        self._wall = context.wall
        self._collections = collections
        self._ingest = ingest
        self._vectors = vectors

    async def consume(
        self, caller: Caller, name: str, messages: Sequence[Message], until: float | None = None
    ) -> Consumed:
        """Do what the messages ask for; a fault of one leaves the others alone.

        A batch counts as one request of class `bulk`. Raises BadInput (their number, a timestamp, or
        the model of the collection is another now), NotFound (collection or its model), QuotaExceeded,
        StoreUnavailable, DeadlineExceeded: then nothing was done, and the whole batch can come again.
        """
        self._check(messages)
        loop = asyncio.get_running_loop()
        async with self._quotas.admitted(caller, "bulk", tokens=0, param="messages"):
            async with within(until, self._clock):
                collection = await self._collections.find(caller, name)
                if any(isinstance(one.body, Document) for one in messages):
                    self._collections.servable(collection)
                plan = await loop.run_in_executor(
                    self._threads, partial(self._planned, collection, messages)
                )
            taken, fate = await self._accepted(caller, collection, plan, until)
            landed = await self._landed(caller, collection, plan, until)
        fates = {**plan.faults, **dict.fromkeys(plan.items, fate), **landed}
        verdicts = [
            self._verdict(fates[plan.instead.get(at, at)], one, instead=at in plan.instead)
            for at, one in enumerate(messages)
        ]
        return Consumed(verdicts, taken)

    def _check(self, messages: Sequence[Message]) -> None:
        most = self._settings.limits.queue_messages_max
        if not 1 <= len(messages) <= most:
            raise BadInput(
                f"Between 1 and {most} messages are allowed, not {len(messages)}.",
                param="messages",
            )
        latest = self._wall() + CLOCKS_DIFFER_S_MAX
        for at, one in enumerate(messages):
            if one.sent_at > latest:
                raise BadInput("It lies in the future.", param=f"messages[{at}].timestamp")

    def _planned(self, collection: Collection, messages: Sequence[Message]) -> _Plan:
        """Check all, and choose what counts. Slow: for a thread."""
        wishes: dict[int, Wish] = {}
        faults: dict[int, ServiceError] = {}
        for at, one in enumerate(messages):
            try:
                wishes[at] = self._wish(one, f"messages[{at}].body", collection)
            except ServiceError as error:
                faults[at] = error
        counts = winners(wishes, dict(enumerate(messages)))
        items: dict[int, NewItem] = {}
        vectors: dict[int, RawVector] = {}
        for at in sorted(set(counts.values())):
            wish = wishes[at]
            if isinstance(wish, RawVector):
                vectors[at] = wish
            else:
                items[at] = self._item(wish, collection, messages[at].sent_at)
        instead = {at: winner for at, winner in counts.items() if winner != at}
        return _Plan(items, vectors, instead, faults)

    def _wish(self, message: Message, param: str, collection: Collection) -> Wish:
        """Raises what is wrong with its body."""
        body, limits = message.body, self._settings.limits
        if isinstance(body, ServiceError):
            raise body
        if isinstance(body, SentVector):
            return fitting(checked(body, param, limits), collection)
        if isinstance(body, Document):
            check_document(body, param, limits)
        else:
            check_id(body.id, f"{param}.id", limits)
        return body

    def _item(self, wish: Document | Removal, collection: Collection, sent_at: float) -> NewItem:
        if isinstance(wish, Removal):
            return delete_item(wish.id, sent_at=sent_at)
        served = self._models.find(collection.model)
        return document_item(served, self._settings, wish, sent_at)

    async def _accepted(
        self, caller: Caller, collection: Collection, plan: _Plan, until: float | None
    ) -> tuple[Taken | None, Fate]:
        """The job of the documents and deletes, if there are any, and what became of them all."""
        chosen = Chosen(list(plan.items.values()))
        if not chosen.items:
            return None, "accepted"
        try:
            async with within(until, self._clock):
                taken = await self._ingest.hand_over(
                    caller, collection, chosen, Terms(), "accepted"
                )
        except ServiceError as error:
            return None, error
        return taken, "accepted"

    async def _landed(
        self, caller: Caller, collection: Collection, plan: _Plan, until: float | None
    ) -> dict[int, Fate]:
        """Vectors; what keeps all of them out is the fate of each."""
        try:
            landed = await self._vectors.land(caller, collection, plan.vectors, until)
        except ServiceError as error:
            return dict.fromkeys(plan.vectors, error)
        return {at: _fate(one) for at, one in landed.results.items()}

    def _verdict(self, fate: Fate, message: Message, *, instead: bool) -> Verdict:
        if isinstance(fate, ServiceError):
            dead = isinstance(fate, BadInput | TooLarge | PoisonInput)
            wait_s = 0 if dead else delay_s(fate, message.attempts, self._settings.limits)
            return Verdict("failed", fate, wait_s, dead)
        return Verdict("superseded" if instead else fate)


def delay_s(error: ServiceError, attempts: int, limits: Limits) -> int:
    """After how many seconds a message is to be delivered again.

    As long as the error says, or `DELAY_S`, and twice that with each delivery: a queue counts them, and
    gives a message up that had too many. As long as may be where a month's limit is used up.
    """
    most = limits.queue_delay_s_max
    if isinstance(error, QuotaExceeded) and error.retry_after_s is None:
        return most
    first = DELAY_S if error.retry_after_s is None else error.retry_after_s
    doublings = min(max(attempts - 1, 0), DOUBLINGS_MAX)
    return min(math.ceil(math.ldexp(first, doublings)), most)


def _fate(result: VectorResult) -> Fate:
    return result.error if result.error is not None else result.status
