"""Settings of durable work: the Store, jobs, files."""

from typing import Self

from pydantic import Field, model_validator

from serve.section import EnvName, Section


class Store(Section):
    """The SQL Store: tenants, keys, collections, generations, jobs, files, webhooks."""

    path: str = Field("store.db", min_length=1, description="SQLite file, under `data_dir`.")
    url_env: EnvName = Field(
        "",
        description="Name of the environment variable with the URL of a Postgres that is used "
        "instead (`postgresql://...`), from every process; empty: the SQLite file.",
    )
    connections: int = Field(
        4, ge=1, le=100, description="Connections of one process to that Postgres."
    )
    commit_ops_max: int = Field(
        256, ge=1, le=10_000, description="Operations that share one commit."
    )
    queue_max: int = Field(10_000, ge=1, le=10**6, description="Operations that may wait.")
    lock_wait_s: float = Field(
        60, gt=0, le=600, description="How long a successor waits for its predecessor's lock."
    )
    operations_kept_s: float = Field(
        3600, ge=60, le=10**6, description="How long results of operations are kept for repeats."
    )
    keys_max: int = Field(100, ge=1, le=10_000, description="Live keys of one tenant.")
    audit_kept_s: float = Field(
        365 * 86_400,
        ge=86_400,
        le=20 * 365 * 86_400,
        description="How long the audit log keeps an entry.",
    )


class Jobs(Section):
    """Durable jobs, and how their items are tried."""

    items_max: int = Field(
        1000, ge=1, le=10_000, description="Items of one job that are sent with the request."
    )
    background_items: int = Field(
        50,
        ge=0,
        le=10_000,
        description="A write of more documents is not waited for, unless its caller says so.",
    )
    open_jobs_max: int = Field(1000, ge=1, le=10**6, description="Open jobs of one tenant.")
    open_items_max: int = Field(
        1_000_000, ge=1, le=10**8, description="Items of a tenant's open jobs."
    )
    open_tokens_max: float = Field(
        5e8, ge=1, le=1e12, description="Estimated tokens of a tenant's open jobs."
    )
    expires_s_max: float = Field(
        30 * 86_400, ge=60, le=365 * 86_400, description="Longest time a job may ask for."
    )
    kept_s: float = Field(
        30 * 86_400, ge=60, le=365 * 86_400, description="How long an ended job can be seen."
    )
    idempotency_kept_s: float = Field(
        86_400, ge=60, le=30 * 86_400, description="How long an Idempotency-Key holds."
    )
    lease_s: float = Field(
        15, ge=1, le=600, description="A worker that is silent for so long has lost its items."
    )
    heartbeat_s: float = Field(
        5, gt=0, le=300, description="How often a worker says that it lives."
    )
    tick_s: float = Field(
        1, gt=0, le=60, description="How often the Store looks for what is due or was lost."
    )
    attempts_max: int = Field(5, ge=1, le=100, description="Tries of an item that fails.")
    crashes_max: int = Field(
        10, ge=2, le=1000, description="Workers that may die with an item before it is given up."
    )
    retry_s: float = Field(60, gt=0, le=86_400, description="Pause after the first failed try.")
    retry_factor: float = Field(
        4.356, ge=1, le=100, description="Each further pause is so many times longer."
    )
    retry_s_max: float = Field(21_600, gt=0, le=30 * 86_400, description="Longest such pause.")
    streams_max: int = Field(
        20,
        ge=1,
        le=10_000,
        description="Event streams and downloads of one tenant in one ingress replica.",
    )
    stream_s: float = Field(
        285,
        gt=0,
        le=3600,
        description="An event stream ends after this, before Serve's `request_timeout_s`; its "
        "reader comes again.",
    )
    stats_s: float = Field(
        5, gt=0, le=300, description="How old figures of `/v1/stats` may be, and how often told."
    )

    @model_validator(mode="after")
    def _heartbeat_is_shorter(self) -> Self:
        if self.heartbeat_s * 2 > self.lease_s:
            message = "jobs.heartbeat_s must be at most half of jobs.lease_s"
            raise ValueError(message)
        return self

    @model_validator(mode="after")
    def _keys_end_before_their_jobs(self) -> Self:
        if self.idempotency_kept_s > self.kept_s:
            message = "jobs.idempotency_kept_s must be at most jobs.kept_s"
            raise ValueError(message)
        return self


class Files(Section):
    """Files that tenants upload, and those that batches write."""

    folder: str = Field(
        "blobs",
        min_length=1,
        description="Folder of their bytes, under `data_dir`: the same for ingress and workers.",
    )
    bytes_max: int = Field(
        200 * 2**20, ge=1024, le=2**34, description="Bytes of one file (OpenAI: 200 MB)."
    )
    lines_max: int = Field(
        50_000, ge=1, le=50_000, description="Requests of one batch file (OpenAI: 50,000)."
    )
    inputs_max: int = Field(
        50_000,
        ge=1,
        le=10**6,
        description="Inputs over all requests of one batch file (OpenAI: 50,000).",
    )
    tenant_files_max: int = Field(
        10_000, ge=1, le=10**6, description="Files that one tenant may have uploaded."
    )
    tenant_bytes_max: int = Field(
        20 * 2**30, ge=1024, le=2**50, description="Bytes of them in all."
    )
    kept_s: float = Field(
        30 * 86_400,
        ge=3600,
        le=30 * 86_400,
        description="How long a file is kept, unless its upload or its batch says less.",
    )
    tidy_s: float = Field(
        600, gt=0, le=86_400, description="How often a worker removes what has expired."
    )
