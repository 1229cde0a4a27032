"""What was computed before, or is being computed, is not computed again.

`embed` cuts what is left of a request into calls of the embedder, each of which goes through `once`.
"""

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b

import numpy as np

from serve.config import Cache
from serve.embedding.row_cache import RowCache
from serve.errors import DeadlineExceeded, ModelUnavailable, ServiceError
from serve.flows.models import Served
from serve.records import EmbedReply, Klass, TokenIds, Vector


Space = tuple[str, str, str]
"""Whose vectors (empty: everybody's), of which model, of which revision of it."""

Key = tuple[Space, bytes]
"""Of one input: its space and the hash of its token ids, prefixes included and truncated: nothing else
changes a whole vector. `dimensions` and `output_dtype` are applied to it afterwards.
"""

Rank = tuple[str, Klass, int]
"""Tenant, class and priority: what decides how fast work is done."""

Outcome = tuple[Vector, ServiceError | None]
"""What became of one input: its vector, unless there is a reason why it has none."""

Ask = Callable[[Sequence[TokenIds], float], Awaitable[EmbedReply]]
"""One call of the embedder, which may wait so many seconds for others."""

DIGEST_BYTES = 16
"""Two inputs of a tenant's own collide by chance once in 2^64 of them, and nobody else's can."""


@dataclass(slots=True)
class Tally:
    """Inputs since start: `hits` were kept, `misses` were not. Of the misses `shared` cost nothing, too:
    they stood twice in a request, or another one was just computing them.
    """

    hits: int = 0
    misses: int = 0
    shared: int = 0


@dataclass(frozen=True, slots=True)
class Lot:
    """A request's inputs, sorted: `rows` with their `keys` are distinct and must be computed.

    Each input has its source: the vector that was kept, or its place among `rows`.
    """

    keys: Sequence[Key]
    rows: Sequence[TokenIds]
    sources: Sequence[Vector | int]

    def filled(self, reply: EmbedReply) -> EmbedReply:
        """The answer for every input, from the reply for `rows`."""
        if len(self.rows) == len(self.sources):  # all of them, in their order
            return reply
        vectors = np.empty((len(self.sources), reply.vectors.shape[1]), np.float32)
        failed, failures, cached = dict(reply.failures), [], 0
        for index, source in enumerate(self.sources):
            if not isinstance(source, int):
                vectors[index] = source
                cached += 1
                continue
            vectors[index] = reply.vectors[source]
            if source in failed:
                failures.append((index, failed[source]))
        return EmbedReply(vectors, tuple(failures), reply.queue_ms, reply.infer_ms, cached)


@dataclass(slots=True, eq=False)
class Flight:
    """A call under way. `brought` is what it came to, by input: None if it failed or was given up.

    `fault` is why it failed where nobody would fare better.
    """

    ended: asyncio.Event = field(default_factory=asyncio.Event)
    brought: Mapping[Key, Outcome] | None = None
    fault: ModelUnavailable | None = None

    def outcome(self, key: Key) -> Outcome | None:
        """What it came to for others: a vector or a fault of the input's own."""
        if self.brought is None:
            return None
        row, failure = self.brought[key]
        return None if failure is not None and failure.refundable else (row, failure)


class Reuse:
    """What one process has computed and is computing.

    Vectors are kept for the tenant who paid for them, or for everybody, as `scope` says. Work under way is
    shared within one rank only, so that nobody waits at another's pace.
    """

    def __init__(self, settings: Cache, *, bytes_max: int, clock: Callable[[], float]) -> None:
        self._scope = settings.scope
        self._clock = clock
        self._flights: dict[tuple[Rank, Key], Flight] = {}
        self.cache = RowCache(bytes_max)
        self.tally = Tally()

    def lot(self, tenant: str, served: Served, ids: Sequence[TokenIds]) -> Lot:
        """Look the inputs up."""
        owner = tenant if self._scope == "tenant" else ""
        space = (owner, served.model.id, served.revision)
        places: dict[Key, int] = {}
        rows: list[TokenIds] = []
        sources: list[Vector | int] = []
        for row in ids:
            key = space, blake2b(row.tobytes(), digest_size=DIGEST_BYTES).digest()
            source: Vector | int | None = places.get(key)
            if source is None:
                source = self.cache.get(key)
            if source is None:
                source = places[key] = len(rows)
                rows.append(row)
            sources.append(source)
        kept = sum(not isinstance(source, int) for source in sources)
        self.tally.hits += kept
        self.tally.misses += len(sources) - kept
        self.tally.shared += len(sources) - kept - len(rows)
        return Lot(list(places), rows, sources)

    async def once(
        self,
        rank: Rank,
        keys: Sequence[Key],
        rows: Sequence[TokenIds],
        ask: Ask,
        *,
        deadline_s: float,
    ) -> EmbedReply:
        """Compute distinct inputs in one call, but for those that another call of the rank computes just now.

        Its end is waited for; what it did not bring, for a reason of its own, is asked for by one of those
        who waited. Nobody waits for others before their own call has ended, so no two wait for each
        other. All waits together take `deadline_s` at most. Raises what `ask` raises, and DeadlineExceeded.
        """
        landed: dict[Key, Outcome] = {}
        wanted = dict(zip(keys, rows, strict=True))
        queue_ms = infer_ms = waited_s = 0.0
        while wanted:
            found = {key: self._flights.get((rank, key)) for key in wanted}
            own = [key for key, flight in found.items() if flight is None]
            if own:
                answer = ask([wanted[key] for key in own], deadline_s)
                reply = await self._led(rank, own, answer)
                if len(own) == len(keys):
                    return reply
                landed |= _by_key(own, reply)
                deadline_s -= reply.queue_ms / 1e3
                queue_ms, infer_ms = max(queue_ms, reply.queue_ms), max(infer_ms, reply.infer_ms)
            others = {key: flight for key, flight in found.items() if flight is not None}
            began = self._clock()
            await _ended(others.values(), deadline_s)
            took_s = self._clock() - began
            waited_s += took_s
            deadline_s -= took_s
            seen = {key: flight.outcome(key) for key, flight in others.items()}
            brought = {key: outcome for key, outcome in seen.items() if outcome is not None}
            self.tally.shared += len(brought)
            landed |= brought
            wanted = {key: wanted[key] for key in others if key not in brought}
        return _gathered([landed[key] for key in keys], max(queue_ms, waited_s * 1e3), infer_ms)

    async def _led(
        self, rank: Rank, keys: Sequence[Key], answer: Awaitable[EmbedReply]
    ) -> EmbedReply:
        """Await a call that others may follow, and keep what it brings. Raises what it raises."""
        flight = Flight()
        for key in keys:
            self._flights[rank, key] = flight
        try:
            reply = await answer
            flight.brought = _by_key(keys, reply)
        except ModelUnavailable as error:
            flight.fault = error
            raise
        finally:
            for key in keys:
                del self._flights[rank, key]
            flight.ended.set()
        for key, (row, failure) in flight.brought.items():
            if failure is None:
                self.cache.put(key, row)
        return reply


async def _ended(flights: Iterable[Flight], patience_s: float) -> None:
    """Wait for calls of others. Raises DeadlineExceeded, and ModelUnavailable where they met it."""
    try:
        async with asyncio.timeout(patience_s):
            for flight in flights:
                await flight.ended.wait()
                if flight.fault is not None:
                    raise flight.fault
    except TimeoutError:
        message = "The same text was not embedded for another request before the deadline."
        raise DeadlineExceeded(message, retry_after_s=2) from None


def _by_key(keys: Sequence[Key], reply: EmbedReply) -> dict[Key, Outcome]:
    """What became of the inputs of a call."""
    failed = dict(reply.failures)
    pairs = zip(keys, reply.vectors, strict=True)
    return {key: (row, failed.get(at)) for at, (key, row) in enumerate(pairs)}


def _gathered(outcomes: Sequence[Outcome], queue_ms: float, infer_ms: float) -> EmbedReply:
    """What several calls brought as one reply."""
    rows = np.stack([row for row, _ in outcomes])
    failures = [(at, failure) for at, (_, failure) in enumerate(outcomes) if failure is not None]
    return EmbedReply(rows, tuple(failures), queue_ms, infer_ms)
