"""What `serve.flows.document_work` does to documents between their text and their outcome: no I/O."""

from dataclasses import dataclass

from serve.config import Settings
from serve.content.chunking import chunk
from serve.content.documents import Document
from serve.flows.models import Served
from serve.records import Chunk, Collection, Record, TokenIds, Vector, record_id


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


def chunk_id(collection: Collection, document: str, ordinal: int) -> str:
    """The record id of a chunk: a repeated write overwrites itself."""
    return record_id(collection.tenant, collection.uuid, document, ordinal, collection.revision)


def records(
    collection: Collection,
    one: Prepared,
    generation: int,
    vectors: Vector,
    *,
    accepted_at: float = 0.0,
) -> list[Record]:
    """A document's chunks as records; `vectors` begins with theirs."""
    return [
        Record(
            id=chunk_id(collection, one.document.id, piece.ordinal),
            document=one.document.id,
            generation=generation,
            ordinal=piece.ordinal,
            vector=vectors[position],
            text=piece.text,
            start=piece.start,
            end=piece.end,
            metadata=one.document.metadata,
            accepted_at=accepted_at,
        )
        for position, piece in enumerate(one.chunks)
    ]
