"""What `serve.flows.ingest` does to documents between their text and their outcome: no I/O."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from serve.config import Settings
from serve.content.chunking import chunk
from serve.content.documents import Document
from serve.errors import BadInput, DeadlineExceeded, Internal, ServiceError
from serve.flows.models import Served
from serve.records import (
    Chunk,
    Collection,
    DocumentVersion,
    Outcome,
    Record,
    TokenIds,
    Vector,
    record_id,
)


Status = Literal["indexed", "superseded", "failed", "deleted", "absent"]


@dataclass(frozen=True, slots=True)
class DocumentResult:
    """What became of one document. `error` is set when `status` is `failed`."""

    document: str
    status: Status
    generation: int = 0
    chunks: int = 0
    tokens: int = 0
    error: ServiceError | None = None


@dataclass(frozen=True, slots=True)
class Prepared:
    """A document cut into chunks, with the token ids the model will see."""

    document: Document
    chunks: tuple[Chunk, ...]
    ids: tuple[TokenIds, ...]

    @property
    def tokens(self) -> int:
        """Tokens over all chunks: what is paid for."""
        return sum(len(row) for row in self.ids)


def prepare(served: Served, document: Document, settings: Settings) -> Prepared:
    """Chunk and tokenise one document; slow, for a thread."""
    prefix = served.model.document_prefix
    room = served.tokens_max - served.tokenizer.special_tokens - served.tokenizer.count(prefix)
    fitting = settings.chunking.fitting(room)
    chunks = tuple(chunk(document.text, served.tokenizer, fitting))
    ids = served.tokenizer.encode([prefix + one.text for one in chunks])
    return Prepared(document, chunks, tuple(ids))


def groups(
    work: Sequence[tuple[Prepared, DocumentVersion]], tokens_max: int
) -> list[list[tuple[Prepared, DocumentVersion]]]:
    """Consecutive documents of at most `tokens_max` together; a larger one goes alone."""
    made: list[list[tuple[Prepared, DocumentVersion]]] = []
    room = 0
    for one, version in work:
        if not made or one.tokens > room:
            made.append([])
            room = tokens_max
        made[-1].append((one, version))
        room -= one.tokens
    return made


def chunk_id(collection: Collection, document: str, ordinal: int) -> str:
    """The record id of a chunk: a repeated write overwrites itself."""
    return record_id(collection.tenant, collection.uuid, document, ordinal, collection.revision)


def records(
    collection: Collection, one: Prepared, version: DocumentVersion, vectors: Vector
) -> list[Record]:
    """A document's chunks as records; `vectors` begins with theirs."""
    return [
        Record(
            id=chunk_id(collection, one.document.id, piece.ordinal),
            document=one.document.id,
            generation=version.generation,
            ordinal=piece.ordinal,
            vector=vectors[position],
            text=piece.text,
            start=piece.start,
            end=piece.end,
            metadata=one.document.metadata,
        )
        for position, piece in enumerate(one.chunks)
    ]


def result(one: Prepared, version: DocumentVersion, outcomes: Sequence[Outcome]) -> DocumentResult:
    """One document's outcome from its records' outcomes: the worst of them."""
    words = {outcome.word: outcome.reason for outcome in outcomes}
    if "rejected" in words:
        error: ServiceError = BadInput(f"The index refused it: {words['rejected']}")
        return failed(one, version, error)
    if "released" in words:
        error = DeadlineExceeded(
            f"It was not written in time. {words['released']}".strip(), retry_after_s=1
        )
        return failed(one, version, error)
    status: Status = "superseded" if "superseded" in words else "indexed"
    return DocumentResult(one.document.id, status, version.generation, len(one.chunks), one.tokens)


def failed(one: Prepared, version: DocumentVersion, error: ServiceError) -> DocumentResult:
    """A document that was not written, and why."""
    return DocumentResult(one.document.id, "failed", version.generation, error=error)


def all_landed(outcomes: Sequence[Outcome]) -> None:
    """Deletes land or are given back. Raises DeadlineExceeded, Internal."""
    for outcome in outcomes:
        if outcome.word == "released":
            raise DeadlineExceeded("The delete was not done in time; repeat it.", retry_after_s=1)
        if outcome.word == "rejected":
            raise Internal(f"The index refused a delete: {outcome.reason}")
