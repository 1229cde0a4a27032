"""Do limits hold over two ingress replicas, and what does a check cost?

    python -m bench.quotas               # about a minute
    python -m bench.quotas --smoke       # under 30 s

Two of the service's `Quotas`, as two ingress replicas hold them, in this process and in real time,
over one ledger: the Ledger actor's bank behind 2 ms each way; a real Redis; the same killed in the
middle. A greedy tenant asks for all it can get of both replicas, a modest one of either for 80 % of
its limits. Then the CPU time of a check while balances suffice, with tenant and key limits.
"""

import asyncio
import contextlib
import random
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

from bench.redis_server import BINARY, redis_server
from bench.report import arguments, finish, spread, table
from serve.admission.bank import BankLedger
from serve.admission.limits import limits_of
from serve.admission.quotas import Quotas
from serve.admission.redis import RedisLedger
from serve.allowance import Allowance
from serve.config import Ledger
from serve.errors import QuotaExceeded
from serve.grants import Draw, Grant, Return
from serve.ports import Ledger as LedgerPort
from serve.records import Caller, UsageRow


Mode = Literal["ledger", "redis", "redis killed"]
REPLICAS = 2
HOP_S = 0.002
"""One way to the Ledger actor: a call measured 2.0 to 2.3 ms there and back on a busy machine."""
REQUESTS, TOKENS = (600, 20), (60_000, 2_000)
"""A minute's refill, and the burst."""
GREEDY_LOOPS = 8
"""Of each replica; a refused one asks again after `PAUSE_S`."""
PAUSE_S = 0.01
MODEST = 0.8
"""Of its limits, in equal steps, by turns at either replica."""
SIZES = (40, 160)
"""Tokens of a request: with 100 in the mean both limits bind alike."""
CHECKS = 20_000


class NoUsage:
    """Keeps no usage."""

    async def report_usage(self, session: str, rows: Sequence[UsageRow]) -> None:
        """See `serve.ports.Usage`."""

    async def month_usage(self, tenant: str, month: str) -> Sequence[UsageRow]:
        """See `serve.ports.Usage`."""
        del tenant, month
        return ()


class Far:
    """A ledger some way off."""

    def __init__(self, ledger: LedgerPort) -> None:
        self._ledger = ledger

    async def exchange(
        self, op: str, replica: str, returns: Sequence[Return], draws: Sequence[Draw]
    ) -> Sequence[Grant]:
        """There and back."""
        await asyncio.sleep(HOP_S)
        grants = await self._ledger.exchange(op, replica, returns, draws)
        await asyncio.sleep(HOP_S)
        return grants


def caller(tenant: str, *, with_key: bool = False) -> Caller:
    """A tenant with every kind of limit; those of its key are as wide."""
    quota = {
        "requests_per_minute": REQUESTS[0],
        "requests_burst": REQUESTS[1],
        "tokens_per_minute": TOKENS[0],
        "tokens_burst": TOKENS[1],
        "concurrent_max": 64,
        "queued_tokens_max": 10**6,
    }
    allowance = Allowance.model_validate({"interactive": quota, "tokens_per_month": 10**9})
    limits = limits_of(f"t/{tenant}", "tenant", allowance)
    if with_key:
        roomy = {**quota, "requests_per_minute": 10**9, "tokens_per_minute": 10**12}
        del roomy["requests_burst"], roomy["tokens_burst"]
        wide = allowance.changed({"interactive": roomy})
        limits = limits_of(f"t/{tenant}", "tenant", wide)
        own = limits_of(f"k/{tenant}/1", "key", wide)
        limits = {klass: (*limits[klass], *own[klass]) for klass in limits}
    return Caller(tenant, "free", 1.0, "1", limits=limits)


@dataclass(slots=True)
class Seen:
    """What passed, as (seconds, tokens), and how much was refused."""

    passed: list[tuple[float, int]] = field(default_factory=list)
    refused: int = 0

    def over(self, per_minute: float, burst: float, *, tokens: bool) -> float:
        """The largest of (passed / limit - 1) over all windows between two requests."""
        rate, worst = per_minute / 60, -1.0
        sizes = [size if tokens else 1 for _, size in self.passed]
        for start, (began, _) in enumerate(self.passed):
            total = 0
            for (at, _), size in zip(self.passed[start:], sizes[start:], strict=True):
                total += size
                worst = max(worst, total / (burst + rate * (at - began)) - 1)
        return worst


async def play(mode: Mode, seconds: float) -> dict[str, Any]:
    """Both tenants against two replicas for some seconds."""
    async with _replicas(mode, seconds) as quotas:
        greedy, modest = Seen(), Seen()
        until = time.monotonic() + seconds
        async with asyncio.TaskGroup() as group:
            for number in range(GREEDY_LOOPS * REPLICAS):
                group.create_task(_grab(quotas[number % REPLICAS], number, greedy, until))
            group.create_task(_ask(quotas, modest, until))
        exchanges = sum(one.tally.exchanges for one in quotas)
        local = sum(one.tally.local_grants for one in quotas)
    return {
        "requests_over": greedy.over(*REQUESTS, tokens=False),
        "tokens_over": greedy.over(*TOKENS, tokens=True),
        "greedy_passed": len(greedy.passed),
        "greedy_part_of_limit": len(greedy.passed) / (REQUESTS[1] + REQUESTS[0] / 60 * seconds),
        "greedy_refused": greedy.refused,
        "modest_passed": len(modest.passed),
        "modest_refused": modest.refused,
        "exchanges": exchanges,
        "local_grants": local,
    }


async def _grab(quotas: Quotas, seed: int, seen: Seen, until: float) -> None:
    rng, who = random.Random(seed), caller("greedy")
    while time.monotonic() < until:
        if not await _one(quotas, who, rng.randint(*SIZES), seen):
            await asyncio.sleep(PAUSE_S)


async def _ask(quotas: Sequence[Quotas], seen: Seen, until: float) -> None:
    rng, who = random.Random(0), caller("modest")
    at, number = time.monotonic(), 0
    while at < until:
        await _one(quotas[number % REPLICAS], who, rng.randint(*SIZES), seen)
        at, number = at + 60 / (MODEST * REQUESTS[0]), number + 1
        await asyncio.sleep(max(at - time.monotonic(), 0))


async def _one(quotas: Quotas, who: Caller, tokens: int, seen: Seen) -> bool:
    try:
        async with quotas.admitted(who, "interactive", tokens=tokens):
            seen.passed.append((time.monotonic(), tokens))
    except QuotaExceeded:
        seen.refused += 1
        return False
    return True


@asynccontextmanager
async def _replicas(mode: Mode, seconds: float) -> AsyncIterator[list[Quotas]]:
    async with _ledgers(mode, seconds) as ledgers:
        quotas = [_quotas(ledger, f"r{number}") for number, ledger in enumerate(ledgers)]
        tasks = [asyncio.create_task(one.run()) for one in quotas]
        try:
            yield quotas
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


def _quotas(ledger: LedgerPort, replica: str) -> Quotas:
    return Quotas(
        ledger,
        NoUsage(),
        Ledger(),
        replica=replica,
        replicas=REPLICAS,
        owners_max=1000,
        clock=time.monotonic,
        wall=time.time,
    )


@asynccontextmanager
async def _ledgers(mode: Mode, seconds: float) -> AsyncIterator[list[LedgerPort]]:
    """One for each replica, of the same books."""
    settings = Ledger()
    if mode == "ledger":
        bank = BankLedger(settings, keys_max=10_000, clock=time.monotonic, wall=time.time)
        yield [Far(bank) for _ in range(REPLICAS)]
        return
    with redis_server() as server:
        ledgers = [RedisLedger(server.url, settings, wall=time.time) for _ in range(REPLICAS)]
        killing = None
        if mode == "redis killed":
            killing = asyncio.get_running_loop().call_later(seconds / 2, server.kill)
        try:
            yield list(ledgers)
        finally:
            if killing is not None:
                killing.cancel()
            for one in ledgers:
                with contextlib.suppress(Exception):  # its server may be dead
                    await one.aclose()


async def check_us(checks: int, *, with_key: bool) -> float:
    """CPU microseconds of one admitted request, all balances being there.

    As the flows do it: the request before its tokenising, the tokens after it.
    """
    who = caller("steady", with_key=with_key)
    bank = BankLedger(Ledger(), keys_max=1000, clock=time.monotonic, wall=time.time)
    quotas = _quotas(bank, "one")
    task = asyncio.create_task(quotas.run())
    for _ in range(200):
        async with quotas.admitted(who, "interactive", tokens=10):
            pass
    await asyncio.sleep(0.3)
    began = time.process_time()
    for number in range(checks):
        async with (
            quotas.admitted(who, "interactive", tokens=0),
            quotas.admitted(who, "interactive", tokens=10, requests=0),
        ):
            pass
        if number % 100 == 0:
            await asyncio.sleep(0)  # the background exchanges are part of the price
    took_s = time.process_time() - began
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    return took_s / checks * 1e6


def modes() -> tuple[Mode, ...]:
    """Those that can be had here."""
    if BINARY:
        return "ledger", "redis", "redis killed"
    print("redis-server is not there: its part is left out")
    return ("ledger",)


async def measure(*, rounds: int, seconds: float, checks: int) -> dict[str, Any]:
    """Every mode by turns, then the price of a check."""
    taken: dict[str, list[dict[str, Any]]] = {mode: [] for mode in modes()}
    for _ in range(rounds):
        for mode, results in taken.items():
            results.append(await play(mode, seconds))  # type: ignore[arg-type]
    prices = [await check_us(checks, with_key=True) for _ in range(max(rounds, 3))]
    return {
        "modes": {
            mode: {key: spread([one[key] for one in results]) for key in results[0]}
            for mode, results in taken.items()
        },
        "limits": len(caller("x", with_key=True).limits["interactive"]),
        "check_us": spread(prices),
    }


def shown(result: Mapping[str, Any]) -> str:
    """The result for people."""
    keys = (
        "requests_over",
        "tokens_over",
        "greedy_part_of_limit",
        "modest_passed",
        "modest_refused",
        "exchanges",
        "local_grants",
    )
    rows = [[mode, *(one[key] for key in keys)] for mode, one in result["modes"].items()]
    price = result["check_us"]
    return (
        table(("ledger", *keys), rows)
        + f"\n\na check against {result['limits']} limits: {price['median']:.1f} us of CPU "
        f"({price['min']:.1f}-{price['max']:.1f})"
    )


def main(words: Sequence[str] | None = None) -> None:
    """Measure, show, and end with one line of JSON."""
    parser = arguments(__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=10, help="of a mode, in a round")
    options = parser.parse_args(words)
    rounds, seconds, checks = options.rounds, options.seconds, CHECKS
    if options.smoke:
        rounds, seconds, checks = 1, 2.0, 2000
    result = asyncio.run(measure(rounds=rounds, seconds=seconds, checks=checks))
    print(shown(result))
    head = {"smoke": options.smoke, "rounds": rounds, "seconds": seconds}
    finish("quotas", "default", {**head, **result}, options.out)


if __name__ == "__main__":
    main()
