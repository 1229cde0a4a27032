"""Webhooks: a tenant's URLs that are told of the ends of its jobs.

`WebhookFlow` is what the routes do with them, `Sender` what a worker does for them. The Store makes
a delivery in the transaction that ends a job; from there on it is sent at least once, and always
with the same id, until its receiver has it or its time is over.
"""

import asyncio
import contextlib
import logging
import random
from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from typing import Protocol

from serve.admission.quotas import Permit
from serve.config import Settings
from serve.egress import REASON_CHARS_MAX, Answer, EgressClient, Refused, Unreachable, check
from serve.errors import BadInput, NotFound, ServiceError
from serve.flows.context import Context, new_op
from serve.items import new_id
from serve.job_ports import Deliveries, Webhooks
from serve.jobs.vault import Vault
from serve.jobs.webhooks import Outcome, new_secret, signed_headers, verdict
from serve.records import Caller
from serve.webhooks import Delivery, DeliveryState, Disabled, Due, Share, Tried, Webhook


PREFIX = "wh"

OVERLAP_S_MAX = 30 * 86_400
"""As the bound of `webhooks.overlap_s`: a rotation that never ends is none."""

CLAIM_WAIT_S = 2.0
"""How long a claim waits in the Store: an idle sender asks so often, and one that leaves waits so long
for the last claim, lest it were leased to nobody."""

LEASE_MARGIN_S = 30.0
"""By which a lease outlasts the longest exchange: so long the Store may be away before a delivery that
got through is sent again."""

AWAY_S = 0.5
"""Between two tries while the Store is away."""

GONE = 410

FAULT = "The sender failed; the operator's log says why."

log = logging.getLogger("headrace.webhooks")


class WebhookStore(Webhooks, Deliveries, Protocol):
    """What the routes need of the Store."""


@dataclass(frozen=True, slots=True)
class MadeWebhook:
    """A webhook with its secret, which nobody can show again."""

    webhook: Webhook
    secret: str = field(repr=False)


class WebhookFlow:
    """Webhooks of the caller's tenant. What changes or sends something counts as a request."""

    def __init__(self, context: Context, store: WebhookStore, vault: Vault) -> None:
        """`vault` seals as that of the workers opens."""
        self._settings = context.settings
        self._quotas = context.quotas
        self._wall = context.wall
        self._store = store
        self._vault = vault

    async def create(self, caller: Caller, url: str) -> MadeWebhook:
        """Make a webhook. Raises BadInput (the URL), QuotaExceeded, StoreUnavailable."""
        try:
            check(url, self._settings.egress)
        except Refused as error:
            raise BadInput(str(error), param="url", code="url_refused") from None
        async with self._charged(caller):
            now, secret = self._wall(), new_secret()
            webhook = Webhook(
                new_id(PREFIX, now), caller.tenant, url, self._vault.seal(secret), now
            )
            most = self._settings.webhooks.tenant_webhooks_max
            return MadeWebhook(await self._store.create_webhook(new_op(), webhook, most), secret)

    async def list(self, caller: Caller) -> Sequence[Webhook]:
        """The tenant's webhooks, oldest first."""
        return await self._store.list_webhooks(caller.tenant)

    async def find(self, caller: Caller, webhook: str) -> Webhook:
        """One webhook. Raises NotFound."""
        found = await self._store.find_webhook(caller.tenant, webhook)
        if found is None:
            raise _unknown(webhook)
        return found

    async def rotate(
        self, caller: Caller, webhook: str, overlap_s: float | None = None
    ) -> MadeWebhook:
        """Make a new secret; the old one signs beside it for `overlap_s` (a setting if None).

        Raises BadInput, NotFound.
        """
        if overlap_s is None:
            overlap_s = self._settings.webhooks.overlap_s
        if not 0 <= overlap_s <= OVERLAP_S_MAX:
            raise BadInput(f"An overlap is 0 to {OVERLAP_S_MAX} seconds.", param="overlap_s")
        secret = new_secret()
        sealed = self._vault.seal(secret)
        async with self._charged(caller):
            kept = await self._store.rotate_webhook(
                new_op(), caller.tenant, webhook, sealed, overlap_s
            )
        return MadeWebhook(kept, secret)

    async def enable(self, caller: Caller, webhook: str) -> Webhook:
        """Make a webhook active again. Raises NotFound."""
        async with self._charged(caller):
            return await self._store.enable_webhook(caller.tenant, webhook)

    async def delete(self, caller: Caller, webhook: str) -> None:
        """Remove a webhook; what waits for it is given up. Raises NotFound."""
        if not await self._store.delete_webhook(new_op(), caller.tenant, webhook):
            raise _unknown(webhook)

    async def deliveries(
        self,
        caller: Caller,
        webhook: str,
        *,
        states: Sequence[DeliveryState],
        after: str,
        limit: int,
    ) -> Sequence[Delivery]:
        """Up to `limit` of a webhook's deliveries, newest first, before `after`. Raises NotFound."""
        return await self._store.list_deliveries(caller.tenant, webhook, states, after, limit)

    async def redeliver(self, caller: Caller, webhook: str, delivery: str) -> Delivery:
        """Send a delivery again. Raises NotFound, Conflict."""
        async with self._charged(caller):
            return await self._store.redeliver(new_op(), caller.tenant, webhook, delivery)

    async def test(self, caller: Caller, webhook: str) -> Delivery:
        """Send a delivery that says only that it is a test. Raises NotFound, Conflict."""
        async with self._charged(caller):
            return await self._store.send_test(new_op(), caller.tenant, webhook)

    def _charged(self, caller: Caller) -> AbstractAsyncContextManager[Permit]:
        return self._quotas.admitted(caller, "interactive", tokens=0)


class Sender:
    """Sends what is due: one per worker process."""

    def __init__(
        self,
        store: Deliveries,
        client: EgressClient,
        vault: Vault,
        settings: Settings,
        *,
        wall: Callable[[], float],
        rng: random.Random,
    ) -> None:
        """`wall` gives epoch seconds, which stand in what is sent; `rng` is for the jitter."""
        self._store = store
        self._client = client
        self._vault = vault
        self._rules = settings.webhooks
        self._lease_s = settings.egress.timeout_s + LEASE_MARGIN_S
        self._wall = wall
        self._rng = rng
        self._sending: set[asyncio.Task[None]] = set()
        self._leaving = False
        self._ended = asyncio.Event()

    async def run(self) -> None:
        """Send until `drain`, or until cancelled. Raises only on a fault of this code."""
        try:
            async with asyncio.TaskGroup() as tasks:
                while not self._leaving:
                    for due in await self._claim():
                        task = tasks.create_task(self._deliver(due))
                        self._sending.add(task)
                        task.add_done_callback(self._sending.discard)
                    if len(self._sending) >= self._rules.sends_max:
                        await asyncio.wait(self._sending, return_when=asyncio.FIRST_COMPLETED)
        finally:
            self._ended.set()

    async def drain(self, wait_s: float) -> None:
        """Claim no more, and finish within `wait_s` what is being sent."""
        self._leaving = True
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._ended.wait(), wait_s)

    async def _claim(self) -> Sequence[Due]:
        room = self._rules.sends_max - len(self._sending)
        share = Share(room, self._rules.tenant_sends_max, self._lease_s)
        try:
            return await self._store.claim_deliveries(share, CLAIM_WAIT_S)
        except ServiceError as error:
            log.warning("cannot claim deliveries: %s", error)
            await asyncio.sleep(AWAY_S)
            return ()

    async def _deliver(self, due: Due) -> None:
        """Send it once, and keep what became of it. A rim: one delivery's fault must not sink the
        others, and one that is not settled would be back to sink the next worker.
        """
        try:
            try:
                tried = await self._try(due)
            except Exception:
                log.exception("delivery %s could not be sent", due.delivery.id)
                tried = self._judged(due, "unreachable", FAULT)
            await self._settle(tried)
        except Exception:
            log.exception("delivery %s could not be settled", due.delivery.id)

    async def _settle(self, tried: Tried) -> None:
        """Until the Store has it, or the lease would be over anyway."""
        loop = asyncio.get_running_loop()
        until = loop.time() + LEASE_MARGIN_S
        while True:
            try:
                await self._store.settle_delivery(tried)
            except ServiceError as error:
                if loop.time() > until:
                    log.warning("cannot settle delivery %s: %s", tried.delivery, error)
                    return
                await asyncio.sleep(AWAY_S)
            else:
                return

    async def _try(self, due: Due) -> Tried:
        """Send it once; see what follows."""
        try:
            answer = await self._post(due)
        except Refused as refusal:
            return self._judged(due, "refused", str(refusal))
        except Unreachable as failure:
            return self._judged(due, "unreachable", str(failure))
        error = "" if answer.status in range(200, 300) else _beginning(answer.body)
        return self._judged(due, answer.status, error, answer.headers.get("retry-after"))

    async def _post(self, due: Due) -> Answer:
        now = self._wall()
        live = [self._vault.open(sealed) for sealed in due.webhook.live(now)]
        body = due.delivery.payload.encode()
        headers = signed_headers(live, due.delivery.id, now, body)
        return await self._client.post(due.webhook.url, content=body, headers=headers)

    def _judged(
        self, due: Due, outcome: Outcome, error: str, retry_after: str | None = None
    ) -> Tried:
        now = self._wall()
        found = verdict(
            outcome,
            attempt=due.delivery.attempts + 1,
            failing_since=due.webhook.failing_since,
            now=now,
            rng=self._rng,
            retry_after=retry_after,
        )
        disabled: Disabled = ""
        if found.word == "disabled":
            disabled = "gone" if outcome == GONE else "failing"
        return Tried(
            due.delivery.id,
            due.delivery.lease,
            found.word,
            # The Store's clock may be another: what travels are durations.
            delay_s=0.0 if found.run_at is None else found.run_at - now,
            hold_s=0.0 if found.hold_until is None else found.hold_until - now,
            disabled=disabled,
            status=outcome if isinstance(outcome, int) else None,
            error=error,
        )


def _beginning(body: bytes) -> str:
    """What a receiver said, as text that can be kept and shown."""
    text = body[: 4 * REASON_CHARS_MAX].decode("utf-8", "replace")
    return "".join(each if each.isprintable() else " " for each in text)[:REASON_CHARS_MAX].strip()


def _unknown(webhook: str) -> NotFound:
    return NotFound(f"You have no webhook {webhook[:128]!r}.", code="webhook_not_found")
