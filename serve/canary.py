"""What is told of canaries across processes: figures that can be added up, where a canary stands, and the port
that this goes through.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol, get_args

from serve.sketch import Sketch


Arm = Literal["stable", "candidate"]
"""Of the two models that are compared: the one that callers name, and the one that is tried."""

ARMS: tuple[Arm, ...] = get_args(Arm)

ShadowEnd = Literal["compared", "failed", "dropped", "skipped"]
"""What becomes of a request that was to be repeated: dropped when all was busy, skipped where the candidate
cannot read it (ids of another tokenizer, inputs too long for it) or it is too large.
"""

State = Literal["checking", "running", "stopped"]
"""Whether the candidate still has to show that its vectors are the same, may do its part, or has been stopped."""


@dataclass(slots=True)
class ArmFigures:
    """Of one arm: requests that it answered, and how long those took that needed it for every input.

    `took` is seconds from the call to its reply, `infer` from the first to the last batch that held a part
    of it; the latter of repeated requests, too.
    """

    requests: int = 0
    took: Sketch = field(default_factory=Sketch)
    infer: Sketch = field(default_factory=Sketch)


@dataclass(slots=True)
class Figures:
    """Since a replica began a canary. `distances` has 1 - cosine of every input that was compared."""

    arms: Mapping[Arm, ArmFigures] = field(
        default_factory=lambda: {arm: ArmFigures() for arm in ARMS}
    )
    fallbacks: int = 0
    shadows: Counter[ShadowEnd] = field(default_factory=Counter)
    distances: Sketch = field(default_factory=Sketch)

    def merge(self, other: "Figures") -> None:
        """Take in what another replica has counted."""
        for arm, own in self.arms.items():
            own.requests += other.arms[arm].requests
            own.took.merge(other.arms[arm].took)
            own.infer.merge(other.arms[arm].infer)
        self.fallbacks += other.fallbacks
        self.shadows.update(other.shadows)
        self.distances.merge(other.distances)


@dataclass(frozen=True, slots=True)
class CanaryReport:
    """Where one replica stands with the canary whose settings are named `key`; `reason` in a sentence."""

    key: str
    state: State
    reason: str
    figures: Figures


@dataclass(frozen=True, slots=True)
class CanaryReports:
    """Of every replica that runs, and why canaries were stopped, by key: by whichever replica."""

    reports: Sequence[CanaryReport]
    stops: Mapping[str, str]


class Trials(Protocol):
    """How canaries go in every ingress replica, as each last told."""

    async def report_canaries(
        self, replica: str, reports: Sequence[CanaryReport]
    ) -> Mapping[str, str]:
        """Put these in the place of the replica's last ones; why canaries were stopped, by key.

        Raises LedgerUnavailable.
        """
        ...

    async def canary_reports(self) -> CanaryReports:
        """Those of every replica that has told something lately. Raises LedgerUnavailable."""
        ...
