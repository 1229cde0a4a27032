"""`/v1/admin/…`: keys, tenants, the audit log and autoscaling, for callers whose key has the role `admin`.

A secret is in the reply that makes it and nowhere else, hence no `Idempotency-Key` here: a repeat
could not show it again.
"""

from dataclasses import asdict
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Response
from pydantic import WithJsonSchema

from serve.api.service import Ordered
from serve.api.shapes import (
    AuditList,
    KeyList,
    KeyMade,
    KeyRevoked,
    KeyShown,
    ScalingList,
    TenantErased,
    TenantList,
    TenantShown,
)
from serve.api.wire import REF, Body, choice, documented, number, page_size, query, read, reply
from serve.flows.operators import PAGE_MAX, MadeKey
from serve.flows.scalings import Scaled
from serve.records import AuditEntry, Key, Tenant


router = APIRouter()

UNCACHED = {"cache-control": "no-store"}
PAGE = 100
KEYS: tuple[Literal["keep", "revoke"], ...] = ("keep", "revoke")

# Checked by the flow, which knows the tier that a tenant's limits stand upon.
LimitsBody = Annotated[dict[str, Any], WithJsonSchema({"$ref": REF.format(model="Allowance")})]


class KeyBody(Body):
    """A new key; its tenant is made when it is new, and then needs a tier."""

    tenant: str
    tier: str | None = None
    role: str = "user"
    name: str = ""
    limits: LimitsBody | None = None


class KeyChangeBody(Body):
    """What to change of a key and the others of its family; `{}` takes its own limits away."""

    name: str | None = None
    limits: LimitsBody | None = None


class KeyRotateBody(Body):
    """How many seconds the old key stays live; `admission.key_overlap_s` unless given."""

    overlap_s: float | None = None


class TenantBody(Body):
    """A tenant's tier, and what it has instead of the tier's limits; a null takes a limit away."""

    tier: str | None = None
    limits: LimitsBody | None = None


@router.post(
    "/v1/admin/keys",
    status_code=201,
    openapi_extra=documented(KeyBody),
    responses={201: {"model": KeyMade}},
)
async def create_key(order: Ordered) -> Response:
    """Make a key; the reply shows its secret, which nobody can show again."""
    body = await read(order.request, KeyBody)
    made = await order.operators.create_key(
        order.by,
        tenant=body.tenant,
        tier=body.tier,
        role=body.role,
        name=body.name,
        limits=body.limits,
    )
    return reply(_made(made), 201, UNCACHED)


@router.get(
    "/v1/admin/keys",
    openapi_extra={
        "parameters": [
            query("tenant", "Only this tenant's."),
            query("after", "The id of the last key of the page before."),
            query("limit", "Keys in a page.", minimum=1, maximum=PAGE_MAX),
        ]
    },
    responses={200: {"model": KeyList}},
)
async def list_keys(order: Ordered) -> Response:
    """Live keys, by id."""
    asked = order.request.query_params
    keys = await order.operators.list_keys(
        asked.get("tenant"), asked.get("after", ""), page_size(order.request, PAGE, PAGE_MAX)
    )
    return reply({"object": "list", "data": [_key(key) for key in keys]})


@router.patch(
    "/v1/admin/keys/{key_id}",
    openapi_extra=documented(KeyChangeBody),
    responses={200: {"model": KeyShown}},
)
async def change_key(key_id: str, order: Ordered) -> Response:
    """Set a key's name and limits; the others of its family follow."""
    body = await read(order.request, KeyChangeBody)
    key = await order.operators.change_key(order.by, key_id, name=body.name, limits=body.limits)
    return reply(_key(key))


@router.post(
    "/v1/admin/keys/{key_id}/rotate",
    status_code=201,
    openapi_extra=documented(KeyRotateBody),
    responses={201: {"model": KeyMade}},
)
async def rotate_key(key_id: str, order: Ordered) -> Response:
    """Make a key's successor; both are live until the old one's time is over."""
    body = await read(order.request, KeyRotateBody)
    made = await order.operators.rotate_key(order.by, key_id, body.overlap_s)
    return reply(_made(made), 201, UNCACHED)


@router.delete("/v1/admin/keys/{key_id}", responses={200: {"model": KeyRevoked}})
async def revoke_key(key_id: str, order: Ordered) -> Response:
    """End a key at once."""
    await order.operators.revoke_key(order.by, key_id)
    return reply({"object": "key", "id": key_id, "revoked": True})


@router.get(
    "/v1/admin/tenants",
    openapi_extra={
        "parameters": [
            query("after", "The last tenant of the page before."),
            query("limit", "Tenants in a page.", minimum=1, maximum=PAGE_MAX),
        ]
    },
    responses={200: {"model": TenantList}},
)
async def list_tenants(order: Ordered) -> Response:
    """Tenants, by name."""
    after = order.request.query_params.get("after", "")
    tenants = await order.operators.list_tenants(after, page_size(order.request, PAGE, PAGE_MAX))
    return reply({"object": "list", "data": [_tenant(tenant) for tenant in tenants]})


@router.get("/v1/admin/tenants/{tenant}", responses={200: {"model": TenantShown}})
async def one_tenant(tenant: str, order: Ordered) -> Response:
    """One tenant."""
    return reply(_tenant(await order.operators.find_tenant(tenant)))


@router.put(
    "/v1/admin/tenants/{tenant}",
    openapi_extra=documented(TenantBody),
    responses={200: {"model": TenantShown}},
)
async def set_tenant(tenant: str, order: Ordered) -> Response:
    """Make a tenant, or set its tier and limits; what is not given stays."""
    body = await read(order.request, TenantBody)
    kept = await order.operators.set_tenant(order.by, tenant, tier=body.tier, limits=body.limits)
    return reply(_tenant(kept))


@router.delete(
    "/v1/admin/tenants/{tenant}/data",
    openapi_extra={
        "parameters": [query("keys", "`keep` (default), or `revoke`: the tenant's keys end, too.")]
    },
    responses={200: {"model": TenantErased}},
)
async def erase_tenant(tenant: str, order: Ordered) -> Response:
    """Remove all that is kept of a tenant; it stays itself, with its limits, its usage and the log."""
    keys = choice(order.request, "keys", KEYS)
    removed = await order.erasure.erase(order.by, tenant, keys)
    return reply({"object": "tenant.data", "tenant": tenant, "removed": asdict(removed)})


@router.get(
    "/v1/admin/audit",
    openapi_extra={
        "parameters": [
            query("tenant", "Only this tenant's."),
            query("before", "The least number of the page before.", minimum=0),
            query("limit", "Entries in a page.", minimum=1, maximum=PAGE_MAX),
        ]
    },
    responses={200: {"model": AuditList}},
)
async def audit(order: Ordered) -> Response:
    """Who changed what, newest first."""
    entries = await order.operators.audit(
        order.request.query_params.get("tenant"),
        number(order.request, "before"),
        page_size(order.request, PAGE, PAGE_MAX),
    )
    return reply({"object": "list", "data": [_entry(entry) for entry in entries]})


@router.get("/v1/admin/autoscaling", responses={200: {"model": ScalingList}})
async def autoscaling(order: Ordered) -> Response:
    """How many replicas each deployment should have, from what that was decided, and why."""
    scaled = await order.scalings.list()
    return reply({"object": "list", "data": [_scaled(one) for one in scaled]})


def _scaled(one: Scaled) -> dict[str, Any]:
    made = one.decision
    return {
        "object": "autoscaling",
        "deployment": one.deployment,
        "fixed": one.fixed,
        "min": one.least,
        "max": one.most,
        "wanted": None if made is None else made.wanted,
        "target": None if made is None else made.target,
        "running": None if made is None else made.running,
        "inputs": {} if made is None else dict(made.inputs),
        "reason": one.reason,
        "at": None if made is None else made.at,
    }


def _key(key: Key) -> dict[str, Any]:
    return {
        "object": "key",
        "id": key.id,
        "family": key.family,
        "tenant": key.tenant,
        "tier": key.tier,
        "role": key.role,
        "name": key.name,
        "limits": dict(key.limits),
        "created": int(key.created_at),
        "expires": None if key.expires_at is None else int(key.expires_at),
    }


def _made(made: MadeKey) -> dict[str, Any]:
    return {**_key(made.key), "secret": made.secret}


def _tenant(tenant: Tenant) -> dict[str, Any]:
    return {
        "object": "tenant",
        "tenant": tenant.tenant,
        "tier": tenant.tier,
        "limits": dict(tenant.limits),
        "created": int(tenant.created_at),
    }


def _entry(entry: AuditEntry) -> dict[str, Any]:
    return {
        "number": entry.number,
        "at": entry.at,
        "by": entry.by,
        "action": entry.action,
        "tenant": entry.tenant,
        "subject": entry.subject,
        "detail": dict(entry.detail),
    }
