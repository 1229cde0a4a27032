"""Proof that a write is durable, and where to see how far it is."""

from typing import Any, Literal


def receipt(job_id: str, level: Literal["accepted", "indexed"], documents: int) -> dict[str, Any]:
    """Of a job's documents. Its id is the job's own in another form: nothing more is stored."""
    return {
        "object": "receipt",
        "id": job_id.replace("job_", "rcpt_", 1),
        "job": job_id,
        "level": level,
        "documents": documents,
        "status_url": f"/v1/jobs/{job_id}",
    }
