"""The filter language: what it accepts, what it names as a fault, what it means."""

import json
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serve.errors import BadInput
from serve.index.filters import DEPTH_MAX, VALUE_CHARS_MAX, VALUES_MAX, matches, parse
from serve.index.terms import _sortable, encode, to_sql
from serve.records import Condition, Every, Some


def nested(levels: int) -> object:
    return {"a": 1} if levels == 0 else {"$and": [nested(levels - 1)]}


def test_forms():
    assert parse({}, terms_max=1) is None
    assert parse({"a": "x"}, terms_max=1) == Condition("a", "$eq", "x")
    assert parse({"a": {"$gt": 1, "$lte": 5}}, terms_max=2) == Every(
        (Condition("a", "$gt", 1), Condition("a", "$lte", 5))
    )
    assert parse({"$or": [{"a": 1}, {"b": {"$in": ["x", 2, True]}}], "c": False}, terms_max=3) == (
        Every(
            (
                Some((Condition("a", "$eq", 1), Condition("b", "$in", ("x", 2, True)))),
                Condition("c", "$eq", False),
            )
        )
    )
    assert parse(nested(DEPTH_MAX), terms_max=1) is not None
    assert parse({"größe.ü'\"\\": 1}, terms_max=1) == Condition("größe.ü'\"\\", "$eq", 1)


@pytest.mark.parametrize(
    ("raw", "param"),
    [
        ([], "filter"),
        (None, "filter"),
        ("a = 1", "filter"),
        ({"$and": [{"b": 1}, {"year": {"$gt": True}}]}, "filter.$and[1].year.$gt"),
        ({"a": {}}, "filter.a"),
        ({"a": None}, "filter.a"),
        ({"a": ["x"]}, "filter.a"),
        ({"a": {"$eq": ["x"]}}, "filter.a.$eq"),
        ({"a": {"$regex": "x"}}, "filter.a.$regex"),
        ({"a": {"$not a bounded operator name": 1}}, "filter.a.$not a bounded o"),
        ({"a": {"$exists": 1}}, "filter.a.$exists"),
        ({"a": {"$in": "x"}}, "filter.a.$in"),
        ({"a": {"$in": []}}, "filter.a.$in"),
        ({"a": {"$nin": ["x", None]}}, "filter.a.$nin[1]"),
        ({"a": {"$in": [["x"]]}}, "filter.a.$in[0]"),
        ({"a": {"$in": list(range(VALUES_MAX + 1))}}, "filter.a.$in"),
        ({"a": float("nan")}, "filter.a"),
        ({"a": float("inf")}, "filter.a"),
        ({"a": 10**400}, "filter.a"),
        ({"a": "x" * (VALUE_CHARS_MAX + 1)}, "filter.a"),
        ({"a": "\ud800"}, "filter.a"),
        ({"$and": {}}, "filter.$and"),
        ({"$or": []}, "filter.$or"),
        ({"$or": [{}]}, "filter.$or[0]"),
        ({"$or": [1]}, "filter.$or[0]"),
        ({"$nor": [{"a": 1}]}, "filter"),
        ({"": 1}, "filter"),
        ({"a\x00b": 1}, "filter"),
        ({"a\x85b": 1}, "filter"),
        ({"\ud800": 1}, "filter"),
        ({"x" * 257: 1}, "filter"),
        ({"a": 1, "b": 1, "c": 1, "d": 1}, "filter.d"),
    ],
)
def test_faults_name_their_place(raw, param):
    with pytest.raises(BadInput) as caught:
        parse(raw, terms_max=3)
    assert caught.value.param == param


def test_nesting_is_bounded():
    with pytest.raises(BadInput) as caught:
        parse(nested(DEPTH_MAX + 1), terms_max=1)
    assert caught.value.param == "filter" + ".$and[0]" * (DEPTH_MAX + 1)


HELD = {
    "word": "beta",
    "year": 2020,
    "share": 0.5,
    "yes": True,
    "tags": ["red", "green"],
    "empty": [],
    "null": None,
    "big": 2**53 + 1,
}


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        ({"word": "beta"}, True),
        ({"word": "bet"}, False),
        ({"year": 2020.0}, True),
        ({"year": "2020"}, False),
        ({"yes": True}, True),
        ({"yes": 1}, False),
        ({"year": True}, False),
        ({"share": {"$gt": 0}}, True),
        ({"share": {"$gt": 0.5}}, False),
        ({"share": {"$gte": 0.5}}, True),
        ({"word": {"$lt": "gamma"}}, True),
        ({"word": {"$lt": "alpha"}}, False),
        ({"word": {"$lt": 5}}, False),
        ({"word": {"$gte": 5}}, False),
        ({"yes": {"$gte": 0}}, False),
        ({"tags": "red"}, True),
        ({"tags": "blue"}, False),
        ({"tags": {"$ne": "red"}}, False),
        ({"tags": {"$ne": "blue"}}, True),
        ({"tags": {"$in": ["blue", "green"]}}, True),
        ({"tags": {"$nin": ["blue", "green"]}}, False),
        ({"tags": {"$gt": "a"}}, False),
        ({"empty": {"$exists": True}}, True),
        ({"empty": {"$ne": "x"}}, True),
        ({"null": {"$exists": False}}, True),
        ({"none": {"$exists": False}}, True),
        ({"none": {"$exists": True}}, False),
        ({"none": {"$ne": "x"}}, True),
        ({"none": {"$nin": ["x"]}}, True),
        ({"none": {"$in": ["x"]}}, False),
        ({"none": {"$lt": 5}}, False),
        ({"big": 2**53}, True),
        ({"$or": [{"year": 1}, {"word": "beta"}]}, True),
        ({"$and": [{"year": 2020}, {"word": "x"}]}, False),
        ({"year": {"$gt": 2000, "$lt": 2010}}, False),
    ],
)
def test_meaning(raw, expected):
    assert matches(parse(raw, terms_max=8), HELD) is expected


def test_no_filter_matches():
    assert matches(None, {})


NUMBERS = st.one_of(st.floats(allow_nan=False, allow_infinity=False), st.integers(-(2**70), 2**70))


@given(one=NUMBERS, other=NUMBERS)
@settings(max_examples=200)
def test_numbers_keep_their_order_as_terms(one, other):
    left, right = float(one), float(other)
    assert (_sortable(left) < _sortable(right)) == (left < right)
    assert (_sortable(left) == _sortable(right)) == (left == right)


TEXT = st.text(max_size=8)
SCALARS = st.one_of(TEXT, st.booleans(), st.floats(allow_nan=False, allow_infinity=False))


@given(
    field=st.text(st.characters(exclude_categories=["Cc", "Cs"]), min_size=1, max_size=8),
    value=SCALARS,
    op=st.sampled_from(["$eq", "$ne", "$in"]),
)
@settings(max_examples=100)
def test_compiled_filters_quote_nothing_of_the_user(field, value, op):
    if field.startswith("$"):
        field = f"x{field}"
    tree = parse({field: {op: [value, "other"] if op == "$in" else value}}, terms_max=1)
    sql = to_sql(tree)
    literals = re.findall(r"'([^']*)'", sql)
    assert all(re.fullmatch(r"[0-9a-fklnsb:|?\[\]()]*", literal) for literal in literals)
    words = re.sub(r"'[^']*'", "", sql)
    assert set(re.findall(r"\w+", words)) <= {
        "contains",
        "regexp_like",
        "terms",
        "OR",
        "AND",
        "NOT",
    }


def test_terms_leave_out_what_no_filter_can_ask():
    assert encode({}) == ""
    assert encode({"a": None, "": 1, "x" * 257: 1, "a\n": 1}) == ""
    assert encode({"a": {"nested": 1}}) == "|61:k|"
    assert encode({"a": ["b", "b"], "c": True}) == "|61:k|61:ls62|63:k|63:b1|"
    assert len(encode({"a": "x" * 100_000})) < 2100


def test_a_json_filter_may_repeat_no_key_but_join_many():
    raw = json.loads('{"a": 1, "a": 2}')
    assert parse(raw, terms_max=1) == Condition("a", "$eq", 2)
