"""One replica's leases against a bank that answers when a test says so."""

import gc
import math
from dataclasses import replace

import pytest

from serve.admission import asks as module
from serve.admission.accounts import Account, Terms
from serve.admission.asks import Ask, Exchange, Permit, Refusal
from serve.admission.leases import TRIES_MAX
from serve.grants import Limit
from tests.unit.leased import A_MONTH, AT_ONCE, LARGE, SETTINGS, SMALL, TOKENS, Replica


# --- blocks -----------------------------------------------------------------------------------


def test_a_block_is_spent_unasked_and_refilled_in_the_background():
    replica = Replica(LARGE)
    assert isinstance(replica.charge(), Ask)
    replica.exchange()
    assert not [ask for _ in range(5) if isinstance(ask := replica.charge(), Ask)]
    assert replica.leases.urgent
    sent = replica.exchange()
    assert [(line.need, line.want) for draw in sent.draws for line in draw.lines] == [(0, 5)]
    assert replica.account(LARGE).balance == 5
    assert replica.free(LARGE) == 600 - 1 - 5 - 5


def test_a_limit_of_few_units_is_asked_for_each_time():
    replica = Replica(SMALL)
    for number in range(3):
        replica.charge()
        (draw,) = replica.exchange().draws
        assert (draw.lines[0].need, draw.lines[0].want) == (1, 1)
        assert replica.free(SMALL) == 20 - number - 1


@pytest.mark.parametrize(
    ("limit", "replicas", "block"),
    [
        (LARGE, 1, 5),
        (LARGE, 2, 5),
        (LARGE, 4, 3),  # together 2 % of the burst
        (LARGE, 7, 0),
        (SMALL, 1, 0),
        (replace(LARGE, interval_s=60), 1, 0),
        (A_MONTH, 2, 100),
    ],
)
def test_blocks_are_half_a_second_and_together_a_small_part_of_the_burst(limit, replicas, block):
    assert Terms(SETTINGS, replicas).block(limit) == block


def test_only_one_of_several_asks_brings_a_block():
    replica = Replica(LARGE)
    asks = [replica.charge() for _ in range(3)]
    sent = replica.exchange()
    assert [draw.lines[0].want for draw in sent.draws] == [6, 1, 1]
    assert all(isinstance(ask.answer, Permit) for ask in asks)
    assert replica.account(LARGE).balance == 5


def test_a_block_that_was_not_granted_is_not_asked_for_with_every_request():
    replica = Replica(LARGE)
    replica.permit()
    replica.others(LARGE, 594)
    for _ in range(3):
        replica.permit()
    replica.exchange()
    assert replica.account(LARGE).balance == 2
    replica.permit()
    assert not replica.leases.urgent
    replica.now = 0.1
    replica.permit()
    assert replica.leases.urgent


def test_an_unused_block_is_given_back():
    replica = Replica(LARGE, A_MONTH)
    replica.permit(7)
    assert replica.free(A_MONTH) == 100_000 - 107
    replica.now = 1.1
    sent = replica.exchange()
    assert sorted(one.units for one in sent.returns) == [5, 100]
    assert replica.free(LARGE) == 600  # the one that was used has been refilled
    assert replica.free(A_MONTH) == 100_000 - 7
    replica.now = 1.2
    assert replica.leases.due(1.2) is None


def test_the_older_mark_of_a_balance_is_the_one_that_counts():
    account = Account(LARGE, Terms(SETTINGS, 2))
    account.add(5, mark=1.0)
    assert account.take(3, 0) == 1.0
    account.add(3, mark=2.0)
    account.add(1, mark=3.0)
    assert account.take(2, 0) == 1.0
    assert account.take(1, 0) == 2.0
    account.put_back(1, 1.0)
    assert account.drop() == [(4, 1.0)]


# --- all or none ------------------------------------------------------------------------------


def test_all_limits_are_charged_or_none():
    replica = Replica(LARGE, TOKENS, AT_ONCE)
    replica.permit(990)
    before = [replica.account(limit).balance for limit in (LARGE, TOKENS, AT_ONCE)]
    refusal = replica.refusal(200)
    assert refusal == Refusal(TOKENS, pytest.approx(19))
    assert [replica.account(limit).balance for limit in (LARGE, TOKENS, AT_ONCE)] == before


def test_the_longest_wait_is_the_one_that_is_told():
    replica = Replica(SMALL, TOKENS, AT_ONCE)
    for _ in range(20):
        replica.permit(50)
    assert replica.refusal(1) == Refusal(SMALL, pytest.approx(0.1))
    replica.now += 0.51
    assert replica.refusal(20) == Refusal(TOKENS, pytest.approx(1.49))


def test_what_exceeds_a_burst_is_refused_for_ever_and_unasked():
    replica = Replica(TOKENS)
    assert replica.charge(1001) == Refusal(TOKENS, math.inf)
    assert isinstance(replica.charge(1000), Ask)


def test_a_refusal_is_repeated_unasked_for_a_while_and_stays_exact():
    replica = Replica(SMALL)
    for _ in range(20):
        replica.permit()
    assert replica.refusal().wait_s == pytest.approx(0.1)
    exchanges = replica.leases._number
    replica.now = 0.06
    assert replica.charge() == Refusal(SMALL, pytest.approx(0.04))
    assert replica.leases._number == exchanges
    replica.now = 0.1
    assert isinstance(replica.charge(), Ask)


def test_a_refusal_does_not_hold_for_what_would_fit():
    replica = Replica(TOKENS)
    replica.permit(900)
    replica.refusal(300)
    assert isinstance(replica.charge(101), Refusal)
    assert isinstance(replica.charge(90), Permit | Ask)


def test_a_refusal_is_forgotten_when_units_come_back():
    replica = Replica(SMALL)
    permits = [replica.permit() for _ in range(20)]
    replica.refusal()
    replica.release(permits[0], refund=True)
    replica.permit()
    replica.refusal()


def test_tokens_do_not_refuse_a_request_without_any():
    replica = Replica(TOKENS)
    permit = replica.permit(1000)
    replica.leases.settle(permit, 1500, 0)
    assert isinstance(replica.charge(0), Permit)


# --- what is given back -----------------------------------------------------------------------


def test_a_refund_gives_everything_back():
    replica = Replica(SMALL, TOKENS, A_MONTH, AT_ONCE)
    permit = replica.permit(600)
    replica.release(permit, refund=True)
    replica.rest(3)
    free = [replica.free(limit) for limit in (SMALL, TOKENS, A_MONTH, AT_ONCE)]
    assert free == [20, 1000, 100_000, 64]


@pytest.mark.parametrize(("true", "free"), [(100, 900), (600, 400), (800, 200), (1500, -500)])
def test_the_true_count_is_settled(true, free):
    replica = Replica(TOKENS, replace(A_MONTH, burst=1000))
    permit = replica.permit(600)
    replica.leases.settle(permit, true, 0)
    replica.release(permit)
    replica.now = 1.1  # blocks are given back
    replica.exchange()
    assert replica.free(TOKENS) == pytest.approx(min(free + 11, 1000))
    assert replica.free(replace(A_MONTH, burst=1000)) == free


def test_returns_that_wait_are_bounded(monkeypatch):
    monkeypatch.setattr(module, "RETURNS_MAX", 3)
    replica = Replica(SMALL)
    for permit in [replica.permit() for _ in range(9)]:
        replica.release(permit, refund=True)
    assert len(replica.due().returns) == 3


# --- levels -----------------------------------------------------------------------------------


def test_units_of_a_level_come_back_at_once_but_for_a_few():
    replica = Replica(AT_ONCE)
    permits = [replica.permit() for _ in range(40)]
    for permit in permits:
        replica.release(permit)
    assert replica.leases.urgent
    (told,) = replica.exchange().returns
    assert told.units <= 7
    assert replica.free(AT_ONCE) == 64 - told.units
    assert isinstance(replica.charge(), Permit)


def test_a_level_of_few_units_is_never_held_unused():
    one = replace(AT_ONCE, burst=2)
    replica = Replica(one)
    permit = replica.permit()
    assert replica.free(one) == 1
    replica.release(permit)
    replica.exchange()
    assert replica.free(one) == 2


def test_unused_units_of_a_level_are_given_back_after_a_while():
    replica = Replica(AT_ONCE)
    replica.release(replica.permit())
    replica.release(replica.permit())
    assert replica.free(AT_ONCE) < 64
    replica.rest(2.2)
    assert replica.free(AT_ONCE) == 64


def test_what_is_held_is_never_less_than_what_is_in_use():
    replica = Replica(AT_ONCE)
    permits = [replica.permit() for _ in range(30)]
    replica.rest(3)
    for permit in permits[:20]:
        replica.release(permit)
    replica.rest(3)
    account = replica.account(AT_ONCE)
    assert (account.in_use(), account.balance, account.held) == (10, 0, 10)
    assert replica.free(AT_ONCE) == 54


def test_what_is_held_for_long_is_told_again_and_does_not_lapse():
    replica = Replica(AT_ONCE)
    permit = replica.permit()
    replica.rest(90)
    assert replica.free(AT_ONCE) == 63
    replica.release(permit)
    replica.rest(2.2)
    assert replica.free(AT_ONCE) == 64


# --- exchanges --------------------------------------------------------------------------------


def test_an_exchange_is_sent_again_until_it_is_answered():
    replica = Replica(TOKENS)
    replica.permit(990)
    replica.charge(5)
    first = replica.due()
    replica.now = 2.0
    again = replica.due()
    assert (again.number, again.asks) == (first.number, first.asks)
    hints = [sent.draws[0].lines[0].hint for sent in (first, again)]
    assert hints[1] - hints[0] == pytest.approx(20)
    replica.now = 31  # the Ledger may forget that it had it
    assert replica.due().number == first.number + 1


def test_nothing_is_sent_but_now_and_then_to_see_whether_the_ledger_is_there():
    replica = Replica(TOKENS)
    replica.exchange()
    assert replica.leases.due(0.4) is None
    assert [draw.lines for draw in replica.leases.due(0.5).draws] == [()]


def test_units_for_which_nobody_waits_any_more_stay_or_go_back():
    replica = Replica(LARGE, AT_ONCE)
    asks = [replica.charge() for _ in range(9)]
    sent = replica.due()
    for ask in asks:
        replica.leases.abandon(ask)
    replica.leases.apply(sent, replica.answers(sent), 0)
    assert replica.account(LARGE).balance == 5
    assert replica.account(AT_ONCE).in_use() == 0
    replica.exchange()
    assert replica.free(LARGE) == 595
    assert [ask.answer for ask in asks] == [None] * 9


# --- limits and owners ------------------------------------------------------------------------


def test_limits_change_at_run_time():
    replica = Replica(TOKENS)
    replica.permit(1000)
    replica.refusal(500)
    replica.limits = (replace(TOKENS, burst=2000),)
    replica.permit(900)
    assert replica.refusal(200).wait_s == pytest.approx(10)


def test_only_so_many_owners_are_held():
    replica = Replica(owners_max=3)
    for number in range(20):
        limit = replace(SMALL, owner=f"t/{number}")
        replica.charge(1, replica.caller(str(number), limit))
        replica.exchange()
    replica.now = 3  # what is active is looked through
    replica.exchange()
    gc.collect()
    assert len(replica.leases.wallets.accounts()) == 3


def test_a_new_month_starts_unused():
    replica = Replica(replace(A_MONTH, burst=100))
    replica.permit(100)
    assert replica.refusal(1) == Refusal(replica.limits[0], math.inf)
    replica.leases.roll("2026-12", 0)
    ask = replica.charge(1)
    assert isinstance(ask, Ask)
    assert replica.due().draws[0].lines[0].hint == 100


def test_what_is_left_follows_a_changed_limit():
    replica = Replica(AT_ONCE, A_MONTH)
    replica.permit(1000)
    replica.limits = replace(AT_ONCE, burst=74), replace(A_MONTH, burst=50_000)
    replica.charge(0)
    assert replica.account(AT_ONCE).free == 73
    assert replica.account(A_MONTH).free == 48_900  # a block of a hundred


def of_months(sent: Exchange | None) -> list[float]:
    return [one.units for one in (sent.returns if sent else ()) if one.limit.kind == "month"]


@pytest.mark.parametrize("when", ["before", "after", "in the middle"])
def test_what_was_not_used_of_the_last_month_is_no_credit_of_the_new_one(when):
    replica = Replica(A_MONTH)
    permit = replica.permit(600)
    if when == "after":
        replica.leases.roll("2026-12", 0)
    replica.release(permit, refund=True)
    if when == "in the middle":
        assert of_months(replica.due()) == [600]
    if when != "after":
        replica.leases.roll("2026-12", 0)
    replica.now = 0.6
    assert of_months(replica.leases.due(0.6)) == []
    assert replica.account(A_MONTH).free == 100_000


def test_what_was_reserved_of_the_last_month_is_not_put_into_the_new_one():
    replica = Replica(A_MONTH)
    replica.permit(50)
    ask = replica.charge(150)
    assert ask.taken == [100]
    replica.leases.roll("2026-12", 0)
    replica.leases.abandon(ask)
    assert replica.account(A_MONTH).balance == 0


@pytest.mark.parametrize("tokens", [7, 10, 13])
def test_the_last_units_are_had_although_some_lie_here_and_some_at_the_ledger(tokens):
    queue = Limit("t/ann", "queue", "level", "tokens", 50 * tokens)
    replica = Replica(queue)
    answers = [replica.permit(tokens)]
    for some in (3, 11, 20, 15):
        answers += [replica.charge(tokens) for _ in range(some)]
        for _ in range(TRIES_MAX):
            if replica.leases.urgent:
                replica.exchange()
    had = [answer.answer if isinstance(answer, Ask) else answer for answer in answers]
    assert len(had) == 50
    assert all(isinstance(answer, Permit) for answer in had)
    assert isinstance(replica.refusal(tokens), Refusal)
