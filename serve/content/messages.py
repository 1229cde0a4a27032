"""Messages of a queue as they arrive, and which of those about one document counts."""

from collections.abc import Mapping
from dataclasses import dataclass

from serve.content.documents import Document
from serve.content.vectors import RawVector, SentVector
from serve.errors import ServiceError


@dataclass(frozen=True, slots=True)
class Removal:
    """A document or vector to delete."""

    id: str


@dataclass(frozen=True, slots=True)
class Message:
    """One message as a queue delivered it.

    Attributes:
        sent_at: when the queue got it, in epoch seconds of the queue's clock.
        attempts: deliveries so far, this one included.
        body: what it asks for, or why that cannot be read.
    """

    sent_at: float
    attempts: int
    body: Document | SentVector | Removal | ServiceError


Wish = Document | RawVector | Removal
"""What a message asks for, checked."""


def winners(wishes: Mapping[int, Wish], messages: Mapping[int, Message]) -> dict[int, int]:
    """For each message, by its number, the one of its document that was sent last: itself, mostly.

    Of two that were sent in the same millisecond the later number. Raw vectors stand apart from documents
    and deletes: they land in another way, and the Store decides between the two.
    """
    last: dict[tuple[bool, str], int] = {}
    for at in sorted(wishes, key=lambda at: (messages[at].sent_at, at)):
        last[_place(wishes[at])] = at
    return {at: last[_place(wish)] for at, wish in wishes.items()}


def _place(wish: Wish) -> tuple[bool, str]:
    return isinstance(wish, RawVector), wish.id
