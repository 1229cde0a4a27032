"""Quotas of some replicas over one ledger and Store that can be away."""

import asyncio
from collections.abc import Sequence

from serve.admission.bank import BankLedger
from serve.admission.quotas import Quotas
from serve.config import Ledger
from serve.errors import LedgerUnavailable, StoreUnavailable
from serve.grants import Draw, Grant, Return
from serve.records import UsageRow


LEDGER = Ledger(timeout_s=0.05, retry_s=0.01, tick_s=0.01, usage_flush_s=0.01)
RUN_OUT = 1_796_083_199.0
"""A second before December 2026 in UTC."""


class Books:
    """A ledger and a Store that can be away."""

    def __init__(self, clock, wall) -> None:
        self.bank = BankLedger(LEDGER, keys_max=100, clock=clock, wall=wall)
        self.away = self.hangs = self.store_away = False
        self.exchanges = 0
        self.months: list[str] = []
        self.rows: list[UsageRow] = []
        self.reported: dict[str, Sequence[UsageRow]] = {}

    async def exchange(
        self, op: str, replica: str, returns: Sequence[Return], draws: Sequence[Draw]
    ) -> Sequence[Grant]:
        self.exchanges += 1
        if self.hangs:
            await asyncio.Event().wait()
        if self.away:
            raise LedgerUnavailable
        return await self.bank.exchange(op, replica, returns, draws)

    async def month_usage(self, tenant: str, month: str) -> Sequence[UsageRow]:
        self.months.append(month)
        if self.store_away:
            raise StoreUnavailable
        return self.rows

    async def report_usage(self, session: str, rows: Sequence[UsageRow]) -> None:
        if self.store_away:
            raise StoreUnavailable
        self.reported[session] = rows


class Town:
    """Quotas of some replicas over the same books."""

    def __init__(self, clock) -> None:
        self.clock = clock
        self.wall_now = RUN_OUT - 60
        self.books = Books(clock, self.wall)
        self.tasks: list[asyncio.Task] = []

    def wall(self) -> float:
        return self.wall_now

    def replica(self, name: str = "a", *, runs: bool = True) -> Quotas:
        quotas = Quotas(
            self.books,
            self.books,
            LEDGER,
            replica=name,
            replicas=2,
            owners_max=100,
            clock=self.clock,
            wall=self.wall,
        )
        if runs:
            self.tasks.append(asyncio.create_task(quotas.run()))
        return quotas
