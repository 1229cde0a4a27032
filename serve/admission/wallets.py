"""Which accounts the requests of a key are charged to. Pure."""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from weakref import WeakValueDictionary

from serve.admission.accounts import Account, Terms
from serve.grants import Limit
from serve.records import Caller, Klass


@dataclass(frozen=True, slots=True)
class Wallet:
    """The accounts that requests of one key's class are charged to."""

    tenant: str
    key: str
    klass: Klass
    limits: tuple[Limit, ...]
    accounts: tuple[Account, ...]
    months: tuple[Account, ...]


class Wallets:
    """Those of the callers seen last, at most `owners_max` keys and classes.

    An account lives as long as a wallet, a permit or a balance needs it.
    """

    def __init__(self, terms: Terms, owners_max: int) -> None:
        self._terms = terms
        self._owners_max = owners_max
        self._wallets: OrderedDict[tuple[str, str, Klass], Wallet] = OrderedDict()
        self._accounts: WeakValueDictionary[tuple[str, str], Account] = WeakValueDictionary()

    def find(self, caller: Caller, klass: Klass) -> Wallet:
        """The accounts of a caller's class; others when its limits have changed."""
        limits = caller.limits.get(klass, ())
        key = caller.tenant, caller.key, klass
        wallet = self._wallets.get(key)
        if wallet is None or wallet.limits is not limits:
            accounts = tuple(self._account(limit) for limit in limits)
            months = tuple(account for account in accounts if account.limit.kind == "month")
            wallet = Wallet(*key, limits, accounts, months)
            self._wallets[key] = wallet
            if len(self._wallets) > self._owners_max:
                self._wallets.popitem(last=False)
        self._wallets.move_to_end(key)
        return wallet

    def accounts(self) -> Sequence[Account]:
        """Every account that lives."""
        return list(self._accounts.values())

    def _account(self, limit: Limit) -> Account:
        key = limit.owner, limit.name
        account = self._accounts.get(key)
        if account is None:
            account = self._accounts[key] = Account(limit, self._terms)
        elif account.limit != limit:
            account.change(limit, self._terms)
        return account
