"""`/v1/collections/{name}/documents`: write and delete, as jobs."""

from collections.abc import Sequence
from typing import Annotated, Any, cast, get_args

from fastapi import APIRouter, Response
from pydantic import Field
from pydantic.config import JsonDict

from serve.api.idempotency import IDEMPOTENCY_PARAMETER, REPLAYED, once
from serve.api.problems import problem_body
from serve.api.receipts import receipt
from serve.api.service import DEADLINE_PARAMETER, Ask, Asked
from serve.api.shapes import DocumentsAccepted, DocumentsWritten
from serve.api.wire import Body, documented, read, reply
from serve.content.documents import Document, check_id
from serve.errors import BadInput
from serve.flows.ingest import MORE, DocumentResult, Taken, Terms
from serve.freshness import Level


router = APIRouter()

LIST_MAX = 10_000
"""The highest that `limits.documents_max` may be: nothing longer is looked at."""

GOES_ON = "Accepted and kept: the work goes on. status_url tells how far it is."

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


WAIT_PARAMETER: dict[str, Any] = {
    "name": "wait",
    "in": "query",
    "required": False,
    "description": "Answer when the documents are `accepted`, safe in the Store, when they are "
    "`indexed`, or when they are `searchable`, if that is before the deadline: the answer tells how far "
    "they are. A write of more than `jobs.background_items` documents waits for the first only, unless "
    "told otherwise; all else for the second. Raw vectors are never answered before that.",
    "schema": {"type": "string", "enum": list(get_args(Level))},
}
ACCEPTED: dict[int | str, dict[str, Any]] = {202: {"model": DocumentsAccepted}}
PARAMETERS = (WAIT_PARAMETER, DEADLINE_PARAMETER, IDEMPOTENCY_PARAMETER)


@router.post(
    "/v1/collections/{name}/documents",
    openapi_extra=documented(DocumentsBody, *PARAMETERS),
    responses={200: {"model": DocumentsWritten}, 207: {"model": DocumentsWritten}, **ACCEPTED},
)
async def write_documents(name: str, ask: Asked) -> Response:
    """Accept documents, durably; then chunk, embed and index them.

    200 when all are in the index, 207 when some failed: each document has its own status. 202 when
    their end was not waited for, or did not come in time: they go on, and the job tells how far.
    """
    body = await read(ask.request, DocumentsBody)
    documents = [Document(one.id, one.text, one.metadata) for one in body.documents]
    asked = terms(ask, body, priority=body.priority)
    return answer(await ask.service.ingest.write(ask.who, name, documents, asked))


@router.delete(
    "/v1/collections/{name}/documents",
    openapi_extra=documented(DeleteBody, *PARAMETERS),
    responses={200: {"model": DocumentsWritten}, 207: {"model": DocumentsWritten}, **ACCEPTED},
)
async def delete_documents(name: str, ask: Asked) -> Response:
    """Delete documents by id, durably as they are written; one that does not exist is `absent`."""
    body = await read(ask.request, DeleteBody)
    ids = once_each(ask, body.ids)
    return answer(await ask.service.ingest.delete(ask.who, name, ids, terms(ask, body)))


def once_each(ask: Ask, ids: Sequence[str]) -> list[str]:
    """Ids of documents, each once. Raises BadInput, by its place, for what is none."""
    limits = ask.service.context.settings.limits
    if len(ids) > limits.documents_max:
        raise BadInput(f"At most {limits.documents_max} ids are allowed.", param="ids")
    for position, document in enumerate(ids):
        check_id(document, f"ids[{position}]", limits)
    return list(dict.fromkeys(ids))


def terms(ask: Ask, body: Body, priority: int = 50) -> Terms:
    """What the request says of how it is to be done. Raises BadInput."""
    kept_s = ask.service.context.settings.jobs.idempotency_kept_s
    return Terms(wait_of(ask), ask.until, once(ask.request, body, kept_s), priority)


def wait_of(ask: Ask) -> Level | None:
    """How far the request waits, where it says so. Raises BadInput."""
    wait = ask.request.query_params.get("wait")
    if wait is not None and wait not in get_args(Level):
        raise BadInput("wait must be `accepted`, `indexed` or `searchable`.", param="wait")
    return cast("Level | None", wait)


def answer(taken: Taken) -> Response:
    """What became of documents, or a receipt for them."""
    headers = {"location": f"/v1/jobs/{taken.job.id}"}
    if taken.replayed:
        headers[REPLAYED] = "true"
    more = {MORE: taken.job.spec[MORE]} if MORE in taken.job.spec else {}
    if taken.level == "accepted":
        proof = {**receipt(taken.job.id, taken.level, taken.documents), "detail": GOES_ON, **more}
        if taken.results:
            proof["data"] = [_shown(result) for result in taken.results]
        return reply(proof, 202, headers)
    failed = sum(result.status in ("failed", "cancelled") for result in taken.results)
    shown = {
        "object": "list",
        "data": [_shown(result) for result in taken.results],
        "failed": failed,
        "usage": {"total_tokens": sum(result.tokens for result in taken.results)},
        "receipt": receipt(taken.job.id, taken.level, taken.documents),
        **more,
    }
    return reply(shown, 207 if failed else 200, headers)


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
