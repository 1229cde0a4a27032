"""What an HTTP status means to the buffer, for backends that are a service."""

import math
from collections.abc import Mapping

from serve.index.errors import (
    BatchTooLarge,
    IndexFault,
    IndexOffline,
    IndexRetryable,
    RecordsRejected,
)


NOT_FOUND = 404
REFUSED = (400, 422)
TOO_LARGE = 413
BUSY = (408, 409, 425, 429)
SERVER_FAULTS = range(500, 600)

RETRY_AFTER_S = 1.0


def fault(status: int, message: str, headers: Mapping[str, str]) -> IndexFault:
    """The error to raise. `headers` are in lower case.

    Key, payment, a missing index, and whatever nobody expects pause the index: nothing is lost.
    """
    if status in REFUSED:
        return RecordsRejected(message)
    if status == TOO_LARGE:
        return BatchTooLarge(message)
    if status in BUSY or status in SERVER_FAULTS:
        return IndexRetryable(message, retry_after_s=retry_after_s(headers))
    return IndexOffline(message)


def retry_after_s(headers: Mapping[str, str]) -> float:
    """The wait that a reply asks for, in seconds; a date or nonsense counts as a second."""
    try:
        asked_s = float(headers.get("retry-after", RETRY_AFTER_S))
    except ValueError:
        return RETRY_AFTER_S
    return asked_s if 0 <= asked_s < math.inf else RETRY_AFTER_S
