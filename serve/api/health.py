"""`/health/live` and `/health/ready`: for probes, without a key."""

from fastapi import APIRouter, Response

from serve.api.service import Served
from serve.api.shapes import Health
from serve.api.wire import reply


router = APIRouter()


@router.get("/health/live", responses={200: {"model": Health}})
async def live() -> Response:
    """The process answers."""
    return reply({"status": "alive"})


@router.get("/health/ready", responses={200: {"model": Health}, 503: {"model": Health}})
async def ready(service: Served) -> Response:
    """200 when every part works: a forward pass of every model ran, Store and writer answer."""
    parts = await service.ready()
    whole = all(parts.values())
    body = {"status": "ready" if whole else "not_ready", "parts": dict(parts)}
    return reply(body, 200 if whole else 503, {} if whole else {"retry-after": "1"})
