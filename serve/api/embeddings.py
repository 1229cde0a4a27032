"""`POST /v1/embeddings`, as OpenAI's specification has it."""

import base64
from typing import Any, cast, get_args

import numpy as np
from fastapi import APIRouter, Response

from serve.api.service import DEADLINE_PARAMETER, Asked
from serve.api.shapes import EmbeddingList
from serve.api.wire import read_json, reply, required_body
from serve.config import Limits
from serve.errors import BadInput
from serve.flows.embed import Embedded, EmbedRequest, TruncateSide


router = APIRouter()

KNOWN = frozenset({"model", "input", "encoding_format", "dimensions", "user", "truncate"})

SCHEMA: dict[str, Any] = {
    "type": "object",
    "required": ["model", "input"],
    "properties": {
        "model": {"type": "string"},
        "input": {
            "oneOf": [
                {"type": "string", "minLength": 1},
                {"type": "array", "minItems": 1, "maxItems": 2048, "items": {"type": "string"}},
                {"type": "array", "minItems": 1, "items": {"type": "integer"}},
                {
                    "type": "array",
                    "minItems": 1,
                    "maxItems": 2048,
                    "items": {"type": "array", "minItems": 1, "items": {"type": "integer"}},
                },
            ],
            "description": "Text, texts, token ids or lists of token ids of the model's tokenizer.",
        },
        "encoding_format": {"type": ["string", "null"], "enum": ["float", "base64", None]},
        "dimensions": {"type": ["integer", "null"], "minimum": 1},
        "user": {"type": ["string", "null"]},
        "truncate": {
            "type": ["string", "null"],
            "enum": ["NONE", "START", "END", None],
            "description": "Which side of too long an input may go; NONE refuses it.",
        },
    },
}


@router.post(
    "/v1/embeddings",
    openapi_extra=required_body(SCHEMA, DEADLINE_PARAMETER),
    responses={200: {"model": EmbeddingList}},
)
async def embeddings(ask: Asked) -> Response:
    """Embed texts or token ids; vectors come back in input order, of unit length."""
    body = await read_json(ask.request)
    limits = ask.service.context.settings.limits
    if limits.unknown_fields == "refuse" and (unknown := body.keys() - KNOWN):
        field = min(unknown)[:64]
        raise BadInput(f"Unknown field {field!r}.", param=field)
    encoding = _choice(body, "encoding_format", ("float", "base64"), "float")
    wanted = parse(body, limits)
    done = await ask.service.embed.embed(ask.who, wanted, ask.id, until=ask.until)
    ask.timed(done.timing)
    headers = {"x-truncated-inputs": str(len(done.cuts))} if done.cuts else None
    return reply(_answer(done, encoding, body["model"]), headers=headers)


def parse(body: dict[str, Any], limits: Limits) -> EmbedRequest:
    """The request, checked. Raises BadInput that names the field."""
    model = body.get("model")
    if not isinstance(model, str) or not model:
        raise BadInput("model must be a non-empty string.", param="model")
    dimensions = body.get("dimensions")
    if dimensions is not None and (type(dimensions) is not int or dimensions < 1):
        raise BadInput("dimensions must be an integer of at least 1.", param="dimensions")
    user = body.get("user")
    if user is not None and not isinstance(user, str):
        raise BadInput("user must be a string.", param="user")
    side = cast("TruncateSide", _choice(body, "truncate", get_args(TruncateSide), "NONE"))
    texts, ids = _inputs(body.get("input"), limits.inputs_max)
    return EmbedRequest(model, texts, ids, dimensions, side)


def _inputs(value: Any, inputs_max: int) -> tuple[list[str] | None, list[list[int]] | None]:
    """Texts or token ids: exactly one of the two. The ids themselves are the tokenizer's to check,
    in its thread: a body may hold millions.
    """
    if isinstance(value, str):
        value = [value]
    if not isinstance(value, list) or not value:
        raise BadInput("input must be a non-empty string or array.", param="input")
    if type(value[0]) is int:
        value = [value]
    if len(value) > inputs_max:
        raise BadInput(
            f"input has {len(value)} items; at most {inputs_max} are allowed.", param="input"
        )
    if isinstance(value[0], str):
        for index, text in enumerate(value):
            if not isinstance(text, str) or not text:
                raise BadInput(
                    f"input[{index}] must be a non-empty string.", param=f"input[{index}]"
                )
        return value, None
    for index, row in enumerate(value):
        if not isinstance(row, list) or not row:
            raise BadInput(
                f"input[{index}] must be a non-empty string or array of token ids, of one kind "
                "over the whole input.",
                param=f"input[{index}]",
            )
    return None, value


def _choice(body: dict[str, Any], field: str, words: tuple[str, ...], default: str) -> str:
    """One of `words`; null is the same as absent."""
    value = body.get(field)
    if value is None:
        return default
    if value not in words:
        raise BadInput(f"{field} must be one of {', '.join(words)}.", param=field)
    return cast("str", value)


def _answer(done: Embedded, encoding: str, model: str) -> dict[str, Any]:
    """OpenAI's list; `truncated` is ours, and only there when something was cut."""
    rows: list[Any] = list(done.vectors)
    if encoding == "base64":
        flat = np.ascontiguousarray(done.vectors, "<f4")
        rows = [base64.b64encode(row.tobytes()).decode() for row in flat]
    answer: dict[str, Any] = {
        "object": "list",
        "data": [
            {"object": "embedding", "index": index, "embedding": row}
            for index, row in enumerate(rows)
        ],
        "model": model,
        "usage": {"prompt_tokens": done.tokens, "total_tokens": done.tokens},
    }
    if done.cuts:
        answer["truncated"] = [
            {"index": cut.index, "tokens": cut.tokens, "used": cut.used} for cut in done.cuts
        ]
    return answer
