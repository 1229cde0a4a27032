"""The limits of every caller as an ingress replica enforces them: the asyncio rim of `leases`.

A request whose limits are covered by what the replica holds awaits nothing. One task exchanges with
the Ledger for all the others, another one reports usage to the Store.
"""

import asyncio
import logging
import math
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import KW_ONLY, dataclass, field

from serve import config
from serve.admission.accounts import Account, Rate
from serve.admission.asks import Ask, Permit, Refusal
from serve.admission.leases import Leases
from serve.admission.limits import SECONDS_PER_MINUTE, day_of, month_ends
from serve.admission.metering import OPERATION, Meter, Outcome, Row
from serve.admission.usage import UsageCount
from serve.admission.wallets import Wallet
from serve.errors import BadInput, Internal, QuotaExceeded, ServiceError
from serve.ports import Ledger, Usage
from serve.records import Caller, Klass, UsageRow


__all__ = ["Permit", "Quotas", "Rate", "Tally"]

log = logging.getLogger("headrace.quotas")

DAY_S = 86_400.0
WHOLE = ",.10g"
"""How numbers of a limit are written: 10,000,000 and 0.5."""


@dataclass(slots=True)
class Tally:
    """What happened since the start: for metrics.

    Attributes:
        exchanges: that the Ledger answered; `failures` that it did not.
        local_grants: requests admitted by the local share.
        refused: requests by the name of the limit that refused them.
    """

    exchanges: int = 0
    failures: int = 0
    local_grants: int = 0
    refused: Counter[str] = field(default_factory=Counter)


@dataclass(eq=False)
class Quotas:
    """Admits requests of one ingress replica, one of `replicas`. `run` must be running.

    Attributes:
        replica: names this process among those that are alive.
        owners_max: keys, by class, whose state is held.
        clock: monotonic, in seconds; `wall` in epoch seconds.
        meter: writes usage as events, too; None: nobody wants them.
        tally: what happened so far.
    """

    ledger: Ledger
    usage: Usage
    settings: config.Ledger
    _: KW_ONLY
    replica: str
    replicas: int
    owners_max: int
    clock: Callable[[], float]
    wall: Callable[[], float]
    meter: Meter | None = None
    tally: Tally = field(default_factory=Tally, init=False)

    def __post_init__(self) -> None:
        """Begin with nothing."""
        day = day_of(self.wall())
        self._life = uuid.uuid4().hex
        self._month = day[:7]
        self._leases = Leases(
            self.settings, replicas=self.replicas, owners_max=self.owners_max, month=self._month
        )
        self._count = UsageCount(f"{self.replica}/{self._life[:8]}", day)
        self._turns_at = _next_day(self.wall())
        self._month_ends = month_ends(self.wall())
        self._wake = asyncio.Event()
        self._futures: dict[Ask, asyncio.Future[None]] = {}
        self._recalls: dict[str, asyncio.Lock] = {}

    @property
    def away(self) -> bool:
        """Whether the Ledger does not answer and requests go by the local share."""
        return self._leases.share is not None

    # --- a request -----------------------------------------------------------------------

    def check(self, caller: Caller, klass: Klass) -> None:
        """Raise QuotaExceeded if even a request of no tokens would be refused, as is known here."""
        wallet = self._leases.wallets.find(caller, klass)
        costs = [0 if account.by_token else 1 for account in wallet.accounts]
        refusal = self._leases.refusal(wallet, costs, self.clock())
        if refusal is not None:
            self._refuse(wallet, refusal, "")
            raise _exceeded(refusal)

    @asynccontextmanager
    async def admitted(
        self,
        caller: Caller,
        klass: Klass,
        *,
        tokens: int,
        requests: int = 1,
        param: str = "input",
        model: str = "",
    ) -> AsyncIterator[Permit]:
        """Charge one request around its work: all of its limits, or none.

        With `requests` 0 only limits of tokens are charged: of a request that was charged before
        its tokens were counted. `model` is what they are for. It is refunded when it is shed, fails
        by our fault or is cancelled; a caller's own mistake that was only found after work was done
        stays charged. Raises QuotaExceeded with the limit as its code and the exact wait, BadInput
        (`tokens_exceed_quota`) for more tokens than the limit can ever hold.
        """
        permit = await self._admit(
            caller, klass, param, tokens=tokens, requests=requests, model=model
        )
        refund = True
        try:
            yield permit
            refund = False
        except ServiceError as error:
            refund = error.refundable
            raise
        finally:
            self._leases.release(permit, self.clock(), refund=refund)
            self._nudge()
            if not refund:
                self._used(permit, model)
            elif requests:
                self._meter(permit.wallet, "refunded", model, requests=requests)

    def settle(self, permit: Permit, *, tokens: int) -> None:
        """The true count is known: charge or give back the difference."""
        self._leases.settle(permit, tokens, self.clock())

    def rates(self, caller: Caller, klass: Klass) -> Sequence[Rate]:
        """What is left of every limit of the class."""
        now, month_left_s = self.clock(), max(self._month_ends - self.wall(), 0.0)
        accounts = self._leases.wallets.find(caller, klass).accounts
        return [account.rate(now, month_left_s) for account in accounts]

    async def _admit(
        self, caller: Caller, klass: Klass, param: str, *, tokens: int, requests: int, model: str
    ) -> Permit:
        if self.wall() >= self._turns_at:
            self._turn()
        wallet = self._leases.wallets.find(caller, klass)
        for account in wallet.months:
            if account.free is None or self.clock() >= account.recall_at:
                await self._recall(wallet)
                break
        answer = self._leases.charge(wallet, tokens, self.clock(), requests=requests)
        if isinstance(answer, Ask):
            answer = await self._answered(answer)
        self._nudge()
        if isinstance(answer, Permit):
            if answer.share is not None:
                self.tally.local_grants += 1
            return answer
        self._refuse(wallet, answer, model)
        limit = answer.limit
        if limit.unit == "tokens" and tokens > limit.burst:
            raise BadInput(
                f"The request has {tokens} tokens; {limit.name} allows {limit.burst:.0f} at once.",
                param=param,
                code="tokens_exceed_quota",
            )
        raise _exceeded(answer)

    async def _answered(self, ask: Ask) -> Permit | Refusal:
        """Wait for the Ledger, but not for long."""
        future = self._futures[ask] = asyncio.get_running_loop().create_future()
        self._wake.set()
        try:
            async with asyncio.timeout(self.settings.timeout_s):
                await future
        except TimeoutError:
            if ask.answer is None:
                self._fail()
            if ask.answer is None:
                self._leases.abandon(ask)
        except BaseException:
            if isinstance(ask.answer, Permit):
                self._leases.release(ask.answer, self.clock(), refund=True)
            elif ask.answer is None:
                self._leases.abandon(ask)
            raise
        finally:
            del self._futures[ask]
        if ask.answer is None:
            message = "The limits could not be charged."
            raise Internal(message)
        return ask.answer

    async def _recall(self, wallet: Wallet) -> None:
        """Learn from the Store what was used this month, before the Ledger is asked for the first
        time: it may have begun later. Without the Store the Ledger's word counts; then one request
        at a time tries again, and the others do not wait.
        """
        lock = self._recalls.setdefault(wallet.tenant, asyncio.Lock())
        async with lock:
            unknown = [one for one in wallet.months if self.clock() >= one.recall_at]
            if unknown:
                month, retry_s = self._month, self.settings.timeout_s + self.settings.retry_s
                for account in unknown:
                    account.recall_at = self.clock() + retry_s
                with suppress(ServiceError, TimeoutError):
                    async with asyncio.timeout(self.settings.timeout_s):
                        rows = await self.usage.month_usage(wallet.tenant, month)
                    for account in unknown if month == self._month else ():
                        self._leases.recall(account, _used(account, wallet, rows), self.clock())
        self._recalls.pop(wallet.tenant, None)

    def _nudge(self) -> None:
        if self._leases.urgent:
            self._wake.set()

    def _refuse(self, wallet: Wallet, refusal: Refusal, model: str) -> None:
        self.tally.refused[refusal.limit.name] += 1
        self._add_usage(wallet, refused=1)
        self._meter(wallet, "refused", model, requests=1)

    def _used(self, permit: Permit, model: str) -> None:
        wallet, requests, tokens = permit.wallet, permit.requests, permit.tokens
        self._add_usage(wallet, requests=requests, tokens=tokens)
        self._meter(wallet, "charged", model, requests=requests, tokens=tokens)

    def _add_usage(
        self, wallet: Wallet, *, requests: int = 0, tokens: int = 0, refused: int = 0
    ) -> None:
        self._count.count(
            wallet.tenant,
            wallet.key,
            wallet.klass,
            requests=requests,
            tokens=tokens,
            refused=refused,
        )

    def _meter(
        self, wallet: Wallet, outcome: Outcome, model: str, *, requests: int, tokens: int = 0
    ) -> None:
        if self.meter is None:
            return
        place = self._month, wallet.tenant, wallet.key, wallet.klass
        row = Row(*place, OPERATION.get(), model, outcome)
        self.meter.count(row, requests=requests, tokens=tokens, now=self.wall())

    # --- in the background ---------------------------------------------------------------

    async def run(self) -> None:
        """Exchange with the Ledger and report usage to the Store, until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._exchange_always())
            tasks.create_task(self._report_always())

    async def close(self) -> None:
        """Give everything back and report the last usage, after `run` has ended."""
        if self.meter is not None:
            await self.meter.write()
        with suppress(TimeoutError):
            async with asyncio.timeout(self.settings.timeout_s):
                if await self._exchange():
                    self._leases.drain()
                    await self._exchange()
                await self._report()

    async def _exchange_always(self) -> None:
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(self.settings.tick_s):
                    await self._wake.wait()
            self._wake.clear()
            if self.wall() >= self._turns_at:
                self._turn()
            if not await self._exchange():
                await asyncio.sleep(self.settings.retry_s)

    async def _exchange(self) -> bool:
        """One exchange, if one is due; false when the Ledger did not answer."""
        sent = self._leases.due(self.clock())
        if sent is None:
            return True
        try:
            async with asyncio.timeout(self.settings.timeout_s):
                grants = await self.ledger.exchange(
                    f"{self._life}-{sent.number}", self.replica, sent.returns, sent.draws
                )
            was_away = self.away
            self._leases.apply(sent, grants, self.clock())
        except (ServiceError, TimeoutError) as error:
            self._fail(error)
            return False
        except Exception:  # the rim of this task: whatever goes wrong, requests must be answered
            log.exception("an exchange with the ledger failed")
            self._fail()
            self._resolve(sent.asks)
            return False
        self.tally.exchanges += 1
        if was_away:
            log.warning("the ledger is back")
        self._resolve(sent.asks)
        return True

    def _fail(self, error: BaseException | None = None) -> None:
        """The Ledger did not answer: those who wait for it are answered by the local share."""
        self.tally.failures += 1
        if not self.away:
            log.warning("the ledger is away, the local share of the limits holds: %r", error)
        self._resolve(self._leases.failed(self.clock()))

    def _resolve(self, asks: Sequence[Ask]) -> None:
        for ask in asks:
            future = self._futures.get(ask)
            if future is not None and ask.answer is not None and not future.done():
                future.set_result(None)

    async def _report_always(self) -> None:
        while True:
            await asyncio.sleep(self.settings.usage_flush_s)
            await self._report()

    async def _report(self) -> None:
        """Report what was used until now; what the Store does not take waits for the next time."""
        if self.meter is not None:
            await self.meter.write()
        for report in self._count.due():
            try:
                await self.usage.report_usage(report.session, report.rows)
            except ServiceError as error:
                log.warning("usage is reported later: %s", error)
                return
            except Exception:  # the rim of this task: it must go on
                log.exception("usage could not be reported")
                return
            self._count.done(report)

    def _turn(self) -> None:
        """A day has ended, and perhaps a month."""
        at = self.wall()
        day = day_of(at)
        self._turns_at = _next_day(at)
        self._count.turn(day)
        if self.meter is not None:
            self.meter.turn()
        if day[:7] != self._month:
            self._month = day[:7]
            self._month_ends = month_ends(at)
            self._leases.roll(self._month, self.clock())


def _next_day(at: float) -> float:
    return (at // DAY_S + 1) * DAY_S


def _used(account: Account, wallet: Wallet, rows: Sequence[UsageRow]) -> int:
    """Tokens of a month by the owner of a limit: the tenant, or the wallet's key."""
    whole = account.limit.owner.startswith("t/")
    return sum(row.tokens for row in rows if whole or row.key == wallet.key)


def _exceeded(refusal: Refusal) -> QuotaExceeded:
    limit, wait_s = refusal.limit, refusal.wait_s
    most = f"{limit.burst:{WHOLE}}"
    if limit.kind == "rate":
        what = (
            f"{most} at once, {SECONDS_PER_MINUTE / limit.interval_s:{WHOLE}} a minute. "
            f"Try again in {wait_s:.3g} s."
        )
    elif limit.kind == "level":
        what = f"{most} at a time. Try again in {wait_s:.3g} s."
    else:
        what = f"{most} in a calendar month (UTC) are used up."
    return QuotaExceeded(
        f"Rate limit reached for {limit.name}: {what}",
        code=limit.name,
        retry_after_s=wait_s if math.isfinite(wait_s) else None,
    )
