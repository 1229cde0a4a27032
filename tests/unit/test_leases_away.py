"""One replica's leases while the Ledger is away, and when it is back."""

from dataclasses import replace

import pytest

from serve.admission.asks import Ask, Permit, Refusal
from serve.admission.bank import Bank
from tests.unit.leased import A_MONTH, AT_ONCE, LARGE, SETTINGS, SMALL, TOKENS, Replica


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


@pytest.mark.parametrize("seconds", [3, SETTINGS.lease_s * 1.5])
def test_what_is_in_use_of_a_level_by_its_share_is_told_and_does_not_lapse(seconds):
    replica = Replica(AT_ONCE)
    replica.fail()
    permits = [replica.permit() for _ in range(9)]
    replica.rest(seconds)
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
    replica.exchange()
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
    assert replica.exchange().returns == ()
    sent = replica.exchange()
    assert {one.limit.name: one.units for one in sent.returns} == {
        "small": pytest.approx(-4, abs=1e-3),
        "month": -40,
    }
    assert all(line.want == 0 for draw in sent.draws for line in draw.lines)
    assert replica.free(slow) == pytest.approx(15, abs=1e-3)
    assert replica.free(A_MONTH) == 100_000 - 90


def test_what_was_used_in_a_long_outage_is_told_to_the_last():
    replica = Replica(A_MONTH)
    replica.permit(50)
    replica.leases.drain()
    replica.exchange()
    for _ in range(40):
        replica.fail(5)
        replica.permit(10)
    replica.rest(3)
    assert replica.leases.share is None
    assert replica.free(A_MONTH) == 100_000 - 50 - 400


def test_what_a_ledger_did_not_hear_before_it_was_away_again_is_told_later():
    replica = Replica(A_MONTH)
    replica.permit(50)
    replica.fail()
    replica.permit(300)
    replica.exchange()
    assert [one.units for one in replica.due().returns] == [-200]
    replica.fail()
    replica.fail(SETTINGS.lease_s / 2)
    replica.rest(3)
    assert replica.free(A_MONTH) == 100_000 - 350


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
