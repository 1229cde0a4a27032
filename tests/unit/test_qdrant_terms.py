"""serve.index.qdrant_terms: what a payload holds for filters; tests/property compares filters."""

import re

import pytest
from qdrant_client.local.payload_filters import check_filter

from serve.index.qdrant_terms import encode, to_filter
from serve.records import Condition, Every, Some


def held(tree, **metadata: object) -> bool:
    return check_filter(to_filter(tree), encode(metadata), "id", {})


def test_nothing_of_a_user_stands_in_it():
    made = encode({"key.with[].paths": "Straße", "größe": ["x", 2.5], "b": True})
    assert set(made) == {"terms", "steps"}
    assert all(re.fullmatch("[0-9a-f]{24}", term) for term in made["terms"])
    assert [set(step) for step in made["steps"]] == [{"at", "word"}] * 2
    filter_ = to_filter(Condition("key.with[].paths", "$gt", "Straße")).model_dump_json()
    assert "paths" not in filter_
    assert "Stra" not in filter_


def test_keys_that_no_filter_names_and_nulls_are_left_out():
    assert encode({"": 1, "a\x00": 1, "\ud800": 1, "k" * 257: 1, "n": None}) == encode({})
    assert encode({"k" * 256: 1}) != encode({})


def test_lists_are_contained_in_but_not_ordered():
    made = encode({"a": ["x", "x", 1, True, None, {"y": 1}, float("nan"), 10**400]})
    assert len(made["terms"]) == 1 + 3
    assert made["steps"] == []
    assert len(encode({"a": []})["terms"]) == 1


def test_a_word_is_a_number_that_float64_holds():
    made = encode({"a": "\U0010ffff" * 600, "b": -1e300})
    assert max(step["word"] for step in made["steps"]) < 2**53
    assert len(made["steps"]) == 513 * 4 // 6 + 1 + 2


@pytest.mark.parametrize("length", [0, 5, 6, 7, 11, 12, 13, 512])
def test_order_where_words_end(length):
    text = "m" * length
    assert held(Condition("a", "$gt", text), a=text + "\x00")
    assert held(Condition("a", "$lt", text + "\x00"), a=text)
    assert not held(Condition("a", "$gt", text), a=text)
    assert held(Condition("a", "$lte", text), a=text)
    assert held(Condition("a", "$gte", text), a=text + "m" * 600)
    if text:
        assert held(Condition("a", "$lt", text), a=text[:-1])
        assert held(Condition("a", "$gt", text), a=text[:-1] + "n")


def test_words_of_another_key_or_kind_are_not_compared():
    assert not held(Condition("a", "$gt", "a"), b="b")
    assert not held(Condition("a", "$gt", 1), a="zzz", b=2)
    assert not held(Condition("a", "$gt", "a"), a=True)
    assert not held(Condition("a", "$eq", 1), a=True, b=1)


def test_trees():
    low, high = Condition("n", "$lt", 2), Condition("n", "$gt", 8)
    assert held(Some((low, high)), n=9)
    assert not held(Some((low, high)), n=5)
    assert held(Every((high, Condition("m", "$exists", False))), n=9)
    assert not held(Every((high, Condition("m", "$exists", False))), n=9, m=1)


def test_an_order_of_what_has_none_is_our_fault():
    with pytest.raises(ValueError, match="ordered"):
        to_filter(Condition("a", "$gt", None))
