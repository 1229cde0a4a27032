"""Settings of autoscaling: of embedder pools, workers and the ingress."""

from typing import Self

from pydantic import Field, model_validator

from serve.section import Section


class Autoscaling(Section):
    """Between which bounds, and how fast."""

    min: int = Field(1, ge=1, le=1000, description="Fewest replicas.")
    max: int = Field(ge=1, le=1000, description="Most replicas.")
    up_s: float = Field(
        2, ge=0, le=3600, description="How long more have to be needed before they are started."
    )
    down_s: float = Field(
        60,
        ge=0,
        le=86_400,
        description="How long fewer have to do before one leaves; as many stay as were needed at most in it.",
    )
    stale_s: float = Field(
        15,
        ge=5,
        le=3600,
        description="A figure that is older counts as unknown: nothing leaves because of it.",
    )

    @model_validator(mode="after")
    def _min_is_below_max(self) -> Self:
        if self.min > self.max:
            message = "autoscaling.min must be at most autoscaling.max"
            raise ValueError(message)
        return self


class PoolScaling(Autoscaling):
    """Of a pool: by the time it takes to drain what waits."""

    min: int = Field(
        1,
        ge=0,
        le=1000,
        description="Fewest replicas; 0: the pool sleeps when nothing waits for it, its next call waits for a "
        "start, and readiness does not ask for it.",
    )
    drain_s: float = Field(
        30,
        gt=0,
        le=86_400,
        description="In so many seconds what waits, in replicas and as jobs in the Store, is to be done.",
    )
    idle_s: float = Field(
        300, ge=0, le=86_400, description="With `min` 0: how long the last replica has been idle."
    )


class WorkerScaling(Autoscaling):
    """Of workers: by the items of their stages."""

    items_per_replica: int = Field(
        500, ge=1, le=20_000, description="Items, ready or in work, for which there is one replica."
    )


class IngressScaling(Autoscaling):
    """Of the HTTP door: by requests."""

    requests_per_replica: float = Field(
        64,
        gt=0,
        le=100_000,
        description="Requests at once, event streams included, for which there is one replica.",
    )
