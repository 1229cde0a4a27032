"""Keys and tenants as operators handle them: what is checked, what is shown, what is logged."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from serve.admission.keys import hash_secret, parse
from serve.allowance import Tier
from serve.config import Settings
from serve.errors import BadInput, Conflict, NotFound
from serve.flows.operators import OperatorFlow
from serve.jobs.owner import StoreOwner


BY = "cli:ann@host"


@pytest.fixture
def store(tmp_path: Path, clock: Any) -> Iterator[StoreOwner]:
    settings = Settings()
    store = StoreOwner(tmp_path / "store.db", settings.store, clock)
    yield store
    store.close()


@pytest.fixture
def flow(store: StoreOwner, clock: Any) -> OperatorFlow:
    return OperatorFlow(Settings(admission={"key_overlap_s": 60}), store, store, clock)


async def refused(act: Any, param: str) -> str:
    with pytest.raises(BadInput) as caught:
        await act
    assert caught.value.param == param
    return caught.value.message


# Keys


async def test_a_made_key_opens_the_door_and_its_secret_is_shown_once(flow, store, clock):
    limits = {"interactive": {"requests_per_minute": 5}, "tokens_per_month": None}
    made = await flow.create_key(
        BY, tenant="acme", tier="premium", role="admin", name="Ann's", limits=limits
    )
    key_id, secret = parse(f"Bearer {made.secret}")
    kept = await store.find_key(key_id)
    assert kept.secret_sha256 == hash_secret(secret)
    assert (kept.role, kept.name, kept.limits) == ("admin", "Ann's", limits)
    assert (kept.tier, kept.created_at) == ("premium", clock())
    (listed,) = await flow.list_keys("acme")
    assert listed == made.key
    for shown in (listed, made, await flow.audit()):
        assert secret not in repr(shown)
        assert kept.secret_sha256 not in repr(shown)


async def test_tiers_that_came_meanwhile_may_be_given(flow):
    await refused(flow.create_key(BY, tenant="acme", tier="trial"), "tier")
    flow.retier({"trial": Tier(weight=2)})
    made = await flow.create_key(BY, tenant="acme", tier="trial")
    assert made.key.tier == "trial"
    await refused(flow.create_key(BY, tenant="beta", tier="free"), "tier")


async def test_a_key_needs_a_tier_only_for_a_new_tenant(flow):
    with pytest.raises(NotFound) as caught:
        await flow.create_key(BY, tenant="acme")
    assert caught.value.param == "tenant"
    await flow.set_tenant(BY, "acme", tier="premium")
    await flow.create_key(BY, tenant="acme")
    assert [key.tier for key in await flow.list_keys()] == ["premium"]


@pytest.mark.parametrize("tenant", ["", "Acme", "a b", "-a", "a" * 64, "a\n", 5, None])
async def test_a_tenants_name_is_checked(flow, tenant):
    await refused(flow.create_key(BY, tenant=tenant, tier="free"), "tenant")
    await refused(flow.set_tenant(BY, tenant, tier="free"), "tenant")
    assert await flow.list_tenants() == []


@pytest.mark.parametrize(
    ("more", "param"),
    [
        ({"tier": "gold"}, "tier"),
        ({"tier": ""}, "tier"),
        ({"role": "root"}, "role"),
        ({"name": "a\x00"}, "name"),
        ({"name": "a" * 129}, "name"),
        ({"limits": {"tokens_per_month": 0}}, "limits.tokens_per_month"),
    ],
    ids=str,
)
async def test_what_a_key_is_made_of_is_checked(flow, more, param):
    await refused(flow.create_key(BY, **({"tenant": "acme", "tier": "free"} | more)), param)
    assert await flow.list_keys() == []
    assert await flow.audit() == []


LIMITS = [
    ({"interactive": {"tokens_per_minute": 0}}, "limits.interactive.tokens_per_minute"),
    ({"interactive": {"tokens_per_minute": "600"}}, "limits.interactive.tokens_per_minute"),
    ({"bulk": {"concurrent_max": True}}, "limits.bulk.concurrent_max"),
    ({"bulk": {"concurrent_max": 1.5}}, "limits.bulk.concurrent_max"),
    ({"bulk": {"requests_per_minute": float("inf")}}, "limits.bulk.requests_per_minute"),
    ({"bulk": {"requests_per_minute": float("nan")}}, "limits.bulk.requests_per_minute"),
    ({"bulk": {"requests_per_minute": 10**400}}, "limits.bulk.requests_per_minute"),
    ({"tokens_per_month": -(10**400)}, "limits.tokens_per_month"),
    ({"bulk": {"requests_per_minute": [1]}}, "limits.bulk.requests_per_minute"),
    ({"bulk": {"requests_per_day": 1}}, "limits.bulk.requests_per_day"),
    ({"bulk": {"preset": "gold"}}, "limits.bulk.preset"),
    ({"bulk": {"preset": ["gold"]}}, "limits.bulk.preset"),
    ({"bulk": 5}, "limits.bulk"),
    ({"bulk": None}, "limits.bulk"),
    ({"weight": 5}, "limits.weight"),
    ({"weight": {"a": 5}}, "limits.weight"),
    ({"tokens_per_month": "many"}, "limits.tokens_per_month"),
    ([], "limits"),
    ("none", "limits"),
]


@pytest.mark.parametrize(("limits", "param"), LIMITS, ids=lambda value: str(value)[:60])
async def test_limits_are_checked_and_the_field_is_named(flow, limits, param):
    key = (await flow.create_key(BY, tenant="acme", tier="free")).key
    for act in (
        flow.create_key(BY, tenant="acme", limits=limits),
        flow.change_key(BY, key.id, limits=limits),
        flow.set_tenant(BY, "acme", limits=limits),
    ):
        assert param in (await refused(act, param)).lower()
    assert (await flow.find_tenant("acme")).limits == {}
    assert await flow.list_keys() == [key]


async def test_a_burst_without_a_rate_is_refused(flow):
    await flow.set_tenant(BY, "acme", tier="free")
    limits = {"interactive": {"requests_per_minute": None, "requests_burst": 5}}
    assert "requests_burst needs" in await refused(
        flow.set_tenant(BY, "acme", limits=limits), "limits.interactive"
    )


async def test_limits_are_kept_as_they_were_given(flow):
    limits = {"interactive": {"requests_per_minute": 5, "concurrent_max": None}, "bulk": {}}
    made = await flow.create_key(BY, tenant="acme", tier="free", limits=limits)
    assert made.key.limits == limits
    assert (await flow.set_tenant(BY, "acme", limits=limits)).limits == limits
    assert (await flow.find_tenant("acme")).limits == limits
    preset = {"bulk": {"preset": "bucket_100_10"}}
    assert (await flow.change_key(BY, made.key.id, limits=preset)).limits == preset


async def test_a_changed_key_keeps_what_is_not_named(flow):
    made = await flow.create_key(
        BY, tenant="acme", tier="free", name="old", limits={"tokens_per_month": 5}
    )
    changed = await flow.change_key(BY, made.key.id, name="new")
    assert (changed.name, changed.limits) == ("new", {"tokens_per_month": 5})
    changed = await flow.change_key(BY, made.key.id, limits={})
    assert (changed.name, changed.limits, changed.secret_sha256) == ("new", {}, "")
    await refused(flow.change_key(BY, made.key.id, name="\n"), "name")
    with pytest.raises(NotFound):
        await flow.change_key(BY, "unknown", name="new")


async def test_a_rotated_key_overlaps_for_a_setting_or_as_told(flow, clock):
    first = await flow.create_key(BY, tenant="acme", tier="free", name="Ann's")
    second = await flow.rotate_key(BY, first.key.id)
    assert second.key.name == "Ann's"
    assert parse(f"Bearer {second.secret}")[0] == second.key.id
    assert second.key.secret_sha256 == ""
    expires = {key.id: key.expires_at for key in await flow.list_keys()}
    assert expires == {first.key.id: clock() + 60, second.key.id: None}
    with pytest.raises(Conflict):
        await flow.rotate_key(BY, first.key.id)
    clock.advance(60)
    third = await flow.rotate_key(BY, second.key.id, 0)
    assert [key.id for key in await flow.list_keys()] == [third.key.id]


@pytest.mark.parametrize("overlap_s", [-1, 91 * 86_400, float("nan"), float("inf")])
async def test_an_overlap_is_bounded(flow, overlap_s):
    made = await flow.create_key(BY, tenant="acme", tier="free")
    await refused(flow.rotate_key(BY, made.key.id, overlap_s), "overlap_s")


async def test_what_is_not_live_is_not_found(flow):
    made = await flow.create_key(BY, tenant="acme", tier="free")
    await flow.revoke_key(BY, made.key.id)
    for act in (
        flow.rotate_key(BY, made.key.id),
        flow.revoke_key(BY, made.key.id),
        flow.find_tenant("nobody"),
        flow.set_tenant(BY, "nobody", limits={}),
    ):
        with pytest.raises(NotFound):
            await act


async def test_an_admin_cannot_lock_everybody_out(flow):
    made = await flow.create_key(BY, tenant="acme", tier="free", role="admin")
    with pytest.raises(Conflict) as caught:
        await flow.revoke_key(f"key:{made.key.id}", made.key.id)
    assert caught.value.code == "last_admin_key"
    await flow.revoke_key(BY, made.key.id)
    assert await flow.list_keys() == []


# Tenants


async def test_a_tier_must_fit_the_tenants_own_limits(store, clock):
    tiers = {"paid": {"weight": 4, "bulk": {"tokens_per_minute": 500}}, "free": {"weight": 1}}
    flow = OperatorFlow(Settings(admission={"tiers": tiers}), store, store, clock)
    limits = {"bulk": {"tokens_burst": 1000}}
    await flow.set_tenant(BY, "acme", tier="paid", limits=limits)
    for act in (
        flow.set_tenant(BY, "acme", tier="free"),
        flow.create_key(BY, tenant="acme", tier="free"),
    ):
        assert "limits.bulk" in await refused(act, "tier")
    assert (await flow.find_tenant("acme")).tier == "paid"
    changed = await flow.set_tenant(BY, "acme", tier="free", limits={})
    assert (changed.tier, changed.limits) == ("free", {})


async def test_a_tier_that_is_gone_from_the_settings_is_named(flow, store):
    await store.set_tenant("op", "acme", "gold", None, BY)
    assert "'gold'" in await refused(flow.set_tenant(BY, "acme", limits={}), "tier")


async def test_lists_come_in_bounded_pages(flow):
    for name in ("a", "b", "c"):
        await flow.set_tenant(BY, name, tier="free")
    assert [each.tenant for each in await flow.list_tenants("a", 1)] == ["b"]
    entries = await flow.audit(limit=2)
    assert [each.tenant for each in entries] == ["c", "b"]
    assert [each.tenant for each in await flow.audit(before=entries[-1].number)] == ["a"]
    assert [each.by for each in await flow.audit("b")] == [BY]
    made = [await flow.create_key(BY, tenant="a") for _ in range(3)]
    ids = sorted(each.key.id for each in made)
    assert [each.id for each in await flow.list_keys("a", ids[0], 1)] == ids[1:2]
    for limit in (0, 1001):
        await refused(flow.list_keys(limit=limit), "limit")
        await refused(flow.list_tenants("", limit), "limit")
        await refused(flow.audit(limit=limit), "limit")
