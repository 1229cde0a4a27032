"""What all ingress replicas have counted of a canary, and where it stands: for `GET /v1/admin/canaries`. Pure."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from serve.canary import CanaryReport, CanaryReports, Figures
from serve.config import Canary


Standing = Literal["off", "unknown", "checking", "running", "stopped"]
"""`off`: not enabled; `unknown`: no replica has told of it; the others are those of the replicas."""


@dataclass(frozen=True, slots=True)
class Compared:
    """A canary and where it stands, `reason` in a sentence, over so many replicas."""

    canary: Canary
    state: Standing
    reason: str
    replicas: int
    figures: Figures = field(default_factory=Figures)


def compared(canary: Canary, told: CanaryReports) -> Compared:
    """One canary, from what was told of all; each replica counts since it began with the present settings."""
    if not canary.enabled:
        return Compared(canary, "off", "Its setting `enabled` is false.", 0)
    own = [one for one in told.reports if one.key == canary.key]
    figures = Figures()
    for one in own:
        figures.merge(one.figures)
    state, reason = _standing(canary, own, told)
    return Compared(canary, state, reason, len(own), figures)


def _standing(
    canary: Canary, own: Sequence[CanaryReport], told: CanaryReports
) -> tuple[Standing, str]:
    if canary.key in told.stops:
        return "stopped", told.stops[canary.key]
    if not own:
        return "unknown", "No ingress replica has told of it yet."
    checking = [one for one in own if one.state == "checking"]
    if checking:
        reasons = [one.reason for one in checking if one.reason]
        return "checking", reasons[0] if reasons else "The vectors of both are being compared."
    return "running", _doing(canary)


def _doing(canary: Canary) -> str:
    return f"{canary.to} answers {canary.share:.3g} of the requests and repeats {canary.shadow:.3g} of them."
