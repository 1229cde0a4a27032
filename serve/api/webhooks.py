"""`/v1/webhooks`: who is told of the ends of the tenant's jobs, and whether they heard it.

A secret is in the reply that makes it and nowhere else, hence no `Idempotency-Key` here.
"""

from typing import Annotated, get_args

from fastapi import APIRouter, Response
from pydantic import Field

from serve.api.service import Asked
from serve.api.webhook_shapes import (
    DeliveryList,
    DeliveryShown,
    WebhookDeleted,
    WebhookList,
    WebhookMade,
    WebhookShown,
    delivery_shown,
    webhook_shown,
)
from serve.api.wire import Body, documented, page_size, query, read, reply, words
from serve.egress import URL_CHARS_MAX
from serve.flows.webhooks import OVERLAP_S_MAX, MadeWebhook
from serve.webhooks import DeliveryState


router = APIRouter()
"""What is charged, at class `interactive`: what changes something, or sends."""

free = APIRouter()
"""What is not."""

DELIVERIES, DELIVERIES_MAX = 20, 100
"""In a page: unless asked for, and at most."""


class WebhookBody(Body):
    """A URL that is told of the end of each job that names its webhook; https, and public."""

    url: Annotated[str, Field(min_length=1, max_length=URL_CHARS_MAX)]


class WebhookRotateBody(Body):
    """How many seconds the old secret signs beside the new one; `webhooks.overlap_s` unless given."""

    overlap_s: Annotated[float, Field(ge=0, le=OVERLAP_S_MAX)] | None = None


@router.post(
    "/v1/webhooks",
    status_code=201,
    openapi_extra=documented(WebhookBody),
    responses={201: {"model": WebhookMade}},
)
async def create_webhook(ask: Asked) -> Response:
    """Make a webhook; the reply shows its secret, which nobody can show again."""
    body = await read(ask.request, WebhookBody)
    return _made(await ask.service.webhooks.create(ask.who, body.url))


@free.get("/v1/webhooks", responses={200: {"model": WebhookList}})
async def list_webhooks(ask: Asked) -> Response:
    """The tenant's webhooks, oldest first."""
    mine = await ask.service.webhooks.list(ask.who)
    return reply({"object": "list", "data": [webhook_shown(one) for one in mine]})


@free.get("/v1/webhooks/{webhook_id}", responses={200: {"model": WebhookShown}})
async def find_webhook(webhook_id: str, ask: Asked) -> Response:
    """One webhook."""
    return reply(webhook_shown(await ask.service.webhooks.find(ask.who, webhook_id)))


@free.delete("/v1/webhooks/{webhook_id}", responses={200: {"model": WebhookDeleted}})
async def delete_webhook(webhook_id: str, ask: Asked) -> Response:
    """Remove a webhook; what waits for it is given up."""
    await ask.service.webhooks.delete(ask.who, webhook_id)
    return reply({"object": "webhook", "id": webhook_id, "deleted": True})


@router.post(
    "/v1/webhooks/{webhook_id}/rotate",
    status_code=201,
    openapi_extra=documented(WebhookRotateBody),
    responses={201: {"model": WebhookMade}},
)
async def rotate_webhook(webhook_id: str, ask: Asked) -> Response:
    """Make a new secret; both sign until the old one's time is over."""
    body = await read(ask.request, WebhookRotateBody)
    return _made(await ask.service.webhooks.rotate(ask.who, webhook_id, body.overlap_s))


@router.post("/v1/webhooks/{webhook_id}/enable", responses={200: {"model": WebhookShown}})
async def enable_webhook(webhook_id: str, ask: Asked) -> Response:
    """Make a webhook active again that was disabled; what was given up stays so."""
    return reply(webhook_shown(await ask.service.webhooks.enable(ask.who, webhook_id)))


@router.post(
    "/v1/webhooks/{webhook_id}/test",
    status_code=202,
    responses={202: {"model": DeliveryShown}},
)
async def test_webhook(webhook_id: str, ask: Asked) -> Response:
    """Send an event of the type `webhook.test`."""
    return reply(delivery_shown(await ask.service.webhooks.test(ask.who, webhook_id)), 202)


@free.get(
    "/v1/webhooks/{webhook_id}/deliveries",
    openapi_extra={
        "parameters": [
            query("state", "Only those in this state; may be given several times."),
            query("after", "The id of the last delivery of the page before."),
            query("limit", "Deliveries in a page.", minimum=1, maximum=DELIVERIES_MAX),
        ]
    },
    responses={200: {"model": DeliveryList}},
)
async def list_deliveries(webhook_id: str, ask: Asked) -> Response:
    """What was sent to a webhook or will be, newest first."""
    limit = page_size(ask.request, DELIVERIES, DELIVERIES_MAX)
    found = await ask.service.webhooks.deliveries(
        ask.who,
        webhook_id,
        states=words(ask.request, "state", get_args(DeliveryState)),
        after=ask.request.query_params.get("after", ""),
        limit=limit + 1,
    )
    shown = [delivery_shown(one) for one in found[:limit]]
    return reply({"object": "list", "data": shown, "has_more": len(found) > limit})


@router.post(
    "/v1/webhooks/{webhook_id}/deliveries/{delivery_id}/redeliver",
    status_code=202,
    responses={202: {"model": DeliveryShown}},
)
async def redeliver(webhook_id: str, delivery_id: str, ask: Asked) -> Response:
    """Send a delivery again, under its own id; its tries count anew."""
    again = await ask.service.webhooks.redeliver(ask.who, webhook_id, delivery_id)
    return reply(delivery_shown(again), 202)


def _made(made: MadeWebhook) -> Response:
    shown = {**webhook_shown(made.webhook), "secret": made.secret}
    headers = {
        "cache-control": "no-store",
        "location": f"/v1/webhooks/{made.webhook.id}",
    }
    return reply(shown, 201, headers)
