"""What an error means for the item that met it. Pure but for the chance that spreads retries."""

import random
from dataclasses import dataclass

from serve.errors import (
    BadInput,
    Conflict,
    Forbidden,
    NotFound,
    Overloaded,
    PoisonInput,
    QuotaExceeded,
    ServiceError,
    TooLarge,
)
from serve.items import ErrorKind, Fault, Item, Settlement


TEXT_MAX = 500
"""Characters of an error that are kept with an item."""

LATER_S = 5.0
"""After this an item is tried again when there was no room for it, and nobody said for how long."""

HOPELESS_S = 900.0
"""After about this, when its tenant was refused and waiting is pointless: a month's limit is used up, or
an operator has something to mend.
"""


@dataclass(frozen=True, slots=True)
class Retries:
    """Pauses between the tries of an item: `first_s`, each further one `factor` times longer."""

    first_s: float
    factor: float
    most_s: float
    rng: random.Random

    def after(self, failed: int) -> float:
        """Seconds after the try number `failed` (from 1), 20 % more or less by chance."""
        return self.about(min(self.first_s * self.factor ** (failed - 1), self.most_s))

    def about(self, plain_s: float) -> float:
        """So many seconds, 20 % more or less by chance."""
        return plain_s * self.rng.uniform(0.8, 1.2)


def fault_of(error: Exception) -> Fault:
    """The kind of an error, with what the tenant may read of it."""
    if not isinstance(error, ServiceError):
        return Fault("server", "internal_error", "A fault of ours; it is in the log.")
    return Fault(_kind(error), error.code, error.message[:TEXT_MAX])


def settled(item: Item, error: Exception, retries: Retries) -> Settlement:
    """An item whose try ended with an error.

    What refuses for lack of room or quota burns no attempt: the item was not tried.
    """
    fault = fault_of(error)
    if fault.kind in ("invalid", "poison"):
        return Settlement(item.id, item.lease, "dead", fault=fault)
    wait_s = error.retry_after_s if isinstance(error, ServiceError) else None
    if fault.kind == "rate_limit":
        later_s = LATER_S if isinstance(error, Overloaded) else retries.about(HOPELESS_S)
        return Settlement(item.id, item.lease, "release", fault=fault, delay_s=wait_s or later_s)
    delay_s = max(retries.after(item.attempts + 1), wait_s or 0.0)
    return Settlement(item.id, item.lease, "retry", fault=fault, delay_s=delay_s)


def _kind(error: ServiceError) -> ErrorKind:
    if isinstance(error, PoisonInput):
        return "poison"
    if isinstance(error, QuotaExceeded | Overloaded):
        return "rate_limit"
    if isinstance(error, BadInput | NotFound | Forbidden | Conflict | TooLarge):
        return "invalid"
    return "network" if error.retryable else "server"
