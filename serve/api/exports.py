"""`GET /v1/collections/{name}/export`: all that a collection holds, as a stream."""

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any

import orjson
from fastapi import APIRouter, Response

from serve.api.service import Asked
from serve.api.sse import CheckedStream
from serve.api.vectors import record_shown
from serve.api.wire import choice, query
from serve.records import Collection, Record


router = APIRouter()

PARQUET = "application/vnd.apache.parquet"
FORMATS = ("jsonl", "parquet")
ENCODINGS = ("float", "base64")
SENT: dict[int | str, dict[str, Any]] = {
    200: {
        "content": {
            "application/jsonl": {"schema": {"type": "string"}},
            PARQUET: {"schema": {"type": "string", "format": "binary"}},
        }
    }
}
LINE = orjson.OPT_APPEND_NEWLINE | orjson.OPT_SERIALIZE_NUMPY


@router.get(
    "/v1/collections/{name}/export",
    status_code=200,
    response_class=CheckedStream,
    openapi_extra={
        "parameters": [
            query("format", "`jsonl` (default) or `parquet`."),
            query("encoding_format", "Of the vectors in JSON: `float` (default) or `base64`."),
        ]
    },
    responses=SENT,
)
async def export(name: str, ask: Asked) -> Response:
    """Every record of a collection: a line of JSON each, or one Parquet file.

    The last line says how many there were. An export without it, or without Parquet's footer, is not whole.
    """
    wanted = choice(ask.request, "format", FORMATS)
    base64 = choice(ask.request, "encoding_format", ENCODINGS) == "base64"
    collection, flow = await ask.service.exports.begin(ask.who, name), ask.service.exports

    def pieces(until: float) -> AsyncGenerator[bytes, None]:
        if wanted == "parquet":
            return flow.parquet(collection, until)
        return _lines(flow.records(collection, until), base64=base64)

    return CheckedStream(
        flow.places.open(ask.who.tenant),
        pieces,
        headers=_headers(collection, wanted),
        media_type=PARQUET if wanted == "parquet" else "application/jsonl",
    )


async def _lines(
    records: AsyncGenerator[Sequence[Record], None], *, base64: bool
) -> AsyncGenerator[bytes, None]:
    count = 0
    async with aclosing(records) as parts:
        async for some in parts:
            count += len(some)
            shown = (record_shown(one, base64=base64) for one in some)
            yield b"".join(orjson.dumps(one, option=LINE) for one in shown)
    yield orjson.dumps({"object": "export.end", "records": count}, option=LINE)


def _headers(collection: Collection, ending: str) -> dict[str, str]:
    """A collection's name is letters, digits, '.', '_' and '-': safe in a file's name."""
    name = f"{collection.name}.{ending}"
    return {
        "cache-control": "no-store",
        "content-disposition": f'attachment; filename="{name}"',
        "x-accel-buffering": "no",
    }
