"""`/v1/jobs`: hand work over, see how far it is, change it, and read what became of it."""

from collections.abc import AsyncGenerator
from typing import Annotated, Any, Literal, get_args

import orjson
from fastapi import APIRouter, Response
from pydantic import Field

from serve.api.documents import LIST_MAX, DocumentBody
from serve.api.idempotency import IDEMPOTENCY_PARAMETER, REPLAYED, once
from serve.api.job_shapes import (
    ItemList,
    JobList,
    JobShown,
    RetryShown,
    item_shown,
    job_shown,
)
from serve.api.receipts import receipt
from serve.api.service import Ask, Asked
from serve.api.sse import HeldStream
from serve.api.wire import Body, Id, documented, number, page_size, query, read, reply, words
from serve.content.documents import Document
from serve.errors import BadInput
from serve.flows.jobs import JobRequest, JobSeen
from serve.items import Change, ItemState, JobState, Kind, Replay
from serve.records import Klass


router = APIRouter()
"""What is charged, at class `bulk`."""

free = APIRouter()
"""What is not: who is over a limit must be able to look, and to stop what runs."""

JOBS_MAX = 100
JOBS = 20
"""Jobs in a page: at most, and unless asked for."""

ITEMS_MAX = 1000
ITEMS = 100
"""Items in a page."""

PAIRS_MAX = 16

SEQ_MAX = 2**31 - 1
"""The Store numbers a job's items with 32 bits."""

JSONL: dict[int | str, dict[str, Any]] = {
    200: {"content": {"application/jsonl": {"schema": {"type": "string"}}}}
}
STATE = "Only those in this state; may be given several times."


class JobBody(Body):
    """Documents to be written to a collection in the background: `items`, or the id of a `file` that
    was uploaded to `/v1/files`, with one of them as JSON on each line.

    `priority` orders the tenant's own work of a class, higher first, and nobody else's.
    `on_error`: whether the first item that fails for good ends the job. What has not ended
    `expires_in` seconds from now is given up. `metadata` comes back with the job.
    """

    kind: Literal["documents"] = "documents"
    collection: Id
    items: Annotated[
        list[DocumentBody], Field(fail_fast=True, max_length=LIST_MAX, default_factory=list)
    ]
    file: Id | None = None
    klass: Annotated[Klass, Field(alias="class")] = "bulk"
    priority: Annotated[int, Field(ge=0, le=100)] = 50
    on_error: Literal["continue", "stop"] = "continue"
    expires_in: Annotated[int, Field(ge=1)] | None = None
    webhook: Id | None = None
    metadata: Annotated[
        dict[
            Annotated[str, Field(min_length=1, max_length=64)],
            Annotated[str, Field(max_length=512)],
        ],
        Field(max_length=PAIRS_MAX),
    ] = Field(default_factory=dict)


class RetryBody(Body):
    """Which dead items are tried again: exactly one of `all`, `error_code` and `seq`."""

    all: Literal[True] | None = None
    error_code: Id | None = None
    seq: Annotated[int, Field(ge=0, le=SEQ_MAX)] | None = None
    dry_run: bool = False


@router.post(
    "/v1/jobs",
    status_code=202,
    openapi_extra=documented(JobBody, IDEMPOTENCY_PARAMETER),
    responses={202: {"model": JobShown}},
)
async def create_job(ask: Asked) -> Response:
    """Hand work over: it is durable when this is answered, and done in the background."""
    body = await read(ask.request, JobBody)
    key = once(ask.request, body, ask.service.context.settings.jobs.idempotency_kept_s)
    accepted = await ask.service.jobs.submit(ask.who, _request(body), key)
    job = accepted.job
    shown = job_shown(JobSeen(job, None, None))
    shown["receipt"] = receipt(job.id, "accepted", len(body.items))
    headers = {"location": shown["receipt"]["status_url"]}
    if accepted.replayed:
        headers[REPLAYED] = "true"
    return reply(shown, 202, headers)


@router.post(
    "/v1/jobs/{job_id}/retry",
    openapi_extra=documented(RetryBody),
    responses={200: {"model": RetryShown}},
)
async def retry_job(job_id: str, ask: Asked) -> Response:
    """Try dead items again; what was written since is not overwritten."""
    body = await read(ask.request, RetryBody)
    if sum(value is not None for value in (body.all, body.error_code, body.seq)) != 1:
        raise BadInput("Give exactly one of all, error_code and seq.", param="all")
    replay = Replay(body.error_code, body.seq, body.dry_run)
    count = await ask.service.jobs.retry(ask.who, job_id, replay)
    answer = {"object": "job.retry", "job": job_id, "items": count, "dry_run": body.dry_run}
    return reply(answer)


@free.get(
    "/v1/jobs",
    openapi_extra={
        "parameters": [
            query("kind", "Only jobs of this kind; may be given several times."),
            query("state", STATE),
            query("after", "The id of the last job of the page before."),
            query("limit", "Jobs in a page.", minimum=1, maximum=JOBS_MAX),
        ]
    },
    responses={200: {"model": JobList}},
)
async def list_jobs(ask: Asked) -> Response:
    """The tenant's jobs, newest first."""
    kinds = words(ask.request, "kind", get_args(Kind))
    limit = page_size(ask.request, JOBS, JOBS_MAX)
    jobs = await ask.service.jobs.list(
        ask.who,
        kind=kinds[0] if len(kinds) == 1 else None,
        states=words(ask.request, "state", get_args(JobState)),
        after=ask.request.query_params.get("after", ""),
        limit=limit + 1,
    )
    return _page([job_shown(job) for job in jobs], limit)


@free.get("/v1/jobs/{job_id}", responses={200: {"model": JobShown}})
async def find_job(job_id: str, ask: Asked) -> Response:
    """One job, with its items counted by stage and state."""
    return reply(job_shown(await ask.service.jobs.find(ask.who, job_id)))


@free.get(
    "/v1/jobs/{job_id}/items",
    openapi_extra={
        "parameters": [
            query("state", STATE),
            query(
                "after",
                "The `seq` of the last item of the page before.",
                minimum=0,
                maximum=SEQ_MAX,
            ),
            query("limit", "Items in a page.", minimum=1, maximum=ITEMS_MAX),
        ]
    },
    responses={200: {"model": ItemList}},
)
async def list_items(job_id: str, ask: Asked) -> Response:
    """A job's items, by number."""
    after = number(ask.request, "after", most=SEQ_MAX)
    limit = page_size(ask.request, ITEMS, ITEMS_MAX)
    items = await ask.service.jobs.items(
        ask.who,
        job_id,
        states=words(ask.request, "state", get_args(ItemState)),
        after=-1 if after is None else after,
        limit=limit + 1,
    )
    return _page([item_shown(item) for item in items], limit)


@free.get("/v1/jobs/{job_id}/results", status_code=200, response_class=HeldStream, responses=JSONL)
async def stream_results(job_id: str, ask: Asked) -> Response:
    """Every item that has ended, by number: a line of JSON each."""
    await ask.service.jobs.find(ask.who, job_id)
    place = ask.service.streams.open(ask.who.tenant)
    return HeldStream(place, lambda _: _results(ask, job_id), media_type="application/jsonl")


@free.post("/v1/jobs/{job_id}/cancel", responses={200: {"model": JobShown}})
async def cancel_job(job_id: str, ask: Asked) -> Response:
    """End a job: what waits is cancelled now, what is being worked on may still be done."""
    return await _changed(ask, job_id, "cancel")


@router.post("/v1/jobs/{job_id}/pause", responses={200: {"model": JobShown}})
async def pause_job(job_id: str, ask: Asked) -> Response:
    """Begin no more items of a job until it is resumed; its expiry holds all the same."""
    return await _changed(ask, job_id, "pause")


@router.post("/v1/jobs/{job_id}/resume", responses={200: {"model": JobShown}})
async def resume_job(job_id: str, ask: Asked) -> Response:
    """Go on with a job that was paused."""
    return await _changed(ask, job_id, "resume")


def _request(body: JobBody) -> JobRequest:
    return JobRequest(
        body.collection,
        [Document(one.id, one.text, one.metadata) for one in body.items],
        klass=body.klass,
        priority=body.priority,
        on_error=body.on_error,
        expires_s=body.expires_in,
        webhook=body.webhook or "",
        metadata=body.metadata,
        file=body.file or "",
    )


async def _changed(ask: Ask, job_id: str, change: Change) -> Response:
    return reply(job_shown(await ask.service.jobs.change(ask.who, job_id, change)))


async def _results(ask: Ask, job_id: str) -> AsyncGenerator[bytes, None]:
    async for items in ask.service.jobs.results(ask.who, job_id):
        lines = [orjson.dumps(item_shown(item), option=orjson.OPT_APPEND_NEWLINE) for item in items]
        yield b"".join(lines)


def _page(shown: list[dict[str, object]], limit: int) -> Response:
    """A page of at most `limit`; one more was asked for, to know whether there is one."""
    return reply({"object": "list", "data": shown[:limit], "has_more": len(shown) > limit})
