"""Proof that a write is durable, and `/v1/receipts`: how far it is."""

from typing import Any

from fastapi import APIRouter, Response

from serve.api.problems import problem_body
from serve.api.receipt_shapes import ReceiptShown
from serve.api.service import Asked
from serve.api.wire import reply
from serve.flows.ingest import error_of
from serve.flows.raw_receipts import RawReceipt
from serve.flows.receipts import JOB, OF_JOB, Seen
from serve.freshness import Level


router = APIRouter()


def receipt(job_id: str, level: Level, documents: int) -> dict[str, Any]:
    """Of a job's documents. Its id is the job's own in another form: nothing more is stored."""
    return {
        "object": "receipt",
        "id": job_id.replace(JOB, OF_JOB, 1),
        "job": job_id,
        "level": level,
        "documents": documents,
        "status_url": f"/v1/jobs/{job_id}",
    }


def raw_receipt(raw: RawReceipt, level: Level) -> dict[str, Any]:
    """Of vectors that their user has computed: there is no job of them."""
    return {
        "object": "receipt",
        "id": raw.id,
        "job": None,
        "level": level,
        "documents": raw.documents,
        "status_url": f"/v1/receipts/{raw.id}",
    }


@router.get("/v1/receipts/{receipt_id}", responses={200: {"model": ReceiptShown}})
async def find_receipt(receipt_id: str, ask: Asked) -> Response:
    """How far a write has come, and what of it failed."""
    return reply(_shown(await ask.service.receipts.find(ask.who, receipt_id)))


def _shown(seen: Seen) -> dict[str, Any]:
    url = f"/v1/jobs/{seen.job}" if seen.job else f"/v1/receipts/{seen.id}"
    return {
        "object": "receipt",
        "id": seen.id,
        "job": seen.job or None,
        "level": seen.level,
        "documents": seen.documents,
        "status_url": url,
        "collection": seen.collection,
        "failed": seen.failed,
        "accepted_at": seen.accepted_at,
        "indexed_at": seen.indexed_at,
        "searchable_at": seen.searchable_at,
        "failures": [
            {"id": one.name, "error": problem_body(error_of(one))} for one in seen.failures
        ],
        "has_more": seen.more,
    }
