"""How long a queue is told to wait, and which message of a document counts."""

import numpy as np

from serve.config import Limits
from serve.content.documents import Document
from serve.content.messages import Message, Removal, winners
from serve.content.vectors import RawVector
from serve.errors import Conflict, Overloaded, QuotaExceeded
from serve.flows.queues import delay_s


LIMITS = Limits()


def test_the_delay_is_the_errors_own_and_doubles_with_each_delivery():
    error = Overloaded("x", retry_after_s=2.2)
    assert [delay_s(error, attempts, LIMITS) for attempts in (1, 2, 3, 6)] == [3, 5, 9, 71]
    assert [delay_s(Conflict("x"), attempts, LIMITS) for attempts in (1, 2, 13)] == [10, 20, 40_960]


def test_no_delay_is_longer_than_a_queue_allows():
    assert delay_s(Overloaded("x", retry_after_s=120), 100, LIMITS) == 43_200
    assert delay_s(Conflict("x"), 10**9, LIMITS) == 43_200
    assert delay_s(Conflict("x"), 1, Limits(queue_delay_s_max=5)) == 5


def test_a_month_that_is_used_up_is_waited_for_as_long_as_may_be():
    assert delay_s(QuotaExceeded("x"), 1, LIMITS) == 43_200
    assert delay_s(QuotaExceeded("x", retry_after_s=0.2), 1, LIMITS) == 1


def test_of_each_id_the_last_one_counts_and_vectors_stand_apart():
    row = np.ones(2, np.float32)
    wishes = {
        0: Document("a", "x"),
        1: Removal("a"),
        3: Document("b", "x"),
        4: RawVector("messages[4].body", "a", row, "", {}),
        6: Document("b", "y"),
    }
    times = {0: 5.0, 1: 4.0, 3: 1.0, 4: 9.0, 6: 1.0}
    messages = {at: Message(times[at], 1, Removal("")) for at in wishes}
    assert winners(wishes, messages) == {0: 0, 1: 0, 3: 6, 4: 4, 6: 6}
