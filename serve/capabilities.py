"""What an index backend takes and can do."""

import math
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class Rates:
    """Bulk writes per second, and bytes per second in the buffer's estimate; infinite: no limit."""

    requests_s: float = math.inf
    bytes_s: float = math.inf


@dataclass(frozen=True, slots=True)
class Capabilities:
    """Limits of an index backend. Vendors change theirs, so adapters take them from settings.

    `upserts` and `deletes` are what one namespace takes, `full_text` is whether it ranks by words, too
    (`TextIndex`).
    """

    max_items: int
    max_bytes: int
    max_dim: int
    max_top_k: int
    consistency: Literal["strong", "token", "eventual"]
    single_writer: bool
    upserts: Rates = Rates()
    deletes: Rates = Rates()
    full_text: bool = False
