"""Filters in Pinecone's language, over terms and numbers that are kept beside each record.

Of Pinecone's language we rely on little, so that results agree with `serve.index.filters.matches`:

    terms     a list of strings, on every record: a digest of each field that exists and of each
              value it is or contains; asked with `$in` and `$nin` only
    nFIELD    a number that is not in a list, for orderings
    sFIELD.L  6 bytes of a string that is not in a list, as a number, for orderings; L = 0, 1, 2

Pinecone orders numbers only, keeps integers as float64, refuses lists of anything but strings, and
leaves open what `$ne` does where a field is missing. FIELD and terms are digests: nothing that a
user wrote becomes a word of a filter, and a term has 22 characters however long the value is.
"""

import base64
import hashlib
from collections.abc import Iterator, Mapping
from typing import Any

from serve.index.filters import FIELD_CHARS_MAX, LISTS, ORDERINGS, as_number, is_plain
from serve.records import Condition, Every, Filter


TERMS = "terms"

LEVELS, LEVEL_BYTES = 3, 6
"""257^6 is below 2^53: a level is exact as a float64. 18 bytes tell timestamps apart by ten seconds;
strings that share more are told apart by `matches` after the query."""

EVERY = "*"
"""A term of every record: `$nin` never meets a record without terms."""


def to_fields(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """What a record carries so that filters find it."""
    return {TERMS: [EVERY, *sorted(_terms(metadata))], **_numbers(metadata)}


def _fields(metadata: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    # Keys that no filter can name, and nulls, are left out.
    for key, value in metadata.items():
        if value is not None and key and len(key) <= FIELD_CHARS_MAX and is_plain(key):
            yield key, value


def _terms(metadata: Mapping[str, Any]) -> set[str]:
    found = set()
    for key, value in _fields(metadata):
        found.add(_term(key, "k"))
        values = value if isinstance(value, list | tuple) else (value,)
        found.update(_term(key, tag) for item in values if (tag := _tagged(item)) is not None)
    return found


def _numbers(metadata: Mapping[str, Any]) -> dict[str, float]:
    found: dict[str, float] = {}
    for key, value in _fields(metadata):
        if isinstance(value, str):
            levels = enumerate(_levels(value))
            found |= {_level_name(key, level): number for level, number in levels}
        elif (number := as_number(value)) is not None:
            found[_number_name(key)] = number
    return found


def _tagged(value: object) -> str | None:
    if isinstance(value, bool):
        return f"b{int(value)}"
    if isinstance(value, str):
        return "s" + value
    number = as_number(value)
    # Adding 0.0 turns -0.0 into 0.0, which must be equal.
    return None if number is None else f"n{(number + 0.0).hex()}"


def _digest(text: str) -> str:
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()
    return base64.urlsafe_b64encode(digest)[:22].decode("ascii")


def _term(field: str, tag: str) -> str:
    # A field holds no control characters: NUL ends it.
    return _digest(f"{field}\0{tag}")


def _number_name(field: str) -> str:
    return f"n{_digest(field)}"


def _level_name(field: str, level: int) -> str:
    return f"s{_digest(field)}.{level}"


def _levels(text: str) -> list[int]:
    """The start of a string as numbers that sort like it: base 257, zero for no byte.

    UTF-8 sorts by code point; all levels are written, also those of a short string.
    """
    start = text[: LEVELS * LEVEL_BYTES].encode("utf-8", "surrogatepass")
    digits = [byte + 1 for byte in start[: LEVELS * LEVEL_BYTES]]
    digits += [0] * (LEVELS * LEVEL_BYTES - len(digits))
    numbers = []
    for level in range(LEVELS):
        number = 0
        for digit in digits[level * LEVEL_BYTES : (level + 1) * LEVEL_BYTES]:
            number = number * 257 + digit
        numbers.append(number)
    return numbers


def to_filter(tree: Filter) -> dict[str, Any]:
    """A filter that lets through all that satisfies the tree, and at times more.

    More: strings that share 18 bytes with a bound, and whatever `$nin` means to Pinecone on lists.
    The caller checks with `matches`. No condition is ever negated, so more stays more.
    """
    if isinstance(tree, Condition):
        return _condition(tree)
    word = "$and" if isinstance(tree, Every) else "$or"
    return _joined(word, [to_filter(part) for part in tree.parts])


def _joined(word: str, parts: list[dict[str, Any]]) -> dict[str, Any]:
    return parts[0] if len(parts) == 1 else {word: parts}


def _condition(condition: Condition) -> dict[str, Any]:
    field, op, value = condition.field, condition.op, condition.value
    if op in ORDERINGS:
        return (
            _ordered_text(field, op, value)
            if isinstance(value, str)
            else _ordered(field, op, value)
        )
    if op == "$exists":
        return {TERMS: {"$in" if value else "$nin": [_term(field, "k")]}}
    tags = (_tagged(item) for item in (value if op in LISTS else (value,)))
    terms = sorted({_term(field, tag) for tag in tags if tag is not None})
    return {TERMS: {"$in" if op in ("$eq", "$in") else "$nin": terms}}


def _ordered(field: str, op: str, value: Any) -> dict[str, Any]:
    number = as_number(value)
    if number is None:  # the parser let only finite numbers and strings through
        raise ValueError(f"not an ordered value: {value!r}")
    return {_number_name(field): {op: number}}


def _ordered_text(field: str, op: str, value: str) -> dict[str, Any]:
    """Beyond the bound at one level and equal at those before, or equal at all of them."""
    beyond = "$gt" if op in ("$gt", "$gte") else "$lt"
    ways: list[dict[str, Any]] = []
    equal: list[dict[str, Any]] = []
    for level, number in enumerate(_levels(value)):
        name = _level_name(field, level)
        ways.append(_joined("$and", [*equal, {name: {beyond: number}}]))
        equal.append({name: {"$eq": number}})
    # A bound that ends within the levels has no other string at its place but itself.
    whole = len(value.encode("utf-8", "surrogatepass")) < LEVELS * LEVEL_BYTES
    if op in ("$gte", "$lte") or not whole:
        ways.append({"$and": equal})
    return {"$or": ways}
