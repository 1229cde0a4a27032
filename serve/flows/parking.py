"""Calls that wait for their model to be loaded: outside of the fair queue, within its bounds.

In the queue they would stand in the way of other models' work, since nobody overtakes its head.
"""

from collections.abc import Iterator, Sequence
from itertools import chain

from serve.flows.pending import Pending


class Parked:
    """By model, in order of arrival. `cost` and `items` are those of all."""

    def __init__(self) -> None:
        self._calls: dict[str, dict[Pending, float]] = {}
        self._tenants: dict[str, tuple[float, int]] = {}
        self.cost = 0.0
        self.items = 0

    def add(self, pending: Pending, cost: float) -> None:
        """Let a call wait."""
        self._calls.setdefault(pending.call.model, {})[pending] = cost
        self._count(pending, cost, len(pending.call.inputs))

    def remove(self, pending: Pending) -> bool:
        """Whether it was there; it is not any more."""
        model = pending.call.model
        cost = self._calls.get(model, {}).pop(pending, None)
        if cost is None:
            return False
        if not self._calls[model]:
            del self._calls[model]
        self._count(pending, -cost, -len(pending.call.inputs))
        return True

    def of(self, model: str) -> Sequence[Pending]:
        """The calls of a model, oldest first."""
        return list(self._calls.get(model, ()))

    def calls(self) -> Iterator[tuple[Pending, float]]:
        """Every call, and its cost."""
        return chain.from_iterable(calls.items() for calls in self._calls.values())

    @property
    def models(self) -> Sequence[str]:
        """Whose calls wait."""
        return list(self._calls)

    def waits(self, model: str) -> bool:
        """Whether a call of that model does."""
        return model in self._calls

    def backlog(self, tenant: str) -> tuple[float, int]:
        """Cost and inputs of a tenant."""
        return self._tenants.get(tenant, (0.0, 0))

    def _count(self, pending: Pending, cost: float, items: int) -> None:
        tenant = pending.call.tenant
        had_cost, had_items = self._tenants.get(tenant, (0.0, 0))
        self._tenants[tenant] = had_cost + cost, had_items + items
        if not self._tenants[tenant][1]:
            del self._tenants[tenant]
        self.items += items
        self.cost = self.cost + cost if self._calls else 0.0  # no remainder of rounding
