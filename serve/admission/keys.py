"""API keys: `hr_<id>_<secret>`. The Store keeps the id and the SHA-256 of the secret.

A fast hash is enough because the secret is 256 random bits, not a password: there is no
dictionary to try. Comparison is constant-time, also for an id that does not exist.
"""

import hashlib
import hmac
import math
import re
import secrets
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from serve.config import Admission, Tier
from serve.errors import Forbidden, StoreUnavailable, Unauthorized
from serve.ports import Keys
from serve.records import Caller, Key


_FORM = re.compile(r"hr_([0-9a-f]{16})_([A-Za-z0-9_-]{43})")
_NOBODY = hashlib.sha256(b"no such key").hexdigest()


def hash_secret(secret: str) -> str:
    """What the Store keeps of a secret."""
    return hashlib.sha256(secret.encode()).hexdigest()


def new_key(tenant: str, tier: str, now: float) -> tuple[Key, str]:
    """A fresh key and the text that its owner sends; the text is shown once and never kept."""
    key_id, secret = secrets.token_hex(8), secrets.token_urlsafe(32)
    return Key(key_id, tenant, tier, hash_secret(secret), now), f"hr_{key_id}_{secret}"


def parse(authorization: str | None) -> tuple[str, str]:
    """Key id and secret of an `Authorization: Bearer` header. Raises Unauthorized."""
    scheme, _, text = (authorization or "").partition(" ")
    match = _FORM.fullmatch(text.strip())
    if scheme.lower() != "bearer" or match is None:
        raise Unauthorized("Send your key as 'Authorization: Bearer hr_...'.")
    return match[1], match[2]


@dataclass(slots=True)
class _Cached:
    key: Key | None
    at: float


class Door:
    """Turns an `Authorization` header into a Caller.

    Looked-up keys (also unknown ones) are trusted for `key_cache_s`, and known ones for
    `key_stale_s` more while the Store is away, so that a restart of the Store is not an outage:
    once it is known to be away, one request in `key_cache_s` waits for it and the others pass.
    """

    def __init__(
        self,
        keys: Keys,
        settings: Admission,
        *,
        clock: Callable[[], float],
    ) -> None:
        self._keys = keys
        self._settings = settings
        self._tiers: Mapping[str, Tier] = settings.tiers
        self._clock = clock
        self._cache: OrderedDict[str, _Cached] = OrderedDict()
        self._away_until: float | None = None  # None while the Store answers

    async def caller(self, authorization: str | None) -> Caller:
        """Who sent this.

        Raises Unauthorized, Forbidden (the tenant's tier is not configured), StoreUnavailable.
        """
        key_id, secret = parse(authorization)
        key = await self._find(key_id)
        known = key.secret_sha256 if key is not None else _NOBODY
        if not hmac.compare_digest(hash_secret(secret), known) or key is None:
            raise Unauthorized("The key is not valid, or has been revoked.")
        tier = self._tiers.get(key.tier)
        if tier is None:
            raise Forbidden(f"Tier {key.tier!r} of this key is not configured here.")
        return Caller(key.tenant, key.tier, tier.weight, key.id)

    async def _find(self, key_id: str) -> Key | None:
        now, trusted_s = self._clock(), self._settings.key_cache_s
        cached = self._cache.get(key_id)
        age_s = now - cached.at if cached is not None else math.inf
        if cached is not None and age_s < trusted_s:
            return cached.key
        stale = None
        if cached is not None and age_s < trusted_s + self._settings.key_stale_s:
            stale = cached.key
        if self._away_until is not None:
            if stale is not None and now < self._away_until:
                return stale
            self._away_until = now + trusted_s
        try:
            key = await self._keys.find_key(key_id)
        except StoreUnavailable:
            self._away_until = self._clock() + trusted_s
            if stale is not None:
                return stale
            raise
        self._away_until = None
        self._keep(key_id, _Cached(key, now))
        return key

    def _keep(self, key_id: str, found: _Cached) -> None:
        self._cache[key_id] = found
        self._cache.move_to_end(key_id)
        while len(self._cache) > self._settings.keys_cached_max:
            self._cache.popitem(last=False)
