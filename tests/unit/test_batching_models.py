"""Models that come and go behind a batcher: who waits for them, who does not, and who is told."""

import asyncio

import numpy as np
import pytest

from serve.errors import DeadlineExceeded, ModelUnavailable, Overloaded, QuotaExceeded
from serve.records import Input


def ids(*row: int) -> Input:
    return Input(ids=np.array(row, np.int32))


def of_length(length: int, first: int = 1) -> Input:
    return ids(first, *range(2, length + 1))


def fail(model: str) -> None:
    raise RuntimeError(f"/secret/path of {model}")


# --- loaded when asked for --------------------------------------------------------------------


async def test_a_model_is_loaded_for_its_first_call_and_stays(rig):
    one = rig(loose="n")
    assert one.log == []
    first = await one.ask(ids(1, 2), model="n")
    assert first.vectors.shape == (1, 8)
    await one.ask(ids(1, 2), model="n")
    assert one.log == [("load", "n")]


async def test_other_models_go_on_while_one_is_loaded_and_its_calls_wait_in_order(rig):
    one = rig(loose="n")
    one.loader.held = True
    waiting = [await one.start(ids(number, 2), model="n") for number in range(1, 4)]
    assert (await one.ask(ids(5))).failures == ()
    assert len(one.loader.waiting) == 1  # one load for all three
    assert not any(task.done() for task in waiting)
    assert (one.batcher.queued_items, one.batcher.queued_tokens) == (3, 6)  # its pace is not known
    report = one.batcher.report("default", "r", 10)
    assert (report.items, report.cost) == (3, 6)
    await one.release()
    assert one.engines["n"].seen == [1, 1, 2, 3]  # first the load's own known good input
    assert one.batcher.tally.dropped == 0


async def test_a_model_that_was_never_measured_gets_its_price_when_it_is_loaded(rig):
    one = rig(loose="n")
    await one.ask(ids(1), model="n")
    await one.hold()
    await one.start(of_length(100), model="m")
    cheap = one.batcher.queued_tokens
    await one.start(of_length(100), model="n")
    assert one.batcher.queued_tokens - cheap == pytest.approx(10 * cheap)
    await one.release()


async def test_a_call_whose_deadline_passes_during_the_load_is_told_and_the_load_goes_on(
    rig, clock
):
    one = rig(loose="n")
    one.loader.held = True
    late = await one.start(ids(1), model="n", limit_s=0.005)
    clock.advance(0.006)
    with pytest.raises(DeadlineExceeded):
        async with asyncio.timeout(10):
            await late
    assert (one.batcher.queued_items, one.batcher.tally.dropped) == (0, 1)
    await one.release()
    assert one.log == [("load", "n")]
    assert one.engines["n"].seen == [1]  # only the known good input of the load


async def test_a_call_that_leaves_before_its_load_began_costs_no_load(rig):
    one = rig(loose="mn", pool={"memory_bytes_max": 100})
    one.loader.held = True
    await one.start(ids(1), model="m")
    leaves = await one.start(ids(1), model="n")
    await one.leave(leaves)
    await one.release()
    assert one.log == [("load", "m")]


async def test_what_waits_for_a_load_counts_against_the_caps(rig):
    one = rig(loose="n", tenant_items_max=2, queue_items_max=3)
    one.loader.held = True
    await one.start(ids(1), ids(2), model="n", tenant="ann")
    with pytest.raises(QuotaExceeded):
        await one.ask(ids(1), model="m", tenant="ann")
    await one.start(ids(1), model="n", tenant="bob")
    with pytest.raises(Overloaded):
        await one.ask(ids(1), model="m", tenant="eve")
    await one.release()
    await one.ask(ids(1), ids(2), model="n", tenant="ann")


async def test_a_call_without_inputs_needs_its_model_too(rig):
    assert (await rig(loose="n").ask(model="n")).vectors.shape == (0, 8)


async def test_a_call_without_inputs_does_not_wait_for_ever_either(rig, clock):
    one = rig(loose="n")
    one.loader.held = True
    late = await one.start(model="n", limit_s=0.005)
    clock.advance(0.006)
    with pytest.raises(DeadlineExceeded):
        async with asyncio.timeout(2):
            await late
    await one.release()


# --- room for one only ------------------------------------------------------------------------


async def test_models_take_turns_and_none_leaves_while_its_work_is_queued_or_at_the_model(
    rig, clock
):
    one = rig(loose="mn", pool={"memory_bytes_max": 150, "swap_after_s": 2})
    await one.ask(ids(1), model="m")
    await one.hold()
    queued = await one.start(ids(2), model="m", tenant="bob")
    other = await one.start(ids(3), model="n")
    assert one.log == [("load", "m")]
    clock.advance(2)
    one.batcher._loads.look()  # as its timer does
    parked = await one.start(ids(4), model="m", tenant="eve")
    assert not parked.done()
    assert one.log == [("load", "m")]
    await one.device.step()  # the occupant
    assert one.log == [("load", "m")]
    await one.release()
    assert queued.done()
    assert other.done()
    assert one.log[:3] == [("load", "m"), ("unload", "m"), ("load", "n")]
    clock.advance(2)
    one.batcher._loads.look()
    async with asyncio.timeout(10):
        assert (await parked).failures == ()
    assert one.log[3:] == [("unload", "n"), ("load", "m")]


async def test_a_turn_ends_by_a_timer_though_nothing_else_happens(rig, clock):
    """By one of the loop; it acts once the batcher's own clock agrees."""
    one = rig(loose="mn", pool={"memory_bytes_max": 150, "swap_after_s": 0.005})
    await one.ask(ids(1), model="m")
    await one.hold()
    await one.start(ids(3), model="n")
    clock.advance(0.006)
    async with asyncio.timeout(10):
        while one.holdings.is_open("m"):  # noqa: ASYNC110  it is told to nobody
            await asyncio.sleep(0.001)
    await one.release()
    assert one.log == [("load", "m"), ("unload", "m"), ("load", "n")]


async def test_a_model_does_not_leave_from_under_a_batch_whose_caller_has_left(rig):
    one = rig(loose="mn", pool={"memory_bytes_max": 150})
    await one.ask(ids(1), model="m")
    one.device.held = True
    leaves = await one.start(ids(2), model="m")
    await one.leave(leaves)
    await one.start(ids(3), model="n")
    assert one.log == [("load", "m")]
    await one.release()
    assert one.log == [("load", "m"), ("unload", "m"), ("load", "n")]


async def test_an_idle_model_makes_room_at_once(rig):
    one = rig(loose="mn", pool={"memory_bytes_max": 150})
    for model in "mnm":
        await one.ask(ids(1), model=model)
    assert one.log == [
        ("load", "m"), ("unload", "m"), ("load", "n"), ("unload", "n"), ("load", "m")
    ]  # fmt: skip


async def test_a_call_that_arrives_while_its_idle_model_is_unloaded_waits_for_it_to_come_back(rig):
    one = rig(loose="mn", pool={"memory_bytes_max": 150})
    await one.ask(ids(1), model="m")
    one.loader.held = True
    await one.start(ids(2), model="n")
    assert len(one.loader.waiting) == 1  # the unload of m has begun
    late = await one.start(ids(3), model="m")
    assert one.spy.seen == [1, 1]  # nothing is given to an engine that may be closed already
    await one.release()
    assert (await late).failures == ()
    assert one.log[1:] == [("unload", "m"), ("load", "n"), ("unload", "n"), ("load", "m")]
    assert one.probed == []


async def test_a_drained_model_that_is_being_unloaded_does_not_come_back_half_way(rig, clock):
    """The call that it leaves for goes away in that moment."""
    one = rig(loose="mn", pool={"memory_bytes_max": 150, "swap_after_s": 2})
    await one.ask(ids(1), model="m")
    await one.hold()
    leaves = await one.start(ids(2), model="n")
    clock.advance(2)
    one.batcher._loads.look()
    parked = await one.start(ids(3), model="m")
    one.loader.held = True
    await one.device.step()  # the last of its work: now it is unloaded
    await one.leave(leaves)
    assert not parked.done()
    assert one.device.waiting == []
    await one.release()
    assert (await parked).failures == ()
    assert one.log[1:] == [("unload", "m"), ("load", "m")]


async def test_a_model_for_which_there_is_no_room_at_all_is_refused_with_the_reason(rig):
    one = rig(loose="n", pool={"memory_bytes_max": 150, "load_retry_s": 7})
    with pytest.raises(ModelUnavailable, match="more memory than its pool") as caught:
        await one.ask(ids(1), model="n")
    assert caught.value.retry_after_s == 7
    assert (await one.ask(ids(1))).failures == ()


# --- loads that fail --------------------------------------------------------------------------


async def test_a_load_that_fails_is_told_to_all_who_wait_and_to_later_ones_at_once(rig, clock):
    one = rig(loose="n", pool={"load_retry_s": 2, "load_retry_s_max": 3})
    one.load_fault = fail
    one.loader.held = True
    for number in range(3):
        await one.start(ids(number), model="n")
    await one.release()
    outcomes = await asyncio.gather(*one.tasks, return_exceptions=True)
    assert {type(outcome) for outcome in outcomes} == {ModelUnavailable}
    assert {outcome.retry_after_s for outcome in outcomes} == {2}
    assert "secret" not in outcomes[0].message
    clock.advance(0.5)
    with pytest.raises(ModelUnavailable) as caught:
        await one.ask(ids(1), model="n")
    assert caught.value.retry_after_s == 1.5
    clock.advance(1.5)
    with pytest.raises(ModelUnavailable) as caught:
        await one.ask(ids(1), model="n")
    assert caught.value.retry_after_s == 3
    one.load_fault = None
    clock.advance(3)
    assert (await one.ask(ids(1), model="n")).failures == ()
    one.batcher.check()
    assert (await one.ask(ids(1))).failures == ()


@pytest.mark.parametrize("error", [StopIteration(), ModelUnavailable("x"), MemoryError()])
async def test_the_keeper_survives_loads_that_fail_in_any_way(rig, clock, error):
    one = rig(loose="n")

    def fault(_model: str) -> None:
        raise error

    one.load_fault = fault
    for _ in range(3):
        with pytest.raises(ModelUnavailable):
            await one.ask(ids(1), model="n")
        clock.advance(60)
    one.load_fault = None
    assert (await one.ask(ids(1), model="n")).failures == ()


# --- models that break ------------------------------------------------------------------------


def breaks(batch, vectors):
    raise RuntimeError("an illegal memory access")


async def test_a_pinned_model_that_breaks_is_loaded_again_and_calls_meanwhile_wait(rig):
    one = rig()
    one.loader.held = True
    one.spy.fault = breaks
    with pytest.raises(ModelUnavailable) as caught:
        await one.ask(ids(1))
    assert caught.value.retry_after_s == 1
    waits = await one.start(ids(2))
    assert (await one.ask(ids(3), model="n")).failures == ()
    one.batcher.check()
    one.spy.fault = None
    await one.release()
    assert (await waits).failures == ()
    assert one.log == [("unload", "m"), ("load", "m")]


async def test_one_broken_model_does_not_sink_the_pool(rig, clock):
    one = rig()
    one.spy.fault = breaks
    for _ in range(4):
        with pytest.raises(ModelUnavailable):
            await one.ask(ids(1))
        assert (await one.ask(ids(3), model="n")).failures == ()
        one.batcher.check()
        clock.advance(60)
    one.spy.fault = None
    one.batcher._loads.look()
    await one.release()
    assert (await one.ask(ids(1))).failures == ()


async def test_a_device_that_is_lost_is_given_up_though_its_other_model_has_nothing_to_do(rig):
    one = rig()
    for spy in one.engines.values():
        spy.fault = breaks
    with pytest.raises(ModelUnavailable):
        await one.ask(ids(1))
    await one.leave(await one.start(ids(2)))
    assert one.probed == ["m", "n"]
    with pytest.raises(ModelUnavailable):
        one.batcher.check()


async def test_a_pass_that_failed_and_whose_caller_left_does_not_show_that_the_model_works(rig):
    one = rig(only="m")
    one.loader.held = True
    one.spy.fault = breaks
    with pytest.raises(ModelUnavailable):
        await one.ask(ids(1))
    await one.leave(await one.start(ids(5)))
    one.spy.fault = None
    await one.release()
    assert one.log == [("unload", "m"), ("load", "m")]
    one.spy.fault = breaks
    one.device.held = True
    leaves = await one.start(ids(2))
    await one.leave(leaves)
    await one.release()
    assert one.batcher.healthy
    with pytest.raises(ModelUnavailable):
        await one.ask(ids(3))
    assert not one.batcher.healthy


async def test_when_no_model_works_the_replica_is_given_up(rig):
    one = rig()
    for spy in one.engines.values():
        spy.fault = breaks
    for model in "mn":
        with pytest.raises(ModelUnavailable):
            await one.ask(ids(1), model=model)
    assert not one.batcher.healthy
    with pytest.raises(ModelUnavailable, match="No model works"):
        one.batcher.check()


async def test_a_reload_that_never_ends_ends_the_replica_where_nothing_else_works(rig, clock):
    for only, healthy in (("m", False), ("mn", True)):
        one = rig(only=only, pool={"reload_s_max": 60})
        one.loader.held = True
        one.spy.fault = breaks
        with pytest.raises(ModelUnavailable):
            await one.ask(ids(1))
        waits = await one.start(ids(2), deadline_s=3600)
        clock.advance(59)
        one.batcher.check()
        clock.advance(2)
        if not healthy:
            with pytest.raises(ModelUnavailable, match="not back after 60 s"):
                one.batcher.check()
            with pytest.raises(ModelUnavailable):
                await waits
        else:
            one.batcher.check()
            assert not waits.done()
        assert one.batcher.healthy is healthy
        one.spy.fault = None
        await one.release()


# --- a pass that never returns ----------------------------------------------------------------


async def test_a_pass_that_does_not_return_ends_the_replica_and_frees_its_callers(rig, clock):
    one = rig(forward_s_max=5)
    await one.hold()
    waits = await one.start(ids(1), tenant="bob", deadline_s=3600)
    clock.advance(5)
    one.batcher.check()
    clock.advance(0.1)
    with pytest.raises(ModelUnavailable, match="more than 5 s"):
        one.batcher.check()
    for task in (*one.tasks, waits):
        with pytest.raises(ModelUnavailable):
            await task
    with pytest.raises(ModelUnavailable):
        await one.ask(ids(1), model="n")
    one.device.held = False
    await one.device.step()


async def test_a_probe_that_does_not_return_ends_it_too(rig, clock):
    one = rig(forward_s_max=5)
    one.spy.fault = breaks
    one.device.held = True
    await one.start(ids(1))
    await one.device.step()
    await one.device.step()
    clock.advance(5.1)  # the probe is at the model
    with pytest.raises(ModelUnavailable):
        one.batcher.check()
    await one.release()


async def test_many_passes_are_not_one_long_one(rig, clock):
    one = rig(tokens_min=100, tokens_max=100, target_ms=1, forward_s_max=0.15)
    await one.ask(*(of_length(100) for _ in range(50)), deadline_s=60)
    one.batcher.check()
    clock.advance(60)  # nor is one that has ended long ago
    one.batcher.check()
