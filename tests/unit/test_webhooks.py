"""Webhooks: what others' libraries verify, and what follows from a try."""

import base64
import json
import random
import time
from email.utils import formatdate
from functools import cache
from itertools import accumulate

import openai
import pytest
import standardwebhooks
from hypothesis import given, settings
from hypothesis import strategies as st

from serve.errors import BadInput
from serve.items import Event
from serve.jobs import webhooks
from serve.jobs.webhooks import Verdict, new_secret, payload, retry_after_s, secret_bytes


NOW = 1_800_000_000.0
DAY_S = 86_400.0
FIGURES = {
    "state": "completed_with_errors",
    "paused": False,
    "total": 10**9,
    "done": 10**9,
    "skipped": 10**9,
    "dead": 10**9,
    "cancelled": 10**9,
    "tokens": 10**15,
}
EVENT = Event(7, "job_018f", "ann", 1_700_000_000.25, "job.completed_with_errors", FIGURES)


@cache
def openai_client() -> openai.OpenAI:
    return openai.OpenAI(api_key="none")


def openai_takes(secret: str, body: bytes, headers) -> bool:
    try:
        event = openai_client().webhooks.unwrap(body, headers, secret=secret)
        assert event.to_dict()["type"] == EVENT.type
    except openai.InvalidWebhookSignatureError:
        return False
    return True


def standard_takes(secret: str, body: bytes, headers) -> bool:
    try:
        assert standardwebhooks.Webhook(secret).verify(body, dict(headers)) == json.loads(body)
    except standardwebhooks.WebhookVerificationError:
        return False
    return True


ORACLES = pytest.mark.parametrize("takes", [openai_takes, standard_takes])


def secret_of(size: int) -> str:
    return f"whsec_{base64.b64encode(bytes(range(size))).decode()}"


@ORACLES
@pytest.mark.parametrize("secret", [new_secret(), secret_of(24), secret_of(64)], ids=len)
def test_a_receivers_library_takes_the_signature(takes, secret):
    body = payload(EVENT)
    assert takes(secret, body, webhooks.signed_headers([secret], "msg_1", time.time(), body))


@ORACLES
def test_either_of_two_live_secrets_verifies_and_no_other(takes):
    new, old = new_secret(), new_secret()
    body = payload(EVENT)
    headers = webhooks.signed_headers([new, old], "msg_1", time.time(), body)
    assert takes(new, body, headers)
    assert takes(old, body, headers)
    assert not takes(new_secret(), body, headers)


@ORACLES
def test_body_id_and_time_are_signed(takes):
    secret, now, body = new_secret(), time.time(), payload(EVENT)
    headers = webhooks.signed_headers([secret], "msg_1", now, body)
    assert not takes(secret, body.replace(b"job_018f", b"job_018e"), headers)
    assert not takes(secret, body, {**headers, "webhook-id": "msg_2"})
    assert not takes(secret, body, {**headers, "webhook-timestamp": str(int(now) - 1)})


def test_a_repeat_keeps_its_id_and_has_the_time_of_its_try():
    secret = new_secret()
    first, again = (webhooks.signed_headers([secret], "msg_1", now, b"{}") for now in (9.9, 15.0))
    assert first["webhook-id"] == again["webhook-id"] == "msg_1"
    assert (first["webhook-timestamp"], again["webhook-timestamp"]) == ("9", "15")
    assert first["webhook-signature"] != again["webhook-signature"]
    assert first["content-type"] == "application/json"


@pytest.mark.parametrize("live", [[], [secret_of(32)] * 3])
def test_one_secret_signs_or_two(live):
    with pytest.raises(ValueError, match="one live secret, or two"):
        webhooks.signed_headers(live, "msg_1", NOW, b"{}")


def test_new_secrets_differ_and_are_long():
    some = {new_secret() for _ in range(100)}
    assert len(some) == 100
    assert {len(secret_bytes(secret)) for secret in some} == {32}


@pytest.mark.parametrize(
    "secret",
    [
        secret_of(23),
        secret_of(65),
        secret_of(32).removeprefix("whsec_"),
        secret_of(32).upper(),
        secret_of(32)[:-1],
        secret_of(32)[:-1] + "\n",
        secret_of(32) + "\n",
        secret_of(32)[:10] + "!" + secret_of(32)[10:],
        "whsec_" + "é" * 40,
        "whsec_",
        "",
    ],
)
def test_what_is_no_secret(secret):
    with pytest.raises(BadInput, match="24 to 64 bytes"):
        secret_bytes(secret)


def test_a_payload_holds_the_job_and_its_counts_and_nothing_else():
    event = Event(7, "job_1", "ann", 1_700_000_000.25, "job.completed", {**FIGURES, "text": "x"})
    said = json.loads(payload(event))
    assert list(said) == ["type", "timestamp", "data"]
    assert said["type"] == "job.completed"
    assert said["timestamp"] == "2023-11-14T22:13:20.250Z"
    figures = {name: count for name, count in FIGURES.items() if name != "paused"}
    assert said["data"] == {"id": "job_1", **figures}


def test_the_largest_payload_is_far_below_the_standards_bound():
    assert len(payload(EVENT)) < 500


class Middle(random.Random):
    """No jitter."""

    def uniform(self, low: float, high: float) -> float:
        return (low + high) / 2 if low < 1 else low


def after(outcome: webhooks.Outcome, **more) -> Verdict:
    given_values = {"attempt": 1, "failing_since": None, "now": NOW, "rng": Middle()} | more
    return webhooks.verdict(outcome, **given_values)


def test_the_schedule_is_the_standards():
    first, *rest = webhooks.ATTEMPTS_S
    hours = [0, 0, 0, 0.5, 2, 5, 10, 14, 20, 24]
    assert [first, *rest] == [0, 5, 300, *(hour * 3600 for hour in hours[3:])]
    pauses = [after("unreachable", attempt=tries).run_at - NOW for tries in range(1, 10)]
    assert pauses == rest
    assert max(accumulate(pauses)) < webhooks.FAILING_S_MAX
    assert after("unreachable", attempt=10) == Verdict("given_up")


@pytest.mark.parametrize("status", [200, 201, 202, 204, 299])
def test_success_is_any_2xx_whatever_was_before(status):
    assert after(status, attempt=10, failing_since=NOW - 9 * DAY_S) == Verdict("delivered")


@pytest.mark.parametrize("outcome", [300, 301, 307, 308, 400, 401, 404, 418, 500, "unreachable"])
def test_a_failure_is_tried_again_and_holds_nobody_else(outcome):
    assert after(outcome) == Verdict("retry", NOW + 5)


def test_gone_disables_at_once():
    assert after(410) == Verdict("disabled")


def test_five_days_of_failure_disable():
    assert after(500, failing_since=NOW - 5 * DAY_S + 1).word == "retry"
    assert after(500, failing_since=NOW - 5 * DAY_S) == Verdict("disabled")
    assert after("unreachable", failing_since=NOW - 5 * DAY_S, attempt=10) == Verdict("disabled")


def test_what_the_guard_refuses_is_not_tried_again():
    assert after("refused") == Verdict("given_up")
    assert after("refused", failing_since=NOW - 5 * DAY_S) == Verdict("disabled")


@pytest.mark.parametrize("status", [429, 502, 504])
def test_a_busy_receiver_is_slowed_down_for_all_its_deliveries(status):
    assert after(status) == Verdict("retry", NOW + 60, NOW + 60)
    assert after(status, attempt=2) == Verdict("retry", NOW + 300, NOW + 60)
    assert after(status, retry_after="90") == Verdict("retry", NOW + 90, NOW + 90)
    assert after(status, attempt=10) == Verdict("given_up", hold_until=NOW + 60)


def test_retry_after_counts_for_every_failure_and_never_shortens():
    assert after(503, retry_after="20") == Verdict("retry", NOW + 20, NOW + 20)
    assert after(503, retry_after="20", attempt=2) == Verdict("retry", NOW + 300, NOW + 20)
    assert after(503, retry_after="0") == Verdict("retry", NOW + 5)


@pytest.mark.parametrize(
    ("header", "seconds"),
    [
        (None, 0),
        ("", 0),
        (" 120 ", 120),
        ("999999999", DAY_S),
        ("9" * 400, 0),
        ("-5", 0),
        ("1.5", 0),
        ("²", 0),
        ("soon", 0),
        (formatdate(NOW + 90, usegmt=True), 90),
        (formatdate(NOW + 90), 90),  # `-0000`
        (formatdate(NOW - 90, usegmt=True), 0),
        (formatdate(NOW + 9 * DAY_S, usegmt=True), DAY_S),
        ("Fri, 01 Jan 10000 00:00:00 GMT", 0),
        ("Fri, 01 Jan 99999999999 00:00:00 GMT", 0),
        ("Fri, 01 Jan 2100 00:00:00 +9999", 0),
        ("Fri, 01 Jan 2100 00:00:00 +99999999999999999", 0),
        ("Fri, 01 Jan , 00:00:00 GMT", 0),
    ],
)
def test_retry_after(header, seconds):
    assert retry_after_s(header, NOW) == seconds


def test_a_date_without_a_zone_is_utc_wherever_we_run(monkeypatch):
    monkeypatch.setenv("TZ", "XXX-9")
    time.tzset()
    try:
        assert retry_after_s(formatdate(NOW + 90), NOW) == 90
    finally:
        monkeypatch.undo()
        time.tzset()


@settings(deadline=None, max_examples=100)
@given(
    st.one_of(
        st.text(max_size=40),
        st.builds(
            "Fri, {} {} {} {}:00:00 {}".format,
            st.integers(0, 40),
            st.sampled_from(["Jan", "Feb", "Dec", "Foo"]),
            st.one_of(st.integers(-5, 10**4), st.integers(0, 10**30), st.just(",")),
            st.integers(0, 99),
            st.one_of(
                st.sampled_from(["GMT", "-0000", "", "EST", "x", ","]),
                st.integers(-(10**30), 10**30).map("{:+05d}".format),
            ),
        ),
    )
)
def test_no_retry_after_is_a_trap(header):
    assert 0 <= retry_after_s(header, NOW) <= DAY_S


@settings(deadline=None, max_examples=200)
@given(
    outcome=st.sampled_from([307, 400, 429, 500, 502, 503, 504, "unreachable"]),
    attempt=st.integers(1, 9),
    asked=st.one_of(st.none(), st.integers(0, 10**6)),
    seed=st.integers(0, 2**32),
)
def test_a_retry_lies_within_the_jitter_and_not_before_it_was_asked_for(
    outcome, attempt, asked, seed
):
    header = None if asked is None else str(asked)
    rng = random.Random(seed)  # noqa: S311 - not a secret
    word = after(outcome, attempt=attempt, retry_after=header, rng=rng)
    wait_s = word.run_at - NOW
    due_s = webhooks.ATTEMPTS_S[attempt]
    honoured_s = min(asked or 0, DAY_S)
    assert word.word == "retry"
    assert wait_s >= max(0.8 * due_s, honoured_s)
    assert wait_s <= 1.2 * max(due_s, honoured_s, webhooks.BUSY_S)
    assert word.hold_until is None or NOW < word.hold_until <= NOW + DAY_S
