"""serve.flows.trial: which requests a candidate gets: as many as was said, and always the same ones."""

import math

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from serve.config import Canary
from serve.flows.trial import course, fraction


REQUESTS = 4000
ROWS = st.lists(st.lists(st.integers(0, 30_000), min_size=1, max_size=8), min_size=1, max_size=4)


def canary(share=0.0, shadow=0.0, to="new", **fields) -> Canary:
    return Canary(model="m", to=to, share=share, shadow=shadow, same_vectors=True, **fields)


def rows(numbers):
    return [np.array(row, np.int32) for row in numbers]


def places(of: Canary, tenant="ann", count=REQUESTS):
    return [fraction(of, tenant, rows([[number, number + 1]])) for number in range(count)]


def near(found: int, share: float) -> bool:
    """Within five standard deviations of a coin's, and five requests where those are next to nothing."""
    return abs(found - REQUESTS * share) <= 5 * math.sqrt(REQUESTS * share * (1 - share)) + 5


@given(st.floats(0, 1), st.floats(0, 1))
def test_each_course_gets_its_share(share, rest):
    shadow = (1 - share) * rest
    one = canary(share, min(shadow, 1 - share))
    found = [course(one, place) for place in PLACES]
    assert near(found.count("candidate"), one.share)
    assert near(found.count("shadow"), one.shadow)


PLACES = places(canary())


def test_none_and_all_are_exact():
    for share, shadow, only in ((0, 0, "stable"), (1, 0, "candidate"), (0, 1, "shadow")):
        assert {course(canary(share, shadow), place) for place in PLACES} == {only}
    assert max(PLACES) < 1


@given(ROWS, st.floats(0, 1))
def test_a_repeat_goes_the_same_way(numbers, share):
    one = canary(share)
    assert fraction(one, "ann", rows(numbers)) == fraction(one, "ann", rows(numbers))


@given(ROWS, st.floats(0, 0.5), st.floats(0, 0.5))
def test_a_larger_share_takes_nobody_back(numbers, less, more):
    less, more = sorted((less, more))
    place = fraction(canary(), "ann", rows(numbers))
    if course(canary(less), place) == "candidate":
        assert course(canary(more), place) == "candidate"
    if course(canary(0.5, less), place) == "shadow":
        assert course(canary(0.5, more), place) == "shadow"


def test_tenants_and_candidates_have_courses_of_their_own():
    """Else one text would be every tenant's canary, and of each candidate."""
    half = {
        name: [place < 0.5 for place in places(one, tenant)]
        for name, one, tenant in (
            ("ann", canary(), "ann"),
            ("bob", canary(), "bob"),
            ("other", canary(to="other"), "ann"),
        )
    }
    for name in ("bob", "other"):
        same = sum(a == b for a, b in zip(half["ann"], half[name], strict=True))
        assert near(same, 0.5)


def test_how_inputs_are_cut_counts():
    one = canary()
    assert fraction(one, "ann", rows([[1, 2], [3]])) != fraction(one, "ann", rows([[1], [2, 3]]))
