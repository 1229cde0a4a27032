"""What an error means for the item that met it."""

import random

import pytest

from serve import errors
from serve.items import Item, Settlement
from serve.jobs.faults import HOPELESS_S, LATER_S, TEXT_MAX, Retries, fault_of, settled


RETRIES = Retries(60, 4.356, 21_600, random.Random(1))  # noqa: S311 - not a secret


def item(attempts: int = 0) -> Item:
    return Item(7, 3, "job", 0, "name", "document", "embed", 1.0, attempts, {})


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (errors.BadInput(), "invalid"),
        (errors.NotFound(), "invalid"),
        (errors.Forbidden(), "invalid"),
        (errors.Conflict(), "invalid"),
        (errors.TooLarge(), "invalid"),
        (errors.PoisonInput(), "poison"),
        (errors.QuotaExceeded(), "rate_limit"),
        (errors.Overloaded(), "rate_limit"),
        (errors.StoreUnavailable(), "network"),
        (errors.IndexUnavailable(), "network"),
        (errors.ModelUnavailable(), "network"),
        (errors.DeadlineExceeded(), "network"),
        (errors.Internal(), "server"),
        (ValueError("secret"), "server"),
    ],
)
def test_an_error_has_a_kind(error: Exception, kind: str):
    assert fault_of(error).kind == kind


def test_a_tenant_reads_our_words_only():
    fault = fault_of(ValueError("secret"))
    assert (fault.code, "secret" in fault.text) == ("internal_error", False)
    fault = fault_of(errors.BadInput("x" * 1000, code="odd"))
    assert (fault.code, fault.text) == ("odd", "x" * TEXT_MAX)


@pytest.mark.parametrize("error", [errors.BadInput("no"), errors.PoisonInput("no")])
def test_what_will_not_pass_is_dead_at_once(error: Exception):
    assert settled(item(), error, RETRIES) == Settlement(7, 3, "dead", fault=fault_of(error))


def test_what_may_pass_is_tried_again_later_and_later():
    for attempts, plain in enumerate((60, 261, 1138, 4960, 21_600, 21_600)):
        waits = [
            settled(item(attempts), errors.IndexUnavailable(), RETRIES).delay_s for _ in range(50)
        ]
        assert all(0.8 * plain <= wait <= 1.2 * plain + 1 for wait in waits)
        assert len(set(waits)) > 1
    assert settled(item(), errors.Internal(), RETRIES).word == "retry"


def test_a_longer_wait_that_an_error_asks_for_is_kept():
    away = errors.StoreUnavailable(retry_after_s=110)
    assert settled(item(), away, RETRIES).delay_s == 110


@pytest.mark.parametrize(
    ("error", "waits"),
    [
        (errors.QuotaExceeded(retry_after_s=9), 9.0),
        (errors.Overloaded(retry_after_s=9), 9.0),
        (errors.Overloaded(), LATER_S),
    ],
)
def test_a_refusal_burns_no_attempt(error: errors.ServiceError, waits: float):
    refused = settled(item(), error, RETRIES)
    assert (refused.word, refused.delay_s) == ("release", waits)


def test_what_waiting_does_not_help_comes_back_seldom_and_spread():
    refused = [settled(item(), errors.QuotaExceeded(), RETRIES) for _ in range(50)]
    assert {one.word for one in refused} == {"release"}
    assert all(0.8 * HOPELESS_S <= one.delay_s <= 1.2 * HOPELESS_S for one in refused)
    assert len({one.delay_s for one in refused}) > 1
