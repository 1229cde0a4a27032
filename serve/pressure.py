"""Who brings writes to the index, and whether to bring more."""

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Sender:
    """Whose writes these are, for their fair share of the index: a tenant and its tier's weight."""

    tenant: str
    weight: float


@dataclass(frozen=True, slots=True)
class Pressure:
    """Whether the writer of the index should be brought more.

    Attributes:
        wait_s: for so many seconds nobody should; 0: there is room.
        paused: because the index as a whole cannot be written, not because much waits.
        tenants: the same seconds for those of which too much waits; the others have room.
    """

    wait_s: float = 0.0
    paused: bool = False
    tenants: Mapping[str, float] = field(default_factory=dict)
