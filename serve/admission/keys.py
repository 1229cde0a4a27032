"""API keys: `hr_<id>_<secret>`. The Store keeps the id and the SHA-256 of the secret.

A fast hash is enough because the secret is 256 random bits, not a password: there is no
dictionary to try. Comparison is constant-time, also for an id that does not exist.
"""

import asyncio
import hashlib
import hmac
import math
import re
import secrets
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from serve.admission.limits import caller_of
from serve.allowance import Tier
from serve.config import Admission
from serve.errors import Forbidden, Overloaded, ServiceError, StoreUnavailable, Unauthorized
from serve.ports import Keys
from serve.records import Caller, Key, Role


_FORM = re.compile(r"hr_([0-9a-f]{16})_([A-Za-z0-9_-]{43})")
_NOBODY = hashlib.sha256(b"no such key").hexdigest()

UNKNOWN_IDS_MAX = 1000
"""Ids without a live key that are remembered, apart from the keys: a flood of made-up ids evicts
none of those."""


def hash_secret(secret: str) -> str:
    """What the Store keeps of a secret."""
    return hashlib.sha256(secret.encode()).hexdigest()


def new_key(
    tenant: str,
    tier: str,
    now: float,
    *,
    role: Role = "user",
    name: str = "",
    limits: Mapping[str, Any] | None = None,
) -> tuple[Key, str]:
    """A fresh key and the text that its owner sends; the text is shown once and never kept.

    With an empty tier the tenant keeps the one it has. `now` is in epoch seconds.
    """
    key_id, secret = secrets.token_hex(8), secrets.token_urlsafe(32)
    key = Key(
        key_id,
        tenant,
        tier,
        hash_secret(secret),
        now,
        role=role,
        name=name,
        family=key_id,
        limits=dict(limits or {}),
    )
    return key, f"hr_{key_id}_{secret}"


def successor(key: Key, now: float) -> tuple[Key, str]:
    """A key of the same family with another id and secret, and the text that its owner sends."""
    fresh, text = new_key(key.tenant, key.tier, now)
    made = replace(
        key,
        id=fresh.id,
        secret_sha256=fresh.secret_sha256,
        created_at=now,
        family=key.family or key.id,
        expires_at=None,
    )
    return made, text


def require_admin(caller: Caller) -> None:
    """Raises Forbidden unless the caller's key is an admin's."""
    if caller.role != "admin":
        raise Forbidden("This needs a key of role 'admin'.", code="admin_required")


def parse(authorization: str | None) -> tuple[str, str]:
    """Key id and secret of an `Authorization: Bearer` header. Raises Unauthorized."""
    scheme, _, text = (authorization or "").partition(" ")
    match = _FORM.fullmatch(text.strip())
    if scheme.lower() != "bearer" or match is None:
        raise Unauthorized("Send your key as 'Authorization: Bearer hr_...'.")
    return match[1], match[2]


@dataclass(slots=True)
class _Found:
    """What the Store said of an id: `key` is None when there is no live one."""

    key: Key | None
    at: float
    caller: Caller | None = None


@dataclass(frozen=True, slots=True)
class _Question:
    """A look-up under way, asked at `at`; a failure is its result, so that none goes unseen."""

    at: float
    answer: asyncio.Task[_Found | ServiceError]


class Door:
    """Turns an `Authorization` header into a Caller.

    Looked-up keys (also unknown ones) are trusted for `key_cache_s`, and known ones for
    `key_stale_s` more while the Store is away or full, so that its restart is not an outage: once
    it is known to be away, one request in `key_cache_s` waits for it, the others that were let in
    before pass, and the rest are refused at once. Requests that need the same look-up share it.
    """

    def __init__(
        self,
        keys: Keys,
        settings: Admission,
        *,
        clock: Callable[[], float],
        wall: Callable[[], float],
    ) -> None:
        """`clock` is monotonic; `wall` gives epoch seconds, for the expiry of keys."""
        self._keys = keys
        self._settings = settings
        self._tiers: Mapping[str, Tier] = settings.tiers
        self._clock = clock
        self._wall = wall
        self._cache: OrderedDict[str, _Found] = OrderedDict()
        self._unknown: OrderedDict[str, _Found] = OrderedDict()
        self._questions: dict[str, _Question] = {}
        self._away_until: float | None = None  # None while the Store answers

    async def caller(self, authorization: str | None) -> Caller:
        """Who sent this.

        Raises Unauthorized, Forbidden (the tenant's tier is not configured, or limits that were
        set for it are not valid any more), StoreUnavailable, Overloaded (the Store's queue).
        """
        key_id, secret = parse(authorization)
        found = await self._find(key_id)
        key = found.key
        known = key.secret_sha256 if key is not None else _NOBODY
        if not hmac.compare_digest(hash_secret(secret), known) or key is None:
            raise Unauthorized("The key is not valid, has expired or has been revoked.")
        if key.expires_at is not None and key.expires_at <= self._wall():
            raise Unauthorized("The key is not valid, has expired or has been revoked.")
        if found.caller is None:
            found.caller = self._caller(key)
        return found.caller

    def retier(self, tiers: Mapping[str, Tier]) -> None:
        """From the next request on these hold, also for keys that were looked up before."""
        self._tiers = tiers
        for found in self._cache.values():
            found.caller = None

    def _caller(self, key: Key) -> Caller:
        tier = self._tiers.get(key.tier)
        if tier is None:
            raise Forbidden(f"Tier {key.tier!r} of this key is not configured here.")
        try:
            return caller_of(key, tier)
        except ValueError:
            raise Forbidden(
                f"The limits that were set for tenant {key.tenant!r} or for this key are not valid "
                f"with tier {key.tier!r} as it is now: an administrator must set them anew.",
                code="limits_not_valid",
            ) from None

    async def _find(self, key_id: str) -> _Found:
        now, trusted_s = self._clock(), self._settings.key_cache_s
        cached = self._cache.get(key_id) or self._unknown.get(key_id)
        age_s = now - cached.at if cached is not None else math.inf
        if cached is not None and age_s < trusted_s:
            return cached
        stale = None
        if cached is not None and cached.key is not None:
            stale = cached if age_s < trusted_s + self._settings.key_stale_s else None
        if self._away_until is not None:
            if now < self._away_until:
                if stale is None:  # a call would last until its timeout, most likely for nothing
                    raise StoreUnavailable("The Store is away.", retry_after_s=trusted_s)
                return stale
            self._away_until = now + trusted_s
        answer = await self._asked(key_id, since=now - trusted_s)
        if isinstance(answer, _Found):
            return answer
        if stale is not None and isinstance(answer, StoreUnavailable | Overloaded):
            return stale
        raise answer

    async def _asked(self, key_id: str, since: float) -> _Found | ServiceError:
        """The Store's answer to a question put after `since`, one at a time for each id."""
        while True:
            question = self._questions.get(key_id)
            if question is None:
                at = self._clock()
                question = _Question(at, asyncio.create_task(self._ask(key_id, at)))
                self._questions[key_id] = question
            # Shielded: a caller who leaves must not take the answer from the others.
            answer = await asyncio.shield(question.answer)
            if question.at > since:
                return answer

    async def _ask(self, key_id: str, at: float) -> _Found | ServiceError:
        try:
            key = await self._keys.find_key(key_id)
        except ServiceError as error:
            if isinstance(error, StoreUnavailable):
                self._away_until = self._clock() + self._settings.key_cache_s
            return error
        finally:
            del self._questions[key_id]
        self._away_until = None
        return self._keep(key_id, key, at)

    def _keep(self, key_id: str, key: Key | None, at: float) -> _Found:
        old = self._cache.get(key_id)
        # An unchanged key keeps its caller: making one costs a validation of all its limits.
        caller = old.caller if old is not None and old.key == key else None
        found = _Found(key, at, caller)
        if key is None:
            self._cache.pop(key_id, None)
            _put(self._unknown, key_id, found, UNKNOWN_IDS_MAX)
        else:
            self._unknown.pop(key_id, None)
            _put(self._cache, key_id, found, self._settings.keys_cached_max)
        return found


def _put(cache: OrderedDict[str, _Found], key_id: str, found: _Found, most: int) -> None:
    cache[key_id] = found
    cache.move_to_end(key_id)
    if len(cache) > most:
        cache.popitem(last=False)
