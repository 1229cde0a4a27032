"""serve.index.qdrant_faults: what is not a reply; tests/contract/test_qdrant.py has the statuses."""

import pytest
from qdrant_client.common.client_exceptions import QdrantException, ResourceExhaustedResponse
from qdrant_client.http.exceptions import ResponseHandlingException

from serve.index.errors import IndexRetryable
from serve.index.qdrant_faults import is_missing, retry_after_s, to_fault, vendor_errors


OTHERS = (
    ResponseHandlingException(ConnectionRefusedError("nobody")),
    QdrantException("Retry-After header value is not a valid integer"),
    ValueError("Expecting value"),
    ValueError("Collection x not found"),
    AssertionError("Upsert returned None result"),
)


@pytest.mark.parametrize("error", OTHERS, ids=str)
def test_what_is_no_reply_is_retried(error):
    assert isinstance(error, vendor_errors())
    fault = to_fault(error)
    assert isinstance(fault, IndexRetryable)
    assert fault.retry_after_s == 1


def test_only_the_local_mode_says_missing_without_a_reply():
    assert [is_missing(error) for error in OTHERS] == [False, False, False, True, False]


@pytest.mark.parametrize(("asked", "given"), [("7", 7), ("0", 0), ("-3", 0), ("86400", 300)])
def test_a_wait_is_believed_within_bounds(asked, given):
    assert retry_after_s(ResourceExhaustedResponse("", asked)) == given
