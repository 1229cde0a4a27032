"""What work costs, while some models are known and others are not yet."""

import pytest

from serve.embedding.packing import Pace
from serve.flows.costs import GUESS, Costs


def test_before_anything_is_known_all_models_are_alike() -> None:
    costs = Costs(["a", "b"], item_overhead_tokens=32)
    assert costs.cost("a", 100, 2) == costs.cost("b", 100, 2) == 164
    assert costs.rate.seconds(1) == GUESS.token_s
    assert costs.cost("a", 0, 0) == 1


def test_a_known_model_is_the_unit_until_an_earlier_one_is_known() -> None:
    costs = Costs(["a", "b", "c"], item_overhead_tokens=0)
    costs.fit("b", Pace(0.0, 0.01))
    assert (costs.cost("a", 10), costs.cost("b", 10)) == (10, 10)
    assert costs.rate.seconds(1) == pytest.approx(0.01)
    costs.fit("c", Pace(0.0, 0.02))
    assert costs.cost("c", 10) == 20
    costs.fit("a", Pace(0.0, 0.001))
    assert (costs.cost("a", 10), costs.cost("b", 10), costs.cost("c", 10)) == (10, 100, 200)
    assert costs.rate.seconds(1) == pytest.approx(0.001)


def test_a_unit_that_is_loaded_again_keeps_what_the_queue_has_learnt() -> None:
    costs = Costs(["a"], item_overhead_tokens=0)
    costs.fit("a", Pace(0.0, 0.001))
    costs.rate.learn(1000, 2.0)
    learnt = costs.rate.seconds(1)
    costs.fit("a", Pace(0.0, 0.001))
    assert costs.rate.seconds(1) == learnt > 0.001
