"""`/v1/files`, as OpenAI's specification has it, for batches."""

import re
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any, cast, get_args

from fastapi import APIRouter, Request, Response
from starlette.datastructures import FormData, UploadFile
from starlette.exceptions import HTTPException

from serve.api.openai_shapes import FileDeleted, FileList, FileShown
from serve.api.service import Asked
from serve.api.sse import HeldStream
from serve.api.wire import page_size, query, reply
from serve.content.blobs import PIECE_BYTES
from serve.errors import BadInput, NotSatisfiable
from serve.items import Order, StoredFile


router = APIRouter()
"""What is charged, at class `bulk`."""

free = APIRouter()
"""What is not."""

FILES_MAX = 10_000
"""Files in a page, also unless asked for."""

FIELDS_MAX = 8
FIELD_BYTES_MAX = 4096
"""Of a form, beside its file."""

EXPIRES_S_MIN, EXPIRES_S_MAX = 3600, 30 * 86_400
"""What OpenAI lets `expires_after` be."""

FORM: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["file", "purpose"],
                    "properties": {
                        "file": {"type": "string", "format": "binary"},
                        "purpose": {"type": "string", "enum": ["batch"]},
                        "expires_after[anchor]": {"type": "string", "enum": ["created_at"]},
                        "expires_after[seconds]": {
                            "type": "integer",
                            "minimum": EXPIRES_S_MIN,
                            "maximum": EXPIRES_S_MAX,
                        },
                    },
                }
            }
        },
    }
}
_BINARY = {
    "content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}
}
BYTES: dict[int | str, dict[str, Any]] = {
    200: _BINARY,
    206: {"description": "The range", **_BINARY},
}
RANGE: dict[str, Any] = {
    "parameters": [
        {
            "name": "Range",
            "in": "header",
            "required": False,
            "description": "`bytes=START-` or `bytes=START-END`, both included; others are ignored.",
            "schema": {"type": "string"},
        }
    ]
}
_SPAN = re.compile(r"bytes=([0-9]{1,15})-([0-9]{0,15})")
_SECONDS = re.compile(r"[0-9]{1,9}")


@router.post("/v1/files", openapi_extra=FORM, responses={200: {"model": FileShown}})
async def upload_file(ask: Asked) -> Response:
    """Keep a file of JSON lines for a batch; the form's other fields may stand before or after it."""
    async with ask.service.files.charged(ask.who), _form(ask.request) as form:
        sent = _file(form)
        kept = await ask.service.files.upload(
            ask.who, sent.filename or "", _pieces(sent), expires_s=_expires_s(form)
        )
    return reply(shown(kept))


@free.get(
    "/v1/files",
    openapi_extra={
        "parameters": [
            query("purpose", "`batch` or `batch_output`: only those."),
            query("order", "`asc` or `desc` (default), by age."),
            query("after", "The id of the last file of the page before."),
            query("limit", "Files in a page.", minimum=1, maximum=FILES_MAX),
        ]
    },
    responses={200: {"model": FileList}},
)
async def list_files(ask: Asked) -> Response:
    """The tenant's files by age, the newest first unless told otherwise."""
    asked = ask.request.query_params
    order = asked.get("order", "desc")
    if order not in get_args(Order):
        raise BadInput("order must be asc or desc.", param="order")
    limit = page_size(ask.request, FILES_MAX, FILES_MAX)
    files = await ask.service.files.list(
        ask.who,
        purpose=asked.get("purpose"),
        order=cast("Order", order),
        after=asked.get("after", ""),
        limit=limit + 1,
    )
    return reply(page([shown(file) for file in files], limit))


@free.get("/v1/files/{file_id}", responses={200: {"model": FileShown}})
async def find_file(file_id: str, ask: Asked) -> Response:
    """One file."""
    return reply(shown(await ask.service.files.find(ask.who, file_id)))


@free.get(
    "/v1/files/{file_id}/content",
    status_code=200,
    response_class=HeldStream,
    openapi_extra=RANGE,
    responses=BYTES,
)
async def read_file(file_id: str, ask: Asked) -> Response:
    """A file's bytes, or one range of them: a download that broke off goes on where it was."""
    file = await ask.service.files.find(ask.who, file_id)
    start, stop = span = _span(ask.request.headers.get("range", ""), file.size)
    pieces = ask.service.files.content(file, start, stop)
    first = await anext(pieces, b"")  # where the bytes are gone, this is a 404 and not a broken 200
    headers = {"content-length": str(stop - start), "accept-ranges": "bytes"}
    part = span != (0, file.size)
    if part:
        headers["content-range"] = f"bytes {start}-{stop - 1}/{file.size}"
    return HeldStream(
        ask.service.streams.open(ask.who.tenant),
        lambda _: _joined(first, pieces),
        status=206 if part else 200,
        headers=headers,
        media_type="application/octet-stream",
    )


@free.delete("/v1/files/{file_id}", responses={200: {"model": FileDeleted}})
async def delete_file(file_id: str, ask: Asked) -> Response:
    """Remove a file; a batch that was made from it goes on."""
    await ask.service.files.delete(ask.who, file_id)
    return reply({"id": file_id, "object": "file", "deleted": True})


def shown(file: StoredFile) -> dict[str, Any]:
    """A file on the wire."""
    return {
        "id": file.id,
        "object": "file",
        "bytes": file.size,
        "created_at": int(file.created_at),
        "expires_at": int(file.expires_at),
        "filename": file.filename,
        "purpose": file.purpose,
        "status": "processed",
    }


def page(shown: Sequence[dict[str, Any]], limit: int) -> dict[str, Any]:
    """OpenAI's list of at most `limit`; one more was asked for, to know whether there is one."""
    data = shown[:limit]
    return {
        "object": "list",
        "data": data,
        "first_id": data[0]["id"] if data else None,
        "last_id": data[-1]["id"] if data else None,
        "has_more": len(shown) > limit,
    }


@asynccontextmanager
async def _form(request: Request) -> AsyncIterator[FormData]:
    """The form, its file in a temporary one on disk where it is larger than 1 MB.

    Raises BadInput, TooLarge.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "multipart/form-data":
        raise BadInput("The body must be multipart/form-data.", param="content-type")
    try:
        form = await request.form(max_files=1, max_fields=FIELDS_MAX, max_part_size=FIELD_BYTES_MAX)
    except HTTPException as error:
        raise BadInput(f"The form is not valid: {error.detail}", param="body") from None
    except UnicodeError:  # a charset such as `undefined`, which Python knows and never decodes
        raise BadInput("The form's charset is not valid.", param="content-type") from None
    try:
        yield form
    finally:
        await form.close()


async def _joined(first: bytes, rest: AsyncIterator[bytes]) -> AsyncGenerator[bytes, None]:
    yield first
    async for piece in rest:
        yield piece


def _span(asked: str, size: int) -> tuple[int, int]:
    """The bytes to send, from the first to before the second (RFC 9110, section 14).

    All of them where no single range is asked for. Raises NotSatisfiable.
    """
    found = _SPAN.fullmatch(asked)
    if found is None:
        return 0, size
    start, last = int(found[1]), int(found[2] or size - 1)
    if found[2] and last < start:
        return 0, size
    if start >= size:
        raise NotSatisfiable(f"The file has {size} bytes.", param="range")
    return start, min(last + 1, size)


def _file(form: FormData) -> UploadFile:
    if form.get("purpose") != "batch":
        raise BadInput("purpose must be 'batch'.", param="purpose")
    sent = form.get("file")
    if not isinstance(sent, UploadFile):
        raise BadInput("file must be a file.", param="file")
    return sent


async def _pieces(sent: UploadFile) -> AsyncIterator[bytes]:
    while piece := await sent.read(PIECE_BYTES):
        yield piece


def _expires_s(form: FormData) -> float | None:
    """Seconds that the file is to be kept, where the form says so. Raises BadInput."""
    anchor, seconds = form.get("expires_after[anchor]"), form.get("expires_after[seconds]")
    if anchor is None and seconds is None:
        return None
    if anchor != "created_at":
        raise BadInput("The anchor must be 'created_at'.", param="expires_after[anchor]")
    whole = int(seconds) if isinstance(seconds, str) and _SECONDS.fullmatch(seconds) else 0
    if not EXPIRES_S_MIN <= whole <= EXPIRES_S_MAX:
        raise BadInput(
            f"It must be a whole number from {EXPIRES_S_MIN} to {EXPIRES_S_MAX}.",
            param="expires_after[seconds]",
        )
    return whole
