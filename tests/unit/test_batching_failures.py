"""What becomes of callers when inputs, batches or models fail: nobody hangs, nobody is lied to."""

import asyncio
import weakref
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from serve.embedding.fake import Faults
from serve.errors import BadInput, Internal, ModelUnavailable, PoisonInput
from serve.records import Input


BAD = 666
"""An input that starts with this token id is the bad one of its test."""


def ids(*row: int) -> Input:
    return Input(ids=np.array(row, np.int32))


def of_length(length: int, first: int = 1) -> Input:
    return ids(first, *range(2, length + 1))


def has_bad(batch: Sequence[Input]) -> bool:
    return any(one.ids[0] == BAD for one in batch)


def raises(error: Exception, when=lambda batch: True):
    def fault(batch, vectors):
        if when(batch):
            raise error
        return vectors

    return fault


def times(count: int, fault):
    """The fault, the first `count` times only."""
    left = [count]

    def limited(batch, vectors):
        if left[0] <= 0:
            return vectors
        left[0] -= 1
        return fault(batch, vectors)

    return limited


async def test_one_bad_input_in_a_hundred_fails_alone(rig):
    one = rig()
    one.spy.fault = raises(RuntimeError("cuda says no: secret text"), has_bad)
    inputs = [of_length(20, BAD if n == 37 else n + 1) for n in range(100)]
    reply = await one.ask(*inputs)
    ((index, error),) = reply.failures
    assert (index, type(error), error.code) == (37, PoisonInput, "input_failed")
    assert "secret" not in error.message
    assert not reply.vectors[37].any()
    good = [n for n in range(100) if n != 37]
    assert np.array_equal(reply.vectors[good], [one.alone(inputs[n]) for n in good])
    assert (one.batcher.healthy, one.batcher.tally.failed, one.probed) == (True, 1, ["m"])


async def test_a_bad_input_does_not_harm_the_calls_it_shares_a_batch_with(rig):
    one = rig(faults=Faults(poison=frozenset({(BAD,)})))
    await one.hold()
    bad = await one.start(ids(BAD), tenant="bad")
    good = [await one.start(ids(n), tenant=f"t{n}") for n in range(1, 9)]
    await one.release()
    assert [type(error) for _, error in (await bad).failures] == [PoisonInput]
    for n, task in enumerate(good, 1):
        assert np.array_equal((await task).vectors[0], one.alone(ids(n)))


async def test_a_failed_batch_is_split_and_tried_again(rig):
    one = rig()
    one.spy.fault = raises(RuntimeError("too many"), lambda batch: len(batch) > 2)
    reply = await one.ask(*(ids(n) for n in range(1, 21)))
    assert reply.failures == ()
    assert np.array_equal(reply.vectors, [one.alone(ids(n)) for n in range(1, 21)])
    assert one.probed == []


async def test_a_failed_batch_frees_its_memory_before_the_next_try(rig):
    """An exception that is kept keeps its frames, and they keep the tensors."""

    class Tensor:
        pass

    tensors: list[weakref.ref] = []
    alive_at_retry = []

    def fault(batch, vectors):
        alive_at_retry.append(sum(tensor() is not None for tensor in tensors))
        tensor = Tensor()
        tensors.append(weakref.ref(tensor))
        if len(batch) > 1:
            raise MemoryError
        return vectors

    one = rig()
    one.spy.fault = fault
    assert (await one.ask(*(ids(n) for n in range(1, 9)))).failures == ()
    assert alive_at_retry == [0] * 15


class OutOfMemoryError(RuntimeError):
    """Called like torch's."""


@pytest.mark.parametrize("error", [MemoryError(), OutOfMemoryError()], ids=["python", "torch"])
async def test_out_of_memory_once_is_survived_and_the_budget_shrinks(rig, error):
    one = rig(tokens_min=100, tokens_max=800, target_ms=10_000)
    inputs = [of_length(100, n) for n in range(1, 17)]
    one.spy.fault = times(1, raises(error))
    assert (await one.ask(*inputs)).failures == ()
    assert (max(one.spy.padded), one.batcher.healthy) == (800, True)
    one.spy.batches.clear()
    assert (await one.ask(*inputs)).failures == ()
    assert max(one.spy.padded) == 400


async def test_a_device_with_less_memory_than_promised_is_learnt(rig):
    one = rig(tokens_min=100, tokens_max=800, faults=Faults(oom_above_tokens=250), target_ms=10_000)
    inputs = [of_length(100, n) for n in range(1, 33)]
    assert (await one.ask(*inputs)).failures == ()
    one.spy.batches.clear()
    assert (await one.ask(*inputs)).failures == ()
    assert max(one.spy.padded) <= 250
    assert one.relieved  # what a GPU's allocator keeps


async def test_a_device_that_cannot_give_memory_back_ends_nothing_by_that(rig):
    """A card whose context is lost says so at whatever is asked of it next."""
    one = rig(tokens_min=100, tokens_max=800, target_ms=10_000)

    def fault():
        raise RuntimeError("CUDA error: an illegal memory access")

    one.relieve = fault
    one.spy.fault = times(1, raises(MemoryError()))
    assert (await one.ask(*(of_length(100, n) for n in range(1, 9)))).failures == ()
    assert one.batcher.healthy
    assert not one.running.done()


async def test_the_budget_is_one_models_and_grows_back_below_what_failed(rig, clock):
    one = rig(
        tokens_min=100, tokens_max=800, target_ms=10**4, oom_forget_s=600, queue_items_max=10**5
    )
    one.spy.fault = times(1, raises(MemoryError()))
    inputs = [of_length(10, n) for n in range(1, 801)]

    async def largest(model: str) -> int:
        engine = one.engines[model]
        engine.batches.clear()
        assert (await one.ask(*inputs, model=model, deadline_s=10**4)).failures == ()
        return max(engine.padded)

    assert await largest("m") == 600  # a hand-out; it failed, and 300 is the budget now
    assert await largest("n") == 600
    grown = [await largest("m") for _ in range(12)]
    assert grown == sorted(grown)
    assert grown[0] < 400
    assert grown[-1] == 540  # 90 %
    clock.advance(600)
    for _ in range(3):
        await largest("m")
    assert await largest("m") == 600


async def test_the_budget_shrinks_no_further_than_a_hand_out_and_never_grows_beyond_the_settings(
    rig,
):
    one = rig(tokens_min=512, tokens_max=64)  # a floor above the ceiling must not raise it
    one.spy.fault = times(1, raises(MemoryError()))
    await one.ask(*(of_length(8) for _ in range(64)))
    one.spy.batches.clear()
    await one.ask(*(of_length(8) for _ in range(64)))
    assert max(one.spy.padded) == 64


async def test_one_input_that_needs_too_much_memory_is_told_so(rig):
    one = rig(faults=Faults(oom_above_tokens=300))
    reply = await one.ask(of_length(400), of_length(200))
    ((index, error),) = reply.failures
    assert (index, error.code, type(error)) == (0, "out_of_memory", PoisonInput)
    assert one.batcher.healthy


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("hiccup")], ids=["oom", "other"])
async def test_a_single_input_is_tried_twice(rig, error):
    one = rig()
    one.spy.fault = times(1, raises(error))
    reply = await one.ask(of_length(30))
    assert reply.failures == ()
    assert one.probed == []


async def test_what_the_engine_calls_the_inputs_fault_is_neither_retried_nor_suspected(rig):
    one = rig()
    one.spy.fault = raises(BadInput("this model takes no such thing"), has_bad)
    reply = await one.ask(ids(BAD))
    assert [(n, type(e), e.message) for n, e in reply.failures] == [
        (0, BadInput, "this model takes no such thing")
    ]
    assert (len(one.spy.batches), one.probed) == (1, [])


def spoil(batch, vectors):
    for row, one in enumerate(batch):
        if one.ids[0] == BAD:
            vectors[row, 0] = np.nan
    return vectors


@pytest.mark.parametrize("company", [0, 1, 30])
async def test_a_vector_that_is_not_finite_fails_its_input_only(rig, company):
    one = rig()
    one.spy.fault = spoil
    inputs = [*(ids(n) for n in range(1, company + 1)), ids(BAD)]
    reply = await one.ask(*inputs)
    ((index, error),) = reply.failures
    assert (index, type(error), error.code) == (company, PoisonInput, "vector_not_finite")
    assert np.isfinite(reply.vectors).all()
    assert not reply.vectors[company].any()
    for row, good in zip(reply.vectors, inputs[:-1], strict=False):
        assert np.array_equal(row, one.alone(good))
    assert one.batcher.healthy


async def test_a_row_that_was_spoilt_by_its_company_is_answered(rig):
    one = rig()
    one.spy.fault = lambda batch, vectors: spoil(batch, vectors) if len(batch) > 1 else vectors
    reply = await one.ask(ids(1), ids(BAD), ids(2))
    assert reply.failures == ()
    assert np.array_equal(reply.vectors[1], one.alone(ids(BAD)))


async def test_a_batch_with_too_few_rows_is_not_trusted(rig):
    one = rig()
    one.spy.fault = times(1, lambda batch, vectors: vectors[:-1])
    reply = await one.ask(*(ids(n) for n in range(1, 9)))
    assert reply.failures == ()
    assert np.array_equal(reply.vectors, [one.alone(ids(n)) for n in range(1, 9)])


# --- a broken model ---------------------------------------------------------------------------


BROKEN = {
    "raises": raises(RuntimeError("CUDA error: an illegal memory access")),
    "out of memory for ever": raises(MemoryError()),
    "StopIteration": raises(StopIteration()),
    "loses rows": lambda batch, vectors: vectors[:-1],
    "not finite": lambda batch, vectors: vectors * np.float32(np.nan),
}


@pytest.mark.parametrize("fault", BROKEN.values(), ids=BROKEN)
async def test_a_broken_model_is_admitted_and_nobody_hangs(rig, fault):
    one = rig(only="m")
    await one.hold()
    one.spy.fault = fault
    for n in range(1, 9):
        await one.start(*(ids(n, m) for m in range(5)), tenant=f"t{n}")
    await one.release()
    outcomes = await asyncio.gather(*one.tasks, return_exceptions=True)
    assert {type(outcome) for outcome in outcomes} == {ModelUnavailable}
    assert one.probed == ["m"]
    assert not one.batcher.healthy
    assert not one.running.done()
    with pytest.raises(ModelUnavailable) as caught:
        await one.ask(ids(1))
    assert caught.value.retry_after_s == 5


async def test_a_model_thread_that_is_gone_is_a_broken_model(rig):
    """A reload works, but does not help."""
    thread = ThreadPoolExecutor(1)
    one = rig(device=thread, only="m")
    thread.shutdown()
    for healthy in (True, False):
        with pytest.raises(ModelUnavailable):
            await one.ask(ids(1))
        assert one.batcher.healthy is healthy


async def test_the_loop_survives_failures_of_every_kind_and_goes_on(rig):
    one = rig()
    kinds = [RuntimeError("x"), MemoryError(), StopIteration(), KeyError("x"), Internal("x")]
    kinds += [StopAsyncIteration(), asyncio.InvalidStateError(), TimeoutError(), RecursionError()]
    for kind in kinds:
        one.spy.fault = times(2, raises(kind))
        await one.ask(ids(1), ids(2))
    one.spy.fault = None
    assert (await one.ask(ids(3))).failures == ()
    assert one.batcher.healthy
    assert not one.running.done()


async def test_when_the_loop_ends_nobody_is_left_waiting(rig):
    one = rig()
    await one.hold()
    waits = await one.start(ids(1), tenant="bob")
    await one.leave(one.running)
    for task in one.tasks:
        with pytest.raises(ModelUnavailable):
            await task
    assert waits.done()
    with pytest.raises(ModelUnavailable):
        await one.ask(ids(1))
    assert not one.batcher.healthy
