"""One replica's leases against a bank that answers when a test says so."""

import gc
import math
from collections.abc import Sequence
from dataclasses import replace

import pytest

from serve.admission import leases as module
from serve.admission.accounts import Account, Terms
from serve.admission.asks import Ask, Exchange, Permit, Refusal
from serve.admission.bank import Bank
from serve.admission.leases import Leases
from serve.config import Ledger
from serve.grants import Draw, Grant, Limit, Line
from serve.records import Caller


SETTINGS = Ledger()
MONTH = "2026-11"
# Ten a second: asked for per request by two replicas below a burst of 200, in blocks of 5 from 500.
SMALL = Limit("t/ann", "small", "rate", "requests", 20, 0.1)
LARGE = Limit("t/ann", "large", "rate", "requests", 600, 0.1)
TOKENS = Limit("t/ann", "tokens", "rate", "tokens", 1000, 0.1)
AT_ONCE = Limit("t/ann", "at once", "level", "requests", 64)
A_MONTH = Limit("t/ann", "month", "month", "tokens", 100_000)


class Replica:
    """Leases of one of two replicas, with the bank they draw from."""

    def __init__(self, *limits: Limit, owners_max: int = 10, bank: Bank | None = None) -> None:
        self.now = 0.0
        self.bank = bank or Bank(keys_max=100, lease_s=SETTINGS.lease_s)
        self.leases = Leases(SETTINGS, replicas=2, owners_max=owners_max, month=MONTH)
        self.limits = limits

    def caller(self, tenant: str = "ann", *limits: Limit) -> Caller:
        return Caller(tenant, "free", 1, "k", limits={"interactive": limits or self.limits})

    def charge(self, tokens: int = 1, caller: Caller | None = None) -> Permit | Ask | Refusal:
        wallet = self.leases.wallets.find(caller or self.caller(), "interactive")
        return self.leases.charge(wallet, tokens, self.now)

    def permit(self, tokens: int = 1) -> Permit:
        """Charge, and exchange if it takes one."""
        answer = self.charge(tokens)
        if isinstance(answer, Ask):
            self.exchange()
            assert isinstance(answer.answer, Permit)
            return answer.answer
        assert isinstance(answer, Permit)
        return answer

    def refusal(self, tokens: int = 1) -> Refusal:
        answer = self.charge(tokens)
        if isinstance(answer, Ask):
            self.exchange()
            answer = answer.answer
        assert isinstance(answer, Refusal)
        return answer

    def due(self) -> Exchange:
        sent = self.leases.due(self.now)
        assert sent is not None
        return sent

    def answers(self, sent: Exchange) -> Sequence[Grant]:
        return self.bank.exchange("a", sent.returns, sent.draws, now=self.now, month=MONTH)

    def exchange(self) -> Exchange:
        sent = self.due()
        self.leases.apply(sent, self.answers(sent), self.now)
        return sent

    def rest(self, seconds: float) -> None:
        """Let time pass, with whatever exchanges are due."""
        for _ in range(round(seconds * 10)):
            self.now += 0.1
            if self.leases.due(self.now):
                self.exchange()

    def others(self, limit: Limit, units: float) -> None:
        """Another replica draws so much."""
        draw = Draw((Line(limit, units, units),))
        (grant,) = self.bank.exchange("b", (), [draw], now=self.now, month=MONTH)
        assert grant.refused is None

    def fail(self, seconds: float = 0.0) -> None:
        """The Ledger does not answer what is due, if anything is."""
        self.now += seconds
        self.leases.due(self.now)
        self.leases.failed(self.now)

    def release(self, permit: Permit, *, refund: bool = False) -> None:
        self.leases.release(permit, self.now, refund=refund)

    def account(self, limit: Limit) -> Account:
        (found,) = [one for one in self.leases.wallets.accounts() if one.limit.name == limit.name]
        return found

    def free(self, limit: Limit) -> float | None:
        return self.bank.free(limit, now=self.now, month=MONTH)


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


# --- the local share --------------------------------------------------------------------------


def test_without_the_ledger_a_replica_has_its_part_of_what_was_left():
    replica = Replica(replace(SMALL, interval_s=10))
    for _ in range(8):
        replica.permit()
    replica.fail()
    permits = [replica.permit() for _ in range(6)]  # half of the twelve that were left
    assert all(permit.share is not None for permit in permits)
    assert replica.refusal().wait_s == pytest.approx(20)
    replica.now += 20
    replica.permit()


def test_balances_go_on_without_the_ledger():
    replica = Replica(LARGE)
    replica.permit()
    replica.fail()
    assert [replica.permit().local for _ in range(5)] == [{}] * 5
    assert replica.permit().local


def test_those_that_wait_are_answered_by_the_share():
    replica = Replica(SMALL)
    asks = [replica.charge() for _ in range(12)]
    replica.due()
    asks += [replica.charge()]
    assert replica.leases.failed(0) == asks
    answers = [type(ask.answer) for ask in asks]
    assert answers == [Permit] * 5 + [Refusal] * 8  # a second's worth of a limit not yet known


def test_one_request_always_fits_into_a_share():
    replica = Replica(TOKENS, replace(AT_ONCE, burst=1))
    replica.fail()
    permit = replica.permit(900)
    assert replica.refusal(900).limit.name == "at once"
    replica.release(permit)
    assert replica.refusal(900).limit == TOKENS


def test_a_level_has_its_part_too():
    replica = Replica(AT_ONCE)
    replica.fail()
    permits = [replica.permit() for _ in range(32)]
    assert replica.refusal() == Refusal(AT_ONCE, 1.0)
    replica.release(permits[0])
    replica.permit()


def test_what_others_held_of_a_level_a_moment_ago_is_not_given_out_twice():
    ten = replace(AT_ONCE, burst=10)
    replica = Replica(ten)
    replica.others(ten, 7)
    permits = [replica.permit()]
    replica.fail()
    permits.append(replica.permit())  # half of the two that were left
    replica.refusal()
    replica.now = 1.1
    permits += [replica.permit() for _ in range(3)]  # half of all
    replica.refusal()


def test_a_refund_by_the_share_is_given_back_to_it():
    replica = Replica(replace(SMALL, interval_s=1000), A_MONTH)
    replica.permit(1)
    replica.fail()
    permits = [replica.permit(10) for _ in range(9)]
    replica.refusal(10)
    replica.release(permits[-1], refund=True)
    replica.permit(10)
    replica.refusal(10)


def test_what_came_from_both_is_given_back_to_both_and_once():
    replica = Replica(A_MONTH)
    replica.permit(50)
    replica.fail()
    permit = replica.permit(150)  # 100 of a block, 50 of the share
    replica.leases.settle(permit, 75, 0)
    replica.release(permit, refund=True)
    late = replica.permit(30)
    replica.rest(3)
    assert replica.leases.share is None
    replica.release(late, refund=True)
    replica.rest(0.1)
    assert replica.free(A_MONTH) == 100_000 - 50


def test_what_is_in_use_of_a_level_by_its_share_is_told():
    replica = Replica(AT_ONCE)
    replica.fail()
    permits = [replica.permit() for _ in range(9)]
    replica.rest(3)
    assert replica.free(AT_ONCE) == 55
    for permit in permits:
        replica.release(permit)
    replica.rest(3)
    assert replica.free(AT_ONCE) == 64


def test_what_was_used_of_a_share_that_refilled_is_told_to_the_last():
    replica = Replica(SMALL)
    for _ in range(20):
        replica.permit()
    replica.fail()
    replica.now = 2.0
    for _ in range(10):
        replica.permit()
    replica.refusal()
    told = [sum(one.units for one in replica.exchange().returns)]
    assert replica.free(SMALL) == pytest.approx(10)
    replica.now = 4.1
    for _ in range(5):
        replica.permit()
    sent = replica.due()
    replica.permit()
    replica.leases.apply(sent, replica.answers(sent), replica.now)
    told.append(sum(one.units for one in sent.returns))
    told.append(sum(one.units for one in replica.exchange().returns))
    assert told == [pytest.approx(-10), pytest.approx(-5), pytest.approx(-1)]
    assert replica.leases.share is None


def test_what_was_used_meanwhile_is_told_when_the_ledger_is_back():
    slow = replace(SMALL, interval_s=1000)
    replica = Replica(slow, A_MONTH)
    replica.permit(50)
    replica.leases.drain()
    replica.exchange()
    replica.fail(0.1)
    for _ in range(4):
        replica.permit(10)
    assert replica.free(slow) == pytest.approx(19, abs=1e-3)
    sent = replica.exchange()
    assert {one.limit.name: one.units for one in sent.returns} == {
        "small": pytest.approx(-4, abs=1e-3),
        "month": -40,
    }
    assert all(line.want == 0 for draw in sent.draws for line in draw.lines)
    assert replica.free(slow) == pytest.approx(15, abs=1e-3)
    assert replica.free(A_MONTH) == 100_000 - 90


def test_a_ledger_that_lost_its_books_learns_what_is_known():
    slow = replace(SMALL, interval_s=1000)
    replica = Replica(slow, A_MONTH, AT_ONCE)
    for _ in range(5):
        replica.permit(10)
    replica.fail()
    replica.permit(10)
    replica.bank = Bank(keys_max=100, lease_s=60)
    for _ in range(3):
        replica.exchange()
    assert replica.free(slow) == pytest.approx(14, abs=0.01)
    assert replica.free(A_MONTH) == 100_000 - 60 - replica.account(A_MONTH).balance
    assert replica.free(AT_ONCE) == 64 - replica.account(AT_ONCE).held


def test_the_share_holds_until_all_replicas_have_told_the_ledger():
    replica = Replica(SMALL)
    replica.permit()
    replica.fail()
    replica.exchange()
    for replica.now in (0.1, 1.0, 1.9):
        assert isinstance(replica.charge(), Permit)
        replica.exchange()
        assert replica.leases.share is not None
    replica.now = 2.0
    replica.exchange()
    assert replica.leases.share is None
    assert isinstance(replica.charge(), Ask)
