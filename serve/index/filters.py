"""The filter language: a JSON object becomes a validated tree, and the tree is evaluated.

Mongo's words: `$eq $ne $gt $gte $lt $lte $in $nin $exists $and $or`; a bare value means `$eq`, and
several keys of one object must all hold. A field is a top-level key of the user's metadata.
`matches` is the oracle: every backend must agree with it.

    `$eq` on a list means *contains*. `$ne` and `$nin` match a missing key, every other operator
    needs the key; a null counts as missing. Values of different types are never equal and never
    ordered; a bool is not a number; lists are not ordered. Numbers compare as float64, strings by
    code point.
"""

import math
from collections.abc import Callable, Mapping
from operator import ge, gt, le, lt
from typing import Any

from serve.errors import BadInput
from serve.records import Condition, Every, Filter, Some


DEPTH_MAX = 8
"""Nested `$and`/`$or`."""

FIELD_CHARS_MAX = 256
VALUE_CHARS_MAX = 512
"""Longest string value. Backends need to index no more than this many characters, plus one."""

VALUES_MAX = 256
"""Values in all `$in` and `$nin` lists of one filter."""

ORDERINGS: dict[str, Callable[[Any, Any], bool]] = {"$gt": gt, "$gte": ge, "$lt": lt, "$lte": le}
EQUALITIES = ("$eq", "$ne")
LISTS = ("$in", "$nin")
JOINS: dict[str, type[Every] | type[Some]] = {"$and": Every, "$or": Some}
OPERATORS = (*EQUALITIES, *ORDERINGS, *LISTS, "$exists")

Scalar = str | float | bool


def parse(raw: object, *, terms_max: int, param: str = "filter") -> Filter | None:
    """The validated tree of a JSON filter; None for an empty object, which restricts nothing.

    Raises BadInput whose `param` is the path of the fault, for example
    `filter.$and[1].year.$gt`. Bounds: `terms_max` conditions, `VALUES_MAX` list values,
    `DEPTH_MAX` levels.
    """
    if raw == {}:
        return None
    return _Parser(terms_max).tree(raw, param, 0)


class _Parser:
    def __init__(self, terms_max: int) -> None:
        self._terms_max = terms_max
        self._terms = 0
        self._values = 0

    def tree(self, raw: object, param: str, depth: int) -> Filter:
        if not isinstance(raw, Mapping) or not raw:
            raise BadInput("A filter must be an object with at least one key.", param=param)
        if depth > DEPTH_MAX:
            raise BadInput(f"A filter may nest at most {DEPTH_MAX} levels.", param=param)
        parts: list[Filter] = []
        for key, value in raw.items():
            if key in JOINS:
                parts.append(self._join(key, value, f"{param}.{key}", depth))
            else:
                parts += self._field(key, value, param)
        return parts[0] if len(parts) == 1 else Every(tuple(parts))

    def _join(self, word: str, raw: object, param: str, depth: int) -> Filter:
        if not isinstance(raw, list) or not raw:
            raise BadInput(f"{word} must be a list of at least one filter.", param=param)
        parts = []
        for position, part in enumerate(raw):
            parts.append(self.tree(part, f"{param}[{position}]", depth + 1))
        return JOINS[word](tuple(parts))

    def _field(self, name: object, raw: object, param: str) -> list[Filter]:
        field = _field_name(name, param)
        path = f"{param}.{field}"
        if not isinstance(raw, Mapping):
            return [self._condition(field, "$eq", raw, path)]
        if not raw:
            raise BadInput("A condition needs an operator.", param=path)
        return [self._condition(field, op, value, f"{path}.{op[:16]}") for op, value in raw.items()]

    def _condition(self, field: str, op: str, value: object, param: str) -> Condition:
        self._terms += 1
        if self._terms > self._terms_max:
            raise BadInput(f"A filter may hold {self._terms_max} conditions.", param=param)
        if op not in OPERATORS:
            known = " ".join(OPERATORS)
            raise BadInput(f"Unknown operator; known are {known}.", param=param)
        if op in LISTS:
            return Condition(field, op, self._list(value, param))
        if op == "$exists" and not isinstance(value, bool):
            raise BadInput("$exists takes true or false.", param=param)
        scalar = _scalar(value, param)
        if op in ORDERINGS and isinstance(scalar, bool):
            raise BadInput(f"{op} takes a string or a number.", param=param)
        return Condition(field, op, scalar)

    def _list(self, raw: object, param: str) -> tuple[Scalar, ...]:
        if not isinstance(raw, list) or not raw:
            raise BadInput("This operator takes a list of at least one value.", param=param)
        self._values += len(raw)
        if self._values > VALUES_MAX:
            raise BadInput(f"A filter may list {VALUES_MAX} values in all.", param=param)
        return tuple(_scalar(value, f"{param}[{at}]") for at, value in enumerate(raw))


def _field_name(name: object, param: str) -> str:
    if not isinstance(name, str) or not name:
        raise BadInput("A field name must be a string that is not empty.", param=param)
    if name.startswith("$"):
        raise BadInput(f"Unknown operator {name[:32]!r}; here only $and and $or.", param=param)
    if len(name) > FIELD_CHARS_MAX:
        raise BadInput(f"A field name may have {FIELD_CHARS_MAX} characters.", param=param)
    if not is_plain(name):
        raise BadInput("A field name must not hold control characters.", param=param)
    return name


def is_plain(text: str) -> bool:
    """Whether a text has no control characters (C0, DEL, C1) and no lone surrogates."""
    return all(
        char >= " " and not "\x7f" <= char <= "\x9f" and not "\ud800" <= char <= "\udfff"
        for char in text
    )


def _scalar(value: object, param: str) -> Scalar:
    if isinstance(value, bool):
        return value
    if isinstance(value, str):
        return _string(value, param)
    if isinstance(value, int | float):
        if as_number(value) is None:
            raise BadInput("A number must be finite.", param=param)
        return value
    raise BadInput("A value must be a string, a number or a bool.", param=param)


def _string(value: str, param: str) -> str:
    if len(value) > VALUE_CHARS_MAX:
        raise BadInput(f"A string may have {VALUE_CHARS_MAX} characters.", param=param)
    if any("\ud800" <= char <= "\udfff" for char in value):
        raise BadInput("A string must be valid Unicode.", param=param)
    return value


def as_number(value: object) -> float | None:
    """A number as float64; None for anything else, a bool and what is not finite included."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None


def matches(tree: Filter | None, metadata: Mapping[str, Any]) -> bool:
    """Whether metadata satisfies a tree (None: always)."""
    if tree is None:
        return True
    if isinstance(tree, Every):
        return all(matches(part, metadata) for part in tree.parts)
    if isinstance(tree, Some):
        return any(matches(part, metadata) for part in tree.parts)
    return _holds(tree, metadata.get(tree.field))


def _holds(condition: Condition, held: object) -> bool:
    op, value = condition.op, condition.value
    if op == "$exists":
        return (held is not None) is value
    if op in ORDERINGS:
        return _ordered(ORDERINGS[op], held, value)
    wanted = value if op in LISTS else (value,)
    found = any(_contains(held, item) for item in wanted)
    return found if op in ("$eq", "$in") else not found


def _contains(held: object, value: Scalar) -> bool:
    if isinstance(held, list | tuple):
        return any(_same(item, value) for item in held)
    return _same(held, value)


def _same(one: object, other: Scalar) -> bool:
    if isinstance(other, bool) or isinstance(one, bool):
        return one is other
    if isinstance(other, str):
        return isinstance(one, str) and one == other
    number = as_number(one)
    return number is not None and number == as_number(other)


def _ordered(compare: Callable[[Any, Any], bool], held: object, value: Scalar) -> bool:
    if isinstance(value, str):
        return isinstance(held, str) and compare(held, value)
    number = as_number(held)
    return number is not None and compare(number, as_number(value))
