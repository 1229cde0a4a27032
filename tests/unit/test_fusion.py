"""Reciprocal rank fusion."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve.flows.fusion import fuse
from serve.records import Hit, Record


def ranking(names, score=1.0):
    return [Hit(Record(name, name, 1, 0, np.ones(2, np.float32)), score) for name in names]


def fused(*names, k=60, top_k=10):
    return [(hit.record.id, hit.score) for hit in fuse(list(map(ranking, names)), k=k, top_k=top_k)]


def test_the_sum_of_reciprocal_ranks():
    assert fused("ab", "bc") == [
        ("b", 1 / 62 + 1 / 61),
        ("a", 1 / 61),
        ("c", 1 / 62),
    ]


def test_both_rankings_beat_a_first_place_in_one_of_them_with_k_60_but_not_with_a_small_one():
    first, second = "xabcde", "yabcde"
    assert fused(first, second)[0][0] == "a"
    assert fused("xabcdeq", "yfghijq", k=60)[0][0] == "q"
    assert fused("xabcdeq", "yfghijq", k=1)[0][0] == "x"


def test_ties_are_sorted_by_id_and_top_k_cuts():
    assert [name for name, _ in fused("ba", "ab")] == ["a", "b"]
    assert [name for name, _ in fused("zy", "xw", top_k=3)] == ["x", "z", "w"]


@pytest.mark.parametrize("empty", [[], [""], ["", ""]])
def test_nothing_comes_of_nothing(empty):
    assert fused(*empty) == []


names = st.lists(st.sampled_from("abcdefghij"), unique=True)


@given(names, names, st.integers(1, 1000))
def test_every_hit_is_there_once_best_first_whichever_ranking_comes_first(one, other, k):
    found = fused(one, other, k=k)
    assert {name for name, _ in found} == {*one, *other}
    assert len(found) == len({name for name, _ in found})
    assert found == sorted(found, key=lambda pair: (-pair[1], pair[0]))
    assert found == fused(other, one, k=k)
    assert [name for name, _ in fused(one, k=k)] == one
