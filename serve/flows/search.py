"""`POST /v1/collections/{name}/search`: query -> vector -> nearest chunks."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from serve.errors import BadInput
from serve.flows.collections import CollectionFlow
from serve.flows.context import Context
from serve.flows.embed import EmbedFlow, EmbedRequest
from serve.index.filters import parse
from serve.ports import Index
from serve.records import Caller, Collection, Hit, Vector


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
        """The nearest chunks. Raises NotFound, BadInput, and what embedding the query raises."""
        if not 1 <= request.top_k <= self._settings.limits.top_k_max:
            raise BadInput(
                f"top_k must be between 1 and {self._settings.limits.top_k_max}.", param="top_k"
            )
        where = None
        if request.where is not None:
            where = parse(request.where, terms_max=self._settings.limits.filter_terms_max)
        collection = await self._collections.find(caller, name)
        vector, tokens = await self._vector(caller, collection, request, request_id)
        hits = await self._index.query(collection.uuid, vector, request.top_k, where)
        return Found(hits, tokens)

    async def count(self, collection: Collection) -> int:
        """Records of a collection."""
        return (await self._index.stats(collection.uuid)).records

    async def _vector(
        self, caller: Caller, collection: Collection, request: SearchRequest, request_id: str
    ) -> tuple[Vector, int]:
        if request.vector is not None:
            vector = _checked(request.vector, collection.dimensions)
            self._quotas.admit(caller, "interactive", tokens=0, now=self._clock())
            return vector, 0
        self._collections.servable(collection)
        prefix = self._models.find(collection.model).model.query_prefix
        wanted = EmbedRequest(collection.model, texts=[prefix + (request.text or "")])
        embedded = await self._embed.embed(caller, wanted, request_id)
        return embedded.vectors[0], embedded.tokens


def _checked(values: Sequence[float], dimensions: int) -> Vector:
    """A caller's own vector. Raises BadInput when it cannot be compared by cosine."""
    if len(values) != dimensions:
        raise BadInput(
            f"vector has {len(values)} dimensions, the collection {dimensions}.", param="vector"
        )
    vector = np.asarray(values, np.float32)
    norm = float(np.linalg.norm(vector.astype(np.float64)))
    if not np.isfinite(norm) or norm == 0.0:
        raise BadInput("vector must be finite and not all zero.", param="vector")
    return vector
