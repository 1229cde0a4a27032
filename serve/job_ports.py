"""Seams of the Store that are about work: jobs, their items, events and files, and webhooks.

They are ports like those of `serve.ports`, implemented by the Store and by `deployments`.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from serve.items import (
    Accepted,
    Change,
    Claim,
    Effort,
    Erased,
    Event,
    FileRoom,
    ItemState,
    ItemView,
    Job,
    JobState,
    JobView,
    Kind,
    NewItem,
    Once,
    Order,
    Replay,
    Settlement,
    Stage,
    Stats,
    StoredFile,
)
from serve.telemetry import Census
from serve.webhooks import Delivery, DeliveryState, Due, Share, Tried, Webhook


class Handover(Protocol):
    """How jobs come into the Store, each once."""

    async def submit_job(
        self, op: str, job: Job, items: Sequence[NewItem], once: Once | None = None
    ) -> Accepted:
        """Keep a job and its items, and grant a generation to each document write, all or nothing.

        Documents whose content has landed already are `skipped` at once. Raises NotFound (the
        collection or the webhook is gone), QuotaExceeded (open jobs, items or tokens of the tenant),
        Mismatch (the idempotency key was used for something else).
        """
        ...

    async def first_job(self, tenant: str, once: Once) -> Job | None:
        """The job that this idempotency key has made, if any; to be asked before anything else.

        What the job was made from may be gone since. Raises Mismatch (it was for something else).
        """
        ...


class Jobs(Handover, Protocol):
    """Jobs in the Store, as their tenant sees them; every call is scoped to one tenant."""

    async def find_job(self, tenant: str, job: str) -> JobView | None:
        """One job with its counts by stage."""
        ...

    async def list_jobs(
        self, tenant: str, kind: Kind | None, states: Sequence[JobState], after: str, limit: int
    ) -> Sequence[Job]:
        """Jobs, newest first, those that are older than the job `after`; no states: all."""
        ...

    async def list_items(
        self, tenant: str, job: str, states: Sequence[ItemState], after: int, limit: int
    ) -> Sequence[ItemView]:
        """A job's items by number, those above `after` (-1: all); no states: all."""
        ...

    async def change_job(self, op: str, tenant: str, job: str, change: Change) -> Job:
        """Cancel (what waits ends now, what is worked on when it settles), pause or resume.

        Raises NotFound, Conflict (it has ended).
        """
        ...

    async def retry_items(self, op: str, tenant: str, job: str, replay: Replay) -> int:
        """Make dead items ready again, attempts forgotten; returns how many.

        A document write gets no new generation: what was accepted since stays. Raises NotFound,
        Conflict (the job was cancelled or has expired).
        """
        ...


class Queue(Protocol):
    """Items in the Store, as a worker sees them."""

    async def claim(
        self, owner: str, stage: Stage, items_max: int, cost_max: float, wait_s: float
    ) -> Claim:
        """Lease up to `items_max` ready items of up to `cost_max` (one at least), in fair order.

        Waits up to `wait_s` for the first. An owner's leases hold while it calls `keep`.
        """
        ...

    async def keep(self, owner: str, held: Sequence[int]) -> frozenset[int]:
        """The owner lives and works on `held`. Returns those that it should drop.

        What it has leased but does not hold, because a reply was lost, goes back.
        """
        ...

    async def settle(self, settlements: Sequence[Settlement]) -> Sequence[bool]:
        """Note what became of items; False where somebody else owns the item by now.

        A repeat of a settlement that was applied is False too and changes nothing.
        """
        ...

    async def add_items(self, item: int, lease: int, start: int, items: Sequence[NewItem]) -> bool:
        """More items for the job of an `expand` item, numbered from `start`; repeats change nothing.

        False when the lease is over. Raises QuotaExceeded (open items or tokens of the tenant).
        """
        ...

    async def leave(self, owner: str) -> None:
        """The owner ends: what it still has goes back at once, and is no crash."""
        ...


class Events(Protocol):
    """What happens to jobs."""

    async def events(self, after: int, limit: int, wait_s: float) -> Sequence[Event]:
        """Events of all tenants above number `after`, waiting up to `wait_s` for the first.

        After -1: none yet, only the last number: an event without a job.
        """
        ...

    async def job_events(self, tenant: str, job: str, after: int, limit: int) -> Sequence[Event]:
        """A job's events above number `after`; after -1 its last one."""
        ...

    async def job_stats(self, tenant: str) -> Stats:
        """The tenant's items by how far they are."""
        ...

    async def list_efforts(self, tenant: str, days: int) -> Sequence[Effort]:
        """What tries of the tenant's items came to, today and in the days before, `days` in all."""
        ...

    async def census(self) -> Census:
        """How many jobs and items of all tenants there are, for figures."""
        ...


class Files(Protocol):
    """Files of tenants in the Store. Their bytes are blobs, which the caller writes and removes."""

    async def create_file(
        self, op: str, file: StoredFile, room: FileRoom | None = None
    ) -> StoredFile:
        """Keep a file whose bytes are there; one of the same id is replaced.

        Raises QuotaExceeded when the tenant has no room for it.
        """
        ...

    async def find_file(self, tenant: str, file: str) -> StoredFile | None:
        """The tenant's file of that id, unless its time is over."""
        ...

    async def list_files(
        self, tenant: str, purpose: str | None, order: Order, after: str, limit: int
    ) -> Sequence[StoredFile]:
        """The tenant's files by age, those behind the id `after`, whether or not it is there still."""
        ...

    async def delete_file(self, op: str, tenant: str, file: str) -> bool:
        """Forget a file; whether there was one. Its bytes are the caller's to remove."""
        ...

    async def expired_files(self, limit: int) -> Sequence[StoredFile]:
        """Files of all tenants whose time is over, with their bytes still to remove."""
        ...

    async def jobs_over(self, jobs: Sequence[str]) -> Mapping[str, bool]:
        """Which of these jobs, of whatever tenant, there are, and whether their own blobs may go.

        True: the job has ended, and nothing of it can be tried again from them.
        """
        ...


class Webhooks(Protocol):
    """Webhooks of tenants in the Store. Their secrets arrive sealed, and leave so."""

    async def create_webhook(self, op: str, webhook: Webhook, most: int) -> Webhook:
        """Keep a webhook. Raises QuotaExceeded when its tenant has `most`."""
        ...

    async def find_webhook(self, tenant: str, webhook: str) -> Webhook | None:
        """The tenant's webhook of that id."""
        ...

    async def list_webhooks(self, tenant: str) -> Sequence[Webhook]:
        """The tenant's webhooks, oldest first."""
        ...

    async def rotate_webhook(
        self, op: str, tenant: str, webhook: str, secret: str, overlap_s: float
    ) -> Webhook:
        """Sign with a new secret, and with the one before too for `overlap_s`. Raises NotFound."""
        ...

    async def enable_webhook(self, tenant: str, webhook: str) -> Webhook:
        """Make it active again, as if it had never failed. Raises NotFound."""
        ...

    async def delete_webhook(self, op: str, tenant: str, webhook: str) -> bool:
        """Forget a webhook; whether there was one. What waits for it is given up soon after."""
        ...


class Deliveries(Protocol):
    """Messages to webhooks in the Store, which makes one when a job that names a webhook ends."""

    async def list_deliveries(
        self, tenant: str, webhook: str, states: Sequence[DeliveryState], after: str, limit: int
    ) -> Sequence[Delivery]:
        """A webhook's, newest first, those before `after`; no states: all. Raises NotFound."""
        ...

    async def redeliver(self, op: str, tenant: str, webhook: str, delivery: str) -> Delivery:
        """Send one again, or now if it waits; its tries count anew.

        Raises NotFound, Conflict (the webhook is disabled, or it is being sent).
        """
        ...

    async def send_test(self, op: str, tenant: str, webhook: str) -> Delivery:
        """A delivery that says only that it is a test. Raises NotFound, Conflict (disabled)."""
        ...

    async def claim_deliveries(self, share: Share, wait_s: float) -> Sequence[Due]:
        """Lease what is due, fairly between tenants; waits up to `wait_s` for the first.

        What is not settled while its lease holds is due again.
        """
        ...

    async def settle_delivery(self, tried: Tried) -> bool:
        """Note what became of a try; False when the lease is over or it was settled before."""
        ...


class Erasure(Protocol):
    """Removing what is kept of a tenant, some of it with each call; repeats find what is left.

    Collections, keys and files have calls of their own, in their ports.
    """

    async def erase_jobs(self, tenant: str, jobs: Sequence[str]) -> Erased:
        """Stop these jobs of the tenant, then forget them with all that is theirs, blobs excepted."""
        ...

    async def erase_rest(self, tenant: str) -> Erased:
        """Forget webhooks and deliveries, idempotency keys, and what tries of items came to."""
        ...

    async def note_erasure(self, op: str, tenant: str, by: str, detail: Mapping[str, Any]) -> None:
        """Write to the audit log what is to be removed, or was."""
        ...
