"""The ports of webhooks over one `Committer`. The sender waits here, and is woken when a job ends."""

from collections.abc import Sequence
from dataclasses import asdict

from serve.job_ports import Deliveries, Webhooks
from serve.jobs import deliveries, webhook_rows
from serve.jobs.deliveries import DELIVERIES
from serve.jobs.job_owner import JobOwner
from serve.jobs.operations import WHETHER, Codec
from serve.webhooks import Delivery, DeliveryState, Due, Share, Tried, Webhook


WEBHOOK: Codec[Webhook] = Codec(asdict, lambda value: Webhook(**value))
DELIVERY: Codec[Delivery] = Codec(asdict, lambda value: Delivery(**value))


class WebhookOwner(JobOwner, Webhooks, Deliveries):
    """Implements them for one process; a call is acknowledged after its commit."""

    async def create_webhook(self, op: str, webhook: Webhook, most: int) -> Webhook:
        """See Webhooks."""
        return await self._once(
            op,
            "create_webhook",
            WEBHOOK,
            lambda conn, _now: webhook_rows.create(conn, webhook, most),
        )

    async def find_webhook(self, tenant: str, webhook: str) -> Webhook | None:
        """See Webhooks."""
        return await self._do(lambda conn, _now: webhook_rows.find(conn, tenant, webhook))

    async def list_webhooks(self, tenant: str) -> Sequence[Webhook]:
        """See Webhooks."""
        return await self._do(lambda conn, _now: webhook_rows.listed(conn, tenant))

    async def rotate_webhook(
        self, op: str, tenant: str, webhook: str, secret: str, overlap_s: float
    ) -> Webhook:
        """See Webhooks."""
        return await self._once(
            op,
            "rotate_webhook",
            WEBHOOK,
            lambda conn, now: webhook_rows.rotate(
                conn, tenant, webhook, secret=secret, overlap_s=overlap_s, now=now
            ),
        )

    async def enable_webhook(self, tenant: str, webhook: str) -> Webhook:
        """See Webhooks."""
        return await self._do(lambda conn, _now: webhook_rows.enable(conn, tenant, webhook))

    async def delete_webhook(self, op: str, tenant: str, webhook: str) -> bool:
        """See Webhooks."""
        return await self._once(
            op,
            "delete_webhook",
            WHETHER,
            lambda conn, _now: webhook_rows.delete(conn, tenant, webhook),
        )

    async def list_deliveries(
        self,
        tenant: str,
        webhook: str,
        states: Sequence[DeliveryState],
        after: str,
        limit: int,
    ) -> Sequence[Delivery]:
        """See Deliveries."""
        return await self._do(
            lambda conn, _now: deliveries.listed(
                conn, tenant, webhook, states=states, after=after, limit=limit
            )
        )

    async def redeliver(self, op: str, tenant: str, webhook: str, delivery: str) -> Delivery:
        """See Deliveries."""
        return await self._once(
            op,
            "redeliver",
            DELIVERY,
            lambda conn, now: deliveries.redeliver(conn, tenant, webhook, delivery, now),
        )

    async def send_test(self, op: str, tenant: str, webhook: str) -> Delivery:
        """See Deliveries."""
        return await self._once(
            op,
            "send_test",
            DELIVERY,
            lambda conn, now: deliveries.test(conn, tenant, webhook, now),
        )

    async def claim_deliveries(self, share: Share, wait_s: float) -> Sequence[Due]:
        """See Deliveries."""
        return await self._wait(
            DELIVERIES,
            lambda: self._do(lambda conn, now: deliveries.claim(conn, share, now)),
            lambda due: due,
            wait_s,
        )

    async def settle_delivery(self, tried: Tried) -> bool:
        """See Deliveries."""
        return await self._do(lambda conn, now: deliveries.settle(conn, tried, now))
