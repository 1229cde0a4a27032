import asyncio

import pytest

from serve.admission.quotas import Dimension, Gcra, Quotas, dimensions
from serve.config import Tier
from serve.errors import (
    BadInput,
    DeadlineExceeded,
    Internal,
    NotFound,
    Overloaded,
    PoisonInput,
    QuotaExceeded,
)
from serve.records import Caller


TIER = Tier(
    weight=1,
    requests_per_minute=60,
    requests_burst=4,
    tokens_per_minute=6000,
    tokens_burst=1000,
    bulk_tokens_per_minute=60_000,
    bulk_tokens_burst=10_000,
    queued_tokens_max=10_000,
)
ANN = Caller("ann", "free", 1, "k1")
ANNS_OTHER_KEY = Caller("ann", "free", 1, "k2")
BOB = Caller("bob", "free", 1, "k3")
NOW = 1000.0


def new_quotas(replicas: int = 1, tenants_max: int = 100, tier: Tier = TIER) -> Quotas:
    return Quotas({"free": tier}, replicas=replicas, tenants_max=tenants_max)


def left(quotas: Quotas, now: float = NOW, klass="interactive") -> tuple[int, int]:
    rates = quotas.rates(ANN, klass, now)
    return rates["requests"].remaining, rates["tokens"].remaining


def refusal(quotas: Quotas, tokens: int, now: float = NOW, caller=ANN) -> QuotaExceeded:
    with pytest.raises(QuotaExceeded) as caught:
        quotas.admit(caller, "interactive", tokens=tokens, now=now)
    return caught.value


def test_the_burst_passes_at_once_and_no_more():
    quotas = new_quotas()
    for _ in range(4):
        quotas.admit(ANN, "interactive", tokens=1, now=NOW)
    error = refusal(quotas, 1)
    assert error.code == "requests_per_minute"
    assert error.retry_after_s == pytest.approx(1)
    assert "requests_per_minute" in error.message
    assert "60 a minute" in error.message


def test_the_wait_is_exact():
    quotas = new_quotas()
    quotas.admit(ANN, "interactive", tokens=900, now=NOW)
    error = refusal(quotas, 250)  # 150 tokens short at 100 a second
    assert (error.code, error.retry_after_s) == ("tokens_per_minute", pytest.approx(1.5))
    refusal(quotas, 250, NOW + 1.499)
    quotas.admit(ANN, "interactive", tokens=250, now=NOW + error.retry_after_s)


def test_all_dimensions_are_charged_or_none():
    quotas = new_quotas()
    quotas.admit(ANN, "interactive", tokens=1000, now=NOW)
    for _ in range(10):
        refusal(quotas, 1)
    assert left(quotas) == (3, 0)


def test_the_longest_wait_is_the_one_named():
    quotas = new_quotas()
    for _ in range(4):
        quotas.admit(ANN, "interactive", tokens=250, now=NOW)
    error = refusal(quotas, 500)
    assert (error.code, error.retry_after_s) == ("tokens_per_minute", pytest.approx(5))


def test_tenants_are_apart_and_the_keys_of_one_are_together():
    quotas = new_quotas()
    quotas.admit(ANN, "interactive", tokens=1000, now=NOW)
    quotas.admit(BOB, "interactive", tokens=1000, now=NOW)
    refusal(quotas, 1, caller=ANNS_OTHER_KEY)


def test_bulk_has_tokens_of_its_own_and_shares_requests():
    quotas = new_quotas()
    quotas.admit(ANN, "bulk", tokens=10_000, now=NOW)
    assert left(quotas) == (3, 1000)
    assert left(quotas, klass="bulk") == (3, 0)
    with pytest.raises(QuotaExceeded) as caught:
        quotas.admit(ANN, "bulk", tokens=1, now=NOW)
    assert caught.value.code == "bulk_tokens_per_minute"


def test_what_exceeds_the_burst_can_never_pass_and_is_no_429():
    quotas = new_quotas()
    with pytest.raises(BadInput) as caught:
        quotas.admit(ANN, "interactive", tokens=1001, now=NOW)
    assert (caught.value.param, caught.value.code) == ("input", "tokens_exceed_quota")
    assert "1000" in caught.value.message
    assert left(quotas) == (4, 1000)
    quotas.admit(ANN, "interactive", tokens=1000, now=NOW)


def test_one_request_of_n_tokens_and_n_of_one_are_admitted_alike():
    """Refusal does not depend on packing: both get exactly the burst, and both then wait alike."""
    roomy = TIER.model_copy(update={"requests_burst": 10_000, "requests_per_minute": 1e9})
    packed, single = new_quotas(tier=roomy), new_quotas(tier=roomy)
    for _ in range(10):
        packed.admit(ANN, "interactive", tokens=100, now=NOW)
    for _ in range(1000):
        single.admit(ANN, "interactive", tokens=1, now=NOW)
    for quotas in (packed, single):
        assert left(quotas)[1] == 0
        assert refusal(quotas, 100).retry_after_s == pytest.approx(1)
        quotas.admit(ANN, "interactive", tokens=100, now=NOW + 1)


async def test_exactly_one_of_many_passes_on_the_last_unit():
    quotas = new_quotas()
    quotas.admit(ANN, "interactive", tokens=990, now=NOW)

    async def ask() -> bool:
        await asyncio.sleep(0)
        try:
            with quotas.admitted(ANN, "interactive", tokens=10, now=NOW):
                await asyncio.sleep(0)
        except QuotaExceeded:
            return False
        return True

    assert sum(await asyncio.gather(*(ask() for _ in range(50)))) == 1


# --- what is given back -----------------------------------------------------------------------


def test_a_refund_gives_everything_back():
    quotas = new_quotas()
    permit = quotas.admit(ANN, "interactive", tokens=600, now=NOW)
    assert left(quotas) == (3, 400)
    quotas.refund(permit)
    assert left(quotas) == (4, 1000)


@pytest.mark.parametrize(("true_tokens", "remaining"), [(100, 900), (600, 400), (800, 200)])
def test_the_true_count_is_settled(true_tokens, remaining):
    quotas = new_quotas()
    permit = quotas.admit(ANN, "interactive", tokens=600, now=NOW)
    quotas.settle(permit, tokens=true_tokens)
    assert left(quotas) == (3, remaining)


def test_a_settled_debt_beyond_the_burst_is_waited_for():
    quotas = new_quotas()
    permit = quotas.admit(ANN, "interactive", tokens=1000, now=NOW)
    quotas.settle(permit, tokens=1500)
    assert left(quotas) == (3, 0)
    assert refusal(quotas, 100).retry_after_s == pytest.approx(6)


def test_a_late_refund_gives_no_credit():
    """What was refilled meanwhile cannot be given back as well."""
    quotas = new_quotas()
    permit = quotas.admit(ANN, "interactive", tokens=1000, now=NOW)
    later = NOW + 60
    quotas.admit(ANN, "interactive", tokens=1000, now=later)
    quotas.refund(permit)
    assert left(quotas, later) == (3, 0)
    refusal(quotas, 1, later)


def test_a_refund_in_the_midst_of_the_refill_gives_back_the_rest():
    quotas = new_quotas()
    permit = quotas.admit(ANN, "interactive", tokens=1000, now=NOW)
    quotas.admit(ANN, "interactive", tokens=300, now=NOW + 4)  # 400 were refilled
    quotas.refund(permit)  # 600 were not: as if the first had never been, 700 are left
    assert left(quotas, NOW + 4)[1] == 700


def test_two_late_refunds_give_no_more_back_than_one_each():
    gcra, limit = Gcra(keys_max=10), Dimension("tokens", interval_s=1, burst=30)
    marks = []
    for _ in range(2):
        gcra.charge("ann", {limit: 10}, NOW)
        marks.append(gcra.mark("ann", limit))
    gcra.give_back("ann", limit, 10, mark=marks[0])
    gcra.charge("ann", {limit: 1}, NOW + 9)  # one second of the second's ten is not refilled
    gcra.give_back("ann", limit, 10, mark=marks[1])
    assert gcra.rate("ann", limit, NOW + 9).remaining == 29
    gcra.charge("ann", {limit: 10}, NOW + 9)
    gcra.give_back("ann", limit, 10, mark=gcra.mark("ann", limit))
    assert gcra.rate("ann", limit, NOW + 9).remaining == 29


def test_a_debt_found_later_does_not_make_an_old_refund_larger():
    gcra, limit = Gcra(keys_max=10), Dimension("tokens", interval_s=1, burst=30)
    gcra.charge("ann", {limit: 10}, NOW)
    old = gcra.mark("ann", limit)
    gcra.charge("ann", {limit: 1}, NOW + 9)
    gcra.give_back("ann", limit, -100, mark=gcra.mark("ann", limit))
    gcra.give_back("ann", limit, 10, mark=old)  # nine of its ten were refilled
    assert gcra.rate("ann", limit, NOW + 9).reset_s == pytest.approx(101)


def test_a_refund_of_a_forgotten_tenant_is_no_credit():
    gcra = Gcra(keys_max=1)
    limit = Dimension("tokens", interval_s=1, burst=10)
    gcra.charge("ann", {limit: 10}, NOW)
    mark = gcra.mark("ann", limit)
    gcra.charge("bob", {limit: 1}, NOW)
    gcra.give_back("ann", limit, 10, mark=mark)
    assert gcra.rate("ann", limit, NOW).remaining == 10
    assert gcra.rate("bob", limit, NOW).remaining == 9


@pytest.mark.parametrize(
    "error",
    [
        Internal("ours"),
        Overloaded("shed"),
        QuotaExceeded("the embedder's cap"),
        DeadlineExceeded("late"),
        ValueError("a bug"),
        asyncio.CancelledError(),
    ],
    ids=lambda error: type(error).__name__,
)
def test_what_was_shed_or_failed_by_our_fault_is_given_back(error):
    quotas = new_quotas()
    with (
        pytest.raises(type(error)),
        quotas.admitted(ANN, "interactive", tokens=600, now=NOW),
    ):
        raise error
    assert left(quotas) == (4, 1000)


@pytest.mark.parametrize(
    "error", [BadInput("wrong"), NotFound("gone"), PoisonInput("bad")], ids=lambda e: type(e).code
)
def test_a_callers_own_fault_after_work_was_done_is_paid_for(error):
    quotas = new_quotas()
    with (
        pytest.raises(type(error)),
        quotas.admitted(ANN, "interactive", tokens=600, now=NOW),
    ):
        raise error
    assert left(quotas) == (3, 400)


def test_success_is_paid_for():
    quotas = new_quotas()
    with quotas.admitted(ANN, "interactive", tokens=600, now=NOW) as permit:
        assert (permit.tokens, left(quotas)) == (600, (3, 400))
    assert left(quotas) == (3, 400)


def test_a_refusal_inside_admitted_refunds_nothing():
    quotas = new_quotas()
    quotas.admit(ANN, "interactive", tokens=900, now=NOW)
    with (
        pytest.raises(QuotaExceeded),
        quotas.admitted(ANN, "interactive", tokens=600, now=NOW),
    ):
        pytest.fail("it must not run")
    assert left(quotas) == (3, 100)


# --- what is left -----------------------------------------------------------------------------


def test_rates_tell_limit_rest_and_time_to_full():
    quotas = new_quotas()
    fresh = quotas.rates(ANN, "interactive", NOW)["tokens"]
    assert (fresh.limit, fresh.remaining, fresh.reset_s) == (1000, 1000, 0)
    quotas.admit(ANN, "interactive", tokens=600, now=NOW)
    used = quotas.rates(ANN, "interactive", NOW + 1)["tokens"]
    assert (used.limit, used.remaining, used.reset_s) == (1000, 500, pytest.approx(5))


def test_what_rates_promise_is_granted():
    quotas = new_quotas()
    quotas.admit(ANN, "interactive", tokens=777, now=NOW)
    for step in range(1, 4):
        now = NOW + step * 0.37
        tokens = left(quotas, now)[1]
        assert tokens > 0
        quotas.admit(ANN, "interactive", tokens=tokens, now=now)


def test_replicas_share_every_limit():
    one, four = dimensions(TIER, "interactive", 1), dimensions(TIER, "interactive", 4)
    assert [d.burst for d in one] == [4, 1000]
    assert [d.burst for d in four] == [1, 250]
    assert [d.interval_s for d in four] == [4 * d.interval_s for d in one]


def test_two_ingresses_together_admit_no_more_than_the_limit():
    replicas = [new_quotas(replicas=2) for _ in range(2)]
    granted = 0
    for step in range(2000):
        now = NOW + step / 100
        for quotas in replicas:
            try:
                quotas.admit(ANN, "interactive", tokens=1, now=now)
            except QuotaExceeded:
                continue
            granted += 1
    window_s = 1999 / 100
    assert granted <= 4 + 1 * window_s
    assert granted >= 4 + 1 * window_s - 2


def test_a_replicas_burst_is_at_least_one():
    requests, tokens = dimensions(TIER, "interactive", 5000)
    assert (requests.burst, tokens.burst) == (1, 1)


def test_only_the_longest_unused_are_forgotten():
    gcra = Gcra(keys_max=3)
    limit = Dimension("tokens", interval_s=1, burst=10)
    for owner in ("a", "b", "c"):
        assert gcra.charge(owner, {limit: 10}, NOW) is None
    assert gcra.charge("a", {limit: 1}, NOW + 1) is None
    assert gcra.charge("d", {limit: 10}, NOW + 1) is None
    left_of = {owner: gcra.rate(owner, limit, NOW + 1).remaining for owner in "abcd"}
    assert left_of == {"a": 0, "b": 10, "c": 1, "d": 0}
    for number in range(100):
        gcra.charge(f"t{number}", {limit: 1}, NOW)
    assert len(gcra._states) == 3
