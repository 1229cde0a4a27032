"""`/v1/batches`, as OpenAI's specification has it; `collection` is ours."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Response
from pydantic import ConfigDict, Field

from serve.api.files import EXPIRES_S_MAX, EXPIRES_S_MIN, page
from serve.api.idempotency import IDEMPOTENCY_PARAMETER, REPLAYED, once
from serve.api.openai_shapes import BatchList, BatchShown
from serve.api.service import Asked
from serve.api.wire import Body, Id, documented, page_size, query, read, reply
from serve.errors import BadInput
from serve.flows.batch import BatchRequest
from serve.flows.batch_file import ENDPOINT
from serve.items import Job, JobState


router = APIRouter()
"""What is charged, at class `bulk`."""

free = APIRouter()
"""What is not: who is over a limit must be able to look, and to stop what runs."""

BATCHES, BATCHES_MAX = 20, 100
"""Batches in a page: unless asked for, and at most."""

STATUS: Mapping[JobState, str] = {
    "validating": "validating",
    "queued": "in_progress",
    "running": "in_progress",
    "finalizing": "finalizing",
    "completed": "completed",
    "completed_with_errors": "completed",
    "failed": "completed",  # all requests have failed: the batch is done, see its error file
    "cancelling": "cancelling",
    "cancelled": "cancelled",
    "expired": "expired",
}
"""OpenAI's words exactly: a client that polls for one of them would wait for ever."""


class ExpiresAfter(Body):
    """How long the files that a batch writes are kept."""

    anchor: Literal["created_at"]
    seconds: Annotated[int, Field(ge=EXPIRES_S_MIN, le=EXPIRES_S_MAX)]


class BatchBody(Body):
    """A batch: embeddings of the lines of a file. `collection`: its vectors land there, too."""

    model_config = ConfigDict(extra="allow")

    input_file_id: Id
    endpoint: Literal["/v1/embeddings"]
    completion_window: Literal["24h"]
    metadata: (
        Annotated[
            dict[
                Annotated[str, Field(min_length=1, max_length=64)],
                Annotated[str, Field(max_length=512)],
            ],
            Field(max_length=16),
        ]
        | None
    ) = None
    output_expires_after: ExpiresAfter | None = None
    collection: Id | None = None


@router.post(
    "/v1/batches",
    openapi_extra=documented(BatchBody, IDEMPOTENCY_PARAMETER),
    responses={200: {"model": BatchShown}},
)
async def create_batch(ask: Asked) -> Response:
    """Hand over a batch; its file is checked first (`validating`), then its requests are done."""
    body = await read(ask.request, BatchBody)
    settings = ask.service.context.settings
    if settings.limits.unknown_fields == "refuse" and (extra := body.model_extra):
        field = min(extra)[:64]
        raise BadInput(f"Unknown field {field!r}.", param=field)
    key = once(ask.request, body, settings.jobs.idempotency_kept_s)
    accepted = await ask.service.batches.create(ask.who, _request(body), key)
    return reply(shown(accepted.job), headers={REPLAYED: "true"} if accepted.replayed else None)


@free.get(
    "/v1/batches",
    openapi_extra={
        "parameters": [
            query("after", "The id of the last batch of the page before."),
            query("limit", "Batches in a page.", minimum=1, maximum=BATCHES_MAX),
        ]
    },
    responses={200: {"model": BatchList}},
)
async def list_batches(ask: Asked) -> Response:
    """The tenant's batches, newest first."""
    limit = page_size(ask.request, BATCHES, BATCHES_MAX)
    after = ask.request.query_params.get("after")
    last = "" if after is None else job_id(after)
    jobs = await ask.service.batches.list(ask.who, last, limit + 1)
    return reply(page([shown(job) for job in jobs], limit))


@free.get("/v1/batches/{batch_id}", responses={200: {"model": BatchShown}})
async def find_batch(batch_id: str, ask: Asked) -> Response:
    """One batch."""
    return reply(shown(await ask.service.batches.find(ask.who, job_id(batch_id))))


@free.post("/v1/batches/{batch_id}/cancel", responses={200: {"model": BatchShown}})
async def cancel_batch(batch_id: str, ask: Asked) -> Response:
    """End a batch: what is done stays and comes as its output."""
    return reply(shown(await ask.service.batches.cancel(ask.who, job_id(batch_id))))


def shown(job: Job) -> dict[str, Any]:
    """A job as a batch on the wire."""
    times = job.times
    status = _status(job)
    return {
        "id": job.id.replace("job_", "batch_", 1),
        "object": "batch",
        "endpoint": ENDPOINT,
        "errors": {"object": "list", "data": [_fault(one) for one in job.errors]}
        if job.errors
        else None,
        "input_file_id": job.files["input"],
        "completion_window": "24h",
        "status": status,
        "output_file_id": job.files.get("output"),
        "error_file_id": job.files.get("error"),
        "created_at": int(job.created_at),
        "in_progress_at": _at(times, "running"),
        "expires_at": int(job.expires_at or 0),
        "finalizing_at": _at(times, "finalizing"),
        "completed_at": _at(times, *_ENDS) if status == "completed" else None,
        "failed_at": _at(times, "failed") if status == "failed" else None,
        "expired_at": _at(times, "expired"),
        "cancelling_at": _at(times, "cancelling"),
        "cancelled_at": _at(times, "cancelled"),
        "request_counts": {
            "total": job.total,
            "completed": job.done + job.skipped,
            "failed": job.dead,
        },
        "usage": _usage(job.tokens),
        "metadata": dict(job.metadata),
        "collection": job.spec.get("collection"),
    }


_ENDS = ("completed", "completed_with_errors", "failed")


def job_id(batch_id: str) -> str:
    """The id of the job that a batch is; of anything else, an id that no job has."""
    return batch_id.replace("batch_", "job_", 1) if batch_id.startswith("batch_") else "-"


def _request(body: BatchBody) -> BatchRequest:
    kept = body.output_expires_after
    return BatchRequest(
        body.input_file_id,
        body.collection,
        None if kept is None else float(kept.seconds),
        body.metadata or {},
    )


def _status(job: Job) -> str:
    """Errors stand in a job that itself failed; one that expires is told to be finalizing."""
    if job.state == "failed" and job.errors:
        return "failed"
    if job.state == "cancelling" and "cancelling" not in job.times:
        return "finalizing"
    return STATUS[job.state]


def _at(times: Mapping[str, float], *states: str) -> int | None:
    return next((int(times[state]) for state in states if state in times), None)


def _fault(fault: Mapping[str, Any]) -> dict[str, Any]:
    return {name: fault.get(name) for name in ("code", "message", "param", "line")}


def _usage(tokens: int) -> dict[str, Any]:
    return {
        "input_tokens": tokens,
        "input_tokens_details": {"cached_tokens": 0},
        "output_tokens": 0,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": tokens,
    }
