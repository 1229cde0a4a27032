"""How much the buffer holds, in all and of each tenant, and how long until there is room. Pure."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from serve.config import Buffer as BufferSettings
from serve.errors import Overloaded, TooLarge
from serve.pressure import Sender


RATE_WEIGHT = 0.2
"""Of the newest flush in the rates that a wait is computed from."""

RETRY_AFTER_S_MIN = 0.1
RETRY_AFTER_S_UNKNOWN = 1.0

Unit = Literal["writes", "bytes"]
Amounts = Mapping[Unit, float]


@dataclass(slots=True)
class _Held:
    """What is there, of one tenant or of all, and its bounds by the names of their settings."""

    bounds: Mapping[Unit, tuple[str, int]]
    amounts: dict[Unit, int] = field(default_factory=lambda: {"writes": 0, "bytes": 0})
    weight: float = 1.0


class Stock:
    """Bounds: `writes_max` and `bytes_max` in all, `tenant_...` of one tenant. At `soft_fill` of a bound
    whoever can should bring no more.
    """

    def __init__(self, settings: BufferSettings) -> None:
        self._soft = settings.soft_fill
        self._all = _Held(
            {
                "writes": ("buffer.writes_max", settings.writes_max),
                "bytes": ("buffer.bytes_max", settings.bytes_max),
            }
        )
        self._own: Mapping[Unit, tuple[str, int]] = {
            "writes": ("buffer.tenant_writes_max", settings.tenant_writes_max),
            "bytes": ("buffer.tenant_bytes_max", settings.tenant_bytes_max),
        }
        self._tenants: dict[str, _Held] = {}
        self._crowded: set[str] = set()
        self._rates: dict[Unit, float] = {}

    @property
    def bytes(self) -> int:
        """Estimated bytes that are held."""
        return self._all.amounts["bytes"]

    @property
    def tenants(self) -> int:
        """Tenants of which something is held."""
        return len(self._tenants)

    def check(self, sender: Sender, count: int, size_bytes: int, least_s: float) -> None:
        """Raises TooLarge for what could never fit, Overloaded for what does not now; both name the bound.

        What they say to wait is `least_s` at least.
        """
        more: Amounts = {"writes": count, "bytes": size_bytes}
        own = self._tenants.get(sender.tenant) or _Held(self._own, weight=sender.weight)
        for held in (self._all, own):
            for unit, (bound, most) in held.bounds.items():
                if more[unit] > most:
                    raise TooLarge(f"These writes exceed {bound}; offer them in parts.")
                over = held.amounts[unit] + more[unit] - most
                if over > 0:
                    wait_s = self._wait_s(held, unit, max(over, more[unit]))
                    message = f"The write buffer is full: {bound}."
                    raise Overloaded(message, retry_after_s=max(wait_s, least_s))

    def add(self, tenant: str, writes: int, size_bytes: int) -> None:
        """So much more is held of a tenant; negative: less."""
        own = self._tenants.get(tenant)
        if own is None:
            own = self._tenants[tenant] = _Held(self._own)
        for held in (own, self._all):
            held.amounts["writes"] += writes
            held.amounts["bytes"] += size_bytes
        if any(own.amounts[unit] >= self._soft * most for unit, (_, most) in own.bounds.items()):
            self._crowded.add(tenant)
        else:
            self._crowded.discard(tenant)
        if not any(own.amounts.values()):
            del self._tenants[tenant]

    def weigh(self, sender: Sender) -> None:
        """Note the weight of a tenant, if something is held of it."""
        if own := self._tenants.get(sender.tenant):
            own.weight = sender.weight

    def learn(self, writes: int, size_bytes: int, took_s: float) -> None:
        """So much lands in so long, in all slots together."""
        seen: Amounts = {"writes": writes / took_s, "bytes": size_bytes / took_s}
        for unit, rate in seen.items():
            known = self._rates.get(unit, rate)
            self._rates[unit] = known + RATE_WEIGHT * (rate - known)

    def crowded_s(self) -> float:
        """Seconds until what is held in all is below the soft bounds; 0: it is."""
        return self._crowded_s(self._all)

    def crowded(self) -> dict[str, float]:
        """Seconds until a tenant is below its own soft bounds, of those that are not."""
        return {tenant: self._crowded_s(self._tenants[tenant]) for tenant in self._crowded}

    def _crowded_s(self, held: _Held) -> float:
        waits = [0.0]
        for unit, (_, most) in held.bounds.items():
            over = held.amounts[unit] - self._soft * most
            if over >= 0:
                waits.append(self._wait_s(held, unit, over))
        return max(waits)

    def _wait_s(self, held: _Held, unit: Unit, excess: float) -> float:
        """How long it takes to land what stands in the way, at the rate seen lately."""
        part = 1.0 if held is self._all else self._part(held)
        rate = self._rates.get(unit, 0.0) * part
        return max(excess / rate if rate else RETRY_AFTER_S_UNKNOWN, RETRY_AFTER_S_MIN)

    def _part(self, own: _Held) -> float:
        """Of that rate, what the fair order leaves to a tenant beside all of which something is held."""
        return own.weight / max(own.weight, sum(one.weight for one in self._tenants.values()))
