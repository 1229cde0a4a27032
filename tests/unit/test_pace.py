"""Token buckets that tell a request when to start."""

import math

import pytest

from serve.index.pace import Pace


def test_a_seconds_worth_goes_out_at_once_and_the_rest_is_spread():
    pace = Pace(requests_s=4, units_s=1000, keys_max=9)
    assert [pace.take("a", 1, 50) for _ in range(7)] == pytest.approx([0, 0, 0, 0, 0.25, 0.5, 0.75])
    assert pace.take("b", 1, 50) == 0
    assert pace.take("a", 1, 52) == 0
    # However long it was idle, no more than a second's worth has gathered.
    assert [pace.take("a", 1, 900) for _ in range(6)] == pytest.approx([0, 0, 0, 0, 0.25, 0.5])


def test_bytes_wait_as_requests_do():
    pace = Pace(requests_s=1000, units_s=100, keys_max=9)
    assert [pace.take("a", 50, 0) for _ in range(4)] == pytest.approx([0, 0, 0.5, 1])


def test_what_is_larger_than_the_bucket_waits_for_a_full_one():
    pace = Pace(requests_s=1000, units_s=100, keys_max=9)
    assert pace.take("a", 300, 0) == 0
    assert pace.take("a", 1, 0) == pytest.approx(2.01)
    assert pace.take("b", 1, 0) == 0
    assert pace.take("b", 300, 0) == pytest.approx(0.01)


def test_in_the_long_run_the_rate_holds():
    pace, now, sent = Pace(requests_s=10, units_s=500, keys_max=1), 0.0, 0
    while now < 20:
        now += pace.take("a", 100, now)
        sent += 1
    assert sent == pytest.approx(5 * 20 + 5, abs=2)


def test_a_clock_that_goes_back_is_no_credit():
    pace = Pace(requests_s=1, units_s=1, keys_max=1)
    assert pace.take("a", 1, 100) == 0
    assert pace.take("a", 1, 99) == pytest.approx(2)


def test_keys_are_bounded_and_the_least_recent_is_forgotten():
    pace = Pace(requests_s=1, units_s=1, keys_max=2)
    for key in ("a", "b", "a", "c"):
        pace.take(key, 1, 0)
    assert len(pace._full_at) == 2
    assert pace.take("a", 1, 0) == pytest.approx(2)
    assert pace.take("b", 1, 0) == 0


def test_who_only_asks_takes_nothing():
    pace = Pace(requests_s=1, units_s=100, keys_max=1)
    assert [pace.wait_s("a", 50, 0) for _ in range(3)] == [0, 0, 0]
    assert pace.take("a", 50, 0) == 0
    assert pace.wait_s("a", 50, 0) == pace.take("a", 50, 0) == pytest.approx(1)


def test_an_infinite_rate_is_none():
    pace = Pace(requests_s=math.inf, units_s=math.inf, keys_max=1)
    assert {pace.take("a", 10**9, 0) for _ in range(1000)} == {0}
