"""What a request is charged, and what is sent to the Ledger for it. Pure; values of `leases`."""

import math
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

from serve.admission.accounts import Account
from serve.admission.gcra import EPSILON_S
from serve.admission.share import Share
from serve.admission.wallets import Wallet
from serve.grants import Draw, Limit, Line, Return


RETURNS_MAX = 10_000
"""Returns that wait for the Ledger; beyond it the oldest are lost, which admits less, not more."""

LEVEL_WAIT_S = 1.0
"""What a refusal by a level says: nobody knows when others are done."""


@dataclass(slots=True, eq=False)
class Permit:
    """What was charged for one request, account by account.

    `month` is the one in which it was charged. `requests` is 0 of tokens that were counted after
    their request was charged. `local` holds what of it came from the local share instead:
    place -> (units, mark).
    """

    wallet: Wallet
    tokens: int
    costs: Sequence[float]
    month: str
    requests: int = 1
    marks: list[float] = field(default_factory=list)
    share: Share | None = None
    local: dict[int, tuple[float, float]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Refusal:
    """The limit that waits longest, and how long; infinite: waiting is pointless."""

    limit: Limit
    wait_s: float


@dataclass(slots=True, eq=False)
class Ask:
    """A request that needs units from the Ledger. `taken` was reserved from the balances.

    `answer` is set by `apply` or `failed`. Of one that nobody waits for any more (`gone`) the
    units stay in the accounts.
    """

    permit: Permit
    taken: list[float] = field(default_factory=list)
    short: list[int] = field(default_factory=list)
    tries: int = 0
    gone: bool = False
    answer: Permit | Refusal | None = None

    def put_back(self, month: str) -> None:
        """What was reserved goes back to the balances, but for a month that has ended."""
        permit = self.permit
        for account, units, mark in zip(
            permit.wallet.accounts, self.taken, permit.marks, strict=True
        ):
            old = account.limit.kind == "month" and permit.month != month
            if old or not units:
                continue
            if account.is_level:
                account.balance += units
            else:
                account.put_back(units, mark)


@dataclass(slots=True, eq=False)
class Exchange:
    """What to send: returns, then draws, of which the last ones are blocks for `blocks`."""

    number: int
    at: float
    returns: tuple[Return, ...]
    draws: tuple[Draw, ...]
    asks: tuple[Ask, ...]
    blocks: tuple[Account, ...]


class Returns:
    """Units that go back to the Ledger, and what it has to be told of use, until they are sent."""

    def __init__(self) -> None:
        self._units: OrderedDict[tuple[Account, float], float] = OrderedDict()
        self._taken: dict[tuple[Account, float], float] = {}

    def add(self, account: Account, units: float, mark: float = 0.0) -> None:
        """Units were not used; below zero more were."""
        is_rate = account.limit.kind == "rate"
        self._add((account, mark if is_rate and units > 0 else 0.0), units)

    def used(self, account: Account, units: float) -> None:
        """So much of a month was used at least, whoever did."""
        self._add((account, units), 0.0)

    def take(self) -> list[Return]:
        """What to send now."""
        taken, self._units = self._units, OrderedDict()
        self._taken = {
            (account, mark): units
            for (account, mark), units in taken.items()
            if account.limit.kind == "month" and (units < 0 or mark)
        }
        return [
            Return(account.limit, units, mark)
            for (account, mark), units in taken.items()
            if units or mark
        ]

    def lost(self) -> None:
        """What was taken last did not arrive: use of a month, which does not refill, is kept."""
        for key, units in self._taken.items():
            self._add(key, units)
        self._taken = {}

    def roll(self) -> None:
        """A new month begins: what was used of the last one is not charged to it."""
        self._taken = {}
        for key in [key for key in self._units if key[0].limit.kind == "month"]:
            del self._units[key]

    def _add(self, key: tuple[Account, float], units: float) -> None:
        self._units[key] = self._units.get(key, 0.0) + units
        if len(self._units) > RETURNS_MAX:
            self._units.popitem(last=False)


def refusal_by(account: Account, units: float, now: float) -> Refusal | None:
    """The refusal that follows from what is known of one account; None: it may be granted."""
    short = units - max(account.balance, 0.0) - (account.free_now(now) or 0.0)
    limit = account.limit
    if limit.kind == "rate":
        wait_s = short * limit.interval_s
        return Refusal(limit, wait_s) if wait_s > EPSILON_S else None
    if short <= 0:
        return None
    return Refusal(limit, LEVEL_WAIT_S if account.is_level else math.inf)


def longest(refusals: Iterable[Refusal | None]) -> Refusal | None:
    """The one to be told: all others are over when it is."""
    real = [refusal for refusal in refusals if refusal is not None]
    return max(real, key=lambda refusal: refusal.wait_s, default=None)


def draw_of(ask: Ask, fed: set[Account], now: float) -> Draw:
    """What an ask lacks; the first that needs an account asks for a block as well."""
    lines = []
    for place in ask.short:
        account = ask.permit.wallet.accounts[place]
        need = ask.permit.costs[place] - ask.taken[place]
        lines.append(line_of(account, need, need if account in fed else account.wanted(need), now))
        fed.add(account)
    return Draw(tuple(lines))


def line_of(account: Account, need: float, want: float, now: float) -> Line:
    """With what this replica knows, in case the Ledger knows nothing."""
    return Line(account.limit, need, want, account.hint(now))


def again(sent: Exchange, now: float) -> Exchange:
    """The same with hints of now: a Ledger that has it already does not look at them."""
    return replace(
        sent,
        draws=tuple(
            Draw(
                tuple(
                    line if line.hint is None else replace(line, hint=_later(line, now - sent.at))
                    for line in draw.lines
                )
            )
            for draw in sent.draws
        ),
    )


def _later(line: Line, seconds: float) -> float:
    hint = line.hint or 0.0
    if line.limit.kind != "rate":
        return hint
    return min(hint + seconds / line.limit.interval_s, line.limit.burst)


def covered(permit: Permit) -> bool:
    """Whether the balances and what the Ledger has left would suffice together."""
    pairs = zip(permit.wallet.accounts, permit.costs, strict=True)
    return all(
        cost <= account.balance + max(account.free or 0.0, 0.0) for account, cost in pairs if cost
    )
