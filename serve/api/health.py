"""`/health/live` and `/health/ready`: for probes, without a key."""

from fastapi import APIRouter, Response

from serve.api.service import Served
from serve.api.shapes import Health
from serve.api.wire import reply


router = APIRouter()

INDEX = "index"
"""The part of readiness without which writes wait, and all else works."""


@router.get("/health/live", responses={200: {"model": Health}})
async def live() -> Response:
    """The process answers."""
    return reply({"status": "alive"})


@router.get("/health/ready", responses={200: {"model": Health}, 503: {"model": Health}})
async def ready(service: Served) -> Response:
    """200 when every part works: a forward pass of every model ran, Store and writer answer.

    `degraded`, 200 too: the index cannot be written, or too much waits for it. Writes wait; the rest works.
    """
    parts = await service.ready()
    broken = {name for name, usable in parts.items() if not usable}
    status = "not_ready" if broken - {INDEX} else "degraded" if broken else "ready"
    works = status != "not_ready"
    body = {"status": status, "parts": dict(parts)}
    return reply(body, 200 if works else 503, {} if works else {"retry-after": "1"})
