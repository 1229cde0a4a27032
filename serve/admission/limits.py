"""From an allowance to limits: who a key's caller is and what holds for it. Pure."""

from collections.abc import Mapping
from datetime import UTC, datetime

from serve.allowance import Allowance, Quota, Tier
from serve.grants import Limit
from serve.records import KLASSES, Caller, Key, Klass


SECONDS_PER_MINUTE = 60.0


def limits_of(owner: str, scope: str, allowance: Allowance) -> Mapping[Klass, tuple[Limit, ...]]:
    """The limits of one owner by class; that of the month is the same one in both.

    `scope` is the word their names begin with: `tenant` or `key`.
    """
    month: tuple[Limit, ...] = ()
    if allowance.tokens_per_month is not None:
        name = f"{scope}_tokens_per_month"
        month = (Limit(owner, name, "month", "tokens", allowance.tokens_per_month),)
    quotas: Mapping[Klass, Quota] = {"interactive": allowance.interactive, "bulk": allowance.bulk}
    words: Mapping[Klass, str] = {"interactive": scope, "bulk": f"{scope}_bulk"}
    return {klass: (*_of_class(owner, words[klass], quotas[klass]), *month) for klass in KLASSES}


def caller_of(key: Key, tier: Tier) -> Caller:
    """Who pays for what this key asks, and within which limits.

    Raises ValueError (pydantic's) when the key or its tenant holds limits of a wrong shape.
    """
    family = key.family or key.id
    tenant = limits_of(f"t/{key.tenant}", "tenant", tier.changed(key.tenant_limits))
    own = limits_of(f"k/{key.tenant}/{family}", "key", Allowance.model_validate(key.limits))
    limits: Mapping[Klass, tuple[Limit, ...]] = {
        klass: (*tenant[klass], *own[klass]) for klass in KLASSES
    }
    return Caller(key.tenant, key.tier, tier.weight, family, key.role, limits)


def month_of(at: float) -> str:
    """The calendar month (UTC) of an epoch time, for example `2026-11`."""
    return datetime.fromtimestamp(at, UTC).strftime("%Y-%m")


def day_of(at: float) -> str:
    """The day (UTC) of an epoch time, for example `2026-11-22`."""
    return datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%d")


def month_ends(at: float) -> float:
    """Epoch time at which the calendar month (UTC) of an epoch time ends."""
    now = datetime.fromtimestamp(at, UTC)
    year, month = (now.year, now.month + 1) if now.month < 12 else (now.year + 1, 1)  # noqa: PLR2004
    return datetime(year, month, 1, tzinfo=UTC).timestamp()


def _of_class(owner: str, word: str, quota: Quota) -> tuple[Limit, ...]:
    limits: list[Limit] = []
    if quota.requests_per_minute and quota.requests_burst:
        interval_s = SECONDS_PER_MINUTE / quota.requests_per_minute
        name = f"{word}_requests_per_minute"
        limits.append(Limit(owner, name, "rate", "requests", quota.requests_burst, interval_s))
    if quota.tokens_per_minute and quota.tokens_burst:
        interval_s = SECONDS_PER_MINUTE / quota.tokens_per_minute
        name = f"{word}_tokens_per_minute"
        limits.append(Limit(owner, name, "rate", "tokens", quota.tokens_burst, interval_s))
    if quota.concurrent_max:
        name = f"{word}_concurrent_requests"
        limits.append(Limit(owner, name, "level", "requests", quota.concurrent_max))
    if quota.queued_tokens_max:
        name = f"{word}_queued_tokens"
        limits.append(Limit(owner, name, "level", "tokens", quota.queued_tokens_max))
    return tuple(limits)
