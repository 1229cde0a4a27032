"""Filters inside Qdrant: metadata as words of our own beside each vector, and trees over them.

Qdrant reads a filter's key as a path, has rules of its own for types, nulls and lists, and orders no
strings. So nothing of a user's metadata is ever a path or a value of a filter:

- `terms` holds one digest per fact that can be asked for: "has this key", "this key is, or contains,
  this value". Equality is then an exact match of keywords, whatever the types.
- `steps` holds values that can be ordered, cut into words of six bytes: `at` is the digest of the key
  and of all bytes before the word, `word` the word as a number. Two values of a key have equal words
  up to the first in which they differ, so one is greater exactly when it has a greater word at a
  place where the other has one, too. UTF-8 sorts as code points do, and numbers are in a form that
  sorts as bytes.

Cost: some 27 bytes a key and value for equality, 57 bytes per six bytes of a string for order (of
which 513 characters count), 114 a number.
"""

import struct
from collections.abc import Iterator, Mapping
from hashlib import blake2b
from typing import TYPE_CHECKING, Any

from serve.index.filters import FIELD_CHARS_MAX, LISTS, VALUE_CHARS_MAX, as_number, is_plain
from serve.records import Condition, Every, Filter


if TYPE_CHECKING:
    from qdrant_client import models

TERMS, STEPS, AT, WORD = "terms", "steps", "at", "word"
PLACES, WORDS = f"{STEPS}[].{AT}", f"{STEPS}[].{WORD}"
"""Paths of what Qdrant keeps indexes over, beside `terms`."""

ORDERS = {"$gt": "gt", "$gte": "gte", "$lt": "lt", "$lte": "lte"}

DIGEST_BYTES = 12
"""Two of 10**9 facts have the same digest with a chance of 10**-11."""

WORD_BYTES = 6
RADIX = 257
"""A digit is a byte plus one, 0 the end. Six fit into 2**53: Qdrant compares numbers as float64."""


def encode(metadata: Mapping[str, Any]) -> dict[str, list[Any]]:
    """The two lists of a record's payload. Keys that no filter can name, and nulls, are left out."""
    terms: set[str] = set()
    steps: list[dict[str, Any]] = []
    for key, value in metadata.items():
        if value is None or not key or len(key) > FIELD_CHARS_MAX or not is_plain(key):
            continue
        terms.add(_term(key, "k"))
        if isinstance(value, list | tuple):  # can contain, but cannot be ordered
            terms.update(_term(key, *tagged) for item in value if (tagged := _tagged(item)))
        elif tagged := _tagged(value):
            terms.add(_term(key, *tagged))
            steps += [{AT: at, WORD: word} for at, word in _steps(key, *tagged)]
    return {TERMS: sorted(terms), STEPS: steps}


def to_filter(tree: Filter) -> "models.Filter":
    """The filter of a validated tree over the two lists; Qdrant evaluates it exactly."""
    from qdrant_client import models  # noqa: PLC0415  see serve.index.qdrant

    if isinstance(tree, Condition):
        return _ordered(tree) if tree.op in ORDERS else _held(tree)
    parts: list[Any] = [to_filter(part) for part in tree.parts]
    return models.Filter(must=parts) if isinstance(tree, Every) else models.Filter(should=parts)


def _held(condition: Condition) -> "models.Filter":
    from qdrant_client import models  # noqa: PLC0415

    field, op, value = condition.field, condition.op, condition.value
    if op == "$exists":
        terms, wanted = {_term(field, "k")}, value
    else:
        values = value if op in LISTS else (value,)
        terms = {_term(field, *tagged) for item in values if (tagged := _tagged(item))}
        wanted = op in ("$eq", "$in")
    match = models.FieldCondition(key=TERMS, match=models.MatchAny(any=sorted(terms)))
    return models.Filter(must=[match]) if wanted else models.Filter(must_not=[match])


def _ordered(condition: Condition) -> "models.Filter":
    from qdrant_client import models  # noqa: PLC0415

    tagged = _tagged(condition.value)
    if tagged is None:  # the parser let only finite numbers and strings through
        message = f"not an ordered value: {condition.value!r}"
        raise ValueError(message)
    op = ORDERS[condition.op]
    places, words = zip(*_steps(condition.field, *tagged), strict=True)
    # Only the last words may be equal: before it they say no more than that both start the same.
    signs = [*(op[:2] for _ in places[1:]), op]
    beyond: list[Any] = []
    for place, sign, word in zip(places, signs, words, strict=True):
        there = models.FieldCondition(key=AT, match=models.MatchValue(value=place))
        greater = models.FieldCondition(key=WORD, range=models.Range(**{sign: word}))
        beyond.append(models.Filter(must=[there, greater]))
    # Most words of a record are at none of these places: one look instead of one per place.
    common = models.FieldCondition(key=AT, match=models.MatchAny(any=list(places)))
    both = models.Filter(must=[common, models.Filter(should=beyond)])
    nested = models.NestedCondition(nested=models.Nested(key=STEPS, filter=both))
    # Known from an index, while the rest reads payloads: whether the key has a value of this kind.
    kind = models.FieldCondition(key=PLACES, match=models.MatchValue(value=places[0]))
    return models.Filter(must=[kind, nested])


def _tagged(value: object) -> tuple[str, bytes] | None:
    """A value's kind, and bytes that are equal and sorted as values of the kind are."""
    if isinstance(value, bool):
        return "b", bytes((value,))
    if isinstance(value, str):
        # A filter's string has at most VALUE_CHARS_MAX characters, so one more decides.
        return "s", value[: VALUE_CHARS_MAX + 1].encode("utf-8", "surrogatepass")
    number = as_number(value)
    if number is None:
        return None
    # IEEE 754 sorts as an unsigned integer once negatives are inverted and the sign bit flipped.
    # Adding 0.0 turns -0.0 into 0.0, which must be equal.
    bits: int = struct.unpack(">Q", struct.pack(">d", number + 0.0))[0]
    return "n", struct.pack(">Q", ~bits & (2**64 - 1) if bits >> 63 else bits | 1 << 63)


def _term(key: str, kind: str, data: bytes = b"") -> str:
    # A key has no control characters, so what follows the zero byte is never a part of it.
    text = key.encode() + b"\0" + kind.encode() + data
    return blake2b(text, digest_size=DIGEST_BYTES).hexdigest()


def _steps(key: str, kind: str, data: bytes) -> Iterator[tuple[str, int]]:
    if kind == "b":  # bools are not ordered
        return
    before = blake2b(key.encode() + b"\0" + kind.encode(), digest_size=DIGEST_BYTES)
    # A value that fills its last word is followed by a word that says so: 0.
    for start in range(0, len(data) + 1, WORD_BYTES):
        part = data[start : start + WORD_BYTES]
        word = 0
        for position in range(WORD_BYTES):
            word = word * RADIX + (part[position] + 1 if position < len(part) else 0)
        yield before.hexdigest(), word
        before.update(part)
