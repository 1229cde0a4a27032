"""`/v1/collections/{name}/documents`: write and delete."""

from typing import Annotated, Any

from fastapi import APIRouter, Response
from pydantic import Field
from pydantic.config import JsonDict

from serve.api.problems import problem_body
from serve.api.service import DEADLINE_PARAMETER, Asked
from serve.api.shapes import DocumentsDeleted, DocumentsWritten
from serve.api.wire import Body, documented, read, reply
from serve.content.documents import Document
from serve.errors import BadInput
from serve.flows.landing import DocumentResult


router = APIRouter()

LIST_MAX = 10_000
"""The highest that `limits.documents_max` may be: nothing longer is looked at."""


METADATA_VALUE: JsonDict = {
    "anyOf": [
        {"type": ["string", "number", "boolean"]},
        {"type": "array", "items": {"type": "string"}},
    ]
}


class DocumentBody(Body):
    """One document. `metadata` is a flat object of strings, numbers, booleans, string lists."""

    id: str
    text: str
    metadata: dict[str, Any] = Field(
        default_factory=dict, json_schema_extra={"additionalProperties": METADATA_VALUE}
    )


class DocumentsBody(Body):
    """Documents to write: a document of the same id is replaced.

    `priority` orders the tenant's own bulk work, higher first, and nobody else's.
    """

    documents: Annotated[
        list[DocumentBody], Field(fail_fast=True, min_length=1, max_length=LIST_MAX)
    ]
    priority: Annotated[int, Field(ge=0, le=100)] = 50


class DeleteBody(Body):
    """Ids of documents to delete."""

    ids: Annotated[
        list[Annotated[str, Field(min_length=1)]],
        Field(fail_fast=True, min_length=1, max_length=LIST_MAX),
    ]


@router.post(
    "/v1/collections/{name}/documents",
    openapi_extra=documented(DocumentsBody, DEADLINE_PARAMETER),
    responses={200: {"model": DocumentsWritten}, 207: {"model": DocumentsWritten}},
)
async def write_documents(name: str, ask: Asked) -> Response:
    """Chunk, embed and index documents; answered when they can be searched.

    200 when all were written, 207 when some failed: each document has its own status.
    """
    body = await read(ask.request, DocumentsBody)
    documents = [Document(one.id, one.text, one.metadata) for one in body.documents]
    written = await ask.service.ingest.write(
        ask.who, name, documents, ask.id, until=ask.until, priority=body.priority
    )
    ask.timed(written.timing)
    failed = sum(result.status == "failed" for result in written.results)
    answer = {
        "object": "list",
        "data": [_shown(result) for result in written.results],
        "failed": failed,
        "usage": {"total_tokens": sum(result.tokens for result in written.results)},
    }
    return reply(answer, 207 if failed else 200)


@router.delete(
    "/v1/collections/{name}/documents",
    openapi_extra=documented(DeleteBody, DEADLINE_PARAMETER),
    responses={200: {"model": DocumentsDeleted}},
)
async def delete_documents(name: str, ask: Asked) -> Response:
    """Delete documents by id; one that does not exist is `absent`."""
    body = await read(ask.request, DeleteBody)
    ids_max = ask.service.context.settings.limits.documents_max
    if len(body.ids) > ids_max:
        raise BadInput(f"At most {ids_max} ids are allowed.", param="ids")
    ids = list(dict.fromkeys(body.ids))
    results = await ask.service.ingest.delete(ask.who, name, ids, until=ask.until)
    return reply({"object": "list", "data": [_shown(result) for result in results]})


def _shown(result: DocumentResult) -> dict[str, Any]:
    shown: dict[str, Any] = {
        "id": result.document,
        "status": result.status,
        "generation": result.generation,
        "chunks": result.chunks,
    }
    if result.error is not None:
        shown["error"] = problem_body(result.error)
    return shown
