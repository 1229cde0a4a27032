"""Replies about webhooks: as OpenAPI shows them, and how they are written."""

from typing import Any, Literal

from serve.api.shapes import Shape
from serve.webhooks import Delivery, DeliveryState, Webhook


class WebhookShown(Shape):
    """A webhook. Times are seconds since 1970.

    `failing_since` is null while its last try got through; `hold_until` is until when its receiver
    asked to be left alone. A rotated secret still signs until `previous_secret_until`.
    """

    object: Literal["webhook"]
    id: str
    url: str
    active: bool
    disabled_reason: Literal["gone", "failing"] | None
    failing_since: float | None
    hold_until: float | None
    previous_secret_until: float | None
    created_at: float


class WebhookMade(WebhookShown):
    """A webhook with its new secret, which is shown this once."""

    secret: str


class WebhookList(Shape):
    """The caller's webhooks, oldest first."""

    object: Literal["list"]
    data: list[WebhookShown]


class WebhookDeleted(Shape):
    """A webhook that is gone."""

    object: Literal["webhook"]
    id: str
    deleted: Literal[True]


class DeliveryShown(Shape):
    """One message to a webhook; `id` is its `webhook-id`, `job` null for a test.

    `run_at` is when it is tried next, `last_status` null where no answer came.
    """

    object: Literal["webhook.delivery"]
    id: str
    webhook: str
    job: str | None
    type: str
    state: DeliveryState
    attempts: int
    created_at: float
    updated_at: float
    run_at: float | None
    last_status: int | None
    last_error: str | None


class DeliveryList(Shape):
    """A webhook's deliveries, newest first; the next page begins after the last one's id."""

    object: Literal["list"]
    data: list[DeliveryShown]
    has_more: bool


def webhook_shown(webhook: Webhook) -> dict[str, Any]:
    """A webhook as `WebhookShown`."""
    return {
        "object": "webhook",
        "id": webhook.id,
        "url": webhook.url,
        "active": webhook.active,
        "disabled_reason": webhook.disabled_reason or None,
        "failing_since": webhook.failing_since,
        "hold_until": webhook.hold_until,
        "previous_secret_until": webhook.previous_until,
        "created_at": webhook.created_at,
    }


def delivery_shown(delivery: Delivery) -> dict[str, Any]:
    """A delivery as `DeliveryShown`."""
    return {
        "object": "webhook.delivery",
        "id": delivery.id,
        "webhook": delivery.webhook,
        "job": delivery.job or None,
        "type": delivery.type,
        "state": delivery.state,
        "attempts": delivery.attempts,
        "created_at": delivery.created_at,
        "updated_at": delivery.updated_at,
        "run_at": delivery.run_at,
        "last_status": delivery.last_status,
        "last_error": delivery.last_error or None,
    }
