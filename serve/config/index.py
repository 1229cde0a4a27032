"""Settings of landing: the index, and the buffer in front of it."""

import re
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from serve.section import EnvName, Section


BUCKET_URI = re.compile(r"(s3|gs|az)://[A-Za-z0-9][A-Za-z0-9._-]*(/[^?#]*)?")
OptionName = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]{0,63}$")]


class Lance(Section):
    """LanceDB, in a folder or an object store."""

    exact: bool = Field(
        default=False, description="Compare all vectors in each search; no ANN index is built."
    )
    ann_rows_min: int = Field(
        20_000,
        ge=2,
        le=10**9,
        description="From so many records a collection gets an ANN index (IVF_SQ); with fewer, "
        "searches are exact.",
    )
    partition_rows: int = Field(
        8192, ge=2, le=10**6, description="Records of a partition of the ANN index, about."
    )
    probes: int = Field(
        20,
        ge=1,
        le=10_000,
        description="Partitions that a search reads: recall for time. Under a filter it reads all.",
    )
    refine: int = Field(
        4,
        ge=1,
        le=100,
        description="Candidates of a search, in `top_k`s, whose whole vectors are compared in the end.",
    )
    build_s_max: float = Field(
        3600, ge=1, le=7 * 86_400, description="Longest build of one index, beside everything else."
    )
    read_s: float = Field(
        2,
        ge=0,
        le=60,
        description="In an object store: how often a reader looks for new versions of a table; 0: at "
        "each read, which costs a request.",
    )
    index_cache_bytes: int = Field(
        2**30,
        ge=2**20,
        le=2**40,
        description="What each process keeps in memory of ANN and full-text indexes: of 1,000 records "
        "of 384 dimensions 0.4 MB.",
    )
    metadata_cache_bytes: int = Field(
        2**28,
        ge=2**20,
        le=2**40,
        description="What each process keeps in memory of the descriptions of tables and their files.",
    )
    storage_env: dict[OptionName, Annotated[EnvName, Field(min_length=1)]] = Field(
        default={},
        max_length=32,
        description="Options of the object store, each with the name of the environment variable that "
        "holds its value.",
    )


class Pgvector(Section):
    """A Postgres with the extension pgvector, 0.8 or later, as the index."""

    url_env: EnvName = Field(
        "",
        description="Name of the environment variable with its URL (`postgresql://...`); it may be "
        "that of `store.url_env`.",
    )
    schema_name: str = Field(
        "headrace_index",
        pattern=r"^[a-z_][a-z0-9_]{0,62}$",
        description="Schema of the tables, one a collection; made when it is missing.",
    )
    connections: int = Field(4, ge=1, le=100, description="Connections of one process, at most.")
    statement_s_max: float = Field(
        20, ge=0.1, le=600, description="Longest statement, and longest wait for a connection."
    )
    hnsw_rows_min: int = Field(
        20_000,
        ge=1,
        le=10**9,
        description="From so many records a collection gets an HNSW index; with fewer, searches "
        "are exact.",
    )
    m: int = Field(16, ge=2, le=100, description="Links of a node of the HNSW index.")
    ef_construction: int = Field(
        64, ge=4, le=1000, description="Candidates while the index is built, at least twice `m`."
    )
    ef_search: int = Field(80, ge=1, le=1000, description="Candidates of a search in the index.")
    build_s_max: float = Field(
        3600, ge=1, le=7 * 86_400, description="Longest build of one index, beside everything else."
    )
    build_bytes_max: int = Field(
        256 * 2**20,
        ge=2**20,
        le=2**40,
        description="Memory of the server for a build (`maintenance_work_mem`). A graph that does "
        "not fit takes many times longer.",
    )

    @model_validator(mode="after")
    def _candidates_suffice(self) -> Self:
        if self.ef_construction < 2 * self.m:
            message = "index.pgvector.ef_construction must be at least twice index.pgvector.m"
            raise ValueError(message)
        return self


class Pinecone(Section):
    """One Pinecone index, of which each collection is a namespace. Limits are the vendor's."""

    host: str = Field(
        "",
        max_length=300,
        pattern=r"^((https://)?[A-Za-z0-9.-]+(:\d{1,5})?|http://(127\.0\.0\.1|localhost)(:\d{1,5})?)?$",
        description="Host of the index, as Pinecone's console shows it; `http://` to this machine only.",
    )
    api_key_env: EnvName = Field(
        "PINECONE_API_KEY",
        min_length=1,
        description="Name of the environment variable with the API key.",
    )
    deadline_s: float = Field(
        20, gt=0, le=300, description="Longest write or read, with the retries inside the SDK."
    )
    max_items: int = Field(1000, ge=1, le=1000, description="Records of one request.")
    max_bytes: int = Field(
        2 * 2**20, ge=2**17, le=2**26, description="Bytes of one request, as they are sent."
    )
    max_dim: int = Field(20_000, ge=1, le=100_000, description="Longest vector it takes.")
    metadata_bytes_max: int = Field(
        40 * 2**10,
        ge=1024,
        le=2**20,
        description="Bytes of one record beside id and vector, as they are sent.",
    )
    upserts_s: float = Field(
        100, gt=0, le=10**5, description="Upsert requests per second and namespace."
    )
    upsert_bytes_s: float = Field(
        50e6, ge=2**17, le=1e11, description="Upserted bytes per second and namespace."
    )
    deletes_s: float = Field(
        100, gt=0, le=10**5, description="Delete requests per second and namespace."
    )
    delete_ids_s: float = Field(
        5000, ge=1, le=10**7, description="Deleted ids per second and namespace."
    )
    fetches_s: float = Field(
        100, gt=0, le=10**5, description="Fetch requests per second, of one process."
    )
    fetch_before_upsert: bool = Field(
        default=True,
        description="Fetch what is held before each upsert, so that nothing replaces a higher generation.",
    )
    ids_tracked_max: int = Field(
        50_000,
        ge=0,
        le=10**7,
        description="Records whose last write the writer remembers, since fetches lag behind.",
    )
    namespaces_tracked_max: int = Field(
        10_000, ge=1, le=10**6, description="Namespaces whose drop is remembered."
    )


class Qdrant(Section):
    """A Qdrant server or cluster, 1.16 or newer: one Qdrant collection for each of ours."""

    url: str = Field(
        "http://127.0.0.1:6333",
        pattern=r"^https?://[^\s/?#@]+(/[^\s?#@]*)?$",
        max_length=2048,
        description="Where its REST API is; without a port it is 6333, also for https.",
    )
    api_key_env: EnvName = Field(
        "",
        description="Name of the environment variable with its API key, which must be allowed to "
        "manage collections; empty: none.",
    )
    prefix: str = Field(
        "headrace-",
        pattern=r"^[A-Za-z0-9_-]{0,64}$",
        description="What the names of our collections in it start with.",
    )
    timeout_s: int = Field(20, ge=1, le=600, description="Longest wait for a part of a reply.")
    request_bytes_max: int = Field(
        32 * 2**20,
        ge=2**16,
        le=2**30,
        description="Bytes of one request; its own limit is `service.max_request_size_mb`.",
    )
    scan_rows: int = Field(500, ge=1, le=10_000, description="Records of one part of a scan.")
    exact: bool = Field(
        default=False, description="Compare all vectors in each search, whatever the graph says."
    )
    hnsw_ef: int = Field(
        128, ge=1, le=10_000, description="Candidates a search of the graph keeps: recall for time."
    )
    hnsw_m: int = Field(
        16, ge=0, le=256, description="Edges of a vector in the graph of new collections; 0: none."
    )
    hnsw_ef_construct: int = Field(
        100, ge=4, le=10_000, description="Candidates while the graph of new collections is built."
    )
    on_disk: bool = Field(
        default=False, description="Keep vectors of new collections on disk, not in memory."
    )
    shards: int = Field(1, ge=1, le=1024, description="Shards of new collections.")
    replicas: int = Field(
        1, ge=1, le=64, description="Copies of new collections; most must take a write."
    )
    ordering: Literal["weak", "medium", "strong"] = Field(
        "medium", description="Through which copy writes go: any, a leader, the permanent leader."
    )


class Index(Section):
    """Where vectors land."""

    backend: Literal["lancedb", "pgvector", "qdrant", "pinecone"] = Field(
        "lancedb", description="What keeps the vectors."
    )
    uri: str = Field(
        "index",
        min_length=1,
        max_length=1024,
        description="Where LanceDB keeps tables: a folder under `data_dir`, or `s3://BUCKET/PREFIX`, "
        "`gs://…`, `az://…`.",
    )
    compact_commits: int = Field(
        64, ge=2, le=10_000, description="Compact a table after this many commits."
    )
    compact_rest_s: float = Field(
        10,
        gt=0,
        le=86_400,
        description="Compact a table after eight commits if it was not written to for so long.",
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
    probe_s: float = Field(
        0.5,
        gt=0,
        le=60,
        description="How often an index whose searches lag behind its writes is asked how far they see, "
        "per collection that somebody waits for, and process.",
    )
    lancedb: Lance = Field(
        default=Lance(), description="With `backend: lancedb`: searches, and the object store."
    )
    pgvector: Pgvector = Field(
        default=Pgvector(), description="With `backend: pgvector`: Postgres as the index."
    )
    qdrant: Qdrant = Field(
        default=Qdrant(), description="With `backend: qdrant`: a Qdrant server or cluster."
    )
    pinecone: Pinecone = Field(
        default=Pinecone(), description="With `backend: pinecone`: an index of Pinecone."
    )

    @property
    def remote(self) -> bool:
        """Whether `uri` is an object store's."""
        return "://" in self.uri

    @model_validator(mode="after")
    def _an_object_store_is_whole(self) -> Self:
        if self.remote and not BUCKET_URI.fullmatch(self.uri):
            message = "index.uri must be a folder, or s3://, gs:// or az:// and BUCKET/PREFIX"
            raise ValueError(message)
        if self.lancedb.storage_env and not self.remote:
            message = "index.lancedb.storage_env is for an object store: index.uri is a folder"
            raise ValueError(message)
        if self.remote and self.keep_versions_s < 10 * self.lancedb.read_s:
            message = "index.keep_versions_s must be at least ten times index.lancedb.read_s"
            raise ValueError(message)
        return self

    @model_validator(mode="after")
    def _a_server_has_an_address(self) -> Self:
        if self.backend == "pgvector" and not self.pgvector.url_env:
            message = "index.pgvector.url_env must name a variable: index.backend is pgvector"
            raise ValueError(message)
        if self.backend == "pinecone" and not self.pinecone.host:
            message = "index.pinecone.host must name the index that backend `pinecone` writes to"
            raise ValueError(message)
        return self


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
    tenant_writes_max: int = Field(
        25_000, ge=1, le=10**7, description="Writes of one tenant that it holds."
    )
    tenant_bytes_max: int = Field(
        128 * 2**20, ge=2**20, le=2**36, description="Estimated bytes of them."
    )
    soft_fill: float = Field(
        0.5,
        gt=0,
        le=1,
        description="From this part of these four bounds on, workers take no more work that lands.",
    )
    lanes_max: int = Field(10_000, ge=1, le=10**6, description="Collections with waiting writes.")
    upkeep_s: float = Field(
        5,
        gt=0,
        le=3600,
        description="How often the index tidies up, beside after each flush: LanceDB compacts.",
    )
    flush_writes_max: int | None = Field(
        None,
        ge=1,
        le=10**6,
        description="Writes of one flush, at most; null: as many as the index takes. `1`: single writes.",
    )
    flushes_max: int = Field(
        2,
        ge=1,
        le=64,
        description="Bulk upserts in flight at once, at most; halved while the index is too busy.",
    )
    flushes_s: float = Field(
        1000, gt=0, le=10**6, description="Bulk upserts per second, of all collections."
    )
    bytes_s: float = Field(
        10**9, ge=2**17, le=10**12, description="Estimated bytes of them per second."
    )
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

    @model_validator(mode="after")
    def _ages_are_in_order(self) -> Self:
        if not self.age_s_min <= self.age_s_start <= self.age_s_max:
            message = "buffer.age_s_start must lie between buffer.age_s_min and buffer.age_s_max"
            raise ValueError(message)
        return self
