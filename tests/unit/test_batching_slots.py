"""Several hand-outs at the model at once: as many as it has slots."""

import numpy as np
import pytest

from serve.errors import ModelUnavailable, Overloaded
from serve.records import Input


def of(*row: int) -> Input:
    return Input(ids=np.array(row, np.int32))


@pytest.fixture
def two(rig):
    """Two slots; a hand-out holds one input of ten tokens."""

    def make(**fields):
        bounds = {"tokens_min": 10, "tokens_max": 10, "target_ms": 10}
        one = rig(slots=2, **(bounds | fields))
        one.device.held = True
        return one

    return make


async def test_each_slot_has_a_hand_out_and_what_comes_next_waits(two):
    one = two()
    for first in (1, 2, 3):
        await one.start(of(first, *range(9)), tenant=f"t{first}")
    assert len(one.device.waiting) == 2
    assert one.batcher.queued_items == 1
    await one.device.step()
    assert len(one.device.waiting) == 2
    assert one.batcher.queued_items == 0
    await one.release()
    assert one.spy.seen == [1, 2, 3]
    assert [task.done() for task in one.tasks] == [True] * 3
    assert one.batcher.tally.handouts == 3


async def test_a_free_slot_takes_what_another_does_not_hold_up(two):
    one = two()
    await one.start(of(1, *range(9)))
    await one.start(of(2, *range(9)))
    one.device.waiting.reverse()  # the second ends first
    await one.device.step()
    assert [task.done() for task in one.tasks] == [False, True]
    await one.start(of(3, *range(9)))
    assert len(one.device.waiting) == 2
    await one.release()


async def test_with_one_slot_there_is_one_hand_out(rig):
    one = rig(tokens_min=10, tokens_max=10, target_ms=10)
    one.device.held = True
    for first in (1, 2):
        await one.start(of(first, *range(9)))
    assert len(one.device.waiting) == 1
    await one.release()


async def test_the_predicted_wait_begins_when_the_first_slot_is_free(two, clock):
    """10 ms a hand-out: the call that comes third waits 10 ms, and then as long as what is ahead."""
    one = two()
    for first in (1, 2):
        await one.start(of(first, *range(9)))
        clock.advance(0.004)
    with pytest.raises(Overloaded):  # 2 ms are left of the first
        await one.ask(of(3, *range(9)), deadline_s=0.001)
    await one.start(of(3, *range(9)), deadline_s=0.003)
    await one.release()


async def test_the_queue_is_as_quick_as_all_slots_together(two):
    """Before anything was seen: twice as quick as one. This device works on one hand-out after the
    other, so that each takes 20 ms beside another one, and the queue 10.
    """
    one = two()
    assert one.batcher._costs.rate.seconds(10) == pytest.approx(0.005)
    for first in range(1, 100):
        await one.start(of(first, *range(9)), tenant=f"t{first}")
    for _ in range(90):
        await one.device.step()
    assert one.batcher._costs.rate.seconds(10) == pytest.approx(0.010, rel=0.05)
    await one.release()


async def test_a_pass_that_never_returns_is_seen_beside_others_that_do(two, clock):
    one = two(forward_s_max=5)
    await one.start(of(1, *range(9)))
    for first in range(2, 6):
        clock.advance(2)
        await one.start(of(first, *range(9)))
        one.device.waiting.reverse()  # the first one stays
        await one.device.step()
    assert [task.done() for task in one.tasks] == [False, True, True, True, True]
    with pytest.raises(ModelUnavailable, match="more than 5 s"):
        one.batcher.check()
    await one.release()


async def test_a_little_waits_for_more_while_another_hand_out_is_at_the_model(two):
    one = two(tokens_min=20, tokens_max=20, target_ms=20)
    for first in (1, 2):
        await one.start(of(first, *range(9)))
    assert len(one.device.waiting) == 1
    await one.start(of(3, *range(9)))
    assert len(one.device.waiting) == 2
    await one.release()
    assert [len(batch) for batch in one.spy.batches] == [1, 2]


async def test_what_waited_for_more_is_served_when_the_other_hand_out_ends(two):
    one = two(tokens_min=20, tokens_max=20, target_ms=20)
    for first in (1, 2):
        await one.start(of(first, *range(9)))
    await one.device.step()
    assert len(one.device.waiting) == 1
    await one.device.step()
    assert [task.done() for task in one.tasks] == [True, True]
