"""`POST /v1/embeddings`, as OpenAI's specification has it."""

from typing import Any, get_args

from fastapi import APIRouter, Response

from serve.api.service import DEADLINE_PARAMETER, Asked
from serve.api.shapes import EmbeddingList
from serve.api.wire import read_json, reply, required_body
from serve.embedding.quantise import Dtype
from serve.flows.embed import Embedded
from serve.flows.exchange import answer, parse


router = APIRouter()

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
        "output_dtype": {
            "type": ["string", "null"],
            "enum": [*get_args(Dtype), None],
            "description": "What a vector is written as; null is float.",
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
    context = ask.service.context
    wanted, encoding = parse(await read_json(ask.request), context.settings.limits)
    done = await ask.service.embed.embed(ask.who, wanted, ask.id, until=ask.until)
    ask.timed(done.timing)
    model = context.models.find(wanted.model).model
    return reply(answer(done, wanted, encoding, model), headers=_headers(done))


def _headers(done: Embedded) -> dict[str, str]:
    counts = {"x-truncated-inputs": len(done.cuts), "x-cached-inputs": done.cached}
    headers = {name: str(count) for name, count in counts.items() if count}
    if done.arm is not None:
        headers |= {"x-canary": done.arm, "x-model-revision": done.revision}
    return headers
