"""What travels through a conduit, as bytes. Pure.

A frame is its body's length, the number of a call and a word, then the body. A body is JSON, and after
it one array as it lies in memory: token ids on the way in, vectors on the way out. Nothing is pickled:
bytes from a socket must not be able to run code.
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
import orjson

from serve import errors
from serve.errors import Internal, ServiceError
from serve.records import EmbedCall, EmbedReply, Input


BODY_BYTES_MAX = 256 * 2**20
"""2,048 vectors of 20,000 dimensions are 156 MiB."""
HELLO_BYTES_MAX = 256
ALIGNED = 16
"""Where an array begins in a body, which itself begins so: Rust code (LanceDB's) panics at one that
lies at an odd address, where numpy only takes longer.
"""

_HEAD = struct.Struct("<IQB")
_SIZE = struct.Struct("<I")
_FIELDS = (
    "request_id",
    "tenant",
    "weight",
    "klass",
    "model",
    "tokens",
    "deadline_s",
    "limit_s",
    "priority",
    "tier",
    "trace",
)
"""Of a call, in the order of a body; its inputs come after them."""

_ERRORS: dict[str, type[ServiceError]] = {
    name: one
    for name, one in vars(errors).items()
    if isinstance(one, type) and issubclass(one, ServiceError)
}


class Malformed(Exception):
    """Bytes that no peer of this version writes: the connection is of no further use."""


class Word(IntEnum):
    """What a frame says. LEAVING: the call was not begun, another replica may have it."""

    HELLO = 1
    CALL = 2
    CANCEL = 3
    REPLY = 4
    REFUSAL = 5
    LEAVING = 6


_WORDS = frozenset(Word)


@dataclass(frozen=True, slots=True)
class Frame:
    """One frame; `number` is the caller's name for the call."""

    number: int
    word: Word
    body: bytes = b""

    def packed(self) -> bytes:
        """As it travels."""
        return _HEAD.pack(len(self.body), self.number, self.word) + self.body


class Splitter:
    """Cuts a stream of bytes into frames."""

    def __init__(self, bytes_max: int = BODY_BYTES_MAX) -> None:
        self._left = bytearray()
        self.bytes_max = bytes_max

    def feed(self, data: bytes) -> Iterator[Frame]:
        """Every frame that is whole now. Raises Malformed."""
        self._left += data
        while len(self._left) >= _HEAD.size:
            size, number, word = _HEAD.unpack_from(self._left)
            if size > self.bytes_max or word not in _WORDS:
                raise Malformed(f"a frame of {size} bytes and word {word}")
            end = _HEAD.size + size
            if len(self._left) < end:
                return
            body = bytes(memoryview(self._left)[_HEAD.size : end])
            del self._left[:end]
            yield Frame(number, Word(word), body)


def carries(call: EmbedCall) -> bool:
    """Whether a frame can hold the call: token ids only."""
    return all(
        one.ids is not None and len(one.ids) == count
        for one, count in zip(call.inputs, call.tokens, strict=True)
    )


def pack_call(call: EmbedCall) -> bytes:
    """A call that `carries` says yes to. Raises ValueError when no frame can hold it."""
    head = [getattr(call, field) for field in _FIELDS]
    rows = [one.ids for one in call.inputs if one.ids is not None]
    flat = rows[0] if len(rows) == 1 else np.concatenate([np.empty(0, np.int32), *rows])
    return _joined(head, np.asarray(flat, "<i4").tobytes())


def read_call(body: bytes) -> EmbedCall:
    """The call; its ids are read-only views of `body`. Raises Malformed."""
    head, rest = _parted(body)
    try:
        values = dict(zip(_FIELDS, head, strict=True))
        values["tokens"] = tokens = tuple(values["tokens"])
        flat = np.frombuffer(rest, "<i4")
        marks = [0, *accumulate(tokens)]
        inputs = tuple(Input(ids=flat[begin:end]) for begin, end in pairwise(marks))
    except (TypeError, ValueError) as error:
        raise Malformed(str(error)) from None
    if marks[-1] != len(flat) or min(tokens, default=0) < 0:
        raise Malformed("token counts that differ from the ids")
    return EmbedCall(inputs=inputs, **values)


def pack_reply(reply: EmbedReply) -> bytes:
    """A reply with its vectors. Raises ValueError when no frame can hold it."""
    failures = [[index, _described(error)] for index, error in reply.failures]
    head = [list(reply.vectors.shape), failures, reply.queue_ms, reply.infer_ms]
    flat = np.ascontiguousarray(reply.vectors, "<f4").reshape(-1)  # no bytes of an empty matrix
    return _joined(head, flat.view(np.uint8).data)


def read_reply(body: bytes) -> EmbedReply:
    """The reply; its vectors are a read-only view of `body`. Raises Malformed."""
    head, rest = _parted(body)
    try:
        shape, failures, queue_ms, infer_ms = head
        vectors = np.frombuffer(rest, "<f4").reshape(shape)
        named = tuple((index, _raised(error)) for index, error in failures)
    except (TypeError, ValueError) as error:
        raise Malformed(str(error)) from None
    return EmbedReply(vectors, named, queue_ms=queue_ms, infer_ms=infer_ms)


def pack_refusal(error: ServiceError) -> bytes:
    """A call that failed as a whole."""
    return orjson.dumps(_described(error))


def read_refusal(body: bytes) -> ServiceError:
    """The same error again. Raises Malformed."""
    try:
        return _raised(orjson.loads(body))
    except (TypeError, ValueError) as error:
        raise Malformed(str(error)) from None


def _described(error: ServiceError) -> list[Any]:
    known = next(one.__name__ for one in type(error).__mro__ if _ERRORS.get(one.__name__) is one)
    return [known, error.message, error.param, error.code, error.retry_after_s]


def _raised(described: Any) -> ServiceError:
    name, message, param, code, retry_after_s = described
    kind = _ERRORS.get(name, Internal)
    return kind(message, param=param, code=code, retry_after_s=retry_after_s)


def _joined(head: list[Any], array: bytes | memoryview) -> bytes:
    text = orjson.dumps(head)
    text += b" " * (-(_SIZE.size + len(text)) % ALIGNED)
    size = _SIZE.size + len(text) + len(array)
    if size > BODY_BYTES_MAX:  # the peer would hang up, and every other call be lost with it
        raise ValueError(f"a body of {size} bytes; a frame holds {BODY_BYTES_MAX}")
    return b"".join((_SIZE.pack(len(text)), text, array))


def _parted(body: bytes) -> tuple[list[Any], memoryview]:
    try:
        (size,) = _SIZE.unpack_from(body)
        view = memoryview(body)[_SIZE.size :]
        head = orjson.loads(view[:size])
    except (struct.error, ValueError) as error:
        raise Malformed(str(error)) from None
    if not isinstance(head, list):
        raise Malformed("a body without a list")
    return head, view[size:]
