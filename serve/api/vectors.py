"""`/v1/collections/{name}/vectors`: vectors that the user has computed."""

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Response
from pydantic import ConfigDict, Field, WithJsonSchema

from serve.api.documents import (
    ACCEPTED,
    LIST_MAX,
    METADATA_VALUE,
    PARAMETERS,
    WAIT_PARAMETER,
    answer,
    once_each,
    terms,
    wait_of,
)
from serve.api.problems import problem_body
from serve.api.receipts import raw_receipt
from serve.api.service import DEADLINE_PARAMETER, Asked
from serve.api.shapes import DocumentsWritten
from serve.api.vector_shapes import VectorList, VectorsWritten
from serve.api.wire import REF, Body, documented, read, reply, validated
from serve.content.vectors import SentVector, in_base64
from serve.errors import BadInput, ServiceError
from serve.flows.vectors import VectorResult
from serve.records import Record


router = APIRouter()
"""What is charged at class `bulk`."""

reads = APIRouter()
"""What is charged at class `interactive`."""

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


class EraseBody(Body):
    """What to delete, raw vectors and documents alike: exactly one of `ids` and `filter`."""

    model_config = ConfigDict(
        json_schema_extra={"oneOf": [{"required": ["ids"]}, {"required": ["filter"]}]}
    )

    ids: (
        Annotated[
            list[Annotated[str, Field(min_length=1)]],
            Field(fail_fast=True, min_length=1, max_length=LIST_MAX),
        ]
        | None
    ) = None
    filter: Annotated[dict[str, Any], Field(min_length=1)] | None = None


class FetchBody(Body):
    """Ids of vectors. Of a document its first chunk is shown."""

    ids: Annotated[
        list[Annotated[str, Field(min_length=1)]],
        Field(fail_fast=True, min_length=1, max_length=LIST_MAX),
    ]
    encoding_format: Literal["float", "base64"] = "float"


@router.post(
    "/v1/collections/{name}/vectors",
    openapi_extra=documented(VectorsBody, WAIT_PARAMETER, DEADLINE_PARAMETER),
    responses={200: {"model": VectorsWritten}, 207: {"model": VectorsWritten}},
)
async def write_vectors(name: str, ask: Asked) -> Response:
    """Put vectors into the index; answered when it has them.

    200 when all are there, 207 when some failed: each vector has its own status.
    """
    body = await read(ask.request, VectorsBody)
    sent = [_sent(one, at) for at, one in enumerate(body.vectors)]
    written = await ask.service.vectors.write(ask.who, name, sent, ask.until, wait_of(ask))
    failed = sum(result.status == "failed" for result in written.results)
    shown = {
        "object": "list",
        "data": [_shown(*each) for each in zip(body.vectors, written.results, strict=True)],
        "failed": failed,
        "receipt": written.receipt and raw_receipt(written.receipt, written.level),
    }
    return reply(shown, 207 if failed else 200)


@router.post(
    "/v1/collections/{name}/vectors/delete",
    openapi_extra=documented(EraseBody, *PARAMETERS),
    responses={200: {"model": DocumentsWritten}, 207: {"model": DocumentsWritten}, **ACCEPTED},
)
async def delete_vectors(name: str, ask: Asked) -> Response:
    """Delete vectors and documents by id or by filter, durably; an id that is not there is `absent`.

    By filter up to `limits.documents_max` are deleted at once, and `has_more` says whether more match.
    """
    body = await read(ask.request, EraseBody)
    if (body.ids is None) == (body.filter is None):
        raise BadInput("Give exactly one of ids and filter.", param="ids")
    asked, flows = terms(ask, body), ask.service
    if body.filter is not None:
        return answer(await flows.vectors.delete_matching(ask.who, name, body.filter, asked))
    ids = once_each(ask, body.ids or ())
    return answer(await flows.ingest.delete(ask.who, name, ids, asked))


@reads.post(
    "/v1/collections/{name}/vectors/fetch",
    openapi_extra=documented(FetchBody, DEADLINE_PARAMETER),
    responses={200: {"model": VectorList}},
)
async def fetch_vectors(name: str, ask: Asked) -> Response:
    """Vectors by id, in the order of `ids`; `missing` are those that there are not."""
    body = await read(ask.request, FetchBody)
    found = await ask.service.vectors.fetch(ask.who, name, body.ids, ask.until)
    shown = [record_shown(one, base64=body.encoding_format == "base64") for one in found.records]
    return reply({"object": "list", "data": shown, "missing": found.missing})


def record_shown(record: Record, *, base64: bool) -> dict[str, Any]:
    """A record on the wire, with its vector."""
    return {
        "id": record.document,
        "chunk": record.ordinal,
        "vector": in_base64(record.vector) if base64 else record.vector,
        "text": record.text,
        "start": record.start,
        "end": record.end,
        "metadata": dict(record.metadata),
        "generation": record.generation,
    }


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
