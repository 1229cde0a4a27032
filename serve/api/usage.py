"""`GET /v1/usage` and `GET /v1/queue`: what a caller has used, what is left, and why it waits."""

from typing import Any

from fastapi import APIRouter, Response

from serve.admission.quotas import Rate
from serve.api.service import Asked
from serve.api.shapes import QueueShown, UsageShown
from serve.api.wire import reply
from serve.records import UsageRow


router = APIRouter()


@router.get("/v1/usage", responses={200: {"model": UsageShown}})
async def usage(ask: Asked) -> Response:
    """The tenant's usage of this month by key and class, and its limits of now."""
    who = ask.who
    view = await ask.service.usage.usage(who)
    answer = {
        "object": "usage",
        "tenant": who.tenant,
        "tier": who.tier,
        "weight": who.weight,
        "month": view.month,
        "data": [_row(row) for row in view.rows],
        "limits": {klass: [_limit(rate) for rate in rates] for klass, rates in view.rates.items()},
    }
    return reply(answer)


@router.get("/v1/queue", responses={200: {"model": QueueShown}})
async def queue(ask: Asked) -> Response:
    """What the tenant has waiting for the model, and why, in words and in numbers."""
    view = await ask.service.usage.queue(ask.who)
    answer = {
        "object": "queue",
        "why": view.why,
        "waiting": view.whole,
        "classes": dict(view.classes),
        "everyone_tokens": view.everyone_tokens,
    }
    return reply(answer)


def _row(row: UsageRow) -> dict[str, Any]:
    return {
        "key": row.key,
        "class": row.klass,
        "requests": row.requests,
        "tokens": row.tokens,
        "refused": row.refused,
    }


def _limit(rate: Rate) -> dict[str, Any]:
    """Nobody knows when a level is free again: its `reset_s` is null."""
    limit = rate.limit
    return {
        "name": limit.name,
        "kind": limit.kind,
        "unit": limit.unit,
        "limit": int(limit.burst),
        "per_minute": round(60 / limit.interval_s, 3) if limit.kind == "rate" else None,
        "remaining": rate.remaining,
        "reset_s": None if limit.kind == "level" else round(rate.reset_s, 3),
    }
