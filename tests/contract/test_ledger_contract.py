"""What every Ledger promises, over the bank and over Redis in its place.

A Redis cannot be given the time: there the tests wait for what they need, by its own clock.
"""

import asyncio
import math
import random
import signal
import struct
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import count
from typing import Any

import pytest

from bench.redis_server import BINARY, RedisServer, redis_server
from serve.admission.bank import Bank, BankLedger
from serve.admission.redis import RedisLedger
from serve.config import Ledger as LedgerSettings
from serve.errors import LedgerUnavailable
from serve.grants import Draw, Grant, Limit, LimitKind, Line, Return
from serve.ports import Ledger


NOVEMBER, DECEMBER = 1_795_000_000.0, 1_797_000_000.0
HOUR_S = 3600.0
SHORT_LEASE_S = 0.5

_numbers = count()


def op() -> str:
    return f"op-{next(_numbers)}"


class Wall:
    """A wall clock that a test sets."""

    at = NOVEMBER

    def __call__(self) -> float:
        return self.at


@dataclass
class Rig:
    """A ledger and a tenant that nobody used before."""

    ledger: Ledger
    wall: Wall
    clock: Any = None
    tenant: str = field(default_factory=lambda: f"tenant-{next(_numbers)}")

    def limit(
        self,
        kind: LimitKind = "rate",
        burst: float = 10,
        interval_s: float = HOUR_S,
        name: str = "",
    ) -> Limit:
        """A rate refills so slowly that nothing of it does during a test, unless told otherwise."""
        interval_s = interval_s if kind == "rate" else 0
        return Limit(f"t/{self.tenant}", name or f"a_{kind}", kind, "tokens", burst, interval_s)

    async def draw(self, *lines: Line, replica: str = "a") -> Grant:
        (grant,) = await self.ledger.exchange(op(), replica, (), [Draw(lines)])
        return grant

    async def give(self, *returns: Return, replica: str = "a") -> None:
        assert await self.ledger.exchange(op(), replica, returns, ()) == []

    async def free(self, limit: Limit) -> float:
        return (await self.draw(line(limit, 0), replica="who looks")).free[0]

    async def now(self) -> float:
        if isinstance(self.ledger, RedisLedger):
            seconds, micros = await self.ledger._redis.time()
            return seconds + micros / 1e6
        return self.clock.now

    async def pass_(self, seconds: float) -> None:
        """Let at least so much time pass."""
        if self.clock:
            self.clock.advance(seconds)
            return
        until = await self.now() + seconds
        while await self.now() < until:  # noqa: ASYNC110 - the server's clock
            await asyncio.sleep(0.001)


def line(limit: Limit, need: float, want: float | None = None, hint: float | None = None) -> Line:
    return Line(limit, need, need if want is None else want, hint)


def settings(**changes: float) -> LedgerSettings:
    return LedgerSettings().model_copy(update=changes)


@pytest.fixture(scope="module")
def server() -> Iterator[RedisServer]:
    if BINARY is None:
        pytest.skip("redis-server is not installed (Debian: apt-get install redis-server)")
    with redis_server() as running:
        yield running


@pytest.fixture
async def redis(server: RedisServer) -> AsyncIterator[RedisLedger]:
    ledger = RedisLedger(server.url, settings(lease_s=SHORT_LEASE_S), wall=Wall())
    yield ledger
    await ledger.aclose()


@pytest.fixture(params=["bank", "redis"])
async def rig(request: pytest.FixtureRequest, clock: Any) -> AsyncIterator[Rig]:
    wall, ours = Wall(), settings(lease_s=SHORT_LEASE_S)
    if request.param == "bank":
        yield Rig(BankLedger(ours, keys_max=1000, clock=clock, wall=wall), wall, clock)
        return
    ledger = RedisLedger(request.getfixturevalue("server").url, ours, wall=wall)
    yield Rig(ledger, wall)
    await ledger.aclose()


# Draws


async def test_a_draw_gets_its_need_and_says_what_is_left(rig: Rig):
    limit = rig.limit()
    grant = await rig.draw(line(limit, 4))
    assert grant.units == (4,)
    assert grant.refused is None
    assert grant.free == (6,)
    assert await rig.free(limit) == pytest.approx(6, abs=1e-3)


@pytest.mark.parametrize("kind", ["rate", "level", "month"])
async def test_beyond_its_need_it_gets_a_quarter_of_what_would_be_left(rig: Rig, kind: LimitKind):
    limit = rig.limit(kind, burst=43)
    grant = await rig.draw(line(limit, 2, want=100))
    assert grant.units == (12,)
    assert grant.free == (31,)
    assert (await rig.draw(line(limit, 2, want=4))).units == (4,)


async def test_lines_are_granted_all_or_none(rig: Rig):
    rate, level, month = rig.limit(), rig.limit("level", 2), rig.limit("month", 5)
    lines = [line(rate, 1, 9), line(level, 3), line(month, 1, 5)]
    grant = await rig.draw(*lines)
    assert grant == Grant((0, 0, 0), (10, 2, 5), (0, 0, 0), 1, math.inf)
    assert [await rig.free(limit) for limit in (rate, level, month)] == [10, 2, 5]
    grant = await rig.draw(lines[0], line(level, 2), lines[2])
    assert grant.units == (3, 2, 2)


async def test_a_refusal_names_the_longest_wait_to_the_microsecond(rig: Rig):
    slow, fast = rig.limit(name="slow"), rig.limit(interval_s=0.5, name="fast")
    await rig.draw(line(slow, 8), line(fast, 9))
    grant = await rig.draw(line(fast, 4), line(slow, 5))
    assert grant.refused == 1
    assert grant.wait_s == pytest.approx((5 - grant.free[1]) * HOUR_S, abs=1e-6)
    grant = await rig.draw(line(fast, 6), line(slow, 1))
    assert grant.refused == 0
    assert grant.wait_s == pytest.approx((6 - grant.free[0]) * 0.5, abs=1e-6)


@pytest.mark.parametrize("kind", ["rate", "level", "month"])
async def test_what_a_limit_can_never_hold_waits_for_ever(rig: Rig, kind: LimitKind):
    grant = await rig.draw(line(rig.limit(kind, burst=10), 11))
    assert (grant.refused, grant.wait_s) == (0, math.inf)


async def test_a_rate_refills_and_no_further_than_its_burst(rig: Rig):
    limit = rig.limit(interval_s=0.005)
    await rig.draw(line(limit, 10))
    grant = await rig.draw(line(limit, 5))
    if grant.refused is not None:  # else a slow machine let that much time pass
        assert grant.wait_s <= 0.025 + 1e-6
        await rig.pass_(grant.wait_s)
        assert (await rig.draw(line(limit, 5))).refused is None
    await rig.pass_(0.05)
    assert await rig.free(limit) == 10


async def test_draws_of_one_exchange_are_answered_in_order_after_its_returns(rig: Rig):
    limit, other = rig.limit(), replace(rig, tenant="another").limit("level", 3)
    first = await rig.draw(line(limit, 10))
    grants = await rig.ledger.exchange(
        op(),
        "a",
        [Return(limit, 5, first.marks[0]), Return(other, 1)],
        [Draw((line(limit, n),)) for n in (2, 4, 3)]
        + [Draw((line(other, 1),)), Draw(())]
        + [Draw((line(limit, 1),))],
    )
    assert [grant.refused for grant in grants] == [None, 0, None, None, None, 0]
    assert grants[3].free == (1,)
    assert grants[4] == Grant((), (), ())


async def test_of_many_at_once_only_one_gets_the_last_unit(rig: Rig):
    limit = rig.limit(burst=1)
    draws = (rig.draw(line(limit, 1), replica=f"r{n}") for n in range(30))
    grants = await asyncio.gather(*draws)
    assert sum(grant.units[0] for grant in grants) == 1


async def test_a_repeated_operation_acts_once(rig: Rig):
    limit, other = rig.limit(), replace(rig, tenant="also").limit("month", 100)
    one = op()
    said = [
        await rig.ledger.exchange(
            one, "a", [Return(other, -7)], [Draw((line(limit, 3, 9),)), Draw((line(other, 1),))]
        )
        for _ in range(3)
    ]
    assert said[0] == said[1] == said[2]
    assert await rig.free(limit) == pytest.approx(10 - said[0][0].units[0], abs=1e-3)


async def test_a_tenants_limits_are_its_own_and_its_keys(rig: Rig):
    limit = rig.limit()
    own = replace(limit, owner=f"k/{rig.tenant}/family")
    await rig.draw(line(limit, 10), line(own, 2))
    assert await rig.free(own) == pytest.approx(8, abs=1e-3)
    assert await rig.free(replace(limit, owner="t/somebody")) == 10
    assert (await rig.draw(line(own, 1))).refused is None


async def test_a_changed_rate_keeps_the_units_used(rig: Rig):
    limit = rig.limit()
    first = await rig.draw(line(limit, 6))
    other = replace(limit, burst=100, interval_s=2 * HOUR_S)
    assert await rig.free(other) == pytest.approx(94, abs=1e-3)
    await rig.give(Return(other, 6, first.marks[0]))
    assert await rig.free(other) == pytest.approx(94, abs=1e-3)  # in seconds of another rate


async def test_a_draw_is_judged_by_its_own_figures_though_a_return_has_older_ones(rig: Rig):
    limit = rig.limit()
    wider = replace(limit, burst=100)
    first = await rig.draw(line(limit, 6))
    returns = [Return(limit, 1, first.marks[0])]
    (grant,) = await rig.ledger.exchange(op(), "a", returns, [Draw((line(wider, 50),))])
    assert grant.refused is None
    assert grant.free[0] == pytest.approx(45, abs=1e-3)


# Returns


async def test_what_was_not_used_is_given_back_once(rig: Rig):
    limit = rig.limit()
    first = await rig.draw(line(limit, 10))
    await rig.give(Return(limit, 10, first.marks[0]))
    second = await rig.draw(line(limit, 10))
    assert second.units == (10,)
    await rig.give(Return(limit, 10, first.marks[0]))  # its units are not the second draw's
    assert (await rig.draw(line(limit, 1))).refused == 0
    await rig.give(Return(limit, 3, second.marks[0]))
    assert await rig.free(limit) == pytest.approx(3, abs=1e-3)


async def test_a_late_return_gives_no_more_than_is_not_refilled(rig: Rig):
    limit = rig.limit(interval_s=0.02)
    first = await rig.draw(line(limit, 10))
    await rig.pass_(0.1)
    then = await rig.now()
    await rig.draw(line(limit, 4))
    await rig.give(Return(limit, 10, first.marks[0]))
    free = await rig.free(limit)
    assert 6 - 1e-6 <= free <= 6 + (await rig.now() - then) / 0.02 + 1e-6


async def test_a_return_to_a_forgotten_limit_is_no_credit(rig: Rig):
    rate, level, month = rig.limit(), rig.limit("level"), rig.limit("month")
    await rig.give(Return(rate, 5, 1e12), Return(level, 0), Return(month, 5))
    assert [await rig.free(limit) for limit in (rate, level, month)] == [10, 10, 10]


@pytest.mark.parametrize("kind", ["rate", "month"])
async def test_a_negative_return_is_charged_whatever_the_limit_says(rig: Rig, kind: LimitKind):
    limit = rig.limit(kind)
    await rig.give(Return(limit, -15))
    grant = await rig.draw(line(limit, 1))
    assert grant.refused == 0
    assert grant.free[0] == pytest.approx(-5, abs=1e-3)
    if kind == "rate":
        assert grant.wait_s == pytest.approx((1 - grant.free[0]) * HOUR_S, abs=1e-6)


# Levels and months


async def test_a_level_is_what_all_replicas_hold(rig: Rig):
    limit = rig.limit("level")
    assert (await rig.draw(line(limit, 6))).free == (4,)
    assert (await rig.draw(line(limit, 5), replica="b")).refused == 0
    assert (await rig.draw(line(limit, 3), replica="b")).free == (1,)
    await rig.give(Return(limit, 2))  # absolute: a holds two now
    assert await rig.free(limit) == 5
    await rig.give(Return(limit, 0), Return(limit, 0))
    assert await rig.free(limit) == 7


async def test_after_a_lease_silent_replicas_lapse_and_hints_are_of_no_use(rig: Rig):
    limit, rate = rig.limit("level"), rig.limit()
    await rig.draw(line(limit, 6), line(rate, 6), replica="silent")
    await rig.give(Return(limit, 4), replica="speaking")
    assert (await rig.draw(line(limit, 5), replica="c")).wait_s == math.inf
    while (grant := await rig.draw(line(limit, 6), replica="c")).refused is not None:
        await rig.give(Return(limit, 4), replica="speaking")
        await rig.pass_(SHORT_LEASE_S / 4)
    assert grant.free == (0,)
    await rig.pass_(0.01)
    grant = await rig.draw(line(rate, 1, hint=0), replica="c")  # the books are not new any more
    assert grant.free[0] == pytest.approx(3, abs=1e-3)


async def test_what_the_store_counted_of_a_month_was_used_at_least(rig: Rig):
    month = rig.limit("month", 100)
    await rig.give(Return(month, 0, 30))
    assert await rig.free(month) == 70
    await rig.draw(line(month, 20))
    await rig.pass_(SHORT_LEASE_S + 0.1)  # the books are not new any more
    for counted, free in ((40, 50), (60, 40), (60, 40), (10, 40)):
        await rig.give(Return(month, 0, counted))
        assert await rig.free(month) == free


async def test_another_month_starts_anew(rig: Rig):
    limit = rig.limit("month")
    assert (await rig.draw(line(limit, 7))).free == (3,)
    await rig.give(Return(limit, 2))
    assert (await rig.draw(line(limit, 6))).refused == 0
    rig.wall.at = DECEMBER
    await rig.give(Return(limit, 3))  # November's: no credit
    assert (await rig.draw(line(limit, 10))).free == (0,)


# Hints: books that have just begun


@pytest.mark.parametrize(
    ("kind", "hint", "left"), [("rate", 5, 2), ("month", 5, 2), ("level", 5, 2)]
)
async def test_new_books_start_from_what_replicas_know(
    rig: Rig, kind: LimitKind, hint: float, left: float
):
    limit = rig.limit(kind, burst=20)
    assert (await rig.draw(line(limit, 2, hint=8))).free == (6,)
    assert (await rig.draw(line(limit, 0, hint=0))).free[0] == pytest.approx(6, abs=1e-3)
    grant = await rig.draw(line(limit, 1, hint=hint), replica="b")  # b knows nothing of a's 2
    assert grant.free[0] == pytest.approx(left, abs=1e-3)


async def test_a_hint_is_no_credit(rig: Rig):
    limit = rig.limit()
    assert (await rig.draw(line(limit, 11, hint=99))).free == (10,)
    assert (await rig.draw(line(limit, 1, hint=-3), replica="b")).refused == 0
    assert await rig.free(limit) == pytest.approx(-3, abs=1e-3)


# Redis alone


class Spy(RedisLedger):
    """Notes the server's time of each tenant's part."""

    async def _call(self, calls: Any) -> list[bytes]:
        replies = await super()._call(calls)
        self.times_us = [struct.unpack("<d", reply[:8])[0] for reply in replies]
        return replies


def is_near(one: float, other: float, within: float) -> bool:
    return one == other or abs(one - other) <= within  # equal: both infinite


TENANTS = ("x", "y", "z")


def some_limits(tenant: str) -> list[Limit]:
    """The odd bursts keep every decision some 0.1 us away from where it would be the other one."""
    return [
        Limit(f"t/{tenant}", "fast", "rate", "tokens", 40.001, 0.0003),
        Limit(f"t/{tenant}", "slow", "rate", "requests", 10.5001, 0.004),
        Limit(f"k/{tenant}/f", "level", "level", "requests", 12),
        Limit(f"t/{tenant}", "month", "month", "tokens", 3000),
    ]


@dataclass
class Twins:
    """The same exchanges for Redis and for a bank of each tenant at the server's time."""

    spy: Spy
    lease_s: float
    hints: float
    rng: random.Random
    limits: dict[str, list[Limit]]
    banks: dict[str, Bank] = field(default_factory=dict)
    marks: dict[Limit, list[tuple[float, float, float]]] = field(default_factory=dict)
    began: float = 0.0
    draws: int = 0

    def returns(self, limit: Limit) -> tuple[Return, Return]:
        """The same one for either, which differ in their marks."""
        rng = self.rng
        if limit.kind == "level":
            one = Return(limit, rng.choice([0, 1, 4]))
            return one, one
        units, mark, twin = rng.choice(self.marks.get(limit, [(1.0, 0.0, 0.0)]))
        units *= rng.choice([1, 1, 0.5, -0.2])
        return Return(limit, units, mark), Return(limit, units, twin)

    def draw(self, tenant: str) -> Draw:
        rng, lines = self.rng, []
        for limit in rng.sample(self.limits[tenant], rng.randint(1, 4)):
            need = rng.choice([0, 1, 2.5, 6, 50 if rng.random() < 0.05 else 3])
            hint = limit.burst - rng.randint(-4, 30) / 2 if rng.random() < self.hints else None
            lines.append(Line(limit, need, need + rng.choice([0, 0, 3, 20]), hint))
        return Draw(tuple(lines))

    async def exchange(self) -> None:
        rng = self.rng
        replica = rng.choice("ab")
        tenants = rng.sample(TENANTS, rng.randint(1, 3))
        returns = [
            (t, self.returns(rng.choice(self.limits[t]))) for t in tenants if rng.random() < 0.6
        ]
        draws = [(t, self.draw(t)) for t in tenants * 2 if rng.random() < 0.7]
        grants = await self.spy.exchange(
            op(), replica, [one for _, (one, _) in returns], [draw for _, draw in draws]
        )
        order = dict.fromkeys(t for t, _ in (*returns, *draws))
        for tenant, at in zip(order, self.spy.times_us if order else (), strict=True):
            self.began = self.began or at
            bank = self.banks.setdefault(tenant, Bank(keys_max=9, lease_s=self.lease_s))
            theirs = bank.exchange(
                replica,
                [twin for t, (_, twin) in returns if t == tenant],
                [draw for t, draw in draws if t == tenant],
                now=(at - self.began) / 1e6,
                month="2026-11",
            )
            ours = [(d, g) for (t, d), g in zip(draws, grants, strict=True) if t == tenant]
            for (draw, grant), twin in zip(ours, theirs, strict=True):
                self.compare(draw, grant, twin)

    def compare(self, draw: Draw, grant: Grant, twin: Grant) -> None:
        self.draws += 1
        assert grant.refused == twin.refused
        assert grant.units == twin.units
        assert is_near(grant.wait_s, twin.wait_s, 1e-6)
        for place, each in enumerate(draw.lines):
            unit_s = each.limit.interval_s if each.limit.kind == "rate" else 1
            assert is_near(grant.free[place], twin.free[place], 1e-6 / unit_s)
            if grant.units[place]:
                known = self.marks.setdefault(each.limit, [])
                known.append((grant.units[place], grant.marks[place], twin.marks[place]))
                del known[:-5]


@pytest.mark.parametrize(("hints", "lease_s"), [(0.5, 60), (0, 0.0100005)])
async def test_redis_answers_as_the_bank_does(
    server: RedisServer, rng: random.Random, hints: float, lease_s: float
):
    spy = Spy(server.url, settings(lease_s=lease_s), wall=Wall())
    tag = next(_numbers)
    limits = {t: some_limits(f"{t}-{tag}") for t in TENANTS}
    twins = Twins(spy, lease_s, hints, rng, limits)
    try:
        for _ in range(300):
            await twins.exchange()
    finally:
        await spy.aclose()
    assert twins.draws > 700


async def test_the_script_is_sent_again_when_the_server_forgot_it(redis: RedisLedger):
    rig = Rig(redis, Wall())
    one, other = rig.limit(), replace(rig, tenant="other").limit()
    await redis._redis.script_flush()
    grants = await redis.exchange(op(), "a", (), [Draw((line(x, 2),)) for x in (one, other)])
    assert [grant.free for grant in grants] == [(8,), (8,)]
    assert await rig.free(one) == pytest.approx(8, abs=1e-3)


async def test_nothing_is_kept_for_ever(redis: RedisLedger):
    rig = Rig(redis, Wall())
    kinds: Sequence[LimitKind] = ("rate", "level", "month")
    await rig.give(Return(rig.limit(name="unknown"), 1))
    await rig.draw(*(line(rig.limit(kind), 1, hint=9) for kind in kinds))
    keys = await redis._redis.keys(f"headrace:{{{rig.tenant}}}:*")
    assert len(keys) == 5  # with both operations
    assert all([0 < await redis._redis.pttl(key) <= 40 * 86_400_000 for key in keys])


async def test_a_refused_call_says_that_the_ledger_is_away(redis: RedisLedger):
    rig = Rig(redis, Wall())
    await redis._redis.set(f"headrace:{{{rig.tenant}}}:t/{rig.tenant}/a_rate", "not ours")
    with pytest.raises(LedgerUnavailable):
        await rig.draw(line(rig.limit(), 1))


async def test_a_server_that_hangs_is_away_and_acts_once_for_a_repeat(server: RedisServer):
    ledger = RedisLedger(server.url, settings(timeout_s=0.03), wall=Wall())
    rig, one = Rig(ledger, Wall()), op()
    draws = [Draw((line(rig.limit(), 4),))]
    await rig.free(rig.limit())
    server.signal(signal.SIGSTOP)
    try:
        for _ in range(2):
            async with asyncio.timeout(100 * ledger._timeout_s):  # or it has no deadline
                with pytest.raises(LedgerUnavailable):
                    await ledger.exchange(one, "a", (), draws)
    finally:
        server.signal(signal.SIGCONT)
    grants = await ledger.exchange(one, "a", (), draws)
    assert grants[0].units == (4,)
    assert await rig.free(rig.limit()) == pytest.approx(6, abs=1e-3)
    await ledger.aclose()


async def test_a_killed_server_is_away_until_it_is_back_and_then_starts_from_hints():
    if BINARY is None:
        pytest.skip("redis-server is not installed (Debian: apt-get install redis-server)")
    with redis_server() as server:
        ledger = RedisLedger(server.url, settings(), wall=Wall())
        rig = Rig(ledger, Wall())
        limit = rig.limit()
        assert (await rig.draw(line(limit, 7))).free == (3,)
        server.kill()
        for _ in range(3):
            with pytest.raises(LedgerUnavailable):
                await rig.draw(line(limit, 1, hint=3))
        server.start()
        assert (await rig.draw(line(limit, 1, hint=3))).free == (2,)
        server.kill()
        await ledger.aclose()
