"""`POST /v1/collections/{name}/search`: query -> vector -> nearest chunks; or words, or both fused."""

import asyncio
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np

from serve.errors import BadInput
from serve.flows.collections import CollectionFlow
from serve.flows.context import Context, Timing, within
from serve.flows.embed import EmbedFlow, EmbedRequest, Work, named
from serve.flows.fusion import fuse
from serve.flows.models import Served
from serve.flows.receipts import ReceiptFlow
from serve.flows.rerank import RerankFlow, RerankRequest
from serve.index.filters import parse
from serve.index.full_text import WORD_BYTES_MAX, unsupported, words
from serve.ports import Index
from serve.records import Caller, Collection, Filter, Hit, Mode, Vector


@dataclass(frozen=True, slots=True)
class Rerank:
    """How many hits a reranker looks at, and which; None: what the settings say, and the first."""

    model: str | None = None
    candidates: int | None = None


@dataclass(frozen=True, slots=True)
class SearchRequest:
    """`where` is the filter as JSON.

    Mode `vector` takes one of `text` and `vector`, `text` a text, and `hybrid` a text, and with it a
    vector where that is not to be the text's own. `rerank` needs a text. `after` are receipts of writes
    that the search must see.
    """

    text: str | None
    vector: Sequence[float] | None
    top_k: int
    where: Mapping[str, Any] | None
    mode: Mode = "vector"
    rerank: Rerank | None = None
    after: Sequence[str] = ()


@dataclass(frozen=True, slots=True)
class Found:
    """Hits, best first, and the tokens that the query cost, with those of a reranker."""

    hits: Sequence[Hit]
    tokens: int
    timing: Timing


@dataclass(frozen=True, slots=True)
class _Plan:
    """A request that was checked: `depth` hits are ranked, and `top_k` of them shown."""

    request: SearchRequest
    where: Filter | None
    depth: int
    reranker: Served | None = None


class SearchFlow:
    """Searches one collection of the caller; reads the index directly."""

    def __init__(
        self,
        context: Context,
        collections: CollectionFlow,
        embed: EmbedFlow,
        rerank: RerankFlow,
        *,
        index: Index,
        receipts: ReceiptFlow,
    ) -> None:
        self._settings = context.settings
        self._models = context.models
        self._quotas = context.quotas
        self._clock = context.clock
        self._collections = collections
        self._embed = embed
        self._rerank = rerank
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
        """The best chunks.

        Raises NotFound, BadInput, QuotaExceeded, DeadlineExceeded, what `ReceiptFlow.wait`,
        `ports.Embedder.embed` and the index raise; a query that was not answered by our fault is
        refunded.
        """
        plan = self._plan(request)
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
                if request.mode == "text":
                    return await self._answer(work, collection, plan, None)
                if request.vector is None:
                    return await self._by_text(work, collection, plan)
                vector = _unit(request.vector, collection.dimensions)
                return await self._answer(work, collection, plan, vector)

    async def count(self, collection: Collection) -> int:
        """Records of a collection."""
        return (await self._index.stats(collection.uuid)).records

    def _plan(self, request: SearchRequest) -> _Plan:
        """What can be said without looking at the collection. Raises BadInput, NotFound."""
        limits, search = self._settings.limits, self._settings.search
        if not 1 <= request.top_k <= limits.top_k_max:
            raise BadInput(f"top_k must be between 1 and {limits.top_k_max}.", param="top_k")
        if request.mode != "vector":
            if not self._index.caps.full_text:
                raise unsupported()
            _check_words(request.text or "", search.words_max)
        where = None
        if request.where is not None:
            where = parse(request.where, terms_max=limits.filter_terms_max)
        wish = request.rerank
        if wish is None:
            return _Plan(request, where, request.top_k)
        if request.text is None:
            raise BadInput("rerank takes a text, which the hits are compared with.", param="rerank")
        most = limits.rerank_documents_max
        depth = max(request.top_k, search.rerank_candidates)
        depth = wish.candidates if wish.candidates is not None else min(depth, most)
        if not request.top_k <= depth <= most:
            raise BadInput(
                f"rerank.candidates must be between top_k, {request.top_k}, and {most}.",
                param="rerank.candidates",
            )
        return _Plan(request, where, depth, self._rerank.find(wish.model, param="rerank.model"))

    async def _answer(
        self, work: Work, collection: Collection, plan: _Plan, vector: Vector | None
    ) -> Found:
        """The best of what the mode ranks, in its order or in that of the reranker."""
        hits = await self._ranked(collection.uuid, plan, vector)
        if plan.reranker is None or not hits:
            return Found(hits, 0, Timing())
        scored = await self._rerank.score(
            work,
            plan.reranker,
            RerankRequest(
                plan.request.text or "",
                [hit.record.text for hit in hits],
                truncate="END",
                query_param="text",
                param="rerank",
            ),
        )
        best = [
            Hit(hits[index].record, scored.scores[index])
            for index in scored.best(plan.request.top_k)
        ]
        return Found(best, scored.tokens, scored.timing)

    async def _ranked(self, ns: str, plan: _Plan, vector: Vector | None) -> Sequence[Hit]:
        """By words, by the vector, or by both."""
        text, where, depth = plan.request.text or "", plan.where, plan.depth
        if vector is None:
            return await self._index.match(ns, text, depth, where)
        if plan.request.mode == "vector":
            return await self._index.query(ns, vector, depth, where)
        settings = self._settings.search
        most = max(depth, settings.candidates)
        try:
            async with asyncio.TaskGroup() as group:
                near = group.create_task(self._index.query(ns, vector, most, where))
                worded = group.create_task(self._index.match(ns, text, most, where))
        except ExceptionGroup as errors:
            raise errors.exceptions[0] from None
        return fuse([near.result(), worded.result()], k=settings.rrf_k, top_k=depth)

    async def _by_text(self, work: Work, collection: Collection, plan: _Plan) -> Found:
        """By the vector of the text, where the mode wants one."""
        self._collections.servable(collection)
        served = self._models.find(collection.model)
        query = served.model.query_prefix + (plan.request.text or "")
        began = self._clock()
        ids, _ = await self._embed.tokenise(
            served, EmbedRequest(collection.model, texts=[query], param="text")
        )
        tokenise_ms = (self._clock() - began) * 1e3
        tokens = len(ids[0])
        async with self._quotas.admitted(
            work.caller,
            work.klass,
            tokens=tokens,
            requests=0,
            param="text",
            model=served.model.id,
        ):
            reply = await self._embed.run(work, served, ids)
            if reply.failures:
                raise named(reply.failures[0][1], "text")
            found = await self._answer(work, collection, plan, reply.vectors[0])
        own = Timing(tokenise_ms, reply.queue_ms, reply.infer_ms)
        return Found(found.hits, tokens + found.tokens, own.then(found.timing))


def _check_words(text: str, words_max: int) -> None:
    """Raises BadInput for more than an index is to look for; long texts are not even read."""
    chars_max = words_max * WORD_BYTES_MAX
    if len(text) > chars_max or len(set(words(text))) > words_max:
        raise BadInput(
            f"To search by words text may have {words_max} different words and {chars_max} characters.",
            param="text",
        )


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
