"""`POST /v1/collections/{name}/search`."""

from typing import Annotated, Any

from fastapi import APIRouter, Response
from pydantic import BeforeValidator, ConfigDict, Field, WithJsonSchema

from serve.api.search_shapes import SearchList
from serve.api.service import DEADLINE_PARAMETER, Asked
from serve.api.wire import Body, Id, documented, read, reply
from serve.errors import BadInput
from serve.flows.search import Rerank, SearchRequest
from serve.records import Hit, Mode


router = APIRouter()

AFTER_MAX = 16
"""Receipts of one search: each costs a look into the Store."""

_ID = {"type": "string", "minLength": 1, "maxLength": 128}
ONE_OR_MORE = {
    "anyOf": [_ID, {"type": "array", "items": _ID, "minItems": 1, "maxItems": AFTER_MAX}]
}


class RerankWish(Body):
    """Which reranker sorts the best `candidates` again; the first, and a setting, unless it says so."""

    model: str | None = None
    candidates: Annotated[int, Field(ge=1)] | None = None


class SearchBody(Body):
    """What to look for: exactly one of `text` and `vector` in mode `vector`, and what ranks.

    Mode `text` ranks by the words of `text`. `hybrid` fuses that with the nearest to `vector`, or to
    the vector of `text`. `filter` is Mongo-like: `{"year": {"$gte": 1990}, "kind": "entry"}`. `after` is
    the id of a receipt, or a list of them: the search waits, until the deadline, until it sees those
    writes.
    """

    model_config = ConfigDict(
        json_schema_extra={"anyOf": [{"required": ["text"]}, {"required": ["vector"]}]}
    )

    text: Annotated[str, Field(min_length=1)] | None = None
    vector: (
        Annotated[list[float], Field(fail_fast=True, min_length=1, max_length=100_000)] | None
    ) = None
    mode: Mode = "vector"
    top_k: Annotated[int, Field(ge=1)] = 10
    rerank: RerankWish | None = None
    filter: dict[str, Any] | None = None
    after: Annotated[
        list[Id],
        Field(min_length=1, max_length=AFTER_MAX),
        BeforeValidator(lambda value: [value] if isinstance(value, str) else value),
        WithJsonSchema(ONE_OR_MORE),
    ] = Field(default_factory=list)


@router.post(
    "/v1/collections/{name}/search",
    openapi_extra=documented(SearchBody, DEADLINE_PARAMETER),
    responses={200: {"model": SearchList}},
)
async def search(name: str, ask: Asked) -> Response:
    """The best chunks, best first, with score, text and offsets."""
    wanted = _wanted(await read(ask.request, SearchBody))
    found = await ask.service.search.search(ask.who, name, wanted, ask.id, until=ask.until)
    ask.timed(found.timing)
    return reply(
        {
            "object": "list",
            "data": [_shown(hit) for hit in found.hits],
            "usage": {"prompt_tokens": found.tokens, "total_tokens": found.tokens},
        }
    )


def _wanted(body: SearchBody) -> SearchRequest:
    """Raises BadInput for a mode without what it ranks by."""
    if body.mode == "vector" and (body.text is None) == (body.vector is None):
        raise BadInput("Send exactly one of text and vector.", param="text")
    if body.mode != "vector" and body.text is None:
        raise BadInput(f"Mode {body.mode} takes a text.", param="text")
    if body.mode == "text" and body.vector is not None:
        raise BadInput("Mode text takes no vector.", param="vector")
    wish = body.rerank
    rerank = None if wish is None else Rerank(wish.model, wish.candidates)
    return SearchRequest(
        body.text, body.vector, body.top_k, body.filter, body.mode, rerank, body.after
    )


def _shown(hit: Hit) -> dict[str, Any]:
    record = hit.record
    return {
        "document": record.document,
        "score": hit.score,
        "chunk": record.ordinal,
        "text": record.text,
        "start": record.start,
        "end": record.end,
        "metadata": dict(record.metadata),
    }
