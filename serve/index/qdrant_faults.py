"""What Qdrant's client raises, as what the buffer decides on. Which status means what was read in
the source of the server, 1.19.
"""

from serve.index.errors import (
    BatchTooLarge,
    IndexFault,
    IndexOffline,
    IndexRetryable,
    RecordsRejected,
)


RETRY_AFTER_S = 1.0
RETRY_AFTER_S_MAX = 300.0
"""A wait that a server or a proxy asks for is not believed beyond."""

REFUSED, RETRYABLE = (400, 422), (408, 409, 425, 429)
NOT_FOUND, TOO_LARGE, FULL = 404, 413, 507

LARGER = (b"is larger than allowed", b"has exceeded limit")
"""Qdrant answers 400 to a body beyond its limit; 413 is a proxy's answer."""

EXHAUSTED = (b"No space left", b"storage size limit")
"""A full disk is a 500, and a limit of strict mode a 400: neither is the fault of a record."""


def vendor_errors() -> tuple[type[Exception], ...]:
    """What a call may raise: for `except`, which asks only once something was raised.

    ValueError is what a reply is that is not JSON, and what the local mode says of a collection
    that is missing; AssertionError a reply without a result.
    """
    from qdrant_client.common.client_exceptions import QdrantException  # noqa: PLC0415
    from qdrant_client.http.exceptions import ApiException  # noqa: PLC0415

    return (ApiException, QdrantException, ValueError, AssertionError)


def is_missing(error: Exception) -> bool:
    """Whether it says that the collection does not exist."""
    status, content = _reply(error)
    if status is None:
        return isinstance(error, ValueError) and "not found" in str(error)
    return status == NOT_FOUND and b"Collection" in content


def is_taken(error: Exception) -> bool:
    """Whether it says that the collection exists already."""
    return "already exists" in str(error)


def to_fault(error: Exception) -> IndexFault:
    """What a write must raise for it."""
    status, content = _reply(error)
    said = str(error)[:500]
    if status is None or is_missing(error):
        return IndexRetryable(said, retry_after_s=retry_after_s(error))
    if any(words in content for words in EXHAUSTED):
        return IndexOffline(said)
    if status == TOO_LARGE or (status in REFUSED and any(words in content for words in LARGER)):
        return BatchTooLarge(said)
    if status in REFUSED:
        return RecordsRejected(said)
    if status in RETRYABLE or (status >= 500 and status != FULL):  # noqa: PLR2004  server errors
        return IndexRetryable(said, retry_after_s=retry_after_s(error))
    return IndexOffline(said)


def retry_after_s(error: Exception) -> float:
    """The wait that it asks for, else ours."""
    wait_s = getattr(error, "retry_after_s", None)
    if wait_s is None:
        return RETRY_AFTER_S
    return min(max(float(wait_s), 0.0), RETRY_AFTER_S_MAX)


def _reply(error: Exception) -> tuple[int | None, bytes]:
    """Status and body of a reply that is no success; (None, b"") for any other error."""
    from qdrant_client.http.exceptions import UnexpectedResponse  # noqa: PLC0415

    if not isinstance(error, UnexpectedResponse):
        return None, b""
    return error.status_code, error.content
