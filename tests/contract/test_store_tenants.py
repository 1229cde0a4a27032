"""What every Store promises of keys, tenants, their audit log and usage, written against the ports."""

import asyncio
from dataclasses import replace
from itertools import count
from typing import Any, Protocol

import pytest

from serve.errors import Conflict, NotFound
from serve.ports import Keys, Tenants, Usage
from serve.records import AuditEntry, Key, Tenant, UsageRow


class Store(Keys, Tenants, Usage, Protocol):
    pass


BY = "cli:ann@host"
HOUR_S = 3600.0
DAY_S = 24 * HOUR_S
SECRET = "ab" * 32

_ops = count()


def op() -> str:
    return f"op-{next(_ops)}"


def key(key_id: str, tenant: str = "acme", tier: str = "free", **more: Any) -> Key:
    values = {"created_at": 5.25, "family": key_id, **more}
    return Key(key_id, tenant, tier, SECRET, **values)


async def live(store: Store, tenant: str | None = None) -> list[str]:
    return [each.id for each in await store.list_keys(tenant)]


async def logged(store: Store, tenant: str | None = None) -> list[tuple[str, str, Any]]:
    """Action, subject and detail, oldest first."""
    entries = reversed(await store.list_audit(tenant, None, 1000))
    return [(entry.action, entry.subject, entry.detail) for entry in entries]


# Keys


async def test_a_key_is_found_as_it_was_made(store: Store):
    limits = {"interactive": {"requests_per_minute": 5}}
    one = key("k1")
    two = key("k2", "else", role="admin", name="Ann's", limits=limits, expires_at=2000.5)
    for each in (one, two):
        await store.create_key(op(), each)
    assert [await store.find_key(name) for name in ("k1", "k2", "k3")] == [one, two, None]


async def test_a_key_without_a_family_starts_one(store: Store):
    await store.create_key(op(), key("k1", family=""))
    assert await store.find_key("k1") == key("k1")


async def test_a_new_key_sets_the_tier_of_all_its_tenants_keys(store: Store):
    await store.create_key(op(), key("k1", tier="free"))
    await store.create_key(op(), key("other", tenant="else", tier="free"))
    await store.create_key(op(), key("k2", tier="premium"))
    tiers = {each.id: each.tier for each in await store.list_keys()}
    assert tiers == {"k1": "premium", "k2": "premium", "other": "free"}


async def test_a_key_without_a_tier_leaves_its_tenants_as_it_is(store: Store):
    with pytest.raises(NotFound) as caught:
        await store.create_key(op(), key("k1", tier=""))
    assert caught.value.param == "tenant"
    assert await store.find_key("k1") is None
    await store.create_key(op(), key("k1", tier="premium"))
    await store.create_key(op(), key("k2", tier=""))
    assert await store.find_key("k2") == key("k2", tier="premium")


async def test_keys_are_listed_by_id_in_pages(store: Store):
    for each in (key("c", created_at=1), key("a", created_at=2), key("b", "aaa"), key("d")):
        await store.create_key(op(), each)
    assert await live(store) == ["a", "b", "c", "d"]
    assert await live(store, "acme") == ["a", "c", "d"]
    assert await live(store, "nobody") == []
    await store.revoke_key(op(), "a", BY)
    pages = [await store.list_keys(None, after, 2) for after in ("", "c", "d")]
    assert [[each.id for each in page] for page in pages] == [["b", "c"], ["d"], []]
    assert [each.id for each in await store.list_keys("acme", "", 1)] == ["c"]


async def test_a_key_id_is_taken_once(store: Store):
    await store.create_key(op(), key("k1"))
    thief = key("k1", tenant="thief", tier="enterprise")
    with pytest.raises(Conflict) as created:
        await store.create_key(op(), thief)
    with pytest.raises(Conflict) as rotated:
        await store.rotate_key(op(), "k1", thief, 60, BY)
    assert [caught.value.param for caught in (created, rotated)] == ["id", "id"]
    assert await store.find_key("k1") == key("k1")
    assert await store.find_tenant("thief") is None
    assert len(await logged(store)) == 2


async def test_a_tenants_live_keys_are_bounded(store: Store):
    for number in range(5):
        await store.create_key(op(), key(f"k{number}"))
    with pytest.raises(Conflict, match="5 live keys") as caught:
        await store.create_key(op(), key("k5", tier="premium"))
    assert caught.value.code == "too_many_keys"
    assert {each.tier for each in await store.list_keys()} == {"free"}  # nothing was done
    await store.create_key(op(), key("other", tenant="else"))
    await store.revoke_key(op(), "k0", BY)
    await store.create_key(op(), key("k5"))


async def test_a_key_ends_when_it_expires(store: Store, clock: Any):
    await store.create_key(op(), key("k1", expires_at=clock() + 60))
    clock.advance(59.9)
    assert await store.find_key("k1") is not None
    clock.advance(0.1)
    assert await store.find_key("k1") is None
    assert await live(store) == []
    for act in (
        store.revoke_key(op(), "k1", BY),
        store.change_key(op(), "k1", "x", None, BY),
        store.rotate_key(op(), "k1", key("k2"), 60, BY),
    ):
        with pytest.raises(NotFound) as caught:
            await act
        assert caught.value.param == "id"


async def test_a_rotated_key_lives_on_beside_its_successor_for_a_while(store: Store, clock: Any):
    limits = {"bulk": {"requests_per_minute": 5}}
    old = key("k1", role="admin", name="Ann's", limits=limits)
    await store.create_key(op(), old)
    clock.advance(10)
    stranger = key(
        "k2", "else", "premium", created_at=clock(), family="k2", name="x", expires_at=1.0
    )
    new = await store.rotate_key(op(), "k1", replace(stranger, secret_sha256="cd" * 32), 60, BY)
    assert new == replace(old, id="k2", secret_sha256="cd" * 32, created_at=clock())
    assert await store.find_key("k2") == new
    assert await store.find_key("k1") == replace(old, expires_at=clock() + 60)
    clock.advance(60)
    assert await live(store) == ["k2"]


async def test_a_key_may_be_rotated_with_no_overlap(store: Store):
    await store.create_key(op(), key("k1"))
    await store.rotate_key(op(), "k1", key("k2"), 0, BY)
    assert await live(store) == ["k2"]


async def test_two_keys_of_a_family_are_live_at_most(store: Store, clock: Any):
    await store.create_key(op(), key("k1"))
    await store.create_key(op(), key("another"))
    await store.rotate_key(op(), "k1", key("k2"), 60, BY)
    for old in ("k1", "k2"):
        with pytest.raises(Conflict) as caught:
            await store.rotate_key(op(), old, key("k3"), 60, BY)
        assert caught.value.param == "id"
    clock.advance(60)
    third = await store.rotate_key(op(), "k2", key("k3"), 60, BY)
    assert (third.family, third.expires_at) == ("k1", None)
    assert sorted(await live(store)) == ["another", "k2", "k3"]


async def test_after_a_lost_reply_the_old_key_is_rotated_again(store: Store, clock: Any):
    await store.create_key(op(), key("k1"))
    await store.rotate_key(op(), "k1", key("lost"), 60, BY)
    with pytest.raises(Conflict, match="revoke its successor"):
        await store.rotate_key(op(), "k1", key("k2"), 60, BY)
    await store.revoke_key(op(), "lost", BY)
    clock.advance(50)
    again = await store.rotate_key(op(), "k1", key("k2"), 60, BY)
    assert (again.family, again.expires_at) == ("k1", None)
    assert await store.find_key("k2") == again
    assert await store.find_key("k1") == key("k1", expires_at=clock() + 60)


async def test_name_and_limits_are_the_familys(store: Store):
    await store.create_key(op(), key("k1", name="old"))
    await store.create_key(op(), key("other"))
    await store.rotate_key(op(), "k1", key("k2"), 60, BY)
    limits = {"tokens_per_month": 7}
    assert (await store.change_key(op(), "k1", None, limits, BY)).limits == limits
    changed = await store.change_key(op(), "k2", "new", None, BY)
    assert changed == await store.find_key("k2")
    told = {each.id: (each.name, each.limits) for each in await store.list_keys()}
    assert told == {"k1": ("new", limits), "k2": ("new", limits), "other": ("", {})}
    assert (await store.change_key(op(), "k2", None, {}, BY)).limits == {}


async def test_a_revoked_key_is_gone_at_once(store: Store):
    for name in ("k1", "k2"):
        await store.create_key(op(), key(name))
    await store.revoke_key(op(), "k1", BY)
    assert await store.find_key("k1") is None
    assert await live(store) == ["k2"]
    for name in ("k1", "unknown"):
        with pytest.raises(NotFound):
            await store.revoke_key(op(), name, BY)
    with pytest.raises(Conflict):
        await store.create_key(op(), key("k1"))  # its id never comes back


async def test_the_last_admin_key_is_revoked_on_the_command_line_only(store: Store):
    await store.create_key(op(), key("user"))
    for name in ("a1", "a2"):
        await store.create_key(op(), key(name, role="admin"))
    await store.rotate_key(op(), "a1", key("a3"), 60, BY)
    await store.revoke_key(op(), "a3", "key:a2")
    with pytest.raises(Conflict) as caught:  # a1 is live, but not for long
        await store.revoke_key(op(), "a2", "key:a2")
    assert caught.value.code == "last_admin_key"
    await store.revoke_key(op(), "user", "key:a2")
    await store.revoke_key(op(), "a2", BY)
    assert await live(store) == ["a1"]


# Tenants


async def test_a_tenant_is_made_and_changed(store: Store, clock: Any):
    with pytest.raises(NotFound) as caught:
        await store.set_tenant(op(), "acme", None, {"tokens_per_month": 1}, BY)
    assert caught.value.param == "tenant"
    assert await store.find_tenant("acme") is None
    made = await store.set_tenant(op(), "acme", "free", None, BY)
    assert made == Tenant("acme", "free", clock())
    clock.advance(1)
    limits = {"interactive": {"requests_per_minute": None}, "tokens_per_month": 7}
    limited = replace(made, limits=limits)
    assert await store.set_tenant(op(), "acme", None, limits, BY) == limited
    raised = replace(limited, tier="premium")
    assert await store.set_tenant(op(), "acme", "premium", None, BY) == raised
    assert await store.find_tenant("acme") == raised
    assert (await store.set_tenant(op(), "acme", None, {}, BY)).limits == {}


async def test_a_key_tells_its_tenants_tier_and_limits_of_now(store: Store):
    await store.create_key(op(), key("k1"))
    await store.set_tenant(op(), "acme", "premium", {"tokens_per_month": 7}, BY)
    expected = key("k1", tier="premium", tenant_limits={"tokens_per_month": 7})
    assert await store.find_key("k1") == expected
    assert await store.list_keys("acme") == [expected]


async def test_tenants_are_listed_by_name_in_pages(store: Store):
    for name in ("c", "a", "d", "b"):
        await store.set_tenant(op(), name, "free", None, BY)
    pages = [await store.list_tenants(after, 2) for after in ("", "b", "d")]
    assert [[each.tenant for each in page] for page in pages] == [["a", "b"], ["c", "d"], []]


# The audit log


async def test_every_change_is_logged_with_both_values(store: Store):
    await store.create_key(op(), key("k1", name="n"), BY)
    await store.create_key(op(), key("k2", tier="premium"), "key:k1")
    await store.set_tenant(op(), "acme", "free", {"tokens_per_month": 7}, BY)
    await store.change_key(op(), "k1", "m", {"tokens_per_month": 5}, BY)
    await store.rotate_key(op(), "k1", key("k3"), 60, BY)
    await store.revoke_key(op(), "k2", BY)
    blank = {"role": "user", "name": "", "limits": {}}
    assert await logged(store) == [
        ("tenant.set", "", {"new": {"tier": "free", "limits": {}}, "old": {}}),
        ("key.create", "k1", {"new": {**blank, "name": "n"}, "old": {}}),
        ("tenant.set", "", {"new": {"tier": "premium"}, "old": {"tier": "free"}}),
        ("key.create", "k2", {"new": blank, "old": {}}),
        (
            "tenant.set",
            "",
            {
                "new": {"tier": "free", "limits": {"tokens_per_month": 7}},
                "old": {"tier": "premium", "limits": {}},
            },
        ),
        (
            "key.change",
            "k1",
            {
                "new": {"name": "m", "limits": {"tokens_per_month": 5}},
                "old": {"name": "n", "limits": {}},
            },
        ),
        (
            "key.rotate",
            "k1",
            {"new": {"id": "k3", "expires_at": None}, "old": {"id": "k1", "expires_at": 1060.0}},
        ),
        ("key.revoke", "k2", {"new": {"live": False}, "old": {"live": True, **blank}}),
    ]
    assert SECRET not in str(await logged(store))


async def test_an_entry_says_when_who_and_whose(store: Store, clock: Any):
    await store.set_tenant(op(), "acme", "free", None, BY)
    clock.advance(5)
    await store.create_key(op(), key("k1"), "key:k0")
    detail = {"new": {"role": "user", "name": "", "limits": {}}, "old": {}}
    newest, oldest = await store.list_audit(None, None, 10)
    expected = AuditEntry(newest.number, 1005.0, "key:k0", "key.create", "acme", "k1", detail)
    assert newest == expected
    assert (oldest.at, oldest.by) == (1000.0, BY)
    assert oldest.number < newest.number


async def test_what_changes_nothing_or_fails_is_not_logged(store: Store):
    await store.create_key(op(), key("k1", name="n"))
    before = await logged(store)
    await store.set_tenant(op(), "acme", "free", {}, BY)
    await store.set_tenant(op(), "acme", None, None, BY)
    await store.change_key(op(), "k1", "n", {}, BY)
    await store.change_key(op(), "k1", None, None, BY)
    for act in (
        store.revoke_key(op(), "unknown", BY),
        store.change_key(op(), "unknown", "x", None, BY),
        store.set_tenant(op(), "new", None, None, BY),
    ):
        with pytest.raises(NotFound):
            await act
    assert await logged(store) == before


async def test_the_log_is_read_in_pages_and_by_tenant(store: Store):
    for name, tier in (("a", "t1"), ("b", "t1"), ("a", "t2"), ("b", "t2"), ("a", "t3")):
        await store.set_tenant(op(), name, tier, None, BY)
    every = await store.list_audit(None, None, 100)
    assert [entry.tenant for entry in every] == ["a", "b", "a", "b", "a"]
    numbers = [entry.number for entry in every]
    assert numbers == sorted(set(numbers), reverse=True)
    assert await store.list_audit(None, None, 2) == every[:2]
    assert await store.list_audit(None, every[1].number, 2) == every[2:4]
    assert await store.list_audit("b", None, 100) == [every[1], every[3]]
    assert await store.list_audit("b", every[1].number, 100) == [every[3]]
    assert await store.list_audit("nobody", None, 100) == []


# Repeats


async def test_a_repeated_change_acts_once_and_is_logged_once(store: Store, clock: Any):
    acts = [
        lambda name: store.create_key(name, key("k1"), BY),
        lambda name: store.create_key(name, key("k9"), BY),
        lambda name: store.change_key(name, "k1", "n", {"tokens_per_month": 1}, BY),
        lambda name: store.rotate_key(name, "k1", key("k2"), 60, BY),
        lambda name: store.revoke_key(name, "k9", BY),
        lambda name: store.set_tenant(name, "acme", "premium", {"tokens_per_month": 1}, BY),
    ]
    for act in acts:
        repeated = op()
        first = await act(repeated)
        before = await logged(store)
        clock.advance(1)
        assert await act(repeated) == first
        assert await logged(store) == before
    assert len(before) == 7


async def test_a_late_repeat_does_not_undo_a_later_change(store: Store):
    first = op()
    await store.set_tenant(first, "acme", "free", None, BY)
    await store.set_tenant(op(), "acme", "premium", None, BY)
    assert (await store.set_tenant(first, "acme", "free", None, BY)).tier == "free"
    assert (await store.find_tenant("acme")).tier == "premium"


async def test_concurrent_repeats_of_a_rotation_make_one_successor(store: Store):
    await store.create_key(op(), key("k1"))
    repeated = op()
    made = await asyncio.gather(
        *(store.rotate_key(repeated, "k1", key("k2"), 60, BY) for _ in range(20))
    )
    assert {each.id for each in made} == {"k2"}
    assert await live(store) == ["k1", "k2"]


# Usage


def used(name: str = "k1", klass: Any = "interactive", tokens: int = 0, **more: Any) -> UsageRow:
    values = {"month": "2026-11", "tenant": "acme", "requests": 1, "refused": 0, **more}
    return UsageRow(key=name, klass=klass, tokens=tokens, **values)


async def test_usage_is_summed_over_replicas_by_key_and_class(store: Store):
    await store.report_usage("r1/2026-11-05", [used(tokens=5), used(klass="bulk", tokens=100)])
    await store.report_usage("r2/2026-11-05", [used(tokens=7, refused=3), used("k0", tokens=1)])
    await store.report_usage("r1/2026-11-06", [used(tokens=2**40)])
    await store.report_usage("r1/2026-12-01", [used(tokens=9, month="2026-12")])
    await store.report_usage("r1/2026-11-06", [used(tokens=9, tenant="else")])
    await store.report_usage("r1/2026-11-06", [])
    assert await store.month_usage("acme", "2026-11") == [
        used("k0", tokens=1),
        used(klass="bulk", tokens=100),
        used(tokens=12 + 2**40, requests=3, refused=3),
    ]
    assert await store.month_usage("acme", "2026-10") == []
    assert await store.month_usage("nobody", "2026-11") == []


async def test_reports_are_cumulative_and_a_late_repeat_never_lowers(store: Store):
    for requests, tokens, refused in ((1, 10, 0), (3, 25, 2), (2, 20, 1), (3, 25, 2)):
        row = used(tokens=tokens, requests=requests, refused=refused)
        await store.report_usage("r1/2026-11-05", [row])
    assert await store.month_usage("acme", "2026-11") == [used(tokens=25, requests=3, refused=2)]


async def test_each_count_rises_on_its_own(store: Store):
    await store.report_usage("s", [used(tokens=5, requests=9), used("k2", tokens=1)])
    await store.report_usage("s", [used(tokens=6, requests=8), used("k2", tokens=1)])
    rows = await store.month_usage("acme", "2026-11")
    assert rows == [used(tokens=6, requests=9), used("k2", tokens=1)]


async def test_thousands_of_rows_in_one_report(store: Store):
    for tokens in (1, 2):
        rows = [used(f"k{number:04}", tokens=tokens) for number in range(1001)]
        await store.report_usage("s", rows)
    assert await store.month_usage("acme", "2026-11") == rows


async def test_ended_sessions_are_folded_and_nothing_is_lost(store: Store, clock: Any):
    rows = [used(tokens=1), used("k2", "bulk", tokens=2)]
    await asyncio.gather(*(store.report_usage(f"{session}", rows) for session in range(600)))
    clock.advance(10 * DAY_S)
    await store.report_usage("young", [used(tokens=1000)])
    clock.advance(HOUR_S)
    for _ in range(7):  # a bounded number of rows at a time
        await store.find_tenant("acme")
        assert await store.month_usage("acme", "2026-11") == [
            used(tokens=1600, requests=601),
            used("k2", "bulk", tokens=1200, requests=600),
        ]
    await store.report_usage("young", [used(tokens=1001)])  # was not folded
    (first, _) = await store.month_usage("acme", "2026-11")
    assert first.tokens == 1601


async def test_usage_is_forgotten_after_thirteen_months(store: Store, clock: Any):
    clock.advance(1_796_000_000)  # 30 November 2026
    months = ["2024-12", "2025-09", "2025-10", "2025-12", "2026-11"]
    await store.report_usage("s", [used(month=month) for month in months])
    clock.advance(HOUR_S)
    await store.tick()
    kept = [month for month in months if await store.month_usage("acme", month)]
    assert kept == ["2025-10", "2025-12", "2026-11"]
