"""Replies of searches and of reranking as OpenAPI shows them."""

from typing import Any, Literal

from serve.api.shapes import Shape, Truncated, Usage


class SearchHit(Shape):
    """A chunk; `text == document[start:end]`.

    `score` is the cosine similarity in mode `vector`, BM25 in mode `text`, and in mode `hybrid` the sum
    of 1/(60 + rank) over the two rankings; a reranker's is its relevance, from 0 to 1. Only cosines and
    relevances compare between requests.
    """

    document: str
    score: float
    chunk: int
    text: str
    start: int
    end: int
    metadata: dict[str, Any]


class SearchList(Shape):
    """The best chunks, best first."""

    object: Literal["list"]
    data: list[SearchHit]
    usage: Usage


class RerankedDocument(Shape):
    """The text as it was sent."""

    text: str


class RerankResult(Shape):
    """`index` is the document's place in the request. `document` is there when it was asked for."""

    index: int
    relevance_score: float
    document: RerankedDocument | None = None


class RerankList(Shape):
    """Documents, best first. `truncated` is there when one was cut; its counts are of the pair."""

    object: Literal["list"]
    model: str
    results: list[RerankResult]
    usage: Usage
    truncated: list[Truncated] | None = None
