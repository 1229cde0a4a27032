"""`POST /v1/collections/{name}/search`: query -> vector -> nearest chunks."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from serve.errors import BadInput
from serve.flows.collections import CollectionFlow
from serve.flows.context import Context
from serve.flows.embed import EmbedFlow, EmbedRequest, Work, named
from serve.index.filters import parse
from serve.ports import Index
from serve.records import Caller, Collection, Hit, TokenIds, Vector


@dataclass(frozen=True, slots=True)
class SearchRequest:
    """Exactly one of `text` and `vector` is set; `where` is the filter as JSON."""

    text: str | None
    vector: Sequence[float] | None
    top_k: int
    where: Mapping[str, Any] | None


@dataclass(frozen=True, slots=True)
class Found:
    """Hits, best first, and the tokens that the query cost."""

    hits: Sequence[Hit]
    tokens: int


class SearchFlow:
    """Searches one collection of the caller; reads the index directly."""

    def __init__(
        self,
        context: Context,
        collections: CollectionFlow,
        embed: EmbedFlow,
        index: Index,
    ) -> None:
        self._settings = context.settings
        self._models = context.models
        self._quotas = context.quotas
        self._clock = context.clock
        self._collections = collections
        self._embed = embed
        self._index = index

    async def search(
        self, caller: Caller, name: str, request: SearchRequest, request_id: str
    ) -> Found:
        """The nearest chunks.

        Raises NotFound, BadInput, QuotaExceeded, and what `ports.Embedder.embed` and the index
        raise; a query that was not answered by our fault is refunded.
        """
        if not 1 <= request.top_k <= self._settings.limits.top_k_max:
            raise BadInput(
                f"top_k must be between 1 and {self._settings.limits.top_k_max}.", param="top_k"
            )
        where = None
        if request.where is not None:
            where = parse(request.where, terms_max=self._settings.limits.filter_terms_max)
        collection = await self._collections.find(caller, name)
        if request.vector is not None:
            vector = _unit(request.vector, collection.dimensions)
            with self._quotas.admitted(caller, "interactive", tokens=0, now=self._clock()):
                return Found(
                    await self._index.query(collection.uuid, vector, request.top_k, where), 0
                )
        ids = await self._tokenised(collection, request.text or "")
        with self._quotas.admitted(caller, "interactive", tokens=len(ids), now=self._clock()):
            vector = await self._embedded(caller, collection, ids, request_id)
            hits = await self._index.query(collection.uuid, vector, request.top_k, where)
        return Found(hits, len(ids))

    async def count(self, collection: Collection) -> int:
        """Records of a collection."""
        return (await self._index.stats(collection.uuid)).records

    async def _tokenised(self, collection: Collection, text: str) -> TokenIds:
        self._collections.servable(collection)
        served = self._models.find(collection.model)
        query = served.model.query_prefix + text
        rows, _ = await self._embed.tokenise(
            served, EmbedRequest(collection.model, texts=[query], param="text")
        )
        return rows[0]

    async def _embedded(
        self, caller: Caller, collection: Collection, ids: TokenIds, request_id: str
    ) -> Vector:
        work = Work(caller, request_id, "interactive", self._settings.limits.interactive_deadline_s)
        reply = await self._embed.run(work, self._models.find(collection.model), [ids])
        if reply.failures:
            raise named(reply.failures[0][1], "text")
        vector: Vector = reply.vectors[0]
        return vector


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
