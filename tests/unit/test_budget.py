"""How large a batch may be: chosen at warm-up, learnt from failures."""

import pytest

from serve.embedding.budget import GROW_AFTER, Budget, choose


# --- choose -----------------------------------------------------------------------------------


def test_a_larger_batch_has_to_be_clearly_better() -> None:
    assert choose([(256, 0.1), (512, 0.196), (1024, 0.392)], least=8) == 256
    assert choose([(256, 0.1), (512, 0.190), (1024, 0.380)], least=8) == 512
    # each a little better, which adds up
    assert choose([(256, 0.1), (512, 0.196), (1024, 0.384), (2048, 0.753)], least=8) == 1024


def test_too_large_is_worse() -> None:
    assert choose([(3, 0.01), (256, 0.05), (512, 0.08), (1024, 0.4)], least=8) == 512


def test_what_a_hand_out_may_always_hold_is_not_undercut() -> None:
    assert choose([(3, 0.001), (64, 0.01), (256, 0.1), (512, 0.2)], least=200) == 256
    assert choose([(3, 0.001), (64, 0.01)], least=200) == 64


def test_a_device_on_which_no_time_passes_takes_all() -> None:
    assert choose([(3, 0.0), (256, 0.0), (512, 0.0)], least=8) == 512


def test_nothing_measured() -> None:
    with pytest.raises(ValueError, match="empty"):
        choose([], least=8)


# --- budget -----------------------------------------------------------------------------------


def grow(budget: Budget, now: float, times: int = 100) -> int:
    for _ in range(times * GROW_AFTER):
        budget.fits(budget.tokens, now)
    return budget.tokens


def test_a_batch_that_ran_out_of_memory_halves_it_down_to_the_least() -> None:
    budget = Budget(least=100, most=1000, forget_s=60)
    budget.shrink(900, 0)
    assert budget.tokens == 450
    for _ in range(5):
        budget.shrink(budget.tokens, 0)
    assert budget.tokens == 100


def test_it_grows_back_slowly_and_stays_below_what_failed() -> None:
    budget = Budget(least=100, most=1000, forget_s=60)
    budget.shrink(1000, 0)
    assert grow(budget, 1, times=1) == 550
    assert grow(budget, 59) == 900
    assert grow(budget, 60) == 1000
    assert grow(budget, 61) == 1000


def test_only_full_batches_tell_that_there_is_room() -> None:
    budget = Budget(least=100, most=1000, forget_s=60)
    budget.shrink(1000, 0)
    for _ in range(1000):
        budget.fits(300, 1000)
    assert budget.tokens == 500


def test_a_failure_begins_the_count_anew_and_the_smallest_one_counts() -> None:
    budget = Budget(least=10, most=1000, forget_s=60)
    budget.shrink(1000, 0)
    for _ in range(GROW_AFTER - 1):
        budget.fits(500, 1)
    budget.shrink(500, 1)
    budget.fits(250, 1)
    assert budget.tokens == 250
    assert grow(budget, 2) == 450
    budget.shrink(480, 50)  # one that went out before
    assert grow(budget, 61) == 432  # the time runs from the last one


def test_a_warm_up_moves_the_bound_but_not_what_was_learnt() -> None:
    budget = Budget(least=100, most=1000, forget_s=60)
    budget.limit(512)
    assert budget.tokens == 512
    budget.shrink(512, 0)
    budget.limit(512)
    assert budget.tokens == 256
    budget.limit(64)
    assert budget.tokens == 64
    budget.shrink(64, 0)
    assert budget.tokens == 64  # the settings allow no less
