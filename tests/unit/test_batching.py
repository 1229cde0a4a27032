"""What a caller gets, in which order, and when it is refused. See also test_batching_failures."""

import asyncio
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from serve.errors import (
    BadInput,
    DeadlineExceeded,
    Internal,
    NotFound,
    Overloaded,
    QuotaExceeded,
)
from serve.records import EmbedReply, Input


BAD = 666
"""An input that starts with this token id must not reach the model."""


def ids(*row: int) -> Input:
    return Input(ids=np.array(row, np.int32))


def of_length(length: int, first: int = 1) -> Input:
    return ids(first, *range(2, length + 1))


# --- answers ----------------------------------------------------------------------------------


async def test_rows_come_back_in_input_order_and_as_if_alone(rig, rng):
    """Also when lengths are mixed and several calls share batches."""
    one = rig()
    calls = [[of_length(rng.randint(1, 200), n) for n in range(20)] for _ in range(5)]
    replies = await asyncio.gather(*(one.ask(*inputs, tenant=str(inputs)) for inputs in calls))
    for inputs, reply in zip(calls, replies, strict=True):
        assert reply.failures == ()
        assert reply.vectors.dtype == np.float32
        assert np.array_equal(reply.vectors, [one.alone(input_) for input_ in inputs])


async def test_a_call_on_an_idle_model_is_served_at_once(rig):
    one = rig()
    reply = await one.ask(of_length(10))
    assert (reply.queue_ms, reply.infer_ms) == (0, pytest.approx(10))
    assert one.spy.batches == [[list(range(1, 11))]]


async def test_arrivals_of_the_same_turn_share_a_batch(rig):
    one = rig()
    await asyncio.gather(*(one.ask(ids(n, n), tenant=f"t{n}") for n in range(1, 11)))
    assert [len(batch) for batch in one.spy.batches] == [10]


async def test_a_call_without_inputs_is_answered(rig):
    reply = await rig().ask()
    assert reply.vectors.shape == (0, 16)


async def test_a_call_whose_counts_do_not_match_is_refused_not_lost(rig):
    with pytest.raises(Internal, match="1 token counts for 2 inputs"):
        await rig().ask(ids(1), ids(2), tokens=(1,))


async def test_an_unknown_model_is_refused(rig):
    with pytest.raises(NotFound):
        await rig().ask(ids(1), model="x")


async def test_the_clock_of_a_call_starts_at_its_first_slice(rig):
    one = rig(tokens_min=100, tokens_max=100, target_ms=1)
    reply = await one.ask(*(of_length(100) for _ in range(5)))
    assert (reply.queue_ms, reply.infer_ms) == (0, pytest.approx(500))


async def test_nothing_is_kept_of_calls_that_were_answered(rig):
    one = rig()
    for number in range(5):
        await one.ask(ids(number))
    assert not one.batcher._calls


async def test_queue_and_model_time_are_told_apart(rig, clock):
    one = rig()
    await one.hold()
    task = await one.start(of_length(20))
    clock.advance(3)
    await one.release()
    reply = await task
    assert reply.queue_ms == pytest.approx(3001)
    assert reply.infer_ms == pytest.approx(20)


# --- batches ----------------------------------------------------------------------------------


async def test_padded_tokens_of_a_batch_never_exceed_the_budget(rig, rng):
    one = rig(tokens_max=300, tokens_min=300, items_max=16)
    inputs = [of_length(rng.choice([3, 10, 100, 250, 400])) for _ in range(200)]
    await one.ask(*inputs)
    assert len(one.spy.seen) == 200
    for batch, padded in zip(one.spy.batches, one.spy.padded, strict=True):
        assert len(batch) <= 16
        assert padded <= 300 or len(batch) == 1
    tally = one.batcher.tally
    assert tally.inputs == 200
    assert tally.tokens == sum(len(input_.ids) for input_ in inputs)
    assert tally.padded == sum(one.spy.padded)
    assert tally.batches == len(one.spy.batches)
    assert tally.model_s == pytest.approx(sum(one.spy.padded) / 1000)


async def test_a_hand_out_is_bounded_in_predicted_time(rig):
    one = rig(target_ms=50, tokens_min=8, tokens_max=10_000)
    await one.hold()
    for number in range(30):
        await one.start(of_length(10), tenant=f"t{number}")
    await one.release()
    # 50 ms at 1 ms a token; the first batch is the occupant's
    assert [len(batch) for batch in one.spy.batches] == [1, *[5] * 6]


@pytest.mark.parametrize(("size", "items"), [(18, 3), (21, 2), (35, 1), (32, 2)])
async def test_a_hand_out_comes_as_near_to_it_as_its_inputs_let_it(rig, size, items):
    one = rig(target_ms=50, tokens_min=8, tokens_max=10_000)
    await one.hold()
    for number in range(12):
        await one.start(of_length(size), tenant=f"t{number}")
    await one.release()
    assert {len(batch) for batch in one.spy.batches[1:]} == {items}


async def test_padding_and_the_fixed_time_of_batches_count_in_a_hand_out(rig, clock):
    """On a device with 10 ms a batch: what is handed out at once comes near the target."""
    one = rig(target_ms=100, tokens_min=8, tokens_max=10_000, overhead_s=0.01)
    await one.hold()
    sizes = [40, 5, 3, 38, 4, 20] * 8
    for number, size in enumerate(sizes):
        await one.start(of_length(size), tenant=f"t{number}")
    took, began, handouts = [], clock(), one.batcher.tally.handouts
    while one.device.waiting:
        await one.device.step()
        if one.batcher.tally.handouts > handouts:
            took.append(clock() - began)
            began, handouts = clock(), one.batcher.tally.handouts
    await one.release()
    assert max(took) <= 0.1 + (0.01 + 0.04) / 2 + 1e-9  # the last input may lead beyond it by half
    assert 0.09 < sum(took[1:-1]) / len(took[1:-1]) < 0.11
    assert len(one.spy.seen) == 1 + len(sizes)


async def test_a_short_text_is_not_padded_to_the_long_ones_it_is_handed_out_with(rig):
    one = rig(target_ms=1000, overhead_s=0.01)
    await one.hold()
    for number, size in enumerate((200, 10, 195, 12)):
        await one.start(of_length(size), tenant=f"t{number}")
    await one.release()
    assert [sorted(map(len, batch)) for batch in one.spy.batches] == [[1], [10, 12], [195, 200]]


async def test_short_texts_are_one_batch_where_the_engine_lets_them_share_rows(rig):
    one = rig(target_ms=1000)
    one.spy.row_tokens = 8
    await one.ask(*(Input(ids=np.arange(1, count + 1, dtype=np.int32)) for count in (4, 1, 3, 2)))
    assert [sorted(map(len, batch)) for batch in one.spy.batches] == [[1, 2, 3, 4]]
    assert (one.batcher.tally.tokens, one.batcher.tally.padded) == (10, 10)


async def test_a_hand_out_may_always_hold_tokens_min(rig):
    one = rig(target_ms=0.001, tokens_min=40, tokens_max=10_000)
    await one.hold()
    for number in range(8):
        await one.start(of_length(10), tenant=f"t{number}")
    await one.release()
    assert [len(batch) for batch in one.spy.batches] == [1, 4, 4]


async def test_a_hand_out_is_bounded_in_inputs(rig):
    one = rig(items_max=4)
    await one.hold()
    for number in range(4):
        await one.start(ids(1), ids(2), ids(3), tenant=f"t{number}")
    await one.start(ids(4), tenant="last")
    await one.release()
    assert [len(batch) for batch in one.spy.batches] == [1, 3, 3, 3, 4]


async def test_hand_outs_shrink_on_a_device_that_slows_down(rig, clock):
    one = rig(target_ms=80, tokens_min=8, tokens_max=10_000)

    def slow(batch, vectors):
        clock.advance(3 * sum(len(input_.ids) for input_ in batch) / 1000)
        return vectors

    async def largest() -> int:
        one.spy.batches.clear()
        await asyncio.gather(*(one.ask(of_length(10), tenant=f"t{n}") for n in range(40)))
        return max(one.spy.padded)

    assert await largest() == 80
    one.spy.fault = slow
    for _ in range(10):
        await largest()
    assert await largest() == 20


async def test_two_models_share_a_queue_but_never_a_batch(rig):
    one = rig()
    await one.hold()
    tasks = []
    for number in range(1, 21):
        model = "mn"[number % 2]
        tasks.append(await one.start(ids(number, 2), model=model, tenant=f"t{number}"))
    await one.release()
    replies = [await task for task in tasks]
    assert {reply.vectors.shape for reply in replies} == {(1, 16), (1, 8)}
    assert set(one.spy.seen) - {9} == set(range(2, 21, 2))
    assert set(one.engines["n"].seen) == set(range(1, 21, 2))


async def test_a_dear_model_costs_more_of_the_queue(rig):
    """A tenant gains nothing by sending its work to the slower model of a pool."""
    one = rig()
    await one.hold()
    await one.start(of_length(100), model="m")
    cheap = one.batcher.queued_tokens
    await one.start(of_length(100), model="n")
    assert one.batcher.queued_tokens - cheap == pytest.approx(10 * cheap)


async def test_the_wait_behind_a_dear_model_is_predicted_as_such(rig):
    one = rig()
    await one.hold()
    await one.start(of_length(100), of_length(100), model="n")
    for model in "mn":  # 200 tokens at 10 ms
        with pytest.raises(Overloaded, match=r"2\.0 s"):
            await one.ask(ids(1), model=model, deadline_s=1)
    await one.release()


async def test_every_input_has_a_fixed_part_in_its_cost(rig):
    one = rig(item_overhead_tokens=32)
    await one.hold()
    await one.start(of_length(10), of_length(20), tenant="bob")
    assert (one.batcher.queued_tokens, one.batcher.queued_items) == (94, 2)


async def test_batches_grow_while_the_model_is_busy(rig):
    """With a real thread: what arrives during a batch is the next batch."""
    entered, go = threading.Event(), threading.Event()

    def wait(_, vectors):
        entered.set()
        assert go.wait(10)
        return vectors

    with ThreadPoolExecutor(1) as thread:
        one = rig(device=thread)
        one.spy.fault = wait
        await one.start(ids(1))
        assert await asyncio.to_thread(entered.wait, 10)
        for number in range(2, 12):
            await one.start(ids(number), tenant=f"t{number}")
        assert one.batcher.queued_items == 10
        go.set()
        await asyncio.gather(*one.tasks)
        assert [len(batch) for batch in one.spy.batches] == [1, 10]


# --- order ------------------------------------------------------------------------------------


async def test_a_large_call_does_not_block_a_small_one_of_another_tenant(rig):
    one = rig(tokens_min=100, tokens_max=100, target_ms=1)
    await one.hold()
    large = await one.start(*(of_length(50, 1) for _ in range(200)), tenant="large")
    small = await one.start(of_length(50, 2), tenant="small")
    for _ in range(3):  # the occupant, at most one slice of the large call, the small one
        await one.device.step()
    assert small.done()
    assert not large.done()
    assert one.spy.seen.count(1) <= 2
    await one.release()
    assert (await large).vectors.shape == (200, 16)


async def test_interactive_goes_before_bulk_nine_to_one(rig):
    one = rig(tokens_min=100, tokens_max=100, target_ms=1)
    await one.hold()
    for number in range(100):
        await one.start(of_length(100, 1), klass="bulk", deadline_s=3600, tenant="job")
        await one.start(of_length(100, 2), deadline_s=3600, tenant=f"user{number}")
    await one.device.step()
    for _ in range(100):
        await one.device.step()
    served = Counter(one.spy.seen)
    assert (served[1], served[2]) == (10, 90)
    await one.release()


async def test_weights_divide_the_model(rig):
    one = rig(tokens_min=100, tokens_max=100, target_ms=1)
    await one.hold()
    for _ in range(100):
        for marker, weight in ((1, 1.0), (4, 4.0), (16, 16.0)):
            await one.start(
                of_length(100, marker), tenant=f"t{marker}", weight=weight, deadline_s=3600
            )
    await one.device.step()
    for _ in range(105):
        await one.device.step()
    served = Counter(one.spy.seen)
    assert [served[marker] for marker in (1, 4, 16)] == pytest.approx([5, 20, 80], abs=1)
    await one.release()


# --- settings that change ---------------------------------------------------------------------


async def test_weights_change_for_what_waits(rig):
    one = rig(tokens_min=100, tokens_max=100, target_ms=1)
    await one.hold()
    for _ in range(100):
        for marker, tier in ((1, "free"), (4, "premium")):
            call = {"tenant": f"t{marker}", "tier": tier, "deadline_s": 3600}
            await one.start(of_length(100, marker), **call)
    one.batcher.adapt(one.batcher._batch, {"free": 1, "premium": 4})
    await one.device.step()
    for _ in range(100):
        await one.device.step()
    served = Counter(one.spy.seen)
    assert [served[marker] for marker in (1, 4)] == pytest.approx([20, 80], abs=1)
    await one.release()
    assert Counter(one.spy.seen) == {9: 1, 1: 100, 4: 100}


async def test_bounds_of_batches_change_between_two_of_them_and_nothing_that_waits_is_lost(rig):
    one = rig(tokens_min=50, tokens_max=400, target_ms=400)
    await one.hold()
    waiting = [await one.start(of_length(50, n), tenant=f"t{n}") for n in range(1, 21)]
    first = one.batcher._batch
    one.batcher.adapt(first.model_copy(update={"tokens_max": 100, "target_ms": 100}), {})
    assert one.batcher.queued_items == 20
    await one.device.step()
    await one.device.step()
    assert [len(batch) for batch in one.spy.batches] == [1, 2]
    one.batcher.adapt(first, {})
    await one.release()
    assert max(len(batch) for batch in one.spy.batches) == 8
    assert all(task.result().failures == () for task in waiting)


async def test_room_in_the_queue_changes_for_those_who_come(rig):
    one = rig(tenant_items_max=10)
    await one.hold()
    await one.start(*(ids(n) for n in range(8)), tenant="bob")
    fewer = one.batcher._batch.model_copy(update={"tenant_items_max": 5})
    one.batcher.adapt(fewer, {})
    assert one.batcher.queued_items == 8
    with pytest.raises(QuotaExceeded):
        await one.ask(ids(1), tenant="bob")
    await one.release()
    assert one.batcher.tally.dropped == 0


async def test_work_for_a_model_that_is_loaded_meanwhile_has_the_new_weight(rig):
    one = rig(loose="m", tokens_min=100, tokens_max=100, target_ms=1)
    one.loader.held = True
    for _ in range(20):
        for marker, tier in ((1, "free"), (4, "premium")):
            await one.start(of_length(100, marker), tenant=f"t{marker}", tier=tier, deadline_s=3600)
    one.batcher.adapt(one.batcher._batch, {"free": 1, "premium": 4})
    one.device.held = True
    await one.loader.step()
    for _ in range(10):
        await one.device.step()
    served = Counter(one.spy.seen)
    assert served[4] >= 2 * served[1]  # of equal weight they would have as much
    await one.release()


# --- leaving and expiring ---------------------------------------------------------------------


async def test_the_model_never_sees_the_work_of_a_caller_who_left(rig):
    one = rig()
    await one.hold()
    leaves = await one.start(*(of_length(200, BAD) for _ in range(5)))
    stays = await one.start(of_length(10, 3), tenant="bob")
    await one.leave(leaves)
    assert (one.batcher.queued_tokens, one.batcher.queued_items) == (10, 1)
    await one.release()
    await stays
    assert set(one.spy.seen) == {9, 3}
    assert one.batcher.tally.dropped == 5


async def test_what_left_of_a_hand_out_between_batches_is_not_run(rig):
    one = rig(tokens_min=100, tokens_max=100, target_ms=1000)
    await one.hold()
    stays = await one.start(of_length(90, 3), tenant="bob")
    leaves = await one.start(of_length(100, BAD))
    await one.device.step()  # the occupant's; both are handed out, in two batches
    await one.leave(leaves)
    await one.release()
    await stays
    assert one.spy.seen == [9, 3]
    assert one.batcher.tally.dropped == 1


async def test_a_caller_who_leaves_in_the_midst_frees_the_rest(rig):
    one = rig(tokens_min=100, tokens_max=100, target_ms=1)
    await one.hold()
    task = await one.start(*(of_length(100, BAD) for _ in range(50)))
    for _ in range(3):
        await one.device.step()
    await one.leave(task)
    assert one.batcher.queued_tokens == 0
    await one.release()
    assert one.spy.seen.count(BAD) <= 3


async def test_what_waited_past_its_deadline_is_answered_and_not_run(rig, clock):
    one = rig()
    await one.hold()
    late = await one.start(of_length(100, BAD), deadline_s=1)
    in_time = await one.start(of_length(10, 3), deadline_s=60, tenant="bob")
    clock.advance(30)
    await one.release()
    with pytest.raises(DeadlineExceeded):
        await late
    assert (await in_time).failures == ()
    assert set(one.spy.seen) == {9, 3}
    assert one.batcher.tally.dropped == 1


async def test_the_time_of_its_own_work_does_not_count_against_the_deadline(rig):
    one = rig(tokens_min=100, tokens_max=100, target_ms=1)
    reply = await one.ask(*(of_length(100) for _ in range(50)), deadline_s=1)  # 5 s of work
    assert reply.failures == ()


# --- refusals ---------------------------------------------------------------------------------


async def test_a_tenants_own_cap_is_told_with_the_wait(rig):
    one = rig(tenant_tokens_max=1500)
    await one.hold()
    await one.start(of_length(500), of_length(400), of_length(500), deadline_s=60)
    await one.start(of_length(400), tenant="bob")
    with pytest.raises(QuotaExceeded) as caught:
        await one.ask(of_length(200))
    assert (caught.value.code, caught.value.status) == ("queue_full", 429)
    # 1,800 tokens wait, hers last, and 1 is at the model
    assert caught.value.retry_after_s == pytest.approx(1.801)
    assert "1400" in caught.value.message
    await one.start(of_length(100), deadline_s=60)
    await one.release()


async def test_a_tenants_own_inputs_are_bounded_over_both_classes(rig):
    one = rig(tenant_items_max=3)
    await one.hold()
    await one.start(ids(1), ids(2))
    await one.start(ids(1), klass="bulk")
    with pytest.raises(QuotaExceeded, match="3 inputs wait already"):
        await one.ask(ids(1))
    await one.start(ids(1), tenant="bob")
    await one.release()


async def test_the_whole_queue_is_bounded_in_tokens_and_inputs(rig):
    one = rig(queue_tokens_max=1000, queue_items_max=20)
    await one.hold()
    await one.start(of_length(400), of_length(400))
    with pytest.raises(Overloaded) as caught:
        await one.ask(of_length(300), tenant="bob")
    assert caught.value.status == 503
    assert caught.value.retry_after_s >= 1
    await one.start(*(ids(1) for _ in range(18)), tenant="bob")
    with pytest.raises(Overloaded):
        await one.ask(ids(1), tenant="eve")
    await one.release()
    await one.ask(ids(1), tenant="eve")


CAPS = [f"{whose}_{word}_max" for whose in ("tenant", "queue") for word in ("tokens", "items")]


@pytest.mark.parametrize("cap", CAPS)
async def test_refusal_does_not_depend_on_packing(rig, cap):
    """A call of n inputs and n calls of one are admitted alike."""

    async def fill(sizes: list[int]) -> int:
        one = rig(**{cap: 100 if "tokens" in cap else 10})
        await one.hold()
        for size in sizes:
            await one.start(*(of_length(10) for _ in range(size)))
        waiting = one.batcher.queued_items
        await one.release()
        outcomes = await asyncio.gather(*one.tasks, return_exceptions=True)
        assert sum(len(r.vectors) for r in outcomes if isinstance(r, EmbedReply)) == waiting + 1
        return waiting

    assert await fill([1] * 15) == 10
    assert await fill([5] * 3) == 10
    assert await fill([10, 1]) == 10
    assert await fill([11, 10]) == 10


@pytest.mark.parametrize("cap", CAPS)
async def test_what_can_never_wait_is_a_bad_request_busy_or_not(rig, cap):
    one = rig(**{cap: 8 if "tokens" in cap else 2})
    for tenant in ("ann", "bob"):
        with pytest.raises(BadInput) as caught:
            await one.ask(of_length(4), of_length(3), of_length(3), tenant=tenant)
        assert (caught.value.code, caught.value.param) == ("tokens_exceed_queue", "input")
        await one.hold()
    await one.release()


async def test_what_cannot_be_in_time_is_refused_at_once(rig):
    one = rig()
    await one.hold()
    for _ in range(30):
        await one.start(of_length(500), deadline_s=60)
    for deadlines in ({"deadline_s": 10}, {"deadline_s": 60, "limit_s": 10}):
        with pytest.raises(Overloaded) as caught:
            await one.ask(ids(1), **deadlines)
        assert "15.0 s" in caught.value.message
        assert caught.value.retry_after_s == pytest.approx(15.001)
    await one.start(ids(1), deadline_s=10, limit_s=1, tenant="bob")  # nothing of his waits
    await one.release()


async def test_the_hand_out_in_flight_is_part_of_the_wait(rig, clock):
    one = rig(tokens_min=500, tokens_max=500)
    one.device.held = True
    await one.start(of_length(400))
    with pytest.raises(Overloaded, match=r"0\.4 s"):
        await one.ask(ids(1), limit_s=0.3, tenant="bob")
    clock.advance(0.2)
    assert not (await one.start(ids(1), limit_s=0.3, tenant="bob")).done()


async def test_the_wait_is_told_by_what_full_hand_outs_took(rig, clock):
    """Texts so short that their fixed part is most of their cost pass faster than it says."""
    one = rig(item_overhead_tokens=90, items_max=10)
    await one.hold()
    for _ in range(100):
        await one.start(*(of_length(10) for _ in range(10)), deadline_s=3600)

    async def wait_s() -> float:
        with pytest.raises(Overloaded) as caught:
            await one.ask(ids(1), deadline_s=0)
        return caught.value.retry_after_s

    assert await wait_s() == pytest.approx(100, abs=1)  # 100 tokens for each of 1,000 texts
    for _ in range(51):
        await one.device.step()
    assert await wait_s() == pytest.approx(0.1 * 50, rel=0.05)  # ten of which take 0.1 s
    await one.release()
