"""serve.flows.trial: who answers, what is repeated, when the vectors are shown, and what stops a canary."""

from types import SimpleNamespace

import numpy as np
import pytest

from serve.config import Canary
from serve.flows.trial import (
    CHECK_AGAIN_S,
    CHECK_EVERY_S,
    TRIES_MIN,
    Miss,
    Shadow,
    Tally,
    Trial,
    concerns,
)
from serve.records import Caller, EmbedReply


ANN = Caller("ann", "free", 1.0, "k")
SAME = np.eye(2, 4, dtype=np.float32)
NEAR = np.array([[1, 0, 0, 0], [np.sqrt(1 - 0.995**2), 0.995, 0, 0]], np.float32)
"""A cosine of 1, and one of 0.995."""


def served(tokens_max=8, made_of="t"):
    tokenizer = SimpleNamespace(made_of=made_of)
    return SimpleNamespace(tokens_max=tokens_max, tokenizer=tokenizer)


def trial(now=0.0, candidate=None, **fields) -> Trial:
    values = {"model": "old", "to": "new", "same_vectors": True, **fields}
    return Trial(Canary(**values), served(), candidate or served(), Tally(), now)


def running(**fields) -> Trial:
    made = trial(**{"share": 1.0, **fields})
    made.checked(SAME, SAME)
    return made


def ids(*lengths):
    return [np.arange(length, dtype=np.int32) for length in lengths]


def shadow(*lengths, texts=("a text",), vectors=SAME):
    return Shadow("r", texts, ids(*lengths), EmbedReply(vectors, infer_ms=5.0))


# --- whom it concerns --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "whom"),
    [
        ({}, {"ann", "bob", "eve"}),
        ({"tenants": ["ann"]}, {"ann"}),
        ({"tiers": ["free"]}, {"ann", "bob"}),
        ({"tenants": ["eve"], "tiers": ["free"]}, {"ann", "bob", "eve"}),
        ({"tiers": ["free"], "except_tenants": ["bob"]}, {"ann"}),
        ({"tenants": ["ann"], "except_tiers": ["free"]}, set()),
    ],
)
def test_whom_a_canary_applies_to(fields, whom):
    callers = [
        Caller(*one, 1.0, "k") for one in (("ann", "free"), ("bob", "free"), ("eve", "gold"))
    ]
    found = {
        one.tenant for one in callers if concerns(Canary(model="old", to="new", **fields), one)
    }
    assert found == whom


def test_whoever_it_does_not_apply_to_has_no_course():
    assert running(except_tenants=["ann"]).course(ANN, ids(3)) is None


# --- before the candidate answers ----------------------------------------------------------------


def test_the_stable_model_answers_until_the_vectors_have_been_shown():
    one = trial(share=1.0)
    assert (one.state, one.course(ANN, ids(3))) == ("checking", "stable")
    one.checked(SAME, SAME)
    assert (one.state, one.course(ANN, ids(3))) == ("running", "candidate")


def test_a_check_that_comes_to_nothing_is_made_again_and_says_so():
    one = trial(share=1.0)
    assert one.due(0.0)
    assert not one.due(CHECK_AGAIN_S)  # it is under way
    one.unchecked("model_unavailable", 1.0)
    assert "model_unavailable" in one.reason
    assert not one.due(CHECK_AGAIN_S)
    assert one.due(1.0 + CHECK_AGAIN_S)
    one.checked(SAME, SAME)
    assert (one.state, one.reason) == ("running", "")


def test_vectors_are_shown_again_and_again_and_a_missing_answer_stops_nothing():
    one = trial(share=1.0)
    assert one.due(0.0)
    one.checked(SAME, SAME)
    assert not one.due(CHECK_EVERY_S - 1)
    assert one.due(CHECK_EVERY_S)
    one.unchecked("overloaded", CHECK_EVERY_S)
    assert (one.state, one.reason) == ("running", "")


def test_only_who_answers_has_to_show_them():
    assert not trial(shadow=1.0).due(1e9)
    assert trial(shadow=1.0).state == "running"


def test_other_vectors_stop_it_before_it_answered_anything():
    one = trial(share=1.0, cosine_min=0.999)
    one.checked(SAME, NEAR)
    assert one.state == "stopped"
    assert one.reason == "The cosine of a text of the check is 0.99500, below cosine_min 0.999."
    assert one.course(ANN, ids(3)) is None
    assert not one.due(1e9)


def test_an_operator_may_allow_more():
    one = trial(share=1.0, cosine_min=0.99)
    one.checked(SAME, NEAR)
    assert one.state == "running"


def test_another_tokenizer_is_no_same_vectors():
    one = trial(share=1.0, candidate=served(made_of="other"))
    assert one.state == "stopped"
    assert "tokenizer" in one.reason
    assert (
        trial(same_vectors=False, shadow=1.0, candidate=served(made_of="other")).state == "running"
    )


def test_what_the_candidate_cannot_read_the_stable_model_answers():
    one = running(candidate=served(tokens_max=4))
    assert [one.course(ANN, ids(4, 4)), one.course(ANN, ids(4, 5))] == ["candidate", "stable"]


# --- requests --------------------------------------------------------------------------------


def test_times_are_of_requests_that_were_computed_in_full():
    one = running()
    one.answered("stable", EmbedReply(SAME, infer_ms=4.0), 0.01)
    one.answered("candidate", EmbedReply(SAME, infer_ms=2.0), 0.02)
    one.answered("candidate", EmbedReply(SAME, infer_ms=2.0, cached=1), 5.0)
    one.answered("candidate", EmbedReply(SAME), 0.04)  # others were computing it
    arms = one.figures.arms
    assert {arm: (arms[arm].requests, arms[arm].took.count) for arm in arms} == {
        "stable": (1, 1),
        "candidate": (3, 2),
    }
    assert (arms["candidate"].took.high, arms["candidate"].infer.high) == (0.04, 0.002)


def test_a_candidate_that_fails_too_often_stops():
    one = running(fallback_max=0.5)
    for _ in range(TRIES_MIN):
        one.answered("candidate", EmbedReply(SAME), 0.01)
    for _ in range(TRIES_MIN):
        one.fell_back(Miss("overloaded"))
        assert one.state == "running"
    one.fell_back(Miss("model_unavailable"))
    assert one.state == "stopped"
    assert one.reason == "21 of its last 41 requests fell back, the last one for model_unavailable."
    assert one.figures.fallbacks == 21


def test_a_few_failures_are_judged_by_nobody():
    one = running(fallback_max=0.0)
    for _ in range(TRIES_MIN - 1):
        one.fell_back(Miss("overloaded"))
    assert one.state == "running"
    one.fell_back(Miss("overloaded"))
    assert one.state == "stopped"


def test_failures_of_long_ago_are_forgotten():
    one = running(fallback_max=0.2)
    for _ in range(10):
        for _ in range(9):
            one.answered("candidate", EmbedReply(SAME), 0.01)
        one.fell_back(Miss("overloaded"))
    assert one.state == "running"


def test_callers_in_a_hurry_do_not_stop_it():
    one = running(fallback_max=0.0)
    for _ in range(3 * TRIES_MIN):
        one.fell_back(Miss("deadline_exceeded", hurried=True))
    assert (one.state, one.figures.fallbacks) == ("running", 60)


# --- what is repeated --------------------------------------------------------------------------


def test_what_waits_and_what_is_under_way_are_bounded():
    one = trial(shadow=1.0, shadow_inputs_max=3, shadows_at_once=2)
    for _ in range(2):
        one.offer(shadow(3, 3), 100)
    one.offer(shadow(3), 100)
    assert one.figures.shadows == {"dropped": 1}  # the second of two inputs
    assert [one.begin() is not None for _ in range(3)] == [True, True, False]
    one.offer(shadow(3, 3), 100)
    one.offer(shadow(3, 3), 100)
    assert one.begin() is None
    one.end()
    assert one.begin() is not None
    assert one.begin() is None
    assert one.figures.shadows == {"dropped": 2}


def test_what_is_too_large_or_cannot_be_read_is_skipped():
    one = trial(shadow=1.0, same_vectors=False, candidate=served(made_of="other"))
    one.offer(shadow(60, 50), 100)
    one.offer(shadow(5, texts=None), 100)
    assert (one.figures.shadows, one.begin()) == ({"skipped": 2}, None)
    alike = trial(shadow=1.0)
    alike.offer(shadow(5, texts=None), 100)
    assert alike.begin() is not None


def test_a_pair_below_the_bound_stops_it_and_what_waits_is_let_go():
    one = running(share=0.5, shadow=0.5)
    one.offer(shadow(3, 3), 100)
    one.compared(shadow(3, 3), EmbedReply(NEAR, infer_ms=3.0))
    assert one.state == "stopped"
    assert one.reason.startswith("The cosine of an input that was repeated is 0.99500")
    assert one.begin() is None
    distances = one.figures.distances
    assert distances.count == 2
    assert distances.high == pytest.approx(0.005, rel=0.01)
    assert distances.low == 0
    assert one.figures.arms["candidate"].infer.count == 1
    assert one.figures.arms["candidate"].requests == 0


def test_models_that_nobody_called_the_same_are_only_compared():
    one = trial(shadow=1.0, same_vectors=False)
    one.compared(shadow(3, 3), EmbedReply(NEAR))
    assert (one.state, one.figures.distances.count) == ("running", 2)
    one.compared(shadow(3, 3), EmbedReply(np.eye(2, 6, dtype=np.float32), infer_ms=3.0))
    assert one.figures.distances.count == 2  # lengths differ: nothing to be said
    assert one.figures.shadows == {"compared": 2}
    assert one.figures.arms["candidate"].infer.count == 1


def test_the_first_reason_stands():
    one = running()
    one.stop("first")
    one.stop("second")
    assert one.report().reason == "first"
