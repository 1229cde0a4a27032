"""Settings: the `args` of `config.yaml`, in its order; each section stands with its kind. Only limits
are elsewhere (`serve.allowance`), because tenants and keys in the Store have them, too.

Unknown keys are refused, every field has a description and bounds, and nothing here reads the
environment: a field that needs a secret holds the *name* of a variable. `docs/config.md` is
generated from them (`python -m deployments.config_docs`).
"""

from pathlib import Path
from typing import Self

from pydantic import Field, model_validator

from serve.config import canaries as canary_rules
from serve.config.admission import Admission, Ledger, Limits
from serve.config.canaries import Canary
from serve.config.egress import Egress, Webhooks
from serve.config.embedding import (
    Batch,
    Cache,
    Chunking,
    Model,
    ModelKind,
    Pool,
    Precision,
    default_pools,
)
from serve.config.index import Buffer, Index
from serve.config.jobs import Files, Jobs, Store
from serve.config.processes import Actors, Ingress, Logs, UsageEvents, Worker
from serve.config.scaling import Autoscaling, IngressScaling, PoolScaling, WorkerScaling
from serve.config.search import Search
from serve.section import LIVE, Section


__all__ = [
    "Actors",
    "Admission",
    "Autoscaling",
    "Batch",
    "Buffer",
    "Cache",
    "Canary",
    "Chunking",
    "Egress",
    "Files",
    "Index",
    "Ingress",
    "IngressScaling",
    "Jobs",
    "Ledger",
    "Limits",
    "Logs",
    "Model",
    "ModelKind",
    "Pool",
    "PoolScaling",
    "Precision",
    "Search",
    "Settings",
    "Store",
    "UsageEvents",
    "Webhooks",
    "Worker",
    "WorkerScaling",
]


class Settings(Section):
    """All of it."""

    data_dir: str = Field(
        "data",
        min_length=1,
        description="Folder of everything durable; relative to where the cluster was started.",
    )
    limits: Limits = Field(default=Limits(), description="What one request may ask for.")
    admission: Admission = Field(default=Admission(), description="Tiers, shares and keys.")
    ledger: Ledger = Field(default=Ledger(), description="How limits are shared out.")
    pools: tuple[Pool, ...] = Field(
        default_factory=default_pools, min_length=1, max_length=16, description="Models."
    )
    canaries: tuple[Canary, ...] = Field(
        (),
        max_length=16,
        description="Models that are tried in the place of others.",
        json_schema_extra=LIVE,
    )
    ingress: Ingress = Field(default=Ingress(), description="The HTTP door.")
    cache: Cache = Field(default=Cache(), description="What is not computed twice.")
    chunking: Chunking = Field(default=Chunking(), description="How documents are cut.")
    index: Index = Field(default=Index(), description="Where vectors land.")
    search: Search = Field(default=Search(), description="How searches rank.")
    buffer: Buffer = Field(default=Buffer(), description="How writes wait for a bulk upsert.")
    store: Store = Field(default=Store(), description="The SQL store.")
    jobs: Jobs = Field(default=Jobs(), description="Durable jobs.")
    files: Files = Field(default=Files(), description="Files of tenants and batches.")
    workers: tuple[Worker, ...] = Field(
        default=(Worker(),), min_length=1, max_length=16, description="Who works on items."
    )
    egress: Egress = Field(default=Egress(), description="Requests to URLs that tenants wrote.")
    webhooks: Webhooks = Field(default=Webhooks(), description="Who is told of the ends of jobs.")
    actors: Actors = Field(default=Actors(), description="The named actors.")
    logs: Logs = Field(default=Logs(), description="Lines of the log.")
    usage_events: UsageEvents = Field(
        default=UsageEvents(), description="Usage as events for billing and analytics."
    )

    @model_validator(mode="after")
    def _names_are_unique(self) -> Self:
        pools = [pool.name for pool in self.pools]
        models = [model.id for pool in self.pools for model in pool.models]
        workers = [worker.name for worker in self.workers]
        for word, names in (("pool", pools), ("model", models), ("worker", workers)):
            if len(set(names)) != len(names):
                message = f"{word} names must be unique: {names}"
                raise ValueError(message)
        return self

    @model_validator(mode="after")
    def _something_embeds(self) -> Self:
        if all(model.kind == "reranker" for model in self.models.values()):
            message = "at least one model must be of kind `embedding`"
            raise ValueError(message)
        return self

    @model_validator(mode="after")
    def _canaries_fit(self) -> Self:
        canary_rules.check(self.canaries, self.models, self.admission.tiers)
        return self

    @model_validator(mode="after")
    def _sends_have_connections(self) -> Self:
        if self.webhooks.sends_max > self.egress.connections_max:
            message = "webhooks.sends_max must be at most egress.connections_max"
            raise ValueError(message)
        return self

    @model_validator(mode="after")
    def _stages_are_worked_on(self) -> Self:
        served = {stage for worker in self.workers for stage in worker.stages}
        if missing := {"prepare", "embed"} - served:
            message = f"no worker has the stages {sorted(missing)}: jobs would wait for ever"
            raise ValueError(message)
        return self

    def under(self, data_dir: Path) -> Self:
        """The same with another `data_dir`, absolute, and with the folders of every pool in it."""
        folder = data_dir.resolve()
        pools = (
            pool.model_copy(
                update={
                    "graphs": str(folder / pool.graphs),
                    "profiles": str(folder / pool.profiles),
                }
            )
            for pool in self.pools
        )
        return self.model_copy(update={"data_dir": str(folder), "pools": tuple(pools)})

    @property
    def scales(self) -> bool:
        """Whether anything grows and shrinks by itself."""
        return any(one.autoscaling is not None for one in self.deployments.values())

    @property
    def deployments(self) -> dict[str, Ingress | Pool | Worker]:
        """Whatever has replicas, by the name that Ray Serve knows it by."""
        return {
            "ingress": self.ingress,
            **{f"worker-{worker.name}": worker for worker in self.workers},
            **{f"embedder-{pool.name}": pool for pool in self.pools},
        }

    @property
    def models(self) -> dict[str, Model]:
        """Every model of every pool, by id."""
        return {model.id: model for pool in self.pools for model in pool.models}
