"""Settings of canaries: a share of a model's requests goes to another one, to be compared."""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Annotated, Self

from pydantic import Field, model_validator

from serve.config.embedding import Model
from serve.section import Name, Section


ModelId = Annotated[str, Field(min_length=1, max_length=128)]

KEY_CHARS = 16


class Canary(Section):
    """One model that is tried in the place of another, or beside it, on `POST /v1/embeddings` only."""

    model: ModelId = Field(description="Id of the stable model: the one that callers name.")
    to: ModelId = Field(description="Id of the candidate, a model of `pools` as well.")
    enabled: bool = Field(default=True, description="Whether anything is done of what follows.")
    share: float = Field(
        0,
        ge=0,
        le=1,
        description="Share of the requests that the candidate answers; needs `same_vectors`.",
    )
    shadow: float = Field(
        0,
        ge=0,
        le=1,
        description="Share of the requests that the stable model answers and the candidate repeats in the "
        "background, only to be compared; with `share` at most 1.",
    )
    same_vectors: bool = Field(
        default=False,
        description="Whether you say that both make vectors of one space, so that either may answer. It is "
        "checked: by texts of our own before the candidate answers anything and every minute, and by what is "
        "repeated.",
    )
    cosine_min: float = Field(
        0.999,
        ge=0,
        le=1,
        description="With `same_vectors`: one pair of vectors of the same input below it stops the canary. "
        "Floating point of any width keeps 0.999; what is below is another vector space.",
    )
    fallback_max: float = Field(
        0.2,
        ge=0,
        le=1,
        description="A larger share of the candidate's last 50 requests (of 20 at least) that the stable model had "
        "to answer in its place stops the canary.",
    )
    patience_s: float = Field(
        2,
        gt=0,
        le=60,
        description="How long the candidate may take to answer, at most half of the time that a caller has, "
        "before the stable model is asked instead.",
    )
    shadow_inputs_max: int = Field(
        1024,
        ge=1,
        le=100_000,
        description="Inputs that wait for their repetition in an ingress replica; what comes beyond is not repeated.",
    )
    shadows_at_once: int = Field(
        2, ge=1, le=64, description="Requests that an ingress replica repeats at a time."
    )
    tenants: tuple[Name, ...] = Field(
        (),
        max_length=1000,
        description="Whom it applies to, with those of `tiers`; everybody if both are empty.",
    )
    tiers: tuple[Name, ...] = Field(
        (), max_length=64, description="Tiers that it applies to, with the `tenants` named."
    )
    except_tenants: tuple[Name, ...] = Field(
        (), max_length=1000, description="Tenants that it never applies to."
    )
    except_tiers: tuple[Name, ...] = Field(
        (), max_length=64, description="Tiers that it never applies to."
    )

    @model_validator(mode="after")
    def _shares_fit(self) -> Self:
        if self.model == self.to:
            message = f"canary of {self.model}: `to` must be another model"
            raise ValueError(message)
        if self.share + self.shadow > 1:
            message = f"canary of {self.model}: share and shadow must be at most 1 together"
            raise ValueError(message)
        if self.share > 0 and not self.same_vectors:
            message = f"canary of {self.model}: share needs same_vectors, or the candidate's vectors spoil indexes"
            raise ValueError(message)
        return self

    @property
    def key(self) -> str:
        """Names these very settings: figures and stops belong to them."""
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()[:KEY_CHARS]


def check(
    canaries: Sequence[Canary], models: Mapping[str, Model], tiers: Mapping[str, object]
) -> None:
    """Raises ValueError for what names no model or tier, and for two models that cannot take turns."""
    named = [canary.model for canary in canaries]
    if len(set(named)) != len(named):
        message = f"a model has one canary: {named}"
        raise ValueError(message)
    for canary in canaries:
        place = f"canary of {canary.model}"
        for name in (canary.model, canary.to):
            if name not in models or models[name].kind != "embedding":
                message = f"{place}: {name!r} is no model of kind `embedding` in `pools`"
                raise ValueError(message)
        if unknown := {*canary.tiers, *canary.except_tiers} - tiers.keys():
            message = f"{place}: there are no tiers {sorted(unknown)}"
            raise ValueError(message)
        stable, candidate = models[canary.model], models[canary.to]
        if canary.same_vectors and not _may_be_the_same(stable, candidate):
            message = (
                f"{place}: same_vectors needs equal `dimensions`, `matryoshka` if the stable one has it, and int8 of "
                "both or of neither"
            )
            raise ValueError(message)


def _may_be_the_same(stable: Model, candidate: Model) -> bool:
    cut = stable.matryoshka and not candidate.matryoshka
    coarse = (stable.precision == "int8") != (candidate.precision == "int8")
    return stable.dimensions == candidate.dimensions and not cut and not coarse
