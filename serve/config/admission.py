"""Settings of admission: what a request may ask for, who may, how much, who is next."""

from typing import Literal

from pydantic import Field

from serve.allowance import Quota, Tier
from serve.records import Klass
from serve.section import LIVE, EnvName, Name, Section


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
    vectors_max: int = Field(
        1000, ge=1, le=10_000, description="Raw vectors written, or fetched, by one request."
    )
    vector_text_chars_max: int = Field(
        16_384, ge=0, le=10**6, description="Characters of the text that comes with a raw vector."
    )
    queue_messages_max: int = Field(
        100, ge=1, le=1000, description="Messages of one queue batch (Cloudflare: 100)."
    )
    queue_delay_s_max: int = Field(
        43_200,
        ge=1,
        le=10**6,
        description="Longest delay that a queue is told to retry a message after (Cloudflare: 43,200).",
    )
    rerank_documents_max: int = Field(
        1000, ge=1, le=10_000, description="Documents of one rerank request, or of a search's."
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
        default_factory=_default_tiers,
        min_length=1,
        max_length=16,
        description="Tiers by name.",
        json_schema_extra=LIVE,
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

    redis_url_env: EnvName = Field(
        "",
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
