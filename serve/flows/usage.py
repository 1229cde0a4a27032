"""`GET /v1/usage` and `GET /v1/queue`: what a caller has used, what is left, and why it waits.

A caller sees its own tenant's figures, and totals that name nobody else.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from serve.admission.accounts import Rate
from serve.admission.limits import month_of
from serve.flows.context import Context
from serve.flows.kept import Kept
from serve.ports import Queues, Usage
from serve.records import KLASSES, Caller, Klass, QueuePlace, QueueReport, UsageRow


KEPT_S = 0.5
"""An answer serves a tenant for so long: the routes are not charged, and each call of the Store
costs a transaction. The figures are some seconds old anyway."""


@dataclass(frozen=True, slots=True)
class UsageView:
    """A tenant's month (`2026-11`, UTC) by key family and class, and its limits of now by class.

    The rows are some seconds old: replicas report every `ledger.usage_flush_s`.
    """

    month: str
    rows: Sequence[UsageRow]
    rates: Mapping[Klass, Sequence[Rate]]


@dataclass(frozen=True, slots=True)
class Waiting:
    """What a tenant has waiting, over all replicas.

    Attributes:
        tokens: their cost, in tokens corrected per model.
        share: the part of the service it gets while everyone now waiting keeps waiting, 0..1.
        ahead_tokens: what passes before the first of it starts.
        starts_s: predicted seconds until that; `ends_s` until the last one is done.
        oldest_s: how long the oldest has waited.
        effective_priority: 0..100 of the one that is next; 100 is next of all.
    """

    items: int
    tokens: float
    share: float
    ahead_tokens: float
    starts_s: float
    ends_s: float
    oldest_s: float
    effective_priority: float


@dataclass(frozen=True, slots=True)
class QueueView:
    """What the caller's tenant has waiting: by class, in all, and why in a sentence.

    A class in which nothing waits is left out, `whole` is None when nothing waits at all.
    `everyone_tokens` is what all tenants together have waiting.
    """

    why: str
    whole: Waiting | None
    classes: Mapping[Klass, Waiting]
    everyone_tokens: float


class UsageFlow:
    """Answers a caller about itself. Not charged: who is refused must be able to ask why."""

    def __init__(self, context: Context, usage: Usage, queues: Queues) -> None:
        self._quotas = context.quotas
        self._wall = context.wall
        self._places_max = context.settings.ledger.queue_places_max
        self._usage = usage
        self._queues = queues
        self._rows = Kept[Sequence[UsageRow]](context.clock, KEPT_S)
        self._reports = Kept[Sequence[QueueReport]](context.clock, KEPT_S)

    async def usage(self, caller: Caller) -> UsageView:
        """This month's usage of the caller's tenant, and what is left now of its limits.

        Raises StoreUnavailable.
        """
        month = month_of(self._wall())
        tenant = caller.tenant
        rows = await self._rows.get((tenant, month), lambda: self._usage.month_usage(tenant, month))
        rates: dict[Klass, Sequence[Rate]] = {
            klass: [_at_most(rate, caller, rows) for rate in self._quotas.rates(caller, klass)]
            for klass in KLASSES
        }
        return UsageView(month, rows, rates)

    async def queue(self, caller: Caller) -> QueueView:
        """What the caller's tenant has waiting. Raises LedgerUnavailable."""
        tenant = caller.tenant
        reports = await self._reports.get((tenant,), lambda: self._queues.queue_reports(tenant))
        classes = {klass: _waiting(reports, (klass,)) for klass in KLASSES}
        whole = _waiting(reports, KLASSES)
        return QueueView(
            self._nothing(reports) if whole is None else _why(caller, whole, reports),
            whole,
            {klass: waiting for klass, waiting in classes.items() if waiting is not None},
            sum(report.cost for report in reports),
        )

    def _nothing(self, reports: Sequence[QueueReport]) -> str:
        if any(len(KLASSES) * report.tenants > self._places_max for report in reports):
            return f"Nothing of yours is among the {self._places_max} largest that wait."
        return "Nothing of yours is waiting."


def _at_most(rate: Rate, caller: Caller, rows: Sequence[UsageRow]) -> Rate:
    """A replica may not have met the month's usage yet: the Store has."""
    limit = rate.limit
    if limit.kind != "month":
        return rate
    tenants = limit.owner.startswith("t/")
    used = sum(row.tokens for row in rows if tenants or row.key == caller.key)
    return rate._replace(remaining=min(rate.remaining, max(int(limit.burst) - used, 0)))


def _waiting(reports: Sequence[QueueReport], klasses: Sequence[Klass]) -> Waiting | None:
    """One tenant's places in these classes, put together."""
    parts = [[one for one in report.places if one.klass in klasses] for report in reports]
    places = [one for part in parts for one in part if one.items]
    if not places:
        return None
    first = min(places, key=lambda place: place.starts_s)
    return Waiting(
        items=sum(place.items for place in places),
        tokens=sum(place.cost for place in places),
        share=_share(parts),
        ahead_tokens=first.ahead,
        starts_s=first.starts_s,
        ends_s=max(place.ends_s for place in places),
        oldest_s=max(place.oldest_s for place in places),
        effective_priority=first.effective_priority,
    )


def _share(parts: Sequence[Sequence[QueuePlace]]) -> float:
    """Of each replica the sum over classes; of the replicas the mean, by what waits in each."""
    costs = [sum(place.cost for place in part) for part in parts]
    shares = [sum(place.share for place in part) for part in parts]
    weighed = sum(cost * share for cost, share in zip(costs, shares, strict=True))
    return min(weighed / sum(costs), 1.0) if sum(costs) else max(shares)


def _why(caller: Caller, whole: Waiting, reports: Sequence[QueueReport]) -> str:
    tenants = max(report.tenants for report in reports if report.places)
    if tenants > 1:
        reason = (
            f"tier {caller.tier!r} has weight {caller.weight:g} among {tenants} waiting tenants, "
            f"which gives you {100 * whole.share:.3g} % of the service"
        )
    else:
        reason = "the model is busy and nobody else waits"
    inputs = "1 input" if whole.items == 1 else f"{whole.items:,} inputs"
    return (
        f"You have {inputs} ({whole.tokens:,.0f} tokens) waiting: {reason}; "
        f"{whole.ahead_tokens:,.0f} tokens come before your first, which starts in about "
        f"{_about(whole.starts_s)}, and your last is done in about {_about(whole.ends_s)}."
    )


def _about(seconds: float) -> str:
    if seconds < 10:  # noqa: PLR2004  below it a tenth of a second is worth saying
        return f"{seconds:.1f} s"
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"  # noqa: PLR2004
