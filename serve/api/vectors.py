"""`/v1/collections/{name}/vectors`: vectors that the user has computed."""

from typing import Annotated, Any

from fastapi import APIRouter, Response
from pydantic import Field, WithJsonSchema

from serve.api.documents import LIST_MAX, METADATA_VALUE
from serve.api.problems import problem_body
from serve.api.service import DEADLINE_PARAMETER, Asked
from serve.api.shapes import VectorsWritten
from serve.api.wire import REF, Body, documented, read, reply, validated
from serve.content.vectors import SentVector
from serve.errors import BadInput, ServiceError
from serve.flows.vectors import VectorResult


router = APIRouter()
"""What is charged at class `bulk`."""

NUMBERS_OR_BASE64 = {
    "anyOf": [
        {"type": "array", "items": {"type": "number"}, "minItems": 1},
        {"type": "string", "format": "byte", "description": "Little-endian float32."},
    ]
}


class VectorBody(Body):
    """One vector, of the collection's dimensions; it is kept at the length that it has.

    `metadata` is a flat object of strings, numbers, booleans, string lists. `text` comes back with
    search results.
    """

    id: str
    vector: Annotated[Any, WithJsonSchema(NUMBERS_OR_BASE64)]
    text: str = ""
    metadata: dict[str, Any] = Field(
        default_factory=dict, json_schema_extra={"additionalProperties": METADATA_VALUE}
    )


class VectorsBody(Body):
    """Vectors to write: what has the id of one of them is replaced."""

    vectors: Annotated[
        list[Any],
        Field(
            min_length=1,
            max_length=LIST_MAX,
            json_schema_extra={"items": {"$ref": REF.format(model="VectorBody")}},
        ),
    ]


@router.post(
    "/v1/collections/{name}/vectors",
    openapi_extra=documented(VectorsBody, DEADLINE_PARAMETER),
    responses={200: {"model": VectorsWritten}, 207: {"model": VectorsWritten}},
)
async def write_vectors(name: str, ask: Asked) -> Response:
    """Put vectors into the index; answered when they can be found.

    200 when all are there, 207 when some failed: each vector has its own status.
    """
    body = await read(ask.request, VectorsBody)
    sent = [_sent(one, at) for at, one in enumerate(body.vectors)]
    results = await ask.service.vectors.write(ask.who, name, sent, ask.until)
    failed = sum(result.status == "failed" for result in results)
    shown = [_shown(one, result) for one, result in zip(body.vectors, results, strict=True)]
    return reply({"object": "list", "data": shown, "failed": failed}, 207 if failed else 200)


def _sent(item: object, at: int) -> SentVector | ServiceError:
    """One vector of a body, or why it cannot be read: that is no reason to refuse the others."""
    try:
        one = validated(item, VectorBody, "vectors", at)
    except BadInput as error:
        return error
    return SentVector(one.id, one.vector, one.text, one.metadata)


def _shown(item: object, result: VectorResult) -> dict[str, Any]:
    named = item.get("id") if isinstance(item, dict) else None
    shown: dict[str, Any] = {
        "id": named if isinstance(named, str) else None,
        "status": result.status,
        "generation": result.generation,
    }
    if result.error is not None:
        shown["error"] = problem_body(result.error)
    return shown
