"""The Ledger as a named actor: shares the limits out, and holds what the embedders report.

Its memory is a cache: after a kill the replicas' own accounts (`Line.hint`) fill it again.
"""

import asyncio
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import ray

from deployments.actors import State, leave, watch
from deployments.observed import observe
from serve.admission.bank import BankLedger
from serve.canary import CanaryReport, CanaryReports
from serve.config import Settings
from serve.flows.trial_reports import TrialReports
from serve.grants import Draw, Grant, Return
from serve.records import QueuePlace, QueueReport
from serve.scaling import Decision


LIMITS_PER_TENANT = 9
"""Two rates and two levels of each class, and the month; those of keys share the room of tenants
that have fewer.
"""

LAPSE_REPORTS = 6
"""A report is forgotten after so many times `ledger.queue_report_s`: its replica is idle or gone."""

REPORTS_MAX = 1024
"""Reports held, each of up to `ledger.queue_places_max` places of some 200 bytes."""


DECISIONS_MAX = 64
"""Last decisions held, one a deployment: 16 pools, 16 workers and the door at most."""


class Reports:
    """The last report of each embedder replica that had work waiting."""

    def __init__(self, lapse_s: float, clock: Callable[[], float]) -> None:
        self._lapse_s = lapse_s
        self._clock = clock
        self._held: OrderedDict[
            tuple[str, str], tuple[float, QueueReport, dict[str, list[QueuePlace]]]
        ] = OrderedDict()

    def keep(self, report: QueueReport) -> None:
        """Put it in the place of the replica's last one; an empty queue needs none."""
        name = report.pool, report.replica
        self._held.pop(name, None)
        if not report.items:
            return
        places: dict[str, list[QueuePlace]] = {}
        for place in report.places:
            places.setdefault(place.tenant, []).append(place)
        self._held[name] = self._clock(), replace(report, places=()), places
        if len(self._held) > REPORTS_MAX:
            self._held.popitem(last=False)

    def of(self, tenant: str) -> tuple[QueueReport, ...]:
        """Every report that has not lapsed, with the places of this tenant only."""
        oldest = self._clock() - self._lapse_s
        while self._held and next(iter(self._held.values()))[0] < oldest:
            self._held.popitem(last=False)
        return tuple(
            replace(report, places=tuple(places.get(tenant, ())))
            for _, report, places in self._held.values()
        )


@ray.remote
class LedgerActor:
    """One for all ingress replicas; `serve.admission.bank` does the arithmetic."""

    async def __init__(self, settings: Settings, _deploy_seq: int) -> None:  # type: ignore[misc]
        """Begin with empty books."""
        observe("ledger", settings.logs)
        self._leaving = False
        self._ledger = BankLedger(
            settings.ledger,
            keys_max=LIMITS_PER_TENANT * settings.admission.tenants_tracked_max,
            clock=time.monotonic,
            wall=time.time,
        )
        self._decisions: OrderedDict[str, Decision] = OrderedDict()
        self._trials = TrialReports(time.monotonic)
        self._reports = Reports(LAPSE_REPORTS * settings.ledger.queue_report_s, time.monotonic)
        self._watch = asyncio.create_task(
            watch(self._state, self.retire, grace_s=settings.actors.orphan_grace_s)
        )

    def _state(self) -> State:
        return "leaving" if self._leaving else "works"

    async def ready(self) -> bool:
        """That it lives."""
        return True

    async def exchange(
        self, op: str, replica: str, returns: Sequence[Return], draws: Sequence[Draw]
    ) -> Sequence[Grant]:
        """See `serve.ports.Ledger`."""
        return await self._ledger.exchange(op, replica, returns, draws)

    async def report_queue(self, report: QueueReport) -> None:
        """Take an embedder's report."""
        self._reports.keep(report)

    async def queue_reports(self, tenant: str) -> Sequence[QueueReport]:
        """See `serve.ports.Queues`."""
        return self._reports.of(tenant)

    async def report_decision(self, decision: Decision) -> None:
        """Take an autoscaling policy's last decision."""
        self._decisions[decision.deployment] = decision
        self._decisions.move_to_end(decision.deployment)
        if len(self._decisions) > DECISIONS_MAX:
            self._decisions.popitem(last=False)

    async def decisions(self) -> Sequence[Decision]:
        """See `serve.ports.Decisions`."""
        return tuple(self._decisions.values())

    async def report_canaries(
        self, replica: str, reports: Sequence[CanaryReport]
    ) -> Mapping[str, str]:
        """See `serve.canary.Trials`."""
        return self._trials.keep(replica, reports)

    async def canary_reports(self) -> CanaryReports:
        """See `serve.canary.Trials`."""
        return self._trials.all()

    async def retire(self) -> None:
        """End for good: there is nothing to be saved."""
        self._leaving = True
        leave()
