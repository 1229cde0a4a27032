"""`POST /v1/rerank`: requests and replies as Cohere's first version, Jina and Infinity have them."""

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Response
from pydantic import Field

from serve.api.search_shapes import RerankList
from serve.api.service import DEADLINE_PARAMETER, Asked
from serve.api.wire import Body, documented, read, reply
from serve.flows.rerank import RerankRequest, Scored


router = APIRouter()


class RerankBody(Body):
    """Documents to sort by how well each answers the query.

    `truncate: END` lets too long a document lose its end, which the reply says; the query is never cut.
    """

    query: Annotated[str, Field(min_length=1)]
    documents: Annotated[list[str], Field(min_length=1, max_length=10_000)]
    model: str | None = None
    top_n: Annotated[int, Field(ge=1)] | None = None
    return_documents: bool = False
    truncate: Literal["NONE", "END"] = "NONE"


@router.post(
    "/v1/rerank",
    openapi_extra=documented(RerankBody, DEADLINE_PARAMETER),
    responses={200: {"model": RerankList}},
)
async def rerank(ask: Asked) -> Response:
    """The documents, best first, each with its relevance from 0 to 1."""
    body = await read(ask.request, RerankBody)
    wanted = RerankRequest(body.query, body.documents, body.model, body.truncate)
    scored = await ask.service.rerank.rerank(ask.who, wanted, ask.id, until=ask.until)
    ask.timed(scored.timing)
    return reply(_answer(scored, body))


def _answer(scored: Scored, body: RerankBody) -> dict[str, Any]:
    results: list[dict[str, Any]] = []
    for index in scored.best(body.top_n or len(body.documents)):
        result: dict[str, Any] = {"index": index, "relevance_score": scored.scores[index]}
        if body.return_documents:
            result["document"] = {"text": body.documents[index]}
        results.append(result)
    answer: dict[str, Any] = {
        "object": "list",
        "model": scored.model,
        "results": results,
        "usage": {"prompt_tokens": scored.tokens, "total_tokens": scored.tokens},
    }
    if scored.cuts:
        answer["truncated"] = [
            {"index": cut.index, "tokens": cut.tokens, "used": cut.used} for cut in scored.cuts
        ]
    return answer
