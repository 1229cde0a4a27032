"""Deadlines, departed callers, and who pays for passes that did or did not happen."""

import asyncio

import numpy as np
import pytest

from serve.embedding.fake import Faults
from serve.errors import DeadlineExceeded, PoisonInput
from serve.records import Input


BAD = 666
"""An input that starts with this token id must not reach the model, or makes it fail."""
LAST = 7
"""The input whose turn is looked at."""


def of_length(length: int, first: int = 1) -> Input:
    return Input(ids=np.array([first, *range(2, length + 1)], np.int32))


# --- the client's own deadline ----------------------------------------------------------------


async def test_nothing_of_a_call_starts_after_its_limit(rig, clock):
    """The time of its own work is included, other than in `deadline_s`."""
    one = rig(tokens_min=100, tokens_max=100, target_ms=1)
    with pytest.raises(DeadlineExceeded):
        await one.ask(*(of_length(100) for _ in range(50)), deadline_s=1, limit_s=2)
    assert len(one.spy.seen) == 20
    assert one.batcher.queued_items == 0


@pytest.mark.parametrize("limit_s", [0, -1])
async def test_a_limit_that_is_spent_is_no_work_at_all(rig, limit_s):
    one = rig()
    with pytest.raises(DeadlineExceeded):
        await one.ask(of_length(10), limit_s=limit_s)
    assert (one.spy.seen, one.batcher.tally.expired) == ([], 1)


async def test_a_limit_beyond_the_deadline_changes_nothing(rig, clock):
    one = rig()
    await one.hold()
    late = await one.start(of_length(100, BAD), deadline_s=1, limit_s=3600)
    clock.advance(1.3)  # its work is 0.1 s
    await one.release()
    with pytest.raises(DeadlineExceeded):
        await late
    assert one.spy.seen == [9]


async def test_a_caller_hears_that_its_call_expired_while_the_model_is_busy(rig, clock):
    """By a timer of the loop; it acts once the batcher's own clock agrees."""
    one = rig()
    await one.hold()
    late = await one.start(of_length(100, BAD), limit_s=0.005)
    clock.advance(0.006)
    with pytest.raises(DeadlineExceeded):
        async with asyncio.timeout(10):
            await late
    assert len(one.device.waiting) == 1
    assert (one.batcher.queued_items, one.batcher.tally.expired) == (0, 1)


async def test_an_early_timer_is_set_again(rig, clock):
    one = rig()
    await one.hold()
    task = await one.start(of_length(10), limit_s=5)
    [pending] = [each for each in one.batcher._calls if each.call.limit_s]
    timer = pending.timer
    clock.advance(4.9)
    one.batcher._watch(pending)
    assert pending.timer is not timer
    assert not task.done()
    await one.release()
    assert (await task).failures == ()
    assert pending.timer.cancelled()


async def test_work_that_is_at_the_model_when_it_expires_is_answered(rig, clock):
    one = rig()
    one.device.held = True
    task = await one.start(of_length(10), limit_s=0.1)
    [pending] = one.batcher._calls
    clock.advance(1)
    one.batcher._watch(pending)
    await one.release()
    assert (await task).failures == ()


async def test_what_expires_between_the_batches_of_a_hand_out_is_not_run(rig):
    one = rig(target_ms=1000)
    await one.hold()
    in_time = await one.start(of_length(90, 3), tenant="bob")
    late = await one.start(of_length(100, BAD), limit_s=0.09)
    await one.release()
    with pytest.raises(DeadlineExceeded):
        await late
    assert (await in_time).failures == ()
    assert one.spy.seen == [9, 3]
    assert (one.batcher.tally.expired, one.batcher.tally.dropped) == (1, 1)


async def test_what_failed_and_has_expired_is_not_tried_again(rig, clock):
    one = rig()

    def fault(batch, vectors):
        clock.advance(5)
        raise RuntimeError

    one.spy.fault = fault
    with pytest.raises(DeadlineExceeded):
        await one.ask(of_length(10), of_length(10), limit_s=1)
    assert (len(one.spy.batches), one.probed, one.batcher.healthy) == (1, [], True)


# --- one tenant's own order -------------------------------------------------------------------


async def test_a_tenants_calls_go_by_priority(rig):
    one = rig(tokens_min=10, tokens_max=10, target_ms=1)
    await one.hold()
    for first, priority in ((1, 0), (2, 50), (3, 100), (4, 50)):
        await one.start(of_length(10, first), priority=priority)
    await one.start(of_length(10, 5), tenant="bob")
    await one.release()
    assert [first for first in one.spy.seen if first not in (5, 9)] == [3, 2, 4, 1]
    assert one.spy.seen.index(5) <= 2


# --- the true cost ----------------------------------------------------------------------------


def before_last(one) -> set[int]:
    """The inputs that the model saw before LAST."""
    return set(one.spy.seen[: one.spy.seen.index(LAST)])


@pytest.mark.parametrize("poison", [True, False])
async def test_who_sends_what_fails_pays_for_the_passes_it_cost(rig, poison):
    """Eight texts fail together; halving them until one is found runs 14 again."""
    bad = of_length(10, BAD)
    one = rig(
        faults=Faults(poison=frozenset({tuple(bad.ids.tolist())}) if poison else frozenset()),
        tokens_min=10,
        target_ms=80,
    )
    await one.hold()
    failing = await one.start(bad, tenant="careless")
    for number in range(60):
        await one.start(of_length(10, 100 + number), tenant="good")
    await one.device.step()  # the first hand-out is at the device
    await one.start(of_length(10, LAST), tenant="careless")
    await one.release()
    failures = (await failing).failures
    assert [type(error) for _, error in failures] == [PoisonInput] * poison
    assert one.batcher.tally.repeated == 14 * poison
    # the next one starts at 60, where the others are, or 140 tokens later
    assert len(before_last(one) - {9, BAD}) == pytest.approx(21 if poison else 7, abs=1)


async def test_passes_that_nobodys_input_caused_are_not_charged(rig):
    one = rig(tokens_min=10, target_ms=80, faults=Faults(oom_above_tokens=50))
    await one.hold()
    for _ in range(4):
        for tenant in ("ann", "bob"):
            await one.start(of_length(10, 3), tenant=tenant)
    await one.start(of_length(10, LAST), tenant="ann")
    await one.start(of_length(10, LAST), tenant="bob")
    await one.device.step()
    await one.device.step()
    flows = one.batcher._queue.classes["interactive"].flows
    assert {tenant: flow.start for tenant, flow in flows.items()} == {"ann": 40, "bob": 40}
    await one.release()
    assert (one.batcher.tally.repeated, one.batcher.tally.failed) == (8, 0)


@pytest.mark.parametrize("leaves", [True, False])
async def test_what_was_handed_out_and_not_run_is_refunded(rig, leaves):
    one = rig(items_max=4, tokens_min=100, target_ms=1000)
    await one.hold()
    task = await one.start(of_length(100, 3), tenant="ann")
    for number in range(40):
        await one.start(of_length(10, 100 + number), tenant="bob")
    await one.device.step()  # hand-out: three of bob's, then hers
    if leaves:
        await one.leave(task)
    await one.start(of_length(10, LAST), tenant="ann")
    await one.release()
    assert (3 in one.spy.seen) is not leaves
    # her next one starts at 100 tokens, ten of bob's texts, or at once
    assert len(before_last(one) - {3, 9}) == pytest.approx(3 if leaves else 10, abs=1)
