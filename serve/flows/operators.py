"""What operators do, over HTTP or on the command line: keys, tenants and the audit log.

Everything is checked here, before it is kept: the tenant's name, the tier, the limits. `by` is who
does it, for the audit log: `key:<id>` or `cli:<user>@<host>`. The hash of a secret goes nowhere.
"""

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast, get_args

from pydantic import TypeAdapter, ValidationError

from serve.admission.keys import new_key, successor
from serve.allowance import Allowance, Tier
from serve.config import Settings
from serve.errors import BadInput, NotFound
from serve.flows.context import new_op
from serve.ports import Keys, Tenants
from serve.records import KLASSES, AuditEntry, Key, Role, Tenant
from serve.section import Name


OVERLAP_S_MAX = 90 * 86_400
"""As the bound of `admission.key_overlap_s`: a rotation that never ends is none."""

KEY_NAME_CHARS_MAX = 128
"""A label for people, shown in lists."""

PAGE_MAX = 1000
"""Keys, tenants or audit entries in one answer, about 300 KB."""

_NAME = TypeAdapter(Name)


@dataclass(frozen=True, slots=True)
class MadeKey:
    """A key and the text its owner sends, which nobody can show again."""

    key: Key
    secret: str = field(repr=False)


class OperatorFlow:
    """Keys, tenants and the audit log. Who may call it is decided by whoever calls it."""

    def __init__(
        self, settings: Settings, keys: Keys, tenants: Tenants, wall: Callable[[], float]
    ) -> None:
        """`wall` gives epoch seconds."""
        self._settings = settings
        self._tiers: Mapping[str, Tier] = settings.admission.tiers
        self._keys = keys
        self._tenants = tenants
        self._wall = wall

    def retier(self, tiers: Mapping[str, Tier]) -> None:
        """What may be given to tenants from now on."""
        self._tiers = tiers

    async def create_key(
        self,
        by: str,
        *,
        tenant: str,
        tier: str | None = None,
        role: str = "user",
        name: str = "",
        limits: Mapping[str, Any] | None = None,
    ) -> MadeKey:
        """Make a key, and its tenant when it is new; a tier is set for all keys of the tenant.

        Raises BadInput (names the field), NotFound (no tier and no such tenant), Conflict (too
        many live keys).
        """
        _check_tenant(tenant)
        _check_key_name(name)
        if tier is not None:
            self._check_tier(tier, await self._tenants.find_tenant(tenant))
        key, secret = new_key(
            tenant,
            tier or "",
            self._wall(),
            role=_role(role),
            name=name,
            limits={} if limits is None else _allowance(limits),
        )
        await self._keys.create_key(new_op(), key, by)
        return MadeKey(_shown(key), secret)

    async def list_keys(
        self, tenant: str | None = None, after: str = "", limit: int = 100
    ) -> Sequence[Key]:
        """Live keys, of one tenant or of all, by id: those after `after`. Raises BadInput."""
        _check_page(limit)
        return [_shown(key) for key in await self._keys.list_keys(tenant, after, limit)]

    async def rotate_key(self, by: str, key_id: str, overlap_s: float | None = None) -> MadeKey:
        """Make a key's successor; the key itself stays live for `overlap_s` (a setting if None).

        Raises BadInput, NotFound, Conflict when another key of its family is live.
        """
        if overlap_s is None:
            overlap_s = self._settings.admission.key_overlap_s
        if not 0 <= overlap_s <= OVERLAP_S_MAX:
            raise BadInput(f"An overlap is 0 to {OVERLAP_S_MAX} seconds.", param="overlap_s")
        old = await self._keys.find_key(key_id)
        if old is None:
            raise NotFound(f"There is no live key {key_id[:64]!r}.", param="id")
        fresh, secret = successor(old, self._wall())
        kept = await self._keys.rotate_key(new_op(), key_id, fresh, overlap_s, by)
        return MadeKey(_shown(kept), secret)

    async def change_key(
        self,
        by: str,
        key_id: str,
        *,
        name: str | None = None,
        limits: Mapping[str, Any] | None = None,
    ) -> Key:
        """Set name and limits of a key's family, where not None; no limits are `{}`.

        Raises BadInput (names the field), NotFound.
        """
        if name is not None:
            _check_key_name(name)
        allowed = None if limits is None else _allowance(limits)
        return _shown(await self._keys.change_key(new_op(), key_id, name, allowed, by))

    async def revoke_key(self, by: str, key_id: str) -> None:
        """End a key at once.

        Raises NotFound; Conflict for the last admin key, unless `by` is on the command line.
        """
        await self._keys.revoke_key(new_op(), key_id, by)

    async def set_tenant(
        self,
        by: str,
        tenant: str,
        *,
        tier: str | None = None,
        limits: Mapping[str, Any] | None = None,
    ) -> Tenant:
        """Make a tenant, or set its tier and what it has instead of the tier's limits.

        `limits` replaces all of what it had; in it a null takes the tier's limit away.
        Raises BadInput (names the field), NotFound (no tier and no such tenant).
        """
        _check_tenant(tenant)
        known = await self._tenants.find_tenant(tenant)
        chosen = None if limits is None else _plain(limits)
        if tier is None and known is None:
            raise NotFound("The tenant is new: it needs a tier.", param="tenant")
        if chosen is None:
            self._check_tier(tier, known)
        else:
            allowance = self._tier(tier or (known.tier if known is not None else ""))
            _named(lambda: allowance.changed(chosen))
        return await self._tenants.set_tenant(new_op(), tenant, tier, chosen, by)

    async def find_tenant(self, tenant: str) -> Tenant:
        """One tenant. Raises NotFound."""
        known = await self._tenants.find_tenant(tenant)
        if known is None:
            raise _unknown(tenant)
        return known

    async def list_tenants(self, after: str = "", limit: int = 100) -> Sequence[Tenant]:
        """Tenants by name, those after `after`. Raises BadInput."""
        _check_page(limit)
        return await self._tenants.list_tenants(after, limit)

    async def audit(
        self, tenant: str | None = None, before: int | None = None, limit: int = 100
    ) -> Sequence[AuditEntry]:
        """Changes, newest first, those with a number below `before`. Raises BadInput."""
        _check_page(limit)
        return await self._tenants.list_audit(tenant, before, limit)

    def _tier(self, tier: str) -> Allowance:
        if tier not in self._tiers:
            known = ", ".join(self._tiers)
            raise BadInput(f"There is no tier {tier[:64]!r}; configured: {known}.", param="tier")
        return self._tiers[tier]

    def _check_tier(self, tier: str | None, known: Tenant | None) -> None:
        """The tier must exist, and what the tenant has instead of its limits must fit it."""
        if tier is None:
            return
        allowance = self._tier(tier)
        if known is None:
            return
        try:
            allowance.changed(known.limits)
        except ValidationError as error:
            where, what = _first(error)
            raise BadInput(
                f"The tenant's own {where} do not fit tier {tier!r} ({what}): set both at once.",
                param="tier",
            ) from None


def _shown(key: Key) -> Key:
    return replace(key, secret_sha256="")


def _unknown(tenant: str) -> NotFound:
    return NotFound(f"There is no tenant {tenant[:64]!r}.", param="tenant")


def _check_tenant(tenant: str) -> None:
    try:
        _NAME.validate_python(tenant, strict=True)
    except ValidationError:
        raise BadInput(
            "A tenant's name has 1 to 63 of a-z 0-9 . _ - and begins with a letter or a digit.",
            param="tenant",
        ) from None


def _role(role: str) -> Role:
    if role not in get_args(Role):
        raise BadInput("A role is 'user' or 'admin'.", param="role")
    return cast("Role", role)


def _check_key_name(name: str) -> None:
    if len(name) > KEY_NAME_CHARS_MAX or not name.isprintable():
        message = f"A key's name has up to {KEY_NAME_CHARS_MAX} printable characters."
        raise BadInput(message, param="name")


def _check_page(limit: int) -> None:
    if not 1 <= limit <= PAGE_MAX:
        raise BadInput(f"A page has 1 to {PAGE_MAX} entries.", param="limit")


def _allowance(limits: Mapping[str, Any]) -> dict[str, Any]:
    """Limits of a key, as they were given. Raises BadInput with the field."""
    plain = _plain(limits)
    _named(lambda: Allowance.model_validate(plain))
    return plain


def _named(validate: Callable[[], Allowance]) -> None:
    """Raises BadInput with the field in place of pydantic's error."""
    try:
        validate()
    except ValidationError as error:
        where, what = _first(error)
        raise BadInput(f"{where}: {what}.", param=where) from None


def _first(error: ValidationError) -> tuple[str, str]:
    """Field and message of the first fault."""
    fault = error.errors()[0]
    return ".".join(["limits", *map(str, fault["loc"])])[:128], fault["msg"]


def _plain(limits: Mapping[str, Any]) -> dict[str, Any]:
    """Only numbers, nulls and presets' names: texts that look like numbers would be kept as texts.

    Raises BadInput with the field.
    """
    if not isinstance(limits, Mapping):
        raise BadInput("Limits are an object.", param="limits")
    for where, value in _leaves(limits):
        # Compared, not converted: a whole number may be larger than any float.
        finite = type(value) in (int, float) and abs(value) <= sys.float_info.max
        if not (value is None or finite or (isinstance(value, str) and where.endswith(".preset"))):
            raise BadInput(f"{where[:128]}: a number or null is expected.", param=where[:128])
    return {
        key: dict(value) if isinstance(value, Mapping) else value for key, value in limits.items()
    }


def _leaves(limits: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for key, value in limits.items():
        if key in KLASSES and isinstance(value, Mapping):
            yield from ((f"limits.{key}.{name}", leaf) for name, leaf in value.items())
        else:
            yield f"limits.{key}", value
