"""`/v1/jobs/{id}/events`, `/v1/stats` and `/v1/stats/events`: how far work is, now and as it goes."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing, suppress
from dataclasses import asdict
from typing import Any

from fastapi import APIRouter, Request, Response

from serve.api.job_shapes import (
    OperationsShown,
    StatsShown,
    event_shown,
    job_shown,
    operations_shown,
)
from serve.api.service import Ask, Asked
from serve.api.sse import PING, STREAMED, EventStream, Responses, message
from serve.api.wire import number, query, reply, whole
from serve.errors import ServiceError
from serve.flows.jobs import JobSeen


router = APIRouter()

DAYS, DAYS_MAX = 7, 90
"""Of operations: unless asked for, and at most (older ones are forgotten)."""

RESUME: dict[str, Any] = {
    "parameters": [
        query("after", "The number of the last event that was read.", minimum=0),
        {
            "name": "Last-Event-ID",
            "in": "header",
            "required": False,
            "description": "The same, as browsers send it; it passes before `after`.",
            "schema": {"type": "integer", "minimum": 0},
        },
    ]
}
NOTHING_MORE: Responses = {
    204: {"description": "The job has ended and all of it was read: do not come again."}
}


@router.get(
    "/v1/jobs/{job_id}/events",
    status_code=200,
    response_class=EventStream,
    openapi_extra=RESUME,
    responses={**STREAMED, **NOTHING_MORE},
)
async def stream_job(job_id: str, ask: Asked) -> Response:
    """What happens to a job: a `snapshot`, then its events as they come, until it has ended.

    Without a number to go on from, events begin with the snapshot.
    """
    feed, tenant, after = ask.service.feed, ask.who.tenant, _after(ask.request)
    begin = (
        await feed.last(tenant, job_id) if after is None else after
    )  # the snapshot must not be older
    seen = await ask.service.jobs.find(ask.who, job_id)
    if after is not None and seen.job.ended and not await feed.missed(tenant, job_id, after):
        return Response(status_code=204)
    return EventStream(
        ask.service.streams.open(tenant), lambda until: _followed(ask, seen, begin, until)
    )


@router.get("/v1/stats", responses={200: {"model": StatsShown}})
async def show_stats(ask: Asked) -> Response:
    """The tenant's items by how far they are, some seconds old."""
    return reply(await _stats(ask))


@router.get(
    "/v1/stats/operations",
    openapi_extra={
        "parameters": [
            query("days", "Days, today included; 7 unless given.", minimum=1, maximum=DAYS_MAX)
        ]
    },
    responses={200: {"model": OperationsShown}},
)
async def show_operations(ask: Asked) -> Response:
    """How often each operation on the tenant's items succeeds, and how long it takes."""
    days = number(ask.request, "days", least=1, most=DAYS_MAX)
    days = DAYS if days is None else days
    efforts = await ask.service.jobs.efforts(ask.who, days)
    return reply({"object": "list", "days": days, "data": operations_shown(efforts)})


@router.get("/v1/stats/events", status_code=200, response_class=EventStream, responses=STREAMED)
async def stream_stats(ask: Asked) -> Response:
    """The same, again and again."""
    return EventStream(
        ask.service.streams.open(ask.who.tenant), lambda until: _repeated(ask, until)
    )


async def _followed(
    ask: Ask, seen: JobSeen, begin: int, until: float
) -> AsyncGenerator[bytes, None]:
    yield message("snapshot", job_shown(seen), begin, first=True)
    job = seen.job
    events = ask.service.feed.follow(job.tenant, job.id, begin, ended=job.ended, until=until)
    with suppress(ServiceError):  # without the Store: the reader comes again
        async with aclosing(events):
            async for event in events:
                yield (
                    PING if event is None else message(event.type, event_shown(event), event.number)
                )


async def _repeated(ask: Ask, until: float) -> AsyncGenerator[bytes, None]:
    loop, every_s = asyncio.get_running_loop(), ask.service.context.settings.jobs.stats_s
    first = True
    with suppress(ServiceError):  # as above
        while (left_s := until - loop.time()) > 0:
            yield message("stats", await _stats(ask), first=first)
            first = False
            await asyncio.sleep(min(every_s, left_s))


async def _stats(ask: Ask) -> dict[str, Any]:
    stats = await ask.service.jobs.stats(ask.who)
    lag = await ask.service.collections.lag(ask.who)
    return {"object": "stats", **asdict(stats), "lag": None if lag is None else asdict(lag)}


def _after(request: Request) -> int | None:
    """The number to go on from, where there is one. Raises BadInput."""
    text = request.headers.get("last-event-id")
    return number(request, "after") if text is None else whole("Last-Event-ID", text)
