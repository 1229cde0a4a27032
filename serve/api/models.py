"""`GET /v1/models` and `GET /v1/models/{id}`, as OpenAI has them."""

from typing import Any

from fastapi import APIRouter, Response

from serve.api.service import Asked
from serve.api.shapes import ModelList, ModelShown
from serve.api.wire import reply
from serve.flows import models


router = APIRouter()


@router.get("/v1/models", responses={200: {"model": ModelList}})
async def list_models(ask: Asked) -> Response:
    """Every served model."""
    data = [_shown(served) for served in ask.service.context.models]
    return reply({"object": "list", "data": data})


@router.get("/v1/models/{model_id:path}", responses={200: {"model": ModelShown}})
async def one_model(model_id: str, ask: Asked) -> Response:
    """One model; ids may contain slashes."""
    return reply(_shown(ask.service.context.models.find(model_id, kind=None)))


def _shown(served: models.Served) -> dict[str, Any]:
    """OpenAI's four fields, and ours: what a client must know to use it."""
    model = served.model
    return {
        "id": model.id,
        "object": "model",
        "created": model.created,
        "owned_by": model.owned_by,
        "kind": model.kind,
        "dimensions": model.dimensions,
        "max_tokens": served.tokens_max,
        "matryoshka": model.matryoshka,
        "revision": served.revision,
    }
