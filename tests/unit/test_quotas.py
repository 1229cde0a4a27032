"""The asyncio rim over a ledger in this process: who is admitted, told what, and when."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from unittest.mock import AsyncMock

import pytest

from serve.admission.limits import limits_of
from serve.admission.quotas import Quotas
from serve.allowance import Allowance, Quota
from serve.errors import (
    BadInput,
    DeadlineExceeded,
    Internal,
    NotFound,
    Overloaded,
    PoisonInput,
    QuotaExceeded,
)
from serve.records import Caller, UsageRow
from tests.unit.town import LEDGER, RUN_OUT, Town


QUOTA = Quota(requests_per_minute=60, requests_burst=4, tokens_per_minute=6000, tokens_burst=1000)


@pytest.fixture
async def town(clock) -> AsyncIterator[Town]:
    town = Town(clock)
    yield town
    for task in town.tasks:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


def caller(
    quota: Quota = QUOTA, *, tenant="ann", key="k", keys: Quota | None = None, month=None
) -> Caller:
    whole = Allowance(interactive=quota, bulk=Quota(concurrent_max=2), tokens_per_month=month)
    mine = limits_of(f"t/{tenant}", "tenant", whole)
    own = limits_of(f"k/{tenant}/{key}", "key", Allowance(interactive=keys or Quota()))
    limits = {klass: (*mine[klass], *own[klass]) for klass in mine}
    return Caller(tenant, "free", 1, key, limits=limits)


ANN = caller()


async def use(quotas: Quotas, tokens: int = 1, who: Caller = ANN, **more) -> None:
    async with quotas.admitted(who, "interactive", tokens=tokens, **more):
        pass


async def refusal(quotas: Quotas, tokens: int = 1, who: Caller = ANN) -> QuotaExceeded:
    with pytest.raises(QuotaExceeded) as caught:
        await use(quotas, tokens, who)
    return caught.value


def left(quotas: Quotas, who: Caller = ANN) -> dict[str, int]:
    return {rate.limit.name: rate.remaining for rate in quotas.rates(who, "interactive")}


async def until(true) -> None:
    """Let the background work go on until it has done that."""
    async with asyncio.timeout(5):
        while not true():  # noqa: ASYNC110 - ends within a tick or two of these settings
            await asyncio.sleep(0.001)


# --- admitted or refused ----------------------------------------------------------------------


async def test_the_burst_passes_at_once_and_no_more(town):
    quotas = town.replica()
    for _ in range(4):
        await use(quotas)
    error = await refusal(quotas)
    assert error.code == "tenant_requests_per_minute"
    assert error.retry_after_s == pytest.approx(1)
    assert "tenant_requests_per_minute: 4 at once, 60 a minute. Try again in 1 s." in error.message


async def test_the_wait_is_exact(town):
    quotas = town.replica()
    await use(quotas, 900)
    error = await refusal(quotas, 250)  # 150 tokens short at 100 a second
    assert error.code == "tenant_tokens_per_minute"
    assert error.retry_after_s == pytest.approx(1.5)
    town.clock.advance(1.499)
    await refusal(quotas, 250)
    town.clock.advance(0.001)
    await use(quotas, 250)


async def test_replicas_share_one_limit_and_tenants_do_not(town):
    here, there = town.replica("a"), town.replica("b")
    for quotas in (here, there, here, there):
        await use(quotas)
    await refusal(here)
    await refusal(there)
    await use(here, who=caller(tenant="bob"))


async def test_a_key_has_limits_of_its_own(town):
    quotas = town.replica()
    who = caller(keys=Quota(requests_per_minute=60, requests_burst=1))
    await use(quotas, who=who)
    assert (await refusal(quotas, who=who)).code == "key_requests_per_minute"
    await use(quotas, who=caller(key="other"))


async def test_the_preset_lets_a_hundred_pass_and_then_one_each_six_seconds(town):
    who = caller(Quota(preset="bucket_100_10"))
    replicas = [town.replica("a"), town.replica("b")]
    for number in range(100):
        await use(replicas[number % 2], who=who)
    error = await refusal(replicas[0], who=who)
    assert error.retry_after_s == pytest.approx(6)
    assert left(replicas[0], who) == {"tenant_requests_per_minute": 0}
    for number in range(5):
        town.clock.advance(6)
        await use(replicas[number % 2], who=who)
        await refusal(replicas[0], who=who)
        await refusal(replicas[1], who=who)


async def test_what_exceeds_a_burst_can_never_pass_and_is_no_429(town):
    quotas = town.replica()
    with pytest.raises(BadInput) as caught:
        await use(quotas, 1001, param="documents")
    assert (caught.value.param, caught.value.code) == ("documents", "tokens_exceed_quota")
    assert "1001 tokens; tenant_tokens_per_minute allows 1000 at once" in caught.value.message
    await use(quotas, 1000)


async def test_no_more_than_so_many_at_once(town):
    who, quotas = caller(Quota(concurrent_max=2, queued_tokens_max=100)), town.replica()
    async with (
        quotas.admitted(who, "interactive", tokens=10),
        quotas.admitted(who, "interactive", tokens=10),
    ):
        error = await refusal(quotas, who=who)
        assert (error.code, error.retry_after_s) == ("tenant_concurrent_requests", 1)
        assert "2 at a time" in error.message
    async with quotas.admitted(who, "interactive", tokens=95):
        assert (await refusal(quotas, 6, who)).code == "tenant_queued_tokens"
        await use(quotas, 5, who)
    with pytest.raises(BadInput):
        await use(quotas, 101, who)


async def test_exactly_one_of_many_passes_on_the_last_unit(town):
    replicas = [town.replica("a"), town.replica("b")]
    await use(replicas[0], 990)

    async def ask(number: int) -> bool:
        try:
            await use(replicas[number % 2], 10)
        except QuotaExceeded:
            return False
        return True

    assert sum(await asyncio.gather(*(ask(number) for number in range(50)))) == 1


async def test_a_class_without_limits_is_free(town):
    quotas, who = town.replica(runs=False), Caller("ann", "free", 1, "k")
    await use(quotas, 10**9, who)
    assert (quotas.rates(who, "interactive"), town.books.exchanges) == ([], 0)


async def test_what_is_covered_by_a_block_awaits_nothing(town):
    quotas = town.replica()
    who = caller(Quota(requests_per_minute=6000, concurrent_max=100))
    await use(quotas, who=who)
    await use(quotas, who=who)
    coroutine = quotas.admitted(who, "interactive", tokens=1).__aenter__()
    with pytest.raises(StopIteration):
        coroutine.send(None)


async def test_draws_of_requests_that_come_together_travel_together(town):
    quotas = town.replica()
    who = caller(Quota(requests_per_minute=60, requests_burst=60))
    await until(lambda: town.books.exchanges == 1)
    await asyncio.gather(*(use(quotas, who=who) for _ in range(20)))
    assert town.books.exchanges <= 3


# --- check ------------------------------------------------------------------------------------


async def test_a_known_refusal_is_repeated_before_any_work(town):
    quotas = town.replica()
    quotas.check(ANN, "interactive")
    for _ in range(4):
        await use(quotas)
    await refusal(quotas)
    with pytest.raises(QuotaExceeded) as caught:
        quotas.check(ANN, "interactive")
    assert caught.value.retry_after_s == pytest.approx(1)
    quotas.check(ANN, "bulk")
    town.clock.advance(1)
    quotas.check(ANN, "interactive")
    assert quotas.tally.refused == {"tenant_requests_per_minute": 2}


async def test_used_up_tokens_do_not_refuse_before_they_are_counted(town):
    quotas = town.replica()
    await use(quotas, 1000)
    await refusal(quotas, 1)
    quotas.check(ANN, "interactive")
    await use(quotas, 0)


# --- what is given back -----------------------------------------------------------------------


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
async def test_what_was_shed_or_failed_by_our_fault_is_given_back(town, error):
    quotas = town.replica()
    with pytest.raises(type(error)):
        async with quotas.admitted(ANN, "interactive", tokens=600):
            raise error
    assert left(quotas) == {"tenant_requests_per_minute": 4, "tenant_tokens_per_minute": 1000}
    for _ in range(4):
        await use(quotas, 250)


@pytest.mark.parametrize(
    "error", [BadInput("wrong"), NotFound("gone"), PoisonInput("bad")], ids=lambda e: type(e).code
)
async def test_a_callers_own_fault_after_work_was_done_is_paid_for(town, error):
    quotas = town.replica()
    with pytest.raises(type(error)):
        async with quotas.admitted(ANN, "interactive", tokens=600):
            raise error
    assert left(quotas) == {"tenant_requests_per_minute": 3, "tenant_tokens_per_minute": 400}


async def test_success_is_paid_for_by_its_true_count(town):
    quotas = town.replica()
    async with quotas.admitted(ANN, "interactive", tokens=600) as permit:
        assert permit.tokens == 600
        quotas.settle(permit, tokens=250)
    assert left(quotas) == {"tenant_requests_per_minute": 3, "tenant_tokens_per_minute": 750}
    await refusal(quotas, 751)


async def test_tokens_can_be_charged_after_their_request(town):
    quotas = town.replica()
    who = caller(QUOTA.model_copy(update={"concurrent_max": 1}), month=10_000)
    async with quotas.admitted(who, "interactive", tokens=0):
        assert (await refusal(quotas, 0, who)).code == "tenant_concurrent_requests"
        async with quotas.admitted(who, "interactive", tokens=600, requests=0):
            during = left(quotas, who)
    assert list(during.values()) == [3, 400, 0, 9400]
    with pytest.raises(QuotaExceeded):
        async with quotas.admitted(who, "interactive", tokens=0):
            await use(quotas, 500, who, requests=0)
    with pytest.raises(Overloaded):
        async with quotas.admitted(who, "interactive", tokens=300, requests=0):
            raise Overloaded
    assert list(left(quotas, who).values()) == [3, 400, 1, 9400]
    assert list(quotas._count._session.rows.values()) == [[1, 600, 2]]


async def test_one_who_leaves_while_waiting_is_not_charged(town):
    town.books.hangs = True
    quotas = town.replica()
    waiting = asyncio.create_task(use(quotas, 900))
    await until(lambda: quotas._futures)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    town.books.hangs = False
    await until(lambda: quotas.tally.exchanges > 0)
    town.clock.advance(0.1)
    await until(lambda: not quotas.away)
    await use(quotas, 1000)


async def test_one_who_leaves_as_the_answer_comes_is_not_charged(town):
    quotas = town.replica(runs=False)
    waiting = asyncio.create_task(use(quotas, 900))
    await until(lambda: quotas._futures)
    await quotas._exchange()
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert left(quotas)["tenant_tokens_per_minute"] == 1000


# --- what is left -----------------------------------------------------------------------------


async def test_rates_tell_every_limit_with_what_is_left_and_when_it_is_full(town):
    quotas = town.replica()
    who = caller(
        QUOTA.model_copy(update={"concurrent_max": 3, "queued_tokens_max": 1000}), month=10_000
    )
    fresh = quotas.rates(who, "interactive")
    assert [(rate.remaining, rate.reset_s) for rate in fresh] == [
        (4, 0),
        (1000, 0),
        (3, 0),
        (1000, 0),
        (10_000, 61),
    ]
    async with quotas.admitted(who, "interactive", tokens=600):
        town.clock.advance(1)
        used = quotas.rates(who, "interactive")
    assert [(rate.remaining, rate.reset_s) for rate in used] == [
        (4, 0),
        (500, pytest.approx(5)),
        (2, 0),
        (400, 0),
        (9400, 61),
    ]


async def test_what_rates_promise_is_granted(town):
    quotas = town.replica()
    await use(quotas, 777)
    for _ in range(3):
        town.clock.advance(0.37)
        tokens = left(quotas)["tenant_tokens_per_minute"]
        assert tokens > 0
        await use(quotas, tokens)


# --- months and usage -------------------------------------------------------------------------


async def test_a_month_goes_on_from_what_the_store_counted(town):
    town.books.rows = [
        UsageRow("2026-11", "ann", "k", "interactive", 1, 300, 0),
        UsageRow("2026-11", "ann", "other", "bulk", 1, 600, 9),
    ]
    quotas, who = town.replica(), caller(Quota(), month=1000)
    await asyncio.gather(*(use(quotas, 10, who) for _ in range(9)))
    error = await refusal(quotas, 11, who)
    assert (error.code, error.retry_after_s) == ("tenant_tokens_per_month", None)
    assert "1,000 in a calendar month (UTC) are used up" in error.message
    assert town.books.months == ["2026-11"]
    town.wall_now = RUN_OUT + 2
    await use(quotas, 1000, who)
    await refusal(quotas, 1, who)
    assert town.books.months == ["2026-11"]


async def test_a_month_is_counted_without_the_store(town):
    town.books.store_away = True
    quotas, who = town.replica(), caller(Quota(), month=1000)
    await use(quotas, 900, who)
    await refusal(quotas, 101, who)


async def test_a_store_that_is_away_is_not_asked_for_every_request(town):
    town.books.store_away = town.books.away = True
    quotas, who = town.replica(), caller(Quota(), month=10**6)
    for _ in range(5):
        await use(quotas, 1, who)
    assert len(town.books.months) == 1
    town.clock.advance(LEDGER.timeout_s + LEDGER.retry_s)
    await use(quotas, 1, who)
    assert len(town.books.months) == 2


async def test_a_store_that_was_away_at_first_is_asked_until_it_answers(town):
    quotas, who = town.replica(), caller(Quota(), month=1000)
    town.books.store_away = True
    await use(quotas, 100, who)
    town.books.store_away = False
    town.books.rows = [UsageRow("2026-11", "ann", "k", "interactive", 1, 700, 0)]
    bob = caller(Quota(), tenant="bob", month=1000)
    await use(quotas, 1, bob)
    assert left(quotas, bob)["tenant_tokens_per_month"] == 299
    town.clock.advance(LEDGER.lease_s + 1)  # the Ledger looks at no hints any more
    await use(quotas, 1, who)
    await refusal(quotas, 300, who)
    await use(quotas, 299, who)


async def test_usage_is_counted_and_reported(town):
    quotas = town.replica()
    await use(quotas, 600)
    async with quotas.admitted(ANN, "interactive", tokens=300) as permit:
        quotas.settle(permit, tokens=200)
    with suppress(Overloaded):
        async with quotas.admitted(ANN, "interactive", tokens=100):
            raise Overloaded
    await refusal(quotas, 900)
    row = UsageRow("2026-11", "ann", "k", "interactive", 2, 800, 1)
    await until(lambda: list(town.books.reported.values()) == [(row,)])
    assert "2026-11-30" in next(iter(town.books.reported))
    town.books.store_away = True
    await use(quotas, 1)
    town.wall_now = RUN_OUT + 2
    await use(quotas, 2)
    town.books.store_away = False
    await until(lambda: len(town.books.reported) == 2)
    (old,), (new,) = town.books.reported.values()
    assert (old.requests, old.tokens) == (3, 801)
    assert (new.month, new.tokens) == ("2026-12", 2)


async def test_what_is_used_during_a_report_waits_for_the_next_one(town, monkeypatch):
    quotas, told = town.replica(runs=False), []

    async def report_usage(_session: str, rows: Sequence[UsageRow]) -> None:
        told.append(rows)
        await asyncio.sleep(0)
        await use(quotas, 1, caller(Quota()))

    monkeypatch.setattr(town.books, "report_usage", report_usage)
    await use(quotas, 1, caller(Quota()))
    await quotas.close()
    assert [[row.tokens for row in rows] for rows in told] == [[1]]


# --- without the Ledger -----------------------------------------------------------------------


@pytest.mark.parametrize("way", ["away", "hangs"])
async def test_without_the_ledger_the_local_share_holds(town, way):
    quotas = town.replica()
    await use(quotas, 1)
    await use(quotas, 1)
    setattr(town.books, way, True)
    town.clock.advance(0.01)
    await until(lambda: quotas.away)
    await use(quotas, 100)  # one of the two requests that were left
    error = await refusal(quotas, 100)
    assert error.code == "tenant_requests_per_minute"
    assert error.retry_after_s == pytest.approx(2 - 0.01)
    assert quotas.tally.local_grants == 1
    failures = quotas.tally.failures
    await until(lambda: quotas.tally.failures > failures)  # it tries again and again
    setattr(town.books, way, False)
    exchanges = quotas.tally.exchanges
    await until(lambda: quotas.tally.exchanges > exchanges)
    town.clock.advance(0.99)
    await until(lambda: not quotas.away)
    assert left(quotas)["tenant_requests_per_minute"] == 2
    await use(quotas, 100)
    await use(quotas, 100)
    await refusal(quotas, 100)


async def test_those_who_wait_for_a_ledger_that_hangs_are_answered_in_time(town):
    quotas = town.replica()
    town.books.hangs = True
    async with asyncio.timeout(5):
        await asyncio.gather(*(use(quotas, 10, caller(tenant=f"t{n}")) for n in range(9)))
    assert quotas.tally.local_grants == 9


async def test_nobody_hangs_when_nothing_runs_in_the_background(town):
    quotas = town.replica(runs=False)
    await use(quotas)
    assert quotas.away
    await use(quotas, who=caller(tenant="bob"))


async def test_a_fault_in_the_background_is_logged_and_does_not_end_it(town, caplog):
    quotas = town.replica()
    good, town.books.bank = town.books.bank, None
    await until(lambda: quotas.tally.failures > 1)
    assert "an exchange with the ledger failed" in caplog.text
    town.books.bank = good
    await until(lambda: quotas.tally.exchanges > 0)


async def test_an_answer_without_sense_leaves_nothing_reserved(town, monkeypatch):
    quotas, who = town.replica(runs=False), caller(Quota(concurrent_max=8))
    monkeypatch.setattr(town.books, "exchange", AsyncMock(return_value=()))
    waiting = [asyncio.create_task(use(quotas, who=who)) for _ in range(2)]
    await until(lambda: len(quotas._futures) == 2)
    assert not await quotas._exchange()
    assert all(future.done() for future in quotas._futures.values())
    await asyncio.gather(*waiting)
    assert quotas._leases.wallets.find(who, "interactive").accounts[0].in_use() == 0


async def test_one_whom_nothing_answers_fails_and_has_nothing_reserved(town, monkeypatch):
    quotas, who = town.replica(runs=False), caller(Quota(tokens_per_minute=60_000))
    monkeypatch.setattr(quotas._leases, "failed", lambda _: [])
    account = quotas._leases.wallets.find(who, "interactive").accounts[0]
    account.add(10, 0.0)
    with pytest.raises(Internal):
        await use(quotas, 15, who)
    assert account.balance == 10


async def test_close_gives_everything_back_and_reports_usage(town):
    quotas = town.replica(runs=False)
    who = caller(Quota(requests_per_minute=6000, concurrent_max=100), month=10**6)
    running = asyncio.create_task(quotas.run())
    await use(quotas, 10, who)
    running.cancel()
    with suppress(asyncio.CancelledError):
        await running
    await quotas.close()
    free = {
        limit.kind: town.books.bank._bank.free(limit, now=town.clock(), month="2026-11")
        for limit in who.limits["interactive"]
    }
    assert free == pytest.approx({"rate": 5999, "level": 100, "month": 10**6 - 10})
    (rows,) = town.books.reported.values()
    assert [row.tokens for row in rows] == [10]


async def test_close_does_not_wait_long_for_a_ledger_that_hangs(town):
    quotas = town.replica(runs=False)
    town.books.hangs = True
    async with asyncio.timeout(5):
        await quotas.close()
