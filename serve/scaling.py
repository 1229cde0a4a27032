"""How much there is to do, and how many replicas that takes: what is told of it across processes."""

from collections.abc import Mapping
from dataclasses import dataclass, field


READY_COUNTED_MAX = 20_000
"""Ready items of a stage that are counted, some ms for the Store: far more than any number of workers
needs to be justified."""


@dataclass(frozen=True, slots=True)
class Backlog:
    """What waits in the Store, of all tenants together.

    Attributes:
        tokens: estimated tokens left of open jobs that are not paused, by model; "": of jobs that say none.
        items: ready or leased ones by stage, the ready up to READY_COUNTED_MAX.
        index_full: the index has no room, so nothing of stage `embed` is claimed now.
        age_s: how long ago it was counted.
    """

    tokens: Mapping[str, float] = field(default_factory=dict)
    items: Mapping[str, int] = field(default_factory=dict)
    index_full: bool = False
    age_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Decision:
    """What was decided for one deployment, from what, and why.

    Attributes:
        wanted: replicas; `target` is how many were wanted before, `running` how many there are.
        inputs: the figures by name, null where unknown: tokens, items, requests, seconds.
        at: epoch seconds of the controller.
    """

    deployment: str
    wanted: int
    target: int
    running: int
    reason: str
    inputs: Mapping[str, float | None]
    at: float
