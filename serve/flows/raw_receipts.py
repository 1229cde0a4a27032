"""Receipts of raw vectors: all that there is to know stands in the id, so that nothing is kept of them.

Who changes an id deceives only himself: it says nothing but where searches must have come to in a
collection, and whose that is the Store knows.
"""

from base64 import urlsafe_b64decode, urlsafe_b64encode
from dataclasses import dataclass
from struct import Struct


PREFIX = "rcpt_v"
"""The ids of other receipts go on with a hexadecimal digit."""

_FIELDS = Struct(">16sQHHQ")
_ID_CHARS = 48
"""Of the fields, in base64."""

_NO_TOKEN = 2**64 - 1


@dataclass(frozen=True, slots=True)
class RawReceipt:
    """A write of raw vectors.

    Attributes:
        collection: its uuid.
        indexed_ms: milliseconds since 1970 when the index had them, which is when it was accepted, too.
        documents: vectors that were sent, of which `failed` did not land.
        token: of what has landed, see `records.Outcome`.
    """

    collection: str
    indexed_ms: int
    documents: int
    failed: int
    token: int | None

    @property
    def id(self) -> str:
        """From which `parse` makes it again."""
        token = _NO_TOKEN if self.token is None else self.token
        place = bytes.fromhex(self.collection), self.indexed_ms
        raw = _FIELDS.pack(*place, self.documents, self.failed, token)
        return PREFIX + urlsafe_b64encode(raw).decode()


def parse(text: str) -> RawReceipt | None:
    """The receipt of this id; None: it is not one."""
    packed = text.removeprefix(PREFIX)
    if len(packed) != _ID_CHARS or packed == text:
        return None
    try:
        raw = urlsafe_b64decode(packed)
    except ValueError:
        return None
    if len(raw) != _FIELDS.size:
        return None
    uuid, indexed_ms, documents, failed, token = _FIELDS.unpack(raw)
    return RawReceipt(
        uuid.hex(), indexed_ms, documents, failed, None if token == _NO_TOKEN else token
    )
