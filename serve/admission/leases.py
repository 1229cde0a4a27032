"""A replica's side of the limits: what it may admit unasked, and what it asks the Ledger. Pure.

Sans I/O: `charge` answers at once or returns an `Ask`; `due` says what to send, `apply` and
`failed` take what came of it. One exchange is under way at a time; the same one is sent again
until it is answered, so that nothing is charged or given back twice. `bank` is the counterpart.
"""

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import replace

from serve.admission.accounts import Account, Terms
from serve.admission.asks import (
    LEVEL_WAIT_S,
    Ask,
    Exchange,
    Permit,
    Refusal,
    Returns,
    again,
    covered,
    draw_of,
    line_of,
    longest,
    refusal_by,
)
from serve.admission.share import Share
from serve.admission.wallets import Wallet, Wallets
from serve.config import Ledger
from serve.grants import Draw, Grant, Return


TRIES_MAX = 3
"""How often one request asks: what it lacks may be partly here by the time it is refused."""

HINTS_MAX = 1000
"""Limits of which a Ledger that was away is told what was left."""

TOUCHES_PER_LEASE = 3
"""How often in a lease the Ledger is told of what is held for long."""


class Leases:
    """The accounts of the callers seen last, at most `owners_max` of them and their classes."""

    def __init__(self, settings: Ledger, *, replicas: int, owners_max: int, month: str) -> None:
        self._settings = settings
        self._replicas = replicas
        self._owners_max = owners_max
        self._month = month
        self.wallets = Wallets(Terms(settings, replicas), owners_max)
        self._active: dict[Account, None] = {}
        self._low: dict[Account, None] = {}
        self._tell: dict[Account, None] = {}
        self._asks: deque[Ask] = deque()
        self._returns = Returns()
        self._sent: Exchange | None = None
        self._number = 0
        self._scan_at = self._beat_at = -math.inf
        self._resume_at = math.inf
        self.share: Share | None = None

    # --- a request -----------------------------------------------------------------------

    def charge(
        self, wallet: Wallet, tokens: int, now: float, *, requests: int = 1
    ) -> Permit | Ask | Refusal:
        """Charge one request of so many tokens to every account, or to none."""
        costs = [tokens if account.by_token else requests for account in wallet.accounts]
        permit = Permit(wallet, tokens, costs, self._month, requests)
        for account, cost in zip(wallet.accounts, costs, strict=True):
            if cost > account.balance and cost:
                return self._beyond(permit, now)
        self._take(permit, now)
        return permit

    def refusal(self, wallet: Wallet, costs: Sequence[float], now: float) -> Refusal | None:
        """Whether so much was refused a moment ago, and would be again."""
        refusals = []
        for account, cost in zip(wallet.accounts, costs, strict=True):
            settings = self._settings
            memory_s = settings.tick_s if account.is_level else settings.refusal_s_max
            if cost and now - account.refused_at <= memory_s:
                refusals.append(refusal_by(account, cost, now))
        return longest(refusals)

    def settle(self, permit: Permit, tokens: int, now: float) -> None:
        """The true count of a permit is known: charge or give back the difference."""
        for place, account in enumerate(permit.wallet.accounts):
            if account.by_token and not account.is_level:
                self._give_back(permit, place, permit.tokens - tokens, now)
        permit.tokens = tokens

    def release(self, permit: Permit, now: float, *, refund: bool) -> None:
        """The request is over; `refund`: nothing was done for it, all of it is given back."""
        for place, account in enumerate(permit.wallet.accounts):
            if not account.is_level:
                if refund:
                    units = permit.tokens if account.by_token else permit.requests
                    self._give_back(permit, place, units, now)
            elif cost := permit.costs[place]:
                account.balance += cost
                if account.balance > account.spare():
                    self._tell[account] = None

    # --- the Ledger ----------------------------------------------------------------------

    @property
    def urgent(self) -> bool:
        """Whether the next exchange should not wait for its tick."""
        return bool(self._asks or self._low or self._tell)

    def due(self, now: float) -> Exchange | None:
        """What to send now: the last exchange again if it was not answered."""
        if self._sent is not None:
            if now - self._sent.at < self._settings.lease_s / 2:
                return again(self._sent, now)
            self._sent = None  # the Ledger may soon forget that it had it: rather lose it
            self._returns.lost()
        if now >= self._scan_at:
            self._scan_at = now + self._settings.idle_s
            self._scan(now)
        asks = tuple(ask for ask in self._asks if not ask.gone)
        self._asks.clear()
        if self.share is not None and self._resume_at < math.inf:  # else it may never arrive
            self._confess(self.share, now)
        returns = self._collect(now)
        fed: set[Account] = set()
        draws = [draw_of(ask, fed, now) for ask in asks]
        blocks = tuple(account for account in self._low if account not in fed)
        self._low.clear()
        for account in blocks:  # of a Ledger that was away only what is left is wanted yet
            want = account.wanted(0) if self.share is None else 0
            draws.append(Draw((line_of(account, 0, want, now),)))
        if not (returns or draws):
            if now < self._beat_at and self.share is None:
                return None
            draws.append(Draw(()))  # to learn that the Ledger is away, or back, before it matters
        self._beat_at = now + self._settings.retry_s
        self._number += 1
        self._sent = Exchange(self._number, now, returns, tuple(draws), asks, blocks)
        return self._sent

    def apply(self, sent: Exchange, grants: Sequence[Grant], now: float) -> None:
        """The exchange was answered, and so is every ask of it that is not `gone` or asks again."""
        self._sent = None
        try:
            self._take_in(sent, grants, now)
        except Exception:
            self._asks.extend(sent.asks)  # `failed` answers those that have no answer yet
            raise
        if self.share is not None:
            self._resume(self.share, now)

    def failed(self, now: float) -> list[Ask]:
        """The exchange was not answered: go by the local share. Returns the asks it answered."""
        if self.share is None:
            self.share = Share(self._replicas, accounts_max=self._owners_max, began=now)
        self._resume_at = math.inf
        sent = () if self._sent is None else self._sent.asks
        every = dict.fromkeys((*sent, *self._asks))
        waiting = [ask for ask in every if not ask.gone and ask.answer is None]
        self._asks.clear()
        for ask in waiting:
            self.abandon(ask)
            ask.answer = self._by_share(self.share, ask.permit, now)
        return waiting

    def abandon(self, ask: Ask) -> None:
        """Nobody waits for it any more: what was reserved goes back to the balances."""
        ask.gone = True
        ask.put_back(self._month)

    def roll(self, month: str, now: float) -> None:
        """A new calendar month begins, and nothing of it is used."""
        self._month = month
        self._returns.roll()
        if self._sent is not None:
            rest = tuple(one for one in self._sent.returns if one.limit.kind != "month")
            self._sent = replace(self._sent, returns=rest)
        for account in self.wallets.accounts():
            if account.limit.kind == "month":
                account.drop()
                account.learn(account.limit.burst, now)
                account.recall_at = math.inf
                account.refused_at = -math.inf

    def recall(self, account: Account, used: int, now: float) -> None:
        """The Store said how much of a month was used, which the Ledger may not know."""
        account.recall(used, now)
        self._returns.used(account, used)

    def drain(self) -> None:
        """Have everything that is not in use given back with the next exchange."""
        for account in self._active:
            account.least = account.balance
        self._scan(math.inf)

    # --- steps of a request --------------------------------------------------------------

    def _beyond(self, permit: Permit, now: float) -> Permit | Ask | Refusal:
        """The balances do not suffice."""
        for account, cost in zip(permit.wallet.accounts, permit.costs, strict=True):
            if cost > account.limit.burst:
                return Refusal(account.limit, math.inf)
        if self.share is not None:
            return self._by_share(self.share, permit, now)
        refusal = self.refusal(permit.wallet, permit.costs, now)
        if refusal is not None:
            return refusal
        ask = Ask(permit)
        self._ask(ask, now)
        return ask

    def _ask(self, ask: Ask, now: float) -> None:
        """Reserve what the balances have and ask for the rest."""
        ask.tries, ask.taken, ask.short, ask.permit.marks = ask.tries + 1, [], [], []
        for place, account in enumerate(ask.permit.wallet.accounts):
            cost = ask.permit.costs[place]
            part = min(cost, max(account.balance, 0.0))
            ask.taken.append(part)
            ask.permit.marks.append(account.take(part, now) if part else math.inf)
            if part < cost:
                ask.short.append(place)
        self._asks.append(ask)

    def _by_share(self, share: Share, permit: Permit, now: float) -> Permit | Refusal:
        """Charge what the balances lack to the local share."""
        needs: dict[int, tuple[Account, float]] = {}
        for place, account in enumerate(permit.wallet.accounts):
            cost = permit.costs[place]
            if cost <= account.balance or not cost:
                continue
            if not account.is_level:
                needs[place] = account, cost - max(account.balance, 0.0)
            elif not share.fits(account, cost, now):
                return Refusal(account.limit, LEVEL_WAIT_S)
        grant = share.draw(list(needs.values()), now=now, month=self._month)
        if grant.refused is not None:
            account, _ = list(needs.values())[grant.refused]
            return Refusal(account.limit, grant.wait_s)
        permit.share = share
        permit.local = {
            place: (need, mark)
            for (place, (_, need)), mark in zip(needs.items(), grant.marks, strict=True)
        }
        self._take(permit, now)
        return permit

    def _take(self, permit: Permit, now: float) -> None:
        """Charge the balances, but for what came from the local share."""
        marks = []
        for place, account in enumerate(permit.wallet.accounts):
            cost = permit.costs[place]
            if permit.local and place in permit.local:
                cost -= permit.local[place][0]
            marks.append(account.take(cost, now))
            if account.balance < account.low and now >= account.pause_until:
                self._low[account] = None
        permit.marks = marks

    def _give_back(self, permit: Permit, place: int, units: float, now: float) -> None:
        """Units of a rate or a month that were not used; below zero more were."""
        account = permit.wallet.accounts[place]
        if account.limit.kind == "month" and permit.month != self._month:
            return
        need, mark = permit.local.get(place, (0.0, 0.0))
        if need:  # first to where it came from last
            here = min(units, need)
            units -= here
            if self.share is not None and self.share is permit.share:
                self.share.give_back(account, here, mark, now=now, month=self._month)
            elif here < 0 or account.limit.kind == "month":  # of a rate it has long been refilled
                self._returns.add(account, here)
        if units:
            if account.free is not None:
                account.free += units
            self._returns.add(account, units, permit.marks[place])

    # --- steps of an exchange ------------------------------------------------------------

    def _take_in(self, sent: Exchange, grants: Sequence[Grant], now: float) -> None:
        asked = len(sent.asks)
        for ask, draw, grant in zip(sent.asks, sent.draws[:asked], grants[:asked], strict=True):
            self._answer(ask, draw, grant, now)
        blocks = zip(sent.blocks, sent.draws[asked:], grants[asked:], strict=False)
        for account, draw, grant in blocks:
            account.learn(grant.free[0], now)
            self._put_in(account, grant.units[0], grant.marks[0])
            if grant.units[0] < draw.lines[0].want / 2:
                account.pause_until = now + self._settings.tick_s

    def _answer(self, ask: Ask, draw: Draw, grant: Grant, now: float) -> None:
        """Take what one ask was granted, or note what it was refused."""
        permit = ask.permit
        accounts = [permit.wallet.accounts[place] for place in ask.short]
        for account, line, free in zip(accounts, draw.lines, grant.free, strict=True):
            account.learn(free, now)
            refused = grant.refused is not None and line.need > free
            account.refused_at = now if refused else -math.inf
        if grant.refused is not None:
            if not ask.gone:
                line = draw.lines[grant.refused]
                ask.put_back(self._month)
                # by what others were granted beyond their need
                if ask.tries < TRIES_MAX and covered(permit):
                    self._ask(ask, now)
                    return
                known = self.refusal(permit.wallet, permit.costs, now)
                wait_s = LEVEL_WAIT_S if line.limit.kind == "level" else grant.wait_s
                ask.answer = known or Refusal(line.limit, wait_s)
            return
        for place, account, line, units, mark in zip(
            ask.short, accounts, draw.lines, grant.units, grant.marks, strict=True
        ):
            used = 0.0 if ask.gone else line.need
            self._put_in(account, units, mark, used=used)
            if not ask.gone:
                permit.marks[place] = min(permit.marks[place], mark)
        if not ask.gone:
            ask.answer = permit

    def _put_in(self, account: Account, units: float, mark: float, used: float = 0.0) -> None:
        """Units were granted, of which so many are used already."""
        self._active[account] = None
        if account.is_level:
            account.held += units
            account.balance += units - used
            if account.balance > account.spare():
                self._tell[account] = None
            return
        kept = min(units - used, max(account.block - account.balance, 0.0))
        if kept:
            account.add(kept, mark)
        if units - used > kept:
            self._returns.add(account, units - used - kept, mark)

    def _collect(self, now: float) -> tuple[Return, ...]:
        """Returns to send: units, and of each level that changed what is held of it."""
        returns = self._returns.take()
        for account in self._tell:
            account.held += max(-account.balance, 0.0)  # used while the Ledger was away
            account.balance = max(account.balance, 0.0)
            account.shed(account.balance - account.spare())
            account.told_at = now
            returns.append(Return(account.limit, account.held))
            if account.held:
                self._active[account] = None
            else:
                self._active.pop(account, None)
        self._tell.clear()
        return tuple(returns)

    def _scan(self, now: float) -> None:
        """Give back what was not used lately; say again what is held for long."""
        settings = self._settings
        for account in list(self._active):
            if account.is_level:
                old = now - account.told_at >= settings.lease_s / TOUCHES_PER_LEASE
                if account.shed(account.least) or old:
                    self._tell[account] = None
                account.least = account.balance
            elif now - account.used_at >= settings.idle_s:
                for units, mark in account.drop():
                    self._returns.add(account, units, mark)
                del self._active[account]

    def _resume(self, share: Share, now: float) -> None:
        """The Ledger is back, perhaps with empty books: tell it what is known, and what was used.

        Go by the local share until every other replica has had the time to tell it as well.
        """
        if now >= self._resume_at:
            self._confess(share, now)
            self.share = None
        if self._resume_at < math.inf:
            return
        self._resume_at = now + self._settings.timeout_s + 2 * self._settings.retry_s
        for account in self.wallets.accounts():
            if account.is_level:
                if account.held or account.balance:
                    self._tell[account] = None
            elif account.owes(now) and len(self._low) < HINTS_MAX:
                self._low[account] = None

    def _confess(self, share: Share, now: float) -> None:
        """What was used by the local share."""
        for account, units in share.owed(now=now, month=self._month):
            self._returns.add(account, -units)
            self._low[account] = None
