"""What a replica goes by while the Ledger is away: its part, 1/replicas, of every limit. Pure.

All replicas together then admit no more than the limit, whoever of them is asked.
"""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import replace

from serve.admission.accounts import EPSILON, KNOWN_S, LEVEL_KNOWN_S, MONTH_SHARE, Account
from serve.admission.bank import Bank
from serve.grants import Draw, Grant, Limit, Line, Return


START_S = 1.0
"""A limit that was not asked about lately starts with so many seconds' worth of its rate: a full
burst would be a second one."""


class Share:
    """One outage of the Ledger, from `began` on; at most `accounts_max` limits."""

    def __init__(self, replicas: int, *, accounts_max: int, began: float) -> None:
        self._replicas = replicas
        self._accounts_max = accounts_max
        self._began = began
        self._bank = Bank(keys_max=accounts_max, lease_s=START_S)
        self._starts: OrderedDict[Account, tuple[float, float]] = OrderedDict()

    def draw(self, needs: Sequence[tuple[Account, float]], *, now: float, month: str) -> Grant:
        """Charge rates and months beyond what was granted: all of them or none."""
        lines = tuple(self._line(account, need, now) for account, need in needs)
        return self._bank.exchange("", (), [Draw(lines)], now=now, month=month)[0]

    def fits(self, account: Account, units: float, now: float) -> bool:
        """Whether so many more units of a level may be in use; one request alone always may.

        For a moment what others hold is known: only what was left is shared out.
        """
        most = account.limit.burst / self._replicas
        if account.free is not None and now - account.free_at <= LEVEL_KNOWN_S:
            most = account.held + max(account.free, 0.0) / self._replicas
        return account.in_use() + units <= max(most, units)

    def give_back(
        self, account: Account, units: float, mark: float, *, now: float, month: str
    ) -> None:
        """Units that were charged here were not used, or (below zero) more was."""
        one = Return(self._part(account.limit, 0), units, mark)
        self._bank.exchange("", [one], (), now=now, month=month)

    def owed(self, *, now: float, month: str) -> list[tuple[Account, float]]:
        """What was used since the last call and is not refilled: the Ledger has to be told.

        Below zero, of a month, it was given back since.
        """
        owed = []
        for account, (start, at) in self._starts.items():
            part = self._part(account.limit, 0)
            left = self._bank.free(part, now=now, month=month)
            if left is None:
                continue
            unused = start
            if part.kind == "rate":
                unused = min(start + (now - at) / part.interval_s, part.burst)
            if unused - left > EPSILON or (part.kind == "month" and unused != left):
                owed.append((account, unused - left))
            self._starts[account] = left, now
        return owed

    def _line(self, account: Account, need: float, now: float) -> Line:
        part = self._part(account.limit, need)
        if account in self._starts:
            self._starts.move_to_end(account)  # the bank forgets in the same order
            return Line(part, need, need)
        start = self._start(account, need, now)
        self._starts[account] = start, now
        if len(self._starts) > self._accounts_max:
            self._starts.popitem(last=False)
        return Line(part, need, need, part.burst - account.limit.burst / self._replicas + start)

    def _start(self, account: Account, need: float, now: float) -> float:
        """Units with which a limit starts here."""
        limit = account.limit
        part = limit.burst / self._replicas
        known = account.free_now(now)
        known = part if known is None else max(known, 0.0) / self._replicas
        if limit.kind == "month":
            guess = part if account.free is not None else limit.burst * MONTH_SHARE
        elif self._began - account.free_at <= KNOWN_S:
            guess = part
        else:
            guess = START_S / limit.interval_s / self._replicas
        return min(part, known, max(guess, need))

    def _part(self, limit: Limit, need: float) -> Limit:
        """The limit as it holds here: one request always fits into its burst."""
        return replace(
            limit,
            burst=max(limit.burst / self._replicas, need),
            interval_s=limit.interval_s * self._replicas,
        )
