"""The Store's ports of webhooks over its actor."""

from collections.abc import Sequence
from typing import cast

from deployments.store_calls import StoreCalls
from serve.job_ports import Deliveries, Webhooks
from serve.webhooks import Delivery, DeliveryState, Due, Share, Tried, Webhook


class WebhookPort(StoreCalls, Webhooks, Deliveries):
    """Implements them by the actor's one method `call`. Each call also raises StoreUnavailable."""

    async def create_webhook(self, op: str, webhook: Webhook, most: int) -> Webhook:
        """See Webhooks."""
        return cast("Webhook", await self._call("create_webhook", op, webhook, most))

    async def find_webhook(self, tenant: str, webhook: str) -> Webhook | None:
        """See Webhooks."""
        return cast("Webhook | None", await self._call("find_webhook", tenant, webhook))

    async def list_webhooks(self, tenant: str) -> Sequence[Webhook]:
        """See Webhooks."""
        return cast("Sequence[Webhook]", await self._call("list_webhooks", tenant))

    async def rotate_webhook(
        self, op: str, tenant: str, webhook: str, secret: str, overlap_s: float
    ) -> Webhook:
        """See Webhooks."""
        kept = await self._call("rotate_webhook", op, tenant, webhook, secret, overlap_s)
        return cast("Webhook", kept)

    async def enable_webhook(self, tenant: str, webhook: str) -> Webhook:
        """See Webhooks."""
        return cast("Webhook", await self._call("enable_webhook", tenant, webhook))

    async def delete_webhook(self, op: str, tenant: str, webhook: str) -> bool:
        """See Webhooks."""
        return cast("bool", await self._call("delete_webhook", op, tenant, webhook))

    async def list_deliveries(
        self, tenant: str, webhook: str, states: Sequence[DeliveryState], after: str, limit: int
    ) -> Sequence[Delivery]:
        """See Deliveries."""
        found = await self._call("list_deliveries", tenant, webhook, states, after, limit)
        return cast("Sequence[Delivery]", found)

    async def redeliver(self, op: str, tenant: str, webhook: str, delivery: str) -> Delivery:
        """See Deliveries."""
        return cast("Delivery", await self._call("redeliver", op, tenant, webhook, delivery))

    async def send_test(self, op: str, tenant: str, webhook: str) -> Delivery:
        """See Deliveries."""
        return cast("Delivery", await self._call("send_test", op, tenant, webhook))

    async def claim_deliveries(self, share: Share, wait_s: float) -> Sequence[Due]:
        """See Deliveries."""
        found = await self._call("claim_deliveries", share, wait_s, wait_s=wait_s)
        return cast("Sequence[Due]", found)

    async def settle_delivery(self, tried: Tried) -> bool:
        """See Deliveries."""
        return cast("bool", await self._call("settle_delivery", tried))
