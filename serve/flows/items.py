"""Documents as items of a job: what a worker needs of a write or a delete, and what it costs.

The hash is over all that shapes what lands in the index. Where it is the landed one's, there is
nothing to do.
"""

import hashlib
import json

from serve.config import Settings
from serve.content.documents import Document
from serve.flows.models import Served
from serve.items import SENT, VERSION, NewItem


CHARS_PER_TOKEN = 4
"""Of English text, by the tokenizers of the served kind: the estimate until a worker has counted."""

ITEM_TOKENS = 32.0
"""Added to each item's cost for its fixed work, like `batch.item_overhead_tokens` for an input."""


def document_item(
    served: Served, settings: Settings, document: Document, sent_at: float | None = None
) -> NewItem:
    """The write of a document in a collection of this model. Slow for long texts: for a thread.

    `sent_at` as in `SENT`.
    """
    return NewItem(
        name=document.id,
        task="document",
        stage="prepare",
        cost=len(document.text) / CHARS_PER_TOKEN + ITEM_TOKENS,
        payload={"text": document.text, "metadata": dict(document.metadata)} | _sent(sent_at),
        sha256=content_sha256(served, settings, document),
    )


def delete_item(
    document: str, generation: int | None = None, sent_at: float | None = None
) -> NewItem:
    """The delete of a document: nothing to prepare, the stage that lands does it.

    With a generation only what is not newer than that goes: what somebody saw who chose it.
    `sent_at` as in `SENT`.
    """
    payload = ({} if generation is None else {VERSION: generation}) | _sent(sent_at)
    return NewItem(name=document, task="delete", stage="embed", cost=ITEM_TOKENS, payload=payload)


def _sent(sent_at: float | None) -> dict[str, float]:
    return {} if sent_at is None else {SENT: sent_at}


def content_sha256(served: Served, settings: Settings, document: Document) -> str:
    """SHA-256 of a document's text and metadata, and of how they become vectors."""
    shaping = {
        "revision": served.revision,
        "prefix": served.model.document_prefix,
        "tokens_max": served.tokens_max,
        "chunking": settings.chunking.model_dump(mode="json"),
        "text": document.text,
        "metadata": dict(document.metadata),
    }
    canonical = json.dumps(shaping, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(canonical.encode()).hexdigest()
