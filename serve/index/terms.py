"""Filters inside LanceDB: metadata as one string of terms, and trees as SQL over that string.

Lance's SQL has no safe access to a user's own keys, so every value is written beside the JSON as a
term `|FIELD:TAGVALUE|`, with field and value in hex. A compiled filter therefore holds nothing but
our own words and hex digits: nothing of the user's text is ever quoted. Numbers are sixteen hex
digits in an order-preserving form, strings the hex of their UTF-8, so that comparing hex compares
values. Lance's SQL knows `contains`, `split_part` and `regexp_like`; it refuses `substr`.

Cost: two bytes per byte of metadata, of which a string counts up to 513 characters, and one pass
over the column per query, before the vectors are compared.
"""

import struct
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from serve.index.filters import (
    FIELD_CHARS_MAX,
    LISTS,
    VALUE_CHARS_MAX,
    Scalar,
    as_number,
    is_plain,
)
from serve.records import Condition, Every, Filter


COLUMN = "terms"
ORDER_SQL = {"$gt": ">", "$gte": ">=", "$lt": "<", "$lte": "<="}

ALTERNATIVE_CHARS_MAX = 128
"""Longest alternative of a regular expression: 256 long ones took seconds to compile."""


def encode(metadata: Mapping[str, Any]) -> str:
    """The terms of metadata. Keys that no filter can name, and nulls, are left out."""
    terms = [term for key, value in metadata.items() for term in _terms(key, value)]
    return f"|{'|'.join(terms)}|" if terms else ""


def _terms(key: str, value: object) -> Iterator[str]:
    if value is None or not key or len(key) > FIELD_CHARS_MAX or not is_plain(key):
        return
    field = hexed(key)
    yield f"{field}:k"
    if isinstance(value, list | tuple):
        # "l" keeps elements apart from scalars: a list can contain, but cannot be ordered.
        tags = {tagged(item) for item in value} - {None}
        yield from (f"{field}:l{tag}" for tag in sorted(filter(None, tags)))
    elif (tag := tagged(value)) is not None:
        yield f"{field}:{tag}"


def tagged(value: object) -> str | None:
    """A value as its type and digits that compare as the value does; None: no filter can name it."""
    if isinstance(value, bool):
        return f"b{int(value)}"
    if isinstance(value, str):
        # A filter's string has at most VALUE_CHARS_MAX characters, so one more decides.
        return "s" + hexed(value[: VALUE_CHARS_MAX + 1])
    number = as_number(value)
    return None if number is None else "n" + _sortable(number)


def hexed(text: str) -> str:
    """A text in digits that compare as its code points do."""
    return text.encode("utf-8", "surrogatepass").hex()


def _sortable(number: float) -> str:
    # IEEE 754 sorts as an unsigned integer once negatives are inverted and the sign bit flipped.
    # Adding 0.0 turns -0.0 into 0.0, which must be equal.
    bits: int = struct.unpack(">Q", struct.pack(">d", number + 0.0))[0]
    flipped = ~bits & (2**64 - 1) if bits >> 63 else bits | 1 << 63
    return f"{flipped:016x}"


def to_sql(tree: Filter) -> str:
    """The SQL predicate of a validated tree over the column `terms`."""
    if isinstance(tree, Condition):
        return _condition(tree)
    word = "AND" if isinstance(tree, Every) else "OR"
    return _joined([to_sql(part) for part in tree.parts], word)


def _joined(parts: Sequence[str], word: str) -> str:
    # One flat chain per level: Lance's parser gives up at about 40 nested brackets.
    return parts[0] if len(parts) == 1 else f"({f' {word} '.join(parts)})"


def _condition(condition: Condition) -> str:
    field, op, value = hexed(condition.field), condition.op, condition.value
    if op in ORDER_SQL:
        return _ordered(field, ORDER_SQL[op], value)
    if op == "$exists":
        predicates, wanted = [f"contains({COLUMN}, '|{field}:k|')"], value
    else:
        values = value if op in LISTS else (value,)
        predicates, wanted = _holding(field, values), op in ("$eq", "$in")
    if wanted:
        return _joined(predicates, "OR")
    return _joined([f"NOT {predicate}" for predicate in predicates], "AND")


def _holding(field: str, values: Sequence[Scalar]) -> list[str]:
    """Predicates of which one holds when the field is, or contains, one of the values."""
    tags = sorted({tag for value in values if (tag := tagged(value)) is not None})
    short = [tag for tag in tags if len(tag) <= ALTERNATIVE_CHARS_MAX] if len(tags) > 1 else []
    predicates = [
        f"contains({COLUMN}, '|{field}:{prefix}{tag}|')"
        for tag in tags
        if tag not in short
        for prefix in ("", "l")
    ]
    if short:
        # A chain of 1,000 `contains` costs five times as much as one expression.
        predicates.append(f"regexp_like({COLUMN}, '[|]{field}:l?({'|'.join(short)})[|]')")
    return predicates


def _ordered(field: str, sign: str, value: Scalar) -> str:
    tag = tagged(value)
    if tag is None:  # the parser let only finite numbers and strings through
        message = f"not an ordered value: {value!r}"
        raise ValueError(message)
    kind, digits = tag[0], tag[1:]
    start = f"|{field}:{kind}"
    # Without the guard a missing key would read as '' and be below everything.
    held = f"split_part(split_part({COLUMN}, '{start}', 2), '|', 1)"
    return f"(contains({COLUMN}, '{start}') AND {held} {sign} '{digits}')"
