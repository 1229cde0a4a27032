"""Filters for Qdrant against the oracle, evaluated by the code of the library's local mode."""

from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from qdrant_client.local.payload_filters import check_filter

from serve.index.filters import matches
from serve.index.qdrant_terms import encode, to_filter
from serve.records import Condition


# Few characters, so that values share long starts; the last two sort by code point, not by UTF-16.
TEXTS = st.text("ab\x00\x7fÿ漢\uffee🎉", max_size=15)
NUMBERS = st.one_of(
    st.integers(-(2**70), 2**70),
    st.floats(allow_nan=False, allow_infinity=False),
    st.sampled_from([0.0, -0.0, 1, -1, 2**53, 2**53 + 1, 5e-324, -5e-324, 1.7e308, 0.1 + 0.2, 0.3]),
)
SCALARS = st.one_of(TEXTS, NUMBERS, st.booleans())
FIELDS = st.sampled_from(["a", "ab", "a.b", 'steps[].at"', "größe"])
METADATA = st.dictionaries(FIELDS, st.one_of(SCALARS, st.lists(SCALARS, max_size=3)))


def agrees(condition: Condition, metadata: dict[str, Any]) -> bool:
    held = check_filter(to_filter(condition), encode(metadata), "id", {})
    return held is matches(condition, metadata)


@settings(max_examples=300, deadline=None)
@given(FIELDS, st.sampled_from(["$eq", "$ne"]), SCALARS, METADATA)
def test_equality(field, op, value, metadata):
    assert agrees(Condition(field, op, value), metadata)


@settings(max_examples=500, deadline=None)
@given(
    st.sampled_from(["$gt", "$gte", "$lt", "$lte"]),
    st.one_of(st.tuples(TEXTS, TEXTS), st.tuples(NUMBERS, NUMBERS), st.tuples(SCALARS, TEXTS)),
)
def test_order(op, values):
    held, value = values
    assert agrees(Condition("a", op, value), {"a": held, "b": value, "c": [value]})
    assert agrees(Condition("a", op, value), {"a": value})
    assert agrees(Condition("a", op, value), {"a": [value]})


@settings(max_examples=200, deadline=None)
@given(FIELDS, st.sampled_from(["$in", "$nin"]), st.lists(SCALARS, min_size=1), METADATA)
def test_lists(field, op, values, metadata):
    assert agrees(Condition(field, op, tuple(values)), metadata)


@settings(max_examples=100, deadline=None)
@given(FIELDS, st.booleans(), METADATA)
def test_existence(field, wanted, metadata):
    assert agrees(Condition(field, "$exists", wanted), metadata)
