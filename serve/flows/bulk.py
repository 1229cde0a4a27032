"""What work on documents and on lines of batch files shares: who pays, what is embedded together, and
that what befalls some items leaves the others alone.
"""

import asyncio
import logging
import math
from collections import defaultdict
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from serve import tracing
from serve.admission.limits import caller_of
from serve.allowance import Tier
from serve.config import Ingress, Limits
from serve.errors import Conflict, QuotaExceeded, ServiceError
from serve.flows.embed import Work
from serve.flows.models import Served
from serve.items import Claim, Item, Job, Settlement
from serve.records import Caller, Collection, EmbedReply, Key, Klass, TokenIds, Vector


FILES_AT_ONCE = 2
"""Files of jobs that one claim reads or writes at once: one that is large does not hold up the others,
and what is kept in memory of each (about 15 MB) stays little.
"""

log = logging.getLogger("headrace.worker")

Failed = Callable[[Item, Exception], Settlement]
"""How an item is settled that met this error."""

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Part:
    """What of an item is embedded: the token ids of its inputs."""

    item: Item
    ids: Sequence[TokenIds]

    @property
    def tokens(self) -> int:
        """Over all inputs: what is paid for."""
        return sum(len(row) for row in self.ids)


P = TypeVar("P", bound=Part)


def payer(key: Key, tiers: Mapping[str, Tier]) -> Caller:
    """Who pays, as `Claim.payers` knows the key.

    Raises QuotaExceeded without a time where its limits, or its tier, are not valid: only an operator
    can mend that, and the items wait until then.
    """
    tier = tiers.get(key.tier)
    try:
        if tier is not None:
            return caller_of(key, tier)
    except ValueError:
        pass
    log.error("the limits of the tenant %r, or its tier %r, are not valid", key.tenant, key.tier)
    message = "The tenant's limits, or its tier, are not valid; only an operator can mend that."
    raise QuotaExceeded(message, code="limits_not_valid")


def check_revision(collection: Collection, served: Served) -> None:
    """Raises Conflict where the model is another one by now than made the collection's vectors."""
    if served.revision != collection.revision:
        raise Conflict(
            f"The collection {collection.name} was made by another revision of the model."
        )


def work_of(limits: Limits, caller: Caller, job: Job, request_id: str) -> Work:
    """For the embedder: how long others may make it wait depends on the class."""
    waits_s = {"bulk": limits.bulk_deadline_s, "interactive": limits.interactive_deadline_s}
    return Work(caller, request_id, job.klass, waits_s[job.klass], None, job.priority)


def work_part(claim: Claim, items: Sequence[Item]) -> tracing.Part:
    """Work at items of one job, in the trace in which that was made."""
    job = claim.jobs[items[0].job]
    carrier = job.spec.get(tracing.KEPT, "")
    return tracing.part(
        "headrace.work", carrier, job=job.id, stage=items[0].stage, items=len(items)
    )


# --- side by side ----------------------------------------------------------------------------


async def by_job(
    items: Iterable[Item],
    act: Callable[[Sequence[Item]], Awaitable[Sequence[Settlement]]],
    failed: Failed,
) -> list[Settlement]:
    """Act on the items of each job, all jobs at once."""
    jobs: dict[str, list[Item]] = defaultdict(list)
    for item in items:
        jobs[item.job].append(item)
    lots = [(some, some) for some in jobs.values()]
    return await _beside(lots, act, failed, len(lots))


async def one_by_one(
    items: Sequence[Item],
    act: Callable[[Item], Awaitable[Settlement]],
    failed: Failed,
    *,
    at_once: int = 1,
) -> list[Settlement]:
    """Act on each item, on `at_once` of them at a time."""

    async def alone(item: Item) -> list[Settlement]:
        return [await act(item)]

    return await _beside([([item], item) for item in items], alone, failed, at_once)


async def in_groups(
    parts: Sequence[P],
    act: Callable[[Sequence[P]], Awaitable[Sequence[Settlement]]],
    failed: Failed,
    *,
    caller: Caller,
    klass: Klass,
    ingress: Ingress,
) -> list[Settlement]:
    """Act on a job's parts in groups of one call of the embedder, several at once.

    Never on more at once than a limit of the payer can hold: groups would only refuse each other.
    """
    limits = caller.limits.get(klass, ())
    most = min((limit.burst for limit in limits if limit.unit == "tokens"), default=math.inf)
    tokens = min(ingress.slice_tokens, most)
    lots = [([part.item for part in some], some) for some in _groups(parts, tokens)]
    at_once = int(min(ingress.slices_in_flight_max, most / tokens))
    return await _beside(lots, act, failed, at_once)


async def _beside(
    lots: Iterable[tuple[Sequence[Item], T]],
    act: Callable[[T], Awaitable[Sequence[Settlement]]],
    failed: Failed,
    at_once: int,
) -> list[Settlement]:
    gate = asyncio.Semaphore(at_once)

    async def one(items: Sequence[Item], lot: T) -> Sequence[Settlement]:
        try:
            async with gate:
                return await act(lot)
        except Exception as error:  # the rim of each lot: other jobs and tenants go on
            if not isinstance(error, ServiceError):
                log.exception("%d items of the task %s failed", len(items), items[0].task)
            return [failed(item, error) for item in items]

    done = await asyncio.gather(*(one(items, lot) for items, lot in lots))
    return [settlement for part in done for settlement in part]


# --- a group ---------------------------------------------------------------------------------


def rows_of(
    group: Sequence[P], reply: EmbedReply
) -> Iterator[tuple[P, Vector, list[tuple[int, ServiceError]]]]:
    """Each part with its vectors, and its failures by its own inputs' numbers."""
    start = 0
    for part in group:
        stop = start + len(part.ids)
        failures = [(at - start, error) for at, error in reply.failures if start <= at < stop]
        yield part, reply.vectors[start:stop], sorted(failures, key=lambda each: each[0])
        start = stop


def paid(group: Sequence[Part], fates: Mapping[int, object]) -> int:
    """Tokens of a group but of what failed by our fault. `fates` is by item: the error, if any."""
    ours = {
        item for item, fate in fates.items() if isinstance(fate, ServiceError) and fate.refundable
    }
    return sum(part.tokens for part in group if part.item.id not in ours)


def _groups(parts: Sequence[P], tokens_max: float) -> list[list[P]]:
    """Consecutive parts of at most `tokens_max` together; a larger one goes alone."""
    made: list[list[P]] = []
    room = 0.0
    for part in parts:
        if not made or part.tokens > room:
            made.append([])
            room = tokens_max
        made[-1].append(part)
        room -= part.tokens
    return made
