"""What a tier, a tenant or a key may use: limits as an operator writes them.

In `config.yaml` for a tier; in the Store, in the same shape, for a tenant or a key.
"""

import math
from collections.abc import Mapping
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from serve.section import Section


PRESETS: dict[str, dict[str, float]] = {
    "bucket_100_10": {"requests_burst": 100, "requests_per_minute": 10},
}
"""Named quotas: a bucket of 100 requests that refills with 10 a minute."""


class Quota(Section):
    """Limits of one class of work. A limit that is not set does not exist.

    A rate over a window of T minutes lets burst + rate * T pass.
    """

    preset: Literal["bucket_100_10"] | None = Field(
        None, description="Values for what is not set here: 100 requests, refilled with 10/min."
    )
    requests_per_minute: float | None = Field(
        None, ge=1e-3, le=1e9, description="Refill of the request quota."
    )
    requests_burst: int | None = Field(
        None, ge=1, le=10**9, description="Requests that may come at once; default: a minute's."
    )
    tokens_per_minute: float | None = Field(
        None, ge=1e-3, le=1e12, description="Refill of the token quota."
    )
    tokens_burst: int | None = Field(
        None, ge=8, le=10**12, description="Tokens that may come at once; default: a minute's."
    )
    concurrent_max: int | None = Field(
        None, ge=1, le=10**6, description="Requests that may be under way at a time."
    )
    queued_tokens_max: int | None = Field(
        None, ge=8, le=10**9, description="Tokens that may be accepted and not yet answered."
    )

    @model_validator(mode="before")
    @classmethod
    def _fill(cls, values: Any) -> Any:
        """From the preset, and a minute's worth for a burst that is not given."""
        if not isinstance(values, dict):
            return values
        given = {key: value for key, value in values.items() if value is not None}
        for key, value in given.items():
            if key != "preset" and not (isinstance(value, int | float) and math.isfinite(value)):
                message = f"{key} must be a finite number"
                raise ValueError(message)
        filled = {**PRESETS.get(given.get("preset", ""), {}), **given}
        for word, least in (("requests", 1), ("tokens", 8)):
            rate = filled.get(f"{word}_per_minute")
            if rate is not None and f"{word}_burst" not in filled:
                filled[f"{word}_burst"] = max(int(rate), least)
        return filled

    @model_validator(mode="after")
    def _bursts_refill(self) -> Self:
        for word in ("requests", "tokens"):
            if getattr(self, f"{word}_burst") and not getattr(self, f"{word}_per_minute"):
                message = f"{word}_burst needs {word}_per_minute"
                raise ValueError(message)
        return self


class Allowance(Section):
    """What a tenant or a key may use. Class `bulk` (document writes) has limits of its own."""

    interactive: Quota = Field(Quota(), description="Limits of embeddings and searches.")
    bulk: Quota = Field(Quota(), description="Limits of bulk work: document writes.")
    tokens_per_month: int | None = Field(
        None, ge=1, le=10**15, description="Tokens of both classes in a calendar month (UTC)."
    )

    def changed(self, changes: Mapping[str, Any]) -> "Allowance":
        """The same with some limits replaced; a null takes a limit away.

        `changes` has this shape, in parts. Raises ValueError (pydantic's) when it has not.
        """
        whole = self.model_dump(include=set(Allowance.model_fields))
        for key, value in changes.items():
            old = whole.get(key)
            if isinstance(value, Mapping) and isinstance(old, dict):
                old["preset"] = None  # its values are filled in already
                value = {**PRESETS.get(value.get("preset", ""), {}), **value}  # noqa: PLW2901
                for word in ("requests", "tokens"):
                    if f"{word}_per_minute" in value:  # its burst goes with it
                        old.pop(f"{word}_burst")
                whole[key] = {**old, **value}
            else:
                whole[key] = value
        return Allowance.model_validate(whole)


class Tier(Allowance):
    """A tier is a fair-share weight and limits."""

    weight: float = Field(gt=0, le=1000, description="Share of the model among waiting tenants.")
