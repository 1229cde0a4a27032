"""`POST /v1/collections/{name}/search`: query -> vector -> nearest chunks."""

from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np

from serve.errors import BadInput
from serve.flows.collections import CollectionFlow
from serve.flows.context import Context, Timing, within
from serve.flows.embed import EmbedFlow, EmbedRequest, Work, named
from serve.flows.receipts import ReceiptFlow
from serve.index.filters import parse
from serve.ports import Index
from serve.records import Caller, Collection, Filter, Hit, Vector


@dataclass(frozen=True, slots=True)
class SearchRequest:
    """Exactly one of `text` and `vector` is set; `where` is the filter as JSON.

    `after` are receipts of writes that the search must see.
    """

    text: str | None
    vector: Sequence[float] | None
    top_k: int
    where: Mapping[str, Any] | None
    after: Sequence[str] = ()


@dataclass(frozen=True, slots=True)
class Found:
    """Hits, best first, and the tokens that the query cost."""

    hits: Sequence[Hit]
    tokens: int
    timing: Timing


class SearchFlow:
    """Searches one collection of the caller; reads the index directly."""

    def __init__(
        self,
        context: Context,
        collections: CollectionFlow,
        embed: EmbedFlow,
        index: Index,
        receipts: ReceiptFlow,
    ) -> None:
        self._settings = context.settings
        self._models = context.models
        self._quotas = context.quotas
        self._clock = context.clock
        self._collections = collections
        self._embed = embed
        self._index = index
        self._receipts = receipts

    async def search(
        self,
        caller: Caller,
        name: str,
        request: SearchRequest,
        request_id: str,
        *,
        until: float | None = None,
    ) -> Found:
        """The nearest chunks.

        Raises NotFound, BadInput, QuotaExceeded, DeadlineExceeded, what `ReceiptFlow.wait`,
        `ports.Embedder.embed` and the index raise; a query that was not answered by our fault is
        refunded.
        """
        if not 1 <= request.top_k <= self._settings.limits.top_k_max:
            raise BadInput(
                f"top_k must be between 1 and {self._settings.limits.top_k_max}.", param="top_k"
            )
        where = None
        if request.where is not None:
            where = parse(request.where, terms_max=self._settings.limits.filter_terms_max)
        deadline_s = self._settings.limits.interactive_deadline_s
        work = Work(caller, request_id, "interactive", deadline_s, until)
        admitted = self._quotas.admitted(caller, "interactive", tokens=0)
        async with AsyncExitStack() as stack:
            async with within(until, self._clock):
                await stack.enter_async_context(admitted)
                collection = await self._collections.find(caller, name)
            # Outside: who waits in vain for a write is told that, not that it was too late.
            await self._receipts.wait(caller, collection, request.after, until)
            async with within(until, self._clock):
                if request.vector is None:
                    return await self._by_text(work, collection, request, where)
                vector = _unit(request.vector, collection.dimensions)
                hits = await self._index.query(collection.uuid, vector, request.top_k, where)
                return Found(hits, 0, Timing())

    async def count(self, collection: Collection) -> int:
        """Records of a collection."""
        return (await self._index.stats(collection.uuid)).records

    async def _by_text(
        self, work: Work, collection: Collection, request: SearchRequest, where: Filter | None
    ) -> Found:
        self._collections.servable(collection)
        served = self._models.find(collection.model)
        query = served.model.query_prefix + (request.text or "")
        began = self._clock()
        ids, _ = await self._embed.tokenise(
            served, EmbedRequest(collection.model, texts=[query], param="text")
        )
        tokenise_ms = (self._clock() - began) * 1e3
        tokens = len(ids[0])
        async with self._quotas.admitted(
            work.caller, work.klass, tokens=tokens, requests=0, param="text"
        ):
            reply = await self._embed.run(work, served, ids)
            if reply.failures:
                raise named(reply.failures[0][1], "text")
            vector: Vector = reply.vectors[0]
            hits = await self._index.query(collection.uuid, vector, request.top_k, where)
        return Found(hits, tokens, Timing(tokenise_ms, reply.queue_ms, reply.infer_ms))


def _unit(values: Sequence[float], dimensions: int) -> Vector:
    """A caller's own vector at unit length, so that neither its square nor its product overflows.

    Raises BadInput when it cannot be compared by cosine.
    """
    if len(values) != dimensions:
        raise BadInput(
            f"vector has {len(values)} dimensions, the collection {dimensions}.", param="vector"
        )
    wide = np.asarray(values, np.float64)
    largest = float(np.max(np.abs(wide)))
    if not np.isfinite(largest) or largest == 0.0:
        raise BadInput("vector must be finite and not all zero.", param="vector")
    wide = wide / largest  # 1e-300 and 1e300 alike: their squares would not be numbers
    unit: Vector = (wide / np.linalg.norm(wide)).astype(np.float32)
    return unit
