from dataclasses import replace

import pytest

from serve.admission.limits import caller_of, day_of, limits_of, month_ends, month_of
from serve.allowance import Allowance, Quota, Tier
from serve.grants import Limit
from serve.records import Key


WHOLE = Quota(
    requests_per_minute=60,
    requests_burst=4,
    tokens_per_minute=6000,
    tokens_burst=1000,
    concurrent_max=3,
    queued_tokens_max=500,
)
KEY = Key("k1", "ann", "free", "0" * 64, 1.0)
NOVEMBER_22 = 1_795_379_653.0


def test_every_part_of_an_allowance_is_a_limit():
    limits = limits_of("t/ann", "tenant", Allowance(interactive=WHOLE, tokens_per_month=10**6))
    assert limits["interactive"] == (
        Limit("t/ann", "tenant_requests_per_minute", "rate", "requests", 4, 1.0),
        Limit("t/ann", "tenant_tokens_per_minute", "rate", "tokens", 1000, 0.01),
        Limit("t/ann", "tenant_concurrent_requests", "level", "requests", 3),
        Limit("t/ann", "tenant_queued_tokens", "level", "tokens", 500),
        Limit("t/ann", "tenant_tokens_per_month", "month", "tokens", 10**6),
    )


def test_bulk_has_limits_of_its_own_and_shares_the_month():
    limits = limits_of(
        "k/ann/f", "key", Allowance(interactive=WHOLE, bulk=WHOLE, tokens_per_month=9)
    )
    names = {klass: [limit.name for limit in some] for klass, some in limits.items()}
    assert names["bulk"] == [
        "key_bulk_requests_per_minute",
        "key_bulk_tokens_per_minute",
        "key_bulk_concurrent_requests",
        "key_bulk_queued_tokens",
        "key_tokens_per_month",
    ]
    assert set(names["bulk"]) & set(names["interactive"]) == {"key_tokens_per_month"}


def test_what_is_not_set_does_not_exist():
    limits = limits_of("t/ann", "tenant", Allowance(bulk=Quota(concurrent_max=2)))
    assert [limit.name for limit in limits["interactive"]] == []
    assert [limit.name for limit in limits["bulk"]] == ["tenant_bulk_concurrent_requests"]


def test_the_preset_is_a_bucket_of_a_hundred_that_refills_with_ten_a_minute():
    limits = limits_of("t/ann", "tenant", Allowance(interactive=Quota(preset="bucket_100_10")))
    (limit,) = limits["interactive"]
    assert (limit.burst, limit.interval_s) == (100, 6)


def test_a_caller_has_its_tenants_limits_and_its_keys():
    tier = Tier(weight=4, interactive=WHOLE)
    key = replace(
        KEY,
        role="admin",
        family="k0",
        tenant_limits={"interactive": {"concurrent_max": 9, "queued_tokens_max": None}},
        limits={"interactive": {"requests_per_minute": 30}},
    )
    caller = caller_of(key, tier)
    assert (caller.tenant, caller.tier, caller.weight) == ("ann", "free", 4)
    assert (caller.key, caller.role) == ("k0", "admin")
    figures = {limit.name: (limit.owner, limit.burst) for limit in caller.limits["interactive"]}
    assert figures == {
        "tenant_requests_per_minute": ("t/ann", 4),
        "tenant_tokens_per_minute": ("t/ann", 1000),
        "tenant_concurrent_requests": ("t/ann", 9),
        "key_requests_per_minute": ("k/ann/k0", 30),
    }


def test_a_key_that_was_never_rotated_is_its_own_family():
    assert caller_of(KEY, Tier(weight=1)).key == "k1"
    assert caller_of(KEY, Tier(weight=1)).limits == {"interactive": (), "bulk": ()}


def test_limits_of_a_wrong_shape_are_refused():
    with pytest.raises(ValueError, match="hourly"):
        caller_of(replace(KEY, limits={"hourly": 3}), Tier(weight=1))


def test_days_and_months_are_in_utc():
    assert (day_of(NOVEMBER_22), month_of(NOVEMBER_22)) == ("2026-11-22", "2026-11")
    ends = month_ends(NOVEMBER_22)
    assert (day_of(ends - 1), day_of(ends)) == ("2026-11-30", "2026-12-01")
    assert month_of(month_ends(ends)) == "2027-01"
