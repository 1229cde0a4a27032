"""Filters of Pinecone let through all that the oracle does, and hold only what Pinecone knows."""

import random
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from serve.index.filters import matches, parse
from serve.index.pinecone_filters import EVERY, TERMS, to_fields, to_filter
from tests.contract.pinecone_server import PineconeServer, check_filter


FIELDS = ("a", "b.c", "größe", "$or"[1:], "it's", "x" * 256)
TEXTS = st.one_of(
    st.text(max_size=40),
    st.sampled_from(["", "a", "ab", "abcdef", "abcdefg", "\x00", "a\x00", "x" * 600, "漢" * 20]),
    st.integers(0, 30).map(lambda length: "abcdefghijklmnopqrstuvwxyz"[:length]),
    st.integers(0, 99).map(lambda second: f"2026-01-01T10:00:{second:02}Z"),
)
NUMBERS = st.one_of(
    st.sampled_from([0, -0.0, 1, -1, 0.5, 2**53 + 1, 1e300, -1e-300]),
    st.integers(-(2**60), 2**60),
    st.floats(allow_nan=False, allow_infinity=False),
)
SCALARS = st.one_of(TEXTS, NUMBERS, st.booleans())
METADATA = st.dictionaries(
    st.sampled_from(FIELDS), st.one_of(SCALARS, st.lists(SCALARS, max_size=4)), max_size=4
)


slowly = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
"""Long texts take long to draw on a busy machine."""


def _short(value: Any) -> Any:
    return value[:512] if isinstance(value, str) else value


VALUES = SCALARS.map(_short)
CONDITIONS = st.one_of(
    st.tuples(st.sampled_from(["$eq", "$ne"]), VALUES),
    st.tuples(st.sampled_from(["$gt", "$gte", "$lt", "$lte"]), st.one_of(TEXTS, NUMBERS)).map(
        lambda pair: (pair[0], _short(pair[1]))
    ),
    st.tuples(st.sampled_from(["$in", "$nin"]), st.lists(VALUES, min_size=1, max_size=4)),
    st.tuples(st.just("$exists"), st.booleans()),
)
LEAVES = st.tuples(st.sampled_from(FIELDS), CONDITIONS).map(
    lambda pair: {pair[0]: {pair[1][0]: pair[1][1]}}
)
TREES = st.recursive(
    LEAVES,
    lambda part: st.tuples(
        st.sampled_from(["$and", "$or"]), st.lists(part, min_size=1, max_size=3)
    ).map(lambda pair: {pair[0]: pair[1]}),
    max_leaves=6,
)


def served(nin_on_lists: str) -> PineconeServer:
    server = PineconeServer(1)
    server.nin_on_lists = nin_on_lists
    return server


SERVERS = [served("none"), served("any")]


def kept(metadata: dict[str, Any]) -> dict[str, Any]:
    """As Pinecone stores it."""
    fields = to_fields(metadata)
    return {
        key: value if isinstance(value, list) else float(value) for key, value in fields.items()
    }


def shares_18_bytes(tree: Any, metadata: dict[str, Any]) -> bool:
    """Whether a bound and a value may only be told apart by `matches`."""
    texts = [value.encode() for value in metadata.values() if isinstance(value, str)]
    bounds: list[bytes] = []

    def walk(part: dict[str, Any]) -> None:
        for asked in part.values():
            if isinstance(asked, list):
                for inner in asked:
                    walk(inner)
            else:
                bounds.extend(value.encode() for value in asked.values() if isinstance(value, str))

    walk(tree)
    long = [bound[:18] for bound in bounds if len(bound) >= 18]
    return any(text.startswith(bound) for text in texts for bound in long)


LONG = "18 bytes and more: "


@slowly
@given(TREES, METADATA)
@example({"a": {"$eq": 0}}, {"a": -0.0})
@example({"a": {"$in": [-0.0]}}, {"a": [0]})
@example({"a": {"$gt": LONG}}, {"a": LONG + "x"})
@example({"a": {"$lt": LONG + "x"}}, {"a": LONG})
@example({"a": {"$lte": "a"}}, {"a": "a\0"})
@example({"a": {"$gt": "abcdef"}}, {"a": "abcdefg"})
@example({"a": {"$eq": 1}}, {"a": True})
@example({"a": {"$gte": 2**53}}, {"a": 2**53 + 1})
def test_nothing_that_matches_is_left_out(raw, metadata):
    tree = parse(raw, terms_max=64)
    assert tree is not None
    compiled = to_filter(tree)
    check_filter(compiled)
    fields = kept(metadata)
    expected = matches(tree, metadata)
    for server in SERVERS:
        assert server.holds(compiled, fields) or not expected
    if not shares_18_bytes(raw, metadata):
        assert SERVERS[0].holds(compiled, fields) == expected


@slowly
@given(METADATA)
def test_every_record_has_terms_and_nothing_of_its_owners_words(metadata):
    fields = to_fields(metadata)
    assert EVERY in fields[TERMS]
    assert all(len(term) == 22 for term in fields[TERMS] if term != EVERY)
    assert all(key == TERMS or len(key) in (23, 25) for key in fields)
    assert all(
        isinstance(value, list) or abs(value) < 2**53 or key.startswith("n")
        for key, value in fields.items()
    )


@slowly
@given(st.lists(TEXTS, min_size=2, max_size=2, unique=True))
def test_levels_sort_as_strings_do(pair):
    low, high = sorted(pair)
    order = [list(to_fields({"a": text}).values())[1:] for text in (low, high)]
    assert order[0] <= order[1]
    if low.encode()[:18] != high.encode()[:18]:
        assert order[0] < order[1]


@pytest.mark.parametrize("key", ["", "x" * 257, "\x00", "a\x00b", "\ud800"])
def test_keys_that_no_filter_can_name_have_no_terms(key):
    assert to_fields({key: "value"}) == {TERMS: [EVERY]}


def test_a_large_filter_stays_small():
    rng = random.Random(1)  # noqa: S311  not a secret
    values = ["漢" * 490 + str(rng.random()) for _ in range(256)]
    tree = parse({"$or": [{"s": {"$in": values}}, {"s": {"$gt": "漢" * 512}}]}, terms_max=2)
    assert tree is not None
    assert len(str(to_filter(tree))) < 256 * 30 + 1000
