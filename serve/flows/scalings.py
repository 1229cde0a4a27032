"""`GET /v1/admin/autoscaling`: how many replicas each deployment should have, and why."""

from collections.abc import Sequence
from dataclasses import dataclass

from serve.config import Settings
from serve.ports import Decisions
from serve.scaling import Decision


@dataclass(frozen=True, slots=True)
class Scaled:
    """A deployment, the bounds of its replicas, and what was decided for it last.

    `decision` is None for one that is not scaled, and until one has been told.
    """

    deployment: str
    least: int
    most: int
    fixed: bool
    decision: Decision | None = None

    @property
    def reason(self) -> str:
        """In a sentence."""
        if self.decision is not None:
            return self.decision.reason
        if self.fixed:
            return f"It has {self.most} by its setting `replicas`; no `autoscaling` is given."
        return "Nothing has been decided since the Ledger started."


class ScalingFlow:
    """Shows what the policies themselves told: nothing is worked out again here."""

    def __init__(self, settings: Settings, decisions: Decisions) -> None:
        self._settings = settings
        self._decisions = decisions

    async def list(self) -> Sequence[Scaled]:
        """Every deployment. Raises LedgerUnavailable."""
        told = {one.deployment: one for one in await self._decisions.decisions()}
        every = []
        for name, one in self._settings.deployments.items():
            rule = one.autoscaling
            if rule is None:
                every.append(Scaled(name, one.replicas, one.replicas, fixed=True))
            else:
                every.append(Scaled(name, rule.min, rule.max, fixed=False, decision=told.get(name)))
        return every
