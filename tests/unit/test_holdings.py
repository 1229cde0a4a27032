"""Which model is loaded next, which leaves, and which is not tried."""

import pytest

from serve.config import Model, Pool
from serve.embedding.holdings import Holdings, Step
from serve.errors import ModelUnavailable, NotFound


def model(model_id: str, **fields) -> Model:
    values = {"id": model_id, "engine": "fake", "dimensions": 8, "tokens_max": 64, "pinned": False}
    return Model(**(values | fields))


def held(*models: Model, sizes: int = 100, **pool) -> Holdings:
    """Pinned models are loaded already; all take `sizes` bytes."""
    holdings = Holdings(Pool(models=models, **({"swap_after_s": 2} | pool)))
    for one in models:
        if one.pinned:
            holdings.loaded(one.id, sizes, 0)
        else:
            holdings.expect(one.id, sizes)
    return holdings


def load(holdings: Holdings, model_id: str, now: float, size_bytes: int = 100) -> None:
    """Wanted by one call, loaded, and used no more."""
    assert not holdings.enter(model_id, now)
    assert holdings.step(now) == Step("load", model_id)
    holdings.loaded(model_id, size_bytes, now)
    assert holdings.enter(model_id, now)
    holdings.leave(model_id, now)


def unload(holdings: Holdings, model_id: str, now: float) -> None:
    assert holdings.step(now) == Step("unload", model_id)
    holdings.unloaded(model_id)


def test_pinned_models_run_at_once_and_nothing_is_to_be_done() -> None:
    holdings = held(model("a", pinned=True), model("b", pinned=True), memory_bytes_max=200)
    assert holdings.enter("a", 0)
    assert holdings.step(1e9) is None
    assert holdings.due(0) is None
    assert holdings.bytes == 200


def test_an_unknown_model() -> None:
    with pytest.raises(NotFound) as caught:
        held(model("a")).enter("x", 0)
    assert caught.value.code == "model_not_found"


def test_a_model_is_loaded_once_for_all_who_ask() -> None:
    holdings = held(model("a"))
    assert not holdings.enter("a", 0)
    assert not holdings.enter("a", 0)
    assert holdings.step(0) == Step("load", "a")
    assert not holdings.enter("a", 1)
    assert holdings.step(1) is None  # one is under way
    holdings.loaded("a", 100, 2)
    assert holdings.enter("a", 2)
    assert holdings.step(2) is None
    assert holdings.counts()["a"][0].loads == 1


def test_loads_are_in_the_order_in_which_they_were_wanted() -> None:
    holdings = held(model("a"), model("b"), model("c"))
    for name in "cab":
        holdings.enter(name, 0)
    for name in "cab":
        assert holdings.step(0) == Step("load", name)
        holdings.loaded(name, 1, 0)


def test_a_model_that_nobody_waits_for_any_more_is_not_loaded() -> None:
    holdings = held(model("a"))
    holdings.enter("a", 0)
    holdings.forget("a", 0)
    assert holdings.step(0) is None


# --- memory -----------------------------------------------------------------------------------


def test_the_least_recently_used_idle_model_leaves() -> None:
    holdings = held(model("a"), model("b"), model("c"), memory_bytes_max=250)
    load(holdings, "a", 1)
    load(holdings, "b", 2)
    assert holdings.enter("a", 3)
    holdings.leave("a", 3)
    assert not holdings.enter("c", 4)
    unload(holdings, "b", 4)
    assert holdings.step(4) == Step("load", "c")
    counts = holdings.counts()
    assert (counts["b"][0].evictions, counts["b"][1], counts["a"][1]) == (1, 0, 100)


def test_nothing_leaves_that_is_used_or_pinned_nor_in_vain() -> None:
    holdings = held(
        model("p", pinned=True), model("a"), model("b"), model("c"), memory_bytes_max=300
    )
    load(holdings, "a", 1)
    load(holdings, "b", 2)
    assert holdings.enter("a", 3)
    holdings.expect("c", 150)
    assert not holdings.enter("c", 3)
    assert holdings.step(3) is None  # b alone would not be enough
    assert holdings.due(3) == 5
    holdings.leave("a", 4)
    unload(holdings, "b", 4)
    unload(holdings, "a", 4)
    assert holdings.step(4) == Step("load", "c")


def test_a_hand_out_keeps_a_model_whose_callers_have_left() -> None:
    holdings = held(model("a"), model("b"), memory_bytes_max=100)
    load(holdings, "a", 1)
    holdings.enter("a", 2)
    holdings.hold("a")
    holdings.leave("a", 2)
    holdings.enter("b", 2)
    assert holdings.step(2) is None
    holdings.leave("a", 3)
    unload(holdings, "a", 3)


def test_a_model_that_is_being_unloaded_takes_no_work_and_comes_back() -> None:
    holdings = held(model("a"), model("b", unload_after_s=10), memory_bytes_max=150)
    load(holdings, "a", 0)
    assert not holdings.enter("b", 1)
    assert holdings.step(1) == Step("unload", "a")
    assert not holdings.enter("a", 1)
    holdings.forget("b", 1)
    assert not holdings.is_open("a")
    holdings.unloaded("a")
    assert holdings.step(2) == Step("load", "a")
    holdings.loaded("a", 100, 2)
    assert holdings.enter("a", 2)


def test_a_model_in_constant_use_has_to_leave_for_one_that_waits_and_comes_back_in_turn() -> None:
    holdings = held(model("a"), model("b"), memory_bytes_max=150)
    load(holdings, "a", 0)
    assert holdings.enter("a", 1)
    holdings.enter("b", 1)
    assert holdings.step(2.9) is None
    assert holdings.enter("a", 2.9)  # its turn is not over yet
    assert holdings.step(3) is None  # now it is
    assert not holdings.enter("a", 3)
    holdings.leave("a", 3.5)
    assert holdings.step(3.5) is None  # one call of it is still at work
    holdings.leave("a", 4)
    unload(holdings, "a", 4)
    assert holdings.step(4) == Step("load", "b")
    holdings.loaded("b", 100, 4)
    assert holdings.enter("b", 4)
    assert holdings.step(5) is None  # a was wanted at 3: its turn comes, too
    assert not holdings.enter("b", 5)
    holdings.leave("b", 5)
    unload(holdings, "b", 5)
    assert holdings.step(5) == Step("load", "a")


def test_what_is_due_is_done_at_that_very_moment() -> None:
    """Whoever slept until then is not woken again."""
    holdings = held(model("a"), model("b"), memory_bytes_max=150, swap_after_s=2)
    load(holdings, "a", 0)
    holdings.enter("a", 1)
    now = 31.052328888281355  # (now + 2) - now is less than 2
    holdings.enter("b", now)
    assert holdings.step(now) is None
    holdings.step(holdings.due(now))
    assert not holdings.is_open("a")


def test_a_drained_model_goes_on_when_nobody_waits_for_its_memory_any_more() -> None:
    holdings = held(model("a"), model("b"), memory_bytes_max=150)
    load(holdings, "a", 0)
    holdings.enter("a", 1)
    holdings.enter("b", 1)
    holdings.step(3)
    assert not holdings.is_open("a")
    holdings.enter("a", 3)
    holdings.forget("a", 3)  # who leaves is not the one it is drained for
    assert not holdings.is_open("a")
    holdings.forget("b", 3)
    assert holdings.is_open("a")


def test_a_drained_model_goes_on_though_another_will_be_tried_again_later() -> None:
    holdings = held(
        model("p", pinned=True), model("a"), model("b"), memory_bytes_max=250, load_retry_s=60
    )
    load(holdings, "a", 0)
    holdings.broke("p", 1)
    unload(holdings, "p", 1)
    assert holdings.step(1) == Step("load", "p")
    holdings.failed("p", 1)
    assert holdings.enter("a", 1)
    holdings.expect("b", 200)
    holdings.enter("b", 1)
    holdings.expect("p", 50)
    assert holdings.step(3) is None
    assert not holdings.enter("a", 3)
    holdings.forget("b", 4)  # p is not due before 61
    assert holdings.is_open("a")


def test_a_model_that_turns_out_larger_makes_idle_ones_leave() -> None:
    holdings = held(model("a"), model("b"), memory_bytes_max=250)
    load(holdings, "a", 0)
    holdings.enter("b", 1)
    assert holdings.step(1) == Step("load", "b")
    holdings.loaded("b", 200, 1)
    assert holdings.is_open("b")
    unload(holdings, "a", 1)
    assert holdings.bytes == 200


def test_a_model_that_turns_out_larger_leaves_where_others_are_in_use_and_has_its_turn() -> None:
    holdings = held(model("a"), model("b"), memory_bytes_max=250)
    load(holdings, "a", 0)
    holdings.enter("a", 1)
    holdings.enter("b", 1)
    holdings.step(1)
    holdings.loaded("b", 200, 1)
    assert not holdings.is_open("b")
    unload(holdings, "b", 1)
    assert holdings.step(1) is None
    holdings.leave("a", 2)
    unload(holdings, "a", 2)
    assert holdings.step(2) == Step("load", "b")


def test_a_model_that_turns_out_larger_is_not_loaded_again_when_its_callers_have_left() -> None:
    holdings = held(model("a"), model("b"), memory_bytes_max=250)
    load(holdings, "a", 0)
    holdings.enter("a", 1)
    holdings.enter("b", 1)
    holdings.step(1)
    holdings.forget("b", 1)
    holdings.loaded("b", 200, 1)
    unload(holdings, "b", 1)
    assert holdings.step(9) is None
    assert holdings.is_open("a")


def test_what_never_fits_is_refused_without_a_load_once_its_size_is_known() -> None:
    holdings = held(model("p", pinned=True), model("a"), memory_bytes_max=250)
    holdings.expect("a", 0)
    holdings.enter("a", 1)
    assert holdings.step(1) == Step("load", "a")
    holdings.loaded("a", 200, 1)
    unload(holdings, "a", 1)
    assert holdings.step(1) == Step("refuse", "a")
    holdings.failed("a", 1)
    assert holdings.step(1) is None


def test_an_idle_model_leaves_after_its_time_and_a_used_one_does_not() -> None:
    holdings = held(model("a", unload_after_s=10), model("b"))
    load(holdings, "a", 0)
    load(holdings, "b", 0)
    assert holdings.due(0) == 10
    holdings.enter("a", 5)
    assert holdings.due(5) is None
    assert holdings.step(50) is None
    holdings.leave("a", 60)
    assert holdings.step(69.9) is None
    assert holdings.step(70) == Step("unload", "a")


# --- failures ---------------------------------------------------------------------------------


def test_a_model_that_fails_to_load_is_tried_again_later_and_later() -> None:
    holdings = held(model("a"), load_retry_s=1, load_retry_s_max=5)
    now, waits = 0.0, []
    for _ in range(5):
        holdings.enter("a", now)
        assert holdings.step(now) == Step("load", "a")
        holdings.failed("a", now)
        with pytest.raises(ModelUnavailable) as caught:
            holdings.enter("a", now)
        waits.append(caught.value.retry_after_s)
        assert holdings.step(now) is None
        now += waits[-1]
    assert waits == [1, 2, 4, 5, 5]
    assert holdings.counts()["a"][0].load_failures == 5
    assert not holdings.lost  # another replica would not load it either
    holdings.enter("a", now)
    holdings.step(now)
    holdings.loaded("a", 100, now)
    assert holdings.enter("a", now)


def test_a_failure_does_not_hold_up_others() -> None:
    holdings = held(model("p", pinned=True), model("a"))
    holdings.broke("p", 0)
    unload(holdings, "p", 0)
    assert holdings.step(0) == Step("load", "p")
    holdings.failed("p", 0)
    holdings.enter("a", 0)
    assert holdings.step(0) == Step("load", "a")  # p is first, but not due


def test_a_pinned_model_that_breaks_is_loaded_again_at_once() -> None:
    holdings = held(model("a", pinned=True), model("b", pinned=True))
    holdings.enter("a", 0)
    holdings.broke("a", 0)
    assert not holdings.enter("a", 0)  # waits for it
    assert holdings.step(0) is None  # the broken one's calls have not left yet
    holdings.leave("a", 0)
    unload(holdings, "a", 0)
    assert holdings.step(0) == Step("load", "a")
    holdings.loaded("a", 100, 1)
    assert holdings.enter("a", 1)
    counts = holdings.counts()["a"][0]
    assert (counts.breaks, counts.evictions, counts.loads) == (1, 0, 2)


def test_a_replica_is_lost_when_a_reload_did_not_help_and_no_other_model_works() -> None:
    for pinned in (True, False):
        holdings = held(model("a", pinned=pinned))
        if not pinned:
            load(holdings, "a", 0)
        holdings.broke("a", 0)
        assert not holdings.lost
        unload(holdings, "a", 0)
        if not pinned:
            assert holdings.step(0) is None
            holdings.enter("a", 1)
        assert holdings.step(1) == Step("load", "a")
        holdings.loaded("a", 100, 1)
        assert not holdings.lost
        holdings.broke("a", 1)
        assert holdings.lost


def test_a_replica_is_lost_when_the_reload_fails() -> None:
    holdings = held(model("a", pinned=True))
    holdings.broke("a", 0)
    unload(holdings, "a", 0)
    holdings.step(0)
    holdings.failed("a", 0)
    assert holdings.lost


def test_a_replica_is_not_lost_while_another_model_works_and_tries_the_pinned_one_again() -> None:
    holdings = held(model("a", pinned=True), model("b", pinned=True), load_retry_s=3)
    for _ in range(2):
        holdings.broke("a", 0)
        unload(holdings, "a", 0)
        if holdings.step(0) is not None:
            holdings.loaded("a", 100, 0)
    assert not holdings.lost
    with pytest.raises(ModelUnavailable):
        holdings.enter("a", 0)
    assert holdings.due(0) == 6
    assert holdings.step(6) == Step("load", "a")
    holdings.broke("b", 6)
    assert holdings.lost


def test_a_model_that_works_again_has_all_its_chances_again() -> None:
    holdings = held(model("a", pinned=True))
    for now in (0, 1, 2):
        holdings.broke("a", now)
        unload(holdings, "a", now)
        assert holdings.step(now) == Step("load", "a")
        holdings.loaded("a", 100, now)
        holdings.worked("a")
        assert not holdings.lost
