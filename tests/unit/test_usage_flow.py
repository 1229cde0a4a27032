"""What a caller is told of itself: its usage, its limits, and why its work waits."""

import asyncio
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from serve.admission.accounts import Rate
from serve.config import Ledger
from serve.errors import StoreUnavailable
from serve.flows.kept import ANSWERS_MAX
from serve.flows.usage import KEPT_S, UsageFlow, Waiting
from serve.grants import Limit
from serve.records import Caller, QueuePlace, QueueReport, UsageRow


ACME = Caller("acme", "premium", 4, "k1")
PLACE = QueuePlace(
    "acme",
    "interactive",
    weight=4,
    items=3,
    cost=1000,
    share=0.25,
    ahead=500,
    starts_s=0.5,
    ends_s=2,
    oldest_s=1,
    effective_priority=80,
)


def report(*places: QueuePlace, replica: str = "r1", cost: float = 5000, tenants: int = 7) -> Any:
    return QueueReport("default", replica, 40, cost, 0.001, tenants, places)


class Sources:
    """The Store's usage, the embedders' reports and the quotas, as a test says."""

    def __init__(self) -> None:
        self.rows: list[UsageRow] = []
        self.reports: list[QueueReport] = []
        self.asked: list[Any] = []
        self.gate: asyncio.Event | None = None
        self.fault: Exception | None = None

    async def month_usage(self, tenant: str, month: str) -> list[UsageRow]:
        self.asked.append((tenant, month))
        if self.gate is not None:
            await self.gate.wait()
        if self.fault is not None:
            raise self.fault
        return self.rows

    async def queue_reports(self, tenant: str) -> list[QueueReport]:
        self.asked.append(tenant)
        return self.reports

    def rates(self, caller: Caller, klass: str) -> list[Rate]:
        return [
            Rate(Limit("t/acme", f"{klass} rate", "rate", "tokens", 50, 1), 40, 10),
            Rate(Limit("t/acme", klass, "month", "tokens", 100), 90, 1),
            Rate(Limit("k/acme/k1", klass, "month", "tokens", 30), 28, 1),
        ]


@pytest.fixture
def sources() -> Sources:
    return Sources()


@pytest.fixture
def flow(sources: Sources, clock: Any) -> UsageFlow:
    context: Any = SimpleNamespace(
        quotas=sources,
        clock=clock,
        wall=lambda: 1_798_761_599.9,  # the last moment of 2026
        settings=SimpleNamespace(ledger=Ledger(queue_places_max=14)),
    )
    return UsageFlow(context, sources, sources)


async def test_usage_is_the_callers_own_of_this_month(flow, sources):
    sources.rows = [UsageRow("2026-12", "acme", "k1", "bulk", 1, 2, 3)]
    expected = {klass: sources.rates(ACME, klass) for klass in ("interactive", "bulk")}
    view = await flow.usage(ACME)
    assert sources.asked == [("acme", "2026-12")]
    assert (view.month, view.rows) == ("2026-12", sources.rows)
    assert view.rates == expected


async def test_no_more_is_left_of_a_month_than_the_store_knows(flow, sources, clock):
    sources.rows = [
        UsageRow("2026-12", "acme", "k1", "bulk", 1, 20, 0),
        UsageRow("2026-12", "acme", "k1", "interactive", 1, 5, 0),
        UsageRow("2026-12", "acme", "k2", "bulk", 1, 30, 0),
    ]
    view = await flow.usage(ACME)
    for klass in ("interactive", "bulk"):
        assert [rate.remaining for rate in view.rates[klass]] == [40, 45, 5]
    sources.rows.append(UsageRow("2026-12", "acme", "k1", "bulk", 1, 500, 0))
    clock.advance(KEPT_S)
    assert [rate.remaining for rate in (await flow.usage(ACME)).rates["bulk"]] == [40, 0, 0]


async def test_an_answer_serves_its_tenant_for_a_while(flow, sources, clock):
    sources.reports = [report()]
    for advance_s in (0.0, KEPT_S - 0.01):
        clock.advance(advance_s)
        await flow.queue(ACME)
        await flow.usage(replace(ACME, key="k2"))
    assert sources.asked == ["acme", ("acme", "2026-12")]
    await flow.queue(replace(ACME, tenant="else"))
    assert sources.asked[2:] == ["else"]
    clock.advance(0.01)
    sources.reports = []
    assert (await flow.queue(ACME)).everyone_tokens == 0
    assert sources.asked[3:] == ["acme"]


async def test_those_who_ask_at_once_share_the_question_and_its_failure(flow, sources, clock):
    sources.gate, sources.fault = asyncio.Event(), StoreUnavailable("Away.", retry_after_s=1)
    tasks = [asyncio.create_task(flow.usage(ACME)) for _ in range(3)]
    await asyncio.sleep(0)
    clock.advance(10)
    tasks.append(asyncio.create_task(flow.usage(ACME)))
    await asyncio.sleep(0)
    tasks[0].cancel()
    await asyncio.sleep(0)
    sources.gate.set()
    outcomes = await asyncio.gather(*tasks, return_exceptions=True)
    assert [type(one) for one in outcomes] == [asyncio.CancelledError] + [StoreUnavailable] * 3
    assert len(sources.asked) == 1
    sources.fault = None
    assert (await flow.usage(ACME)).rows == []  # its time was over when it came


async def test_the_kept_answers_are_bounded(flow, sources):
    for number in range(ANSWERS_MAX + 1):
        await flow.queue(replace(ACME, tenant=f"t{number}"))
    assert len(flow._reports._answers) == ANSWERS_MAX
    del sources.asked[:]
    for number in (ANSWERS_MAX, 0):
        await flow.queue(replace(ACME, tenant=f"t{number}"))
    assert sources.asked == ["t0"]


async def test_nothing_waits(flow, sources, clock):
    for sources.reports in ([], [report()]):
        clock.advance(KEPT_S)
        view = await flow.queue(ACME)
        assert (view.whole, view.classes) == (None, {})
        assert view.why == "Nothing of yours is waiting."
    assert view.everyone_tokens == 5000
    assert sources.asked == ["acme", "acme"]


async def test_a_place_that_may_have_been_left_out_is_not_denied(flow, sources):
    sources.reports = [report(tenants=8)]
    assert "among the 14 largest" in (await flow.queue(ACME)).why


async def test_one_place_is_told_as_it_is(flow, sources):
    sources.reports = [report(PLACE)]
    view = await flow.queue(ACME)
    assert view.whole == Waiting(3, 1000, 0.25, 500, 0.5, 2, 1, 80)
    assert view.classes == {"interactive": view.whole}
    assert view.why == (
        "You have 3 inputs (1,000 tokens) waiting: tier 'premium' has weight 4 among 7 waiting "
        "tenants, which gives you 25 % of the service; 500 tokens come before your first, which "
        "starts in about 0.5 s, and your last is done in about 2.0 s."
    )


async def test_places_of_several_replicas_are_put_together(flow, sources):
    later = replace(
        PLACE,
        items=1,
        cost=3000,
        share=0.05,
        ahead=100,
        starts_s=0.1,
        ends_s=90.4,
        oldest_s=4,
        effective_priority=20,
    )
    sources.reports = [report(PLACE), report(later, replica="r2", tenants=9), report(cost=1)]
    view = await flow.queue(ACME)
    assert view.whole == Waiting(4, 4000, pytest.approx(0.1), 100, 0.1, 90.4, 4, 20)
    assert view.everyone_tokens == 10_001
    assert "among 9 waiting tenants, which gives you 10 % of" in view.why
    assert "done in about 90 s" in view.why


async def test_the_share_over_both_classes_is_their_sum_in_each_replica(flow, sources):
    bulk = replace(PLACE, klass="bulk", cost=9000, share=0.01, starts_s=30, ends_s=400, items=9)
    sources.reports = [report(PLACE, bulk), report(bulk, replica="r2")]
    view = await flow.queue(ACME)
    assert view.classes["interactive"].share == pytest.approx(0.25)
    assert view.classes["bulk"].share == pytest.approx(0.01)
    assert view.classes["bulk"].tokens == 18_000
    assert view.whole.share == pytest.approx((10_000 * 0.26 + 9000 * 0.01) / 19_000)
    assert view.whole.starts_s == 0.5
    assert "21 inputs (19,000 tokens)" in view.why
    assert "done in about 7 min" in view.why


async def test_who_waits_alone_is_told_so(flow, sources):
    sources.reports = [report(replace(PLACE, items=1, share=1.0), tenants=1)]
    why = (await flow.queue(ACME)).why
    assert "You have 1 input (" in why
    assert "nobody else waits" in why
