"""Webhooks, the pure part: secrets, signatures, payloads, and what follows from an answer.

The scheme is Standard Webhooks 1.0, so that receivers verify with its libraries, or with OpenAI's
client. `egress` sends; when and what, the Store knows.
"""

import base64
import binascii
import hmac
import random
import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, Literal

import orjson

from serve.errors import BadInput
from serve.items import Event


PREFIX = "whsec_"

SECRET_BYTES = 32
SECRET_BYTES_MIN, SECRET_BYTES_MAX = 24, 64
"""The standard's bounds of a secret."""

SECRETS_LIVE_MAX = 2
"""The old one stays beside the new one while receivers change over."""

ATTEMPTS_S = (0, 5, 300, 1800, 7200, 18_000, 36_000, 50_400, 72_000, 86_400)
"""Pause before each try, from the one before: the standard's own table, 3.1 days in all."""

JITTER = 0.2
"""Each pause is longer or shorter by up to this part, so that retries of an outage spread."""

FAILING_S_MAX = 5 * 86_400.0
"""A webhook that has only failed for so long is disabled."""

BUSY = frozenset({429, 502, 504})
"""Statuses by which a receiver says that it gets too much: all its deliveries wait."""

BUSY_S = 60.0

RETRY_AFTER_S_MAX = 86_400.0
"""More is taken for this: the schedule's longest pause."""

FIGURES = ("state", "total", "done", "skipped", "dead", "cancelled", "tokens")
"""What a payload says of a job: never an input, never a vector, so that it stays far below the
standard's 20 kB."""

Outcome = int | Literal["unreachable", "refused"]
"""What became of a try: a status, no answer, or forbidden by the guard of `egress`."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What follows from a try.

    delivered: it got through. retry: again at `run_at`. given_up: this delivery has failed for good.
    disabled: so has its webhook.

    Attributes:
        run_at: epoch seconds; None unless `retry`.
        hold_until: the webhook's other deliveries wait until then; None: they need not.
    """

    word: Literal["delivered", "retry", "given_up", "disabled"]
    run_at: float | None = None
    hold_until: float | None = None


def new_secret() -> str:
    """A fresh secret, as its receiver takes it."""
    return PREFIX + base64.b64encode(secrets.token_bytes(SECRET_BYTES)).decode()


def secret_bytes(secret: str) -> bytes:
    """What a secret stands for.

    Raises BadInput for one that is not `whsec_` and base64 of 24 to 64 bytes.
    """
    try:
        raw = base64.b64decode(secret.removeprefix(PREFIX), validate=True)
    except (binascii.Error, ValueError):  # ValueError: beyond ASCII
        raw = b""
    if not secret.startswith(PREFIX) or not SECRET_BYTES_MIN <= len(raw) <= SECRET_BYTES_MAX:
        message = f"A secret is {PREFIX} and the base64 of {SECRET_BYTES_MIN} to {SECRET_BYTES_MAX} bytes."
        raise BadInput(message)
    return raw


def payload(event: Event) -> bytes:
    """The body that tells of an event: what happened, when, and the job's figures."""
    data: dict[str, Any] = {"id": event.job}
    data |= {name: event.data[name] for name in FIGURES if name in event.data}
    at = datetime.fromtimestamp(event.at, UTC).isoformat(timespec="milliseconds")
    timestamp = at.replace("+00:00", "Z")
    return orjson.dumps({"type": event.type, "timestamp": timestamp, "data": data})


def signed_headers(
    live: Sequence[str], delivery: str, now: float, body: bytes
) -> Mapping[str, str]:
    """Headers of a delivery, signed with every live secret.

    `delivery` is its id: the same in every try, which is how a receiver knows a repeat.
    """
    if not 1 <= len(live) <= SECRETS_LIVE_MAX:
        raise ValueError("a webhook has one live secret, or two")
    timestamp = str(int(now))
    signed = b".".join((delivery.encode(), timestamp.encode(), body))
    signatures = (
        base64.b64encode(hmac.digest(secret_bytes(secret), signed, "sha256")).decode()
        for secret in live
    )
    return {
        "content-type": "application/json",
        "webhook-id": delivery,
        "webhook-timestamp": timestamp,
        "webhook-signature": " ".join(f"v1,{signature}" for signature in signatures),
    }


def verdict(
    outcome: Outcome,
    *,
    attempt: int,
    failing_since: float | None,
    now: float,
    rng: random.Random,
    retry_after: str | None = None,
) -> Verdict:
    """What follows from a try of a delivery.

    Args:
        outcome: what became of it.
        attempt: its number, from 1.
        failing_since: when the webhook began to fail; None if its last try got through.
        now: epoch seconds.
        rng: for the jitter.
        retry_after: the header of that name, as it came.
    """
    if outcome in range(200, 300):
        return Verdict("delivered")
    failing_s = 0.0 if failing_since is None else now - failing_since
    if outcome == 410 or failing_s >= FAILING_S_MAX:  # noqa: PLR2004 - Gone
        return Verdict("disabled")
    asked_s = retry_after_s(retry_after, now)
    if outcome in BUSY:
        asked_s = max(asked_s, BUSY_S)
    hold_until = now + asked_s if asked_s else None
    if outcome == "refused" or attempt >= len(ATTEMPTS_S):
        return Verdict("given_up", hold_until=hold_until)
    pause_s = ATTEMPTS_S[attempt] * rng.uniform(1 - JITTER, 1 + JITTER)
    asked_s *= rng.uniform(1, 1 + JITTER)  # never earlier than asked
    return Verdict("retry", now + max(pause_s, asked_s), hold_until)


def retry_after_s(header: str | None, now: float) -> float:
    """Seconds that a `Retry-After` asks for, from 0 to 24 h; 0 when it says nothing of use."""
    text = (header or "").strip()
    if re.fullmatch("[0-9]{1,9}", text):
        return min(float(text), RETRY_AFTER_S_MAX)
    try:
        moment = parsedate_to_datetime(text)
    except (ValueError, OverflowError, IndexError, TypeError):  # what the parser lets through
        return 0.0
    if moment.tzinfo is None:  # `-0000`: UTC from a place unknown
        moment = moment.replace(tzinfo=UTC)
    return min(max(moment.timestamp() - now, 0.0), RETRY_AFTER_S_MAX)
