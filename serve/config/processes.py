"""Settings of processes: the door, workers, named actors."""

from typing import Literal

from pydantic import Field

from serve.config.scaling import IngressScaling, WorkerScaling
from serve.section import LIVE, Name, Section


class Ingress(Section):
    """The HTTP door."""

    replicas: int = Field(
        1,
        ge=1,
        le=1000,
        description="Ingress replicas, unless `autoscaling` is given; while the Ledger is away each enforces "
        "1/replicas of a limit.",
    )
    autoscaling: IngressScaling | None = Field(
        None, description="By open requests; absent: `replicas`."
    )
    requests_max: int = Field(
        512, ge=8, le=100_000, description="Requests a replica works on at once."
    )
    exports_max: int = Field(
        4,
        ge=1,
        le=10_000,
        description="Exports of collections that a replica sends at once; each may hold 150 MB.",
    )
    tenant_exports_max: int = Field(
        2, ge=1, le=10_000, description="Those of one tenant in one ingress replica."
    )
    slice_tokens: int = Field(
        16_384,
        ge=256,
        le=10**7,
        description="A request above this is cut into calls of this size, spread over replicas.",
    )
    slices_in_flight_max: int = Field(
        4, ge=1, le=256, description="Calls of one request that run at once."
    )
    tokens_per_s_min: float = Field(
        500,
        gt=0,
        le=1e9,
        description="Slowest pace at which a call's own work may go before it counts as lost.",
    )
    tokenizer_threads: int = Field(2, ge=1, le=64, description="Threads that tokenise.")
    drain_s: float = Field(
        300,
        gt=0,
        le=3600,
        description="How long a replica that leaves may take for its last requests; without any it goes at "
        "once. As long as Serve's `request_timeout_s`.",
    )

    @property
    def replicas_max(self) -> int:
        """Most replicas that there may be."""
        return self.replicas if self.autoscaling is None else self.autoscaling.max


class Worker(Section):
    """One deployment that works on items of some stages."""

    name: Name = Field("items", description="Its deployment is `worker-NAME`.")
    stages: tuple[Literal["prepare", "predict", "embed"], ...] = Field(
        ("prepare", "embed"), min_length=1, max_length=3, description="Stages it claims from."
    )
    replicas: int = Field(
        1, ge=1, le=1000, description="Worker replicas, unless `autoscaling` is given."
    )
    autoscaling: WorkerScaling | None = Field(
        None, description="By items of its stages; absent: `replicas`."
    )
    items_max: int = Field(64, ge=1, le=500, description="Items of one claim.")
    cost_max: float = Field(
        16_384,
        ge=1,
        le=1e9,
        description="Estimated tokens of one claim, if it is more than one item.",
    )
    claims_max: int = Field(
        2, ge=1, le=64, description="Claims of one stage that a replica works on at once."
    )
    drain_s: float = Field(
        30, gt=0, le=600, description="How long a replica that leaves may finish what it has."
    )

    @property
    def replicas_max(self) -> int:
        """Most replicas that there may be."""
        return self.replicas if self.autoscaling is None else self.autoscaling.max


class Logs(Section):
    """What processes of ours write to stderr. Ray Serve's own lines: `logging_config` of the deploy file."""

    encoding: Literal["text", "json"] = Field(
        "text",
        description="`json`: an object a line, with the ids of request and trace where there are some.",
    )
    level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = Field(
        "WARNING",
        description="The least that is written, as JSON; the named actors keep that of their start.",
        json_schema_extra=LIVE,
    )


class UsageEvents(Section):
    """What each key used, as CloudEvents for billing and analytics. Every `ledger.usage_flush_s` a line for each key, class,
    operation, model and outcome that there was.
    """

    sink: Literal["none", "stderr", "folder"] = Field(
        "none", description="Where ingress and workers write them, as lines of JSON."
    )
    folder: str = Field(
        "usage",
        min_length=1,
        description="With `folder`: under `data_dir`, unless absolute. A file for each hour and process.",
    )
    keep_days: float = Field(7, gt=0, le=3660, description="Then files are deleted.")
    bytes_max: int = Field(
        10 * 2**30,
        ge=2**20,
        le=2**50,
        description="Of all files together, but for an hour's growth: the oldest are deleted.",
    )


class Actors(Section):
    """The named actors: Store owner, Upserter and Ledger."""

    call_timeout_s: float = Field(
        10, gt=0, le=600, description="Longest wait for a short call to an actor."
    )
    orphan_grace_s: float = Field(
        60,
        ge=5,
        le=86_400,
        description="An actor whose application is gone ends after this; longer than a redeploy.",
    )
    drain_s: float = Field(30, gt=0, le=600, description="Flush deadline when the writer leaves.")
