"""Webhooks and their deliveries as they travel between the Store, the ingress and the sender.

Like `records`, these import nothing of the package and are never changed.
"""

from dataclasses import dataclass
from typing import Literal


Disabled = Literal["", "gone", "failing"]
"""Why a webhook is no longer called. gone: its receiver answered 410. failing: for days on end."""

DeliveryState = Literal["waiting", "leased", "delivered", "given_up"]
"""waiting: until `run_at`. leased: being sent. The last two are ends; a redelivery begins anew."""


@dataclass(frozen=True, slots=True)
class Webhook:
    """A URL of a tenant that is told of its jobs' ends.

    Attributes:
        secret: sealed, see `serve.jobs.vault`; signs. `previous` does so too until `previous_until`.
        active: False: it gets nothing until it is enabled again.
        failing_since: when it began to fail; None: its last try got through.
        hold_until: its receiver asked to be left alone until then.
    """

    id: str
    tenant: str
    url: str
    secret: str
    created_at: float
    previous: str = ""
    previous_until: float | None = None
    active: bool = True
    disabled_reason: Disabled = ""
    failing_since: float | None = None
    hold_until: float | None = None

    def live(self, now: float) -> tuple[str, ...]:
        """The sealed secrets that sign now, the newer one first."""
        if self.previous_until is not None and now < self.previous_until:
            return self.secret, self.previous
        return (self.secret,)


@dataclass(frozen=True, slots=True)
class Delivery:
    """One message to a webhook, with what became of its last try.

    Attributes:
        id: what its receiver knows a repeat by: the same in every try.
        job: empty for a test.
        payload: the body; what is signed is these very bytes in UTF-8.
        attempts: tries that were settled; a crash of the sender is none.
        run_at: of the next try, or until when the lease holds; None at the end.
        lease: the fencing token: a settlement with an older one does nothing.
        last_status: of the last answer; None when there was none.
    """

    id: str
    webhook: str
    tenant: str
    job: str
    type: str
    payload: str
    created_at: float
    updated_at: float
    run_at: float | None
    state: DeliveryState = "waiting"
    attempts: int = 0
    lease: int = 0
    last_status: int | None = None
    last_error: str = ""


@dataclass(frozen=True, slots=True)
class Due:
    """A leased delivery, and where it goes."""

    delivery: Delivery
    webhook: Webhook


@dataclass(frozen=True, slots=True)
class Share:
    """What one claim of deliveries takes at most, and for how long.

    Attributes:
        most: deliveries.
        tenant_most: deliveries of one tenant that are leased at once, those of other senders
            included.
        lease_s: after which one that was not settled is tried again.
    """

    most: int
    tenant_most: int
    lease_s: float


@dataclass(frozen=True, slots=True)
class Tried:
    """What became of a try of a leased delivery.

    Attributes:
        word: as in `serve.jobs.webhooks.Verdict`.
        delay_s: until the next try, of `retry`.
        hold_s: for how long the webhook's other deliveries wait; 0: they need not.
        disabled: why, of `disabled`.
        error: may be read by the tenant.
    """

    delivery: str
    lease: int
    word: Literal["delivered", "retry", "given_up", "disabled"]
    delay_s: float = 0.0
    hold_s: float = 0.0
    disabled: Disabled = ""
    status: int | None = None
    error: str = ""
