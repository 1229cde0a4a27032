"""HTTP statuses as what the buffer decides on."""

import pytest

from serve.index.errors import BatchTooLarge, IndexOffline, IndexRetryable, RecordsRejected
from serve.index.statuses import fault


@pytest.mark.parametrize(
    ("statuses", "kind"),
    [
        ((400, 422), RecordsRejected),
        ((413,), BatchTooLarge),
        ((408, 409, 425, 429, 500, 502, 503, 504, 529, 599), IndexRetryable),
        ((301, 401, 402, 403, 404, 405, 412, 414, 451, 600), IndexOffline),
    ],
)
def test_each_status_has_one_meaning(statuses, kind):
    for status in statuses:
        error = fault(status, "why", {})
        assert (type(error), str(error)) == (kind, "why")


def test_a_refused_batch_names_no_record():
    error = fault(400, "why", {})
    assert isinstance(error, RecordsRejected)
    assert error.pairs is None


@pytest.mark.parametrize(
    ("asked", "wait_s"),
    [("12", 12), ("0", 0), ("-1", 1), ("nan", 1), ("inf", 1), ("Fri, 31 Dec 1999", 1), ("", 1)],
)
def test_the_wait_is_the_one_that_was_asked_for(asked, wait_s):
    error = fault(503, "why", {"retry-after": asked})
    assert isinstance(error, IndexRetryable)
    assert error.retry_after_s == wait_s
