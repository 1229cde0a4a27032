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


@dataclass(slots=True)
class _State:
    """Theoretical arrival time, latest charge, and the seconds given back so far."""

    tat: float
    at: float
    back_s: float = 0.0


class Gcra:
    """Theoretical arrival times by key; at most `keys_max`, the longest unused forgotten first.

    A forgotten key starts with a full burst, hence the bound must exceed the tenants in use.
    """

    def __init__(self, keys_max: int) -> None:
        self._keys_max = keys_max
        self._states: OrderedDict[tuple[str, str], _State] = OrderedDict()

    def charge(
        self, owner: str, costs: Mapping[Dimension, float], now: float
    ) -> tuple[Dimension, float] | None:
        """Charge every dimension or none; None when granted.

        Else the dimension that has to wait longest, and how many seconds.
        """
        charged: dict[tuple[str, str], float] = {}
        worst: tuple[Dimension, float] | None = None
        for dimension, cost in costs.items():
            state = self._states.get((owner, dimension.name))
            tat = (now if state is None else max(state.tat, now)) + cost * dimension.interval_s
            wait = tat - dimension.burst * dimension.interval_s - now
            if wait > EPSILON_S and (worst is None or wait > worst[1]):
                worst = (dimension, wait)
            charged[owner, dimension.name] = tat
        if worst is None:
            for key, tat in charged.items():
                self._keep(key, tat, now)
        return worst

    def mark(self, owner: str, dimension: Dimension) -> float:
        """Where a charge that was just granted ends, for `give_back`."""
        state = self._states[owner, dimension.name]
        return state.tat + state.back_s

    def give_back(self, owner: str, dimension: Dimension, units: float, *, mark: float) -> None:
        """Take `units` off a charge; below zero it was too small and grows.

        What of the charge had been refilled by the time of the latest one is not given back, and
        nothing is to a forgotten key: a late refund must not let more than the burst through.
        """
        state = self._states.get((owner, dimension.name))
        if state is not None:
            unfilled_s = max(mark - state.back_s - state.at, 0.0)
            back_s = min(units * dimension.interval_s, unfilled_s)
            state.tat -= back_s
            state.back_s += max(back_s, 0.0)

    def rate(self, owner: str, dimension: Dimension, now: float) -> Rate:
        """How much is left."""
        state = self._states.get((owner, dimension.name))
        debt_s = 0.0 if state is None else max(state.tat - now, 0.0)
        remaining = int((dimension.burst - debt_s / dimension.interval_s) + 1e-6)
        return Rate(int(dimension.burst), max(remaining, 0), debt_s)

    def _keep(self, key: tuple[str, str], tat: float, now: float) -> None:
        state = self._states.setdefault(key, _State(tat, now))
        state.tat, state.at = tat, now
        self._states.move_to_end(key)
        if len(self._states) > self._keys_max:
            self._states.popitem(last=False)


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
    marks: tuple[float, float]


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
                param="input" if klass == "interactive" else "documents",
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
        gcra, tenant = self._gcra, caller.tenant
        marks = gcra.mark(tenant, requests), gcra.mark(tenant, per_token)
        return Permit(caller, klass, tokens, marks)

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
        self._give_back(permit, requests=0, tokens=permit.tokens - tokens)

    def refund(self, permit: Permit) -> None:
        """Nothing was done for it (shed, or a fault of ours): give all of it back."""
        self._give_back(permit, requests=1, tokens=permit.tokens)

    def _give_back(self, permit: Permit, *, requests: int, tokens: int) -> None:
        limits = self._dimensions[permit.caller.tier, permit.klass]
        for limit, units, mark in zip(limits, (requests, tokens), permit.marks, strict=True):
            self._gcra.give_back(permit.caller.tenant, limit, units, mark=mark)

    def rates(self, caller: Caller, klass: Klass, now: float) -> dict[str, Rate]:
        """What is left, under the names `requests` and `tokens`."""
        requests, per_token = self._dimensions[caller.tier, klass]
        return {
            "requests": self._gcra.rate(caller.tenant, requests, now),
            "tokens": self._gcra.rate(caller.tenant, per_token, now),
        }
