"""What each ingress replica said last of its canaries, kept where all reach it: in the Ledger."""

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence

from serve.canary import CanaryReport, CanaryReports


LAPSE_S = 30.0
"""What a replica said is forgotten after so long: it tells every 5 s, so it is gone."""

REPLICAS_MAX = 1024
"""Replicas held, each with up to 16 canaries of some kB."""

STOPS_MAX = 256
"""Stopped canaries remembered, so that a new replica does not begin one again."""


class TrialReports:
    """The last reports of each replica, and which canaries were stopped by any of them. Bounded."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._held: OrderedDict[str, tuple[float, Sequence[CanaryReport]]] = OrderedDict()
        self._stops: OrderedDict[str, str] = OrderedDict()

    def keep(self, replica: str, reports: Sequence[CanaryReport]) -> Mapping[str, str]:
        """Put them in the place of the replica's last ones; why canaries were stopped, by key."""
        self._held.pop(replica, None)
        self._held[replica] = self._clock(), reports
        if len(self._held) > REPLICAS_MAX:
            self._held.popitem(last=False)
        for one in reports:
            if one.state == "stopped":
                self._stops.setdefault(one.key, one.reason)
        while len(self._stops) > STOPS_MAX:
            self._stops.popitem(last=False)
        return dict(self._stops)

    def all(self) -> CanaryReports:
        """Every report that has not lapsed."""
        oldest = self._clock() - LAPSE_S
        while self._held and next(iter(self._held.values()))[0] < oldest:
            self._held.popitem(last=False)
        reports = tuple(one for _, every in self._held.values() for one in every)
        return CanaryReports(reports, dict(self._stops))
