"""One replica's leases with the bank that answers them when a test says so."""

from collections.abc import Sequence

from serve.admission.accounts import Account
from serve.admission.asks import Ask, Exchange, Permit, Refusal
from serve.admission.bank import Bank
from serve.admission.leases import Leases
from serve.config import Ledger
from serve.grants import Draw, Grant, Limit, Line
from serve.records import Caller


SETTINGS = Ledger()
MONTH = "2026-11"
# Ten a second: asked for per request by two replicas below a burst of 200, in blocks of 5 from 500.
SMALL = Limit("t/ann", "small", "rate", "requests", 20, 0.1)
LARGE = Limit("t/ann", "large", "rate", "requests", 600, 0.1)
TOKENS = Limit("t/ann", "tokens", "rate", "tokens", 1000, 0.1)
AT_ONCE = Limit("t/ann", "at once", "level", "requests", 64)
A_MONTH = Limit("t/ann", "month", "month", "tokens", 100_000)


class Replica:
    """Leases of one of two replicas, with the bank they draw from."""

    def __init__(self, *limits: Limit, owners_max: int = 10, bank: Bank | None = None) -> None:
        self.now = 0.0
        self.bank = bank or Bank(keys_max=100, lease_s=SETTINGS.lease_s)
        self.leases = Leases(SETTINGS, replicas=2, owners_max=owners_max, month=MONTH)
        self.limits = limits

    def caller(self, tenant: str = "ann", *limits: Limit) -> Caller:
        return Caller(tenant, "free", 1, "k", limits={"interactive": limits or self.limits})

    def charge(self, tokens: int = 1, caller: Caller | None = None) -> Permit | Ask | Refusal:
        wallet = self.leases.wallets.find(caller or self.caller(), "interactive")
        return self.leases.charge(wallet, tokens, self.now)

    def permit(self, tokens: int = 1) -> Permit:
        """Charge, and exchange if it takes one."""
        answer = self.charge(tokens)
        if isinstance(answer, Ask):
            self.exchange()
            assert isinstance(answer.answer, Permit)
            return answer.answer
        assert isinstance(answer, Permit)
        return answer

    def refusal(self, tokens: int = 1) -> Refusal:
        answer = self.charge(tokens)
        if isinstance(answer, Ask):
            self.exchange()
            answer = answer.answer
        assert isinstance(answer, Refusal)
        return answer

    def due(self) -> Exchange:
        sent = self.leases.due(self.now)
        assert sent is not None
        return sent

    def answers(self, sent: Exchange) -> Sequence[Grant]:
        return self.bank.exchange("a", sent.returns, sent.draws, now=self.now, month=MONTH)

    def exchange(self) -> Exchange:
        sent = self.due()
        self.leases.apply(sent, self.answers(sent), self.now)
        return sent

    def rest(self, seconds: float) -> None:
        """Let time pass, with whatever exchanges are due."""
        for _ in range(round(seconds * 10)):
            self.now += 0.1
            if self.leases.due(self.now):
                self.exchange()

    def others(self, limit: Limit, units: float) -> None:
        """Another replica draws so much."""
        draw = Draw((Line(limit, units, units),))
        (grant,) = self.bank.exchange("b", (), [draw], now=self.now, month=MONTH)
        assert grant.refused is None

    def fail(self, seconds: float = 0.0) -> None:
        """The Ledger does not answer what is due, if anything is."""
        self.now += seconds
        self.leases.due(self.now)
        self.leases.failed(self.now)

    def release(self, permit: Permit, *, refund: bool = False) -> None:
        self.leases.release(permit, self.now, refund=refund)

    def account(self, limit: Limit) -> Account:
        (found,) = [one for one in self.leases.wallets.accounts() if one.limit.name == limit.name]
        return found

    def free(self, limit: Limit) -> float | None:
        return self.bank.free(limit, now=self.now, month=MONTH)
