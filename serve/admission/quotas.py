"""Quotas: GCRA over requests and tokens per minute, all dimensions or none. Pure.

The generic cell rate algorithm (ITU-T I.371) keeps one number per key, the theoretical arrival
time, and gives the exact time to wait. A limit over a window T means burst + rate * T.
Each ingress replica enforces its share of every limit; see docs/adr/0006.
"""

from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from serve.config import Tier
from serve.errors import BadInput, QuotaExceeded, ServiceError
from serve.records import Caller, Klass


EPSILON_S = 1e-9
"""Sums of floats: a wait below this is none."""


@dataclass(frozen=True, slots=True)
class Dimension:
    """One limit: `burst` units at once, one more each `interval_s`."""

    name: str
    interval_s: float
    burst: float


@dataclass(frozen=True, slots=True)
class Rate:
    """The state of one limit: units left, and the seconds until all of them are."""

    limit: int
    remaining: int
    reset_s: float


class Gcra:
    """Theoretical arrival times by key; at most `keys_max`, the longest unused forgotten first.

    A forgotten key starts with a full burst, hence the bound must exceed the tenants in use.
    """

    def __init__(self, keys_max: int) -> None:
        self._keys_max = keys_max
        self._tat: OrderedDict[tuple[str, str], float] = OrderedDict()

    def charge(
        self, owner: str, costs: Mapping[Dimension, float], now: float
    ) -> tuple[Dimension, float] | None:
        """Charge every dimension or none; None when granted.

        Else the dimension that has to wait longest, and how many seconds.
        """
        charged: dict[tuple[str, str], float] = {}
        worst: tuple[Dimension, float] | None = None
        for dimension, cost in costs.items():
            key = (owner, dimension.name)
            tat = max(self._tat.get(key, now), now) + cost * dimension.interval_s
            wait = tat - dimension.burst * dimension.interval_s - now
            if wait > EPSILON_S and (worst is None or wait > worst[1]):
                worst = (dimension, wait)
            charged[key] = tat
        if worst is None:
            for key, tat in charged.items():
                self._tat[key] = tat
                self._tat.move_to_end(key)
            while len(self._tat) > self._keys_max:
                self._tat.popitem(last=False)
        return worst

    def settle(self, owner: str, dimension: Dimension, diff: float) -> None:
        """Add `diff` units (true less charged, may be negative) to what was charged.

        A no-op for a forgotten key: a late refund must not create a credit.
        """
        key = (owner, dimension.name)
        if key in self._tat:
            self._tat[key] += diff * dimension.interval_s

    def rate(self, owner: str, dimension: Dimension, now: float) -> Rate:
        """How much is left."""
        debt_s = max(self._tat.get((owner, dimension.name), now) - now, 0.0)
        remaining = int((dimension.burst - debt_s / dimension.interval_s) + 1e-6)
        return Rate(int(dimension.burst), max(remaining, 0), debt_s)


REQUESTS = "requests_per_minute"
TOKENS: Mapping[Klass, str] = {
    "interactive": "tokens_per_minute",
    "bulk": "bulk_tokens_per_minute",
}


def dimensions(tier: Tier, klass: Klass, replicas: int) -> tuple[Dimension, Dimension]:
    """One replica's share of a tier's request and token limits for a class."""
    if klass == "interactive":
        per_minute, burst = tier.tokens_per_minute, tier.tokens_burst
    else:
        per_minute, burst = tier.bulk_tokens_per_minute, tier.bulk_tokens_burst

    def share(name: str, per_minute: float, burst: float) -> Dimension:
        return Dimension(name, 60 * replicas / per_minute, max(burst / replicas, 1))

    return (
        share(REQUESTS, tier.requests_per_minute, tier.requests_burst),
        share(TOKENS[klass], per_minute, burst),
    )


@dataclass(frozen=True, slots=True)
class Permit:
    """What was charged: pass it to `settle` or `refund` once, when the truth is known."""

    caller: Caller
    klass: Klass
    tokens: int


class Quotas:
    """The limits of every tenant, as one ingress replica enforces them."""

    def __init__(self, tiers: Mapping[str, Tier], *, replicas: int, tenants_max: int) -> None:
        self._gcra = Gcra(3 * tenants_max)  # requests, tokens and bulk tokens of each
        self._dimensions: dict[tuple[str, Klass], tuple[Dimension, Dimension]] = {}
        for name, tier in tiers.items():
            self._dimensions[name, "interactive"] = dimensions(tier, "interactive", replicas)
            self._dimensions[name, "bulk"] = dimensions(tier, "bulk", replicas)

    def admit(self, caller: Caller, klass: Klass, *, tokens: int, now: float) -> Permit:
        """Charge one request and its tokens, or nothing.

        Raises QuotaExceeded with the dimension as its code and the exact wait, BadInput when the
        request exceeds what its tier can ever hold at once.
        """
        requests, per_token = self._dimensions[caller.tier, klass]
        if tokens > per_token.burst:
            raise BadInput(
                f"The request has {tokens} tokens; tier {caller.tier} allows "
                f"{int(per_token.burst)} at once ({per_token.name}).",
                param="input",
                code="tokens_exceed_quota",
            )
        refused = self._gcra.charge(caller.tenant, {requests: 1, per_token: tokens}, now)
        if refused is not None:
            dimension, wait_s = refused
            raise QuotaExceeded(
                f"Rate limit reached for {dimension.name}: {int(dimension.burst)} at once, "
                f"{60 / dimension.interval_s:g} a minute. Try again in {wait_s:.3g} s.",
                code=dimension.name,
                retry_after_s=wait_s,
            )
        return Permit(caller, klass, tokens)

    @contextmanager
    def admitted(
        self, caller: Caller, klass: Klass, *, tokens: int, now: float
    ) -> Iterator[Permit]:
        """`admit` around work: refunded when it is shed, fails by our fault or is cancelled.

        A caller's own mistake that was only found after work was done stays charged.
        """
        permit = self.admit(caller, klass, tokens=tokens, now=now)
        try:
            yield permit
        except BaseException as error:
            if not isinstance(error, ServiceError) or error.refundable:
                self.refund(permit)
            raise

    def settle(self, permit: Permit, *, tokens: int) -> None:
        """The true count is known: charge or give back the difference."""
        _, per_token = self._dimensions[permit.caller.tier, permit.klass]
        self._gcra.settle(permit.caller.tenant, per_token, tokens - permit.tokens)

    def refund(self, permit: Permit) -> None:
        """Nothing was done for it (shed, or a fault of ours): give all of it back."""
        requests, per_token = self._dimensions[permit.caller.tier, permit.klass]
        self._gcra.settle(permit.caller.tenant, requests, -1)
        self._gcra.settle(permit.caller.tenant, per_token, -permit.tokens)

    def rates(self, caller: Caller, klass: Klass, now: float) -> dict[str, Rate]:
        """What is left, under the names `requests` and `tokens`."""
        requests, per_token = self._dimensions[caller.tier, klass]
        return {
            "requests": self._gcra.rate(caller.tenant, requests, now),
            "tokens": self._gcra.rate(caller.tenant, per_token, now),
        }
