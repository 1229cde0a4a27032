"""Settings of search beyond the nearest vectors."""

from pydantic import Field

from serve.section import Section


class Search(Section):
    """How two rankings become one, and one becomes better."""

    candidates: int = Field(
        100,
        ge=1,
        le=10_000,
        description="Hits of each ranking that a hybrid search fuses, unless `top_k` is more.",
    )
    rrf_k: int = Field(
        60,
        ge=1,
        le=10_000,
        description="k of reciprocal rank fusion: a hit at rank r of a ranking gets 1/(k + r). A "
        "larger one lets lower ranks count for more.",
    )
    rerank_candidates: int = Field(
        50,
        ge=1,
        le=10_000,
        description="Hits that a search reranks, unless it says how many, or `top_k` is more.",
    )
    words_max: int = Field(
        256,
        ge=1,
        le=10_000,
        description="Different words of the text of a text or hybrid search; 64 characters for each.",
    )
