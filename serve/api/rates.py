"""Headers that tell a caller its limits: OpenAI's, and the IETF's of draft-ietf-httpapi-
ratelimit-headers-10 (structured fields, RFC 9651), which name every limit of the class.
"""

import calendar
import math
from collections.abc import Sequence
from datetime import UTC, datetime

from serve.admission.quotas import Rate
from serve.grants import Limit


INTEGER_MAX = 999_999_999_999_999
"""The largest integer of a structured field."""

ROUNDING_S = 1e-6
"""Sums of floats: nine seconds and a bit of dust are nine."""

RawHeaders = list[tuple[bytes, bytes]]


def rate_headers(rates: Sequence[Rate], *, now: float, violated: str | None) -> RawHeaders:
    """All of them, for the limits of one caller and class; none where there is no limit.

    `now` is in epoch seconds: a month has a length. The limit called `violated`, because of which
    the request was refused, comes first in `RateLimit`.
    """
    headers: RawHeaders = []
    for unit in ("requests", "tokens"):
        mine = [rate for rate in rates if rate.limit.kind == "rate" and rate.limit.unit == unit]
        if mine:
            tightest = min(mine, key=lambda rate: (rate.remaining, rate.limit.burst))
            headers += _openai(unit, tightest)
    if rates:
        first = sorted(rates, key=lambda rate: rate.limit.name != violated)
        policies = ", ".join([_policy(rate.limit, now) for rate in rates])
        headers.append((b"ratelimit-policy", policies.encode()))
        headers.append((b"ratelimit", ", ".join([_state(rate) for rate in first]).encode()))
    return headers


def duration(seconds: float) -> str:
    """A duration as OpenAI writes it: `12ms`, `1s`, `6m0s`, `1h2m3s`."""
    ms = round(seconds * 1e3)
    if ms < 1000:  # noqa: PLR2004  a second
        return f"{ms}ms"
    whole = -(-ms // 1000)
    hours, rest = divmod(whole, 3600)
    minutes, secs = divmod(rest, 60)
    if hours:
        return f"{hours}h{minutes}m{secs}s"
    return f"{minutes}m{secs}s" if minutes else f"{secs}s"


def _openai(unit: str, rate: Rate) -> RawHeaders:
    return [
        (f"x-ratelimit-limit-{unit}".encode(), b"%d" % rate.limit.burst),
        (f"x-ratelimit-remaining-{unit}".encode(), b"%d" % rate.remaining),
        (f"x-ratelimit-reset-{unit}".encode(), duration(rate.reset_s).encode()),
    ]


def _policy(limit: Limit, now: float) -> str:
    """A limit as a policy: a rate's window is the time in which its burst is refilled."""
    policy = f'"{limit.name}";q={_integer(limit.burst)}'
    if limit.kind == "rate":
        policy += f";w={_integer(max(limit.burst * limit.interval_s, 1))}"
    elif limit.kind == "month":
        policy += f";w={_month_s(now)}"
    if limit.unit == "tokens":
        policy += ';qu="tokens"'
    elif limit.kind == "level":
        policy += ';qu="concurrent-requests"'
    return policy


def _month_s(now: float) -> int:
    today = datetime.fromtimestamp(now, UTC)
    return 86_400 * calendar.monthrange(today.year, today.month)[1]


def _state(rate: Rate) -> str:
    """What is left of a limit; nobody knows when a level is free again."""
    state = f'"{rate.limit.name}";r={_integer(rate.remaining)}'
    return (
        state if rate.limit.kind == "level" else f"{state};t={math.ceil(rate.reset_s - ROUNDING_S)}"
    )


def _integer(value: float) -> int:
    return min(round(value), INTEGER_MAX)
