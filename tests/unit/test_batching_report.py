"""What a batcher reports of its queue."""

import numpy as np
import pytest

from serve.flows.turns import Waiting
from serve.records import Input, QueueReport


def of_length(length: int, first: int = 1) -> Input:
    return Input(ids=np.array([first, *range(2, length + 1)], np.int32))


async def test_an_empty_queue_is_reported_as_such(rig):
    report = rig().batcher.report("default", "r1", 10)
    assert report == QueueReport("default", "r1", 0, 0, pytest.approx(0.001), 0, ())


async def test_what_waits_is_told_by_tenant_and_class(rig, clock):
    one = rig(tokens_min=100, tokens_max=1000, overhead_s=0.01)
    one.device.held = True
    await one.start(of_length(490), tenant="occupant")  # 0.5 s
    await one.start(of_length(100), of_length(100), tenant="ann", weight=4.0)
    clock.advance(0.2)
    await one.start(of_length(100), tenant="ann", weight=4.0, priority=9)
    await one.start(of_length(60), tenant="bob", weight=1.0)
    await one.start(of_length(50), tenant="ann", weight=4.0, klass="bulk")
    report = one.batcher.report("default", "r1", 10)
    assert (report.items, report.cost, report.tenants) == (5, 410, 2)
    assert report.cost_s == pytest.approx(1.01 / 1000)  # of a batch of 1,000 tokens
    ann, bob, bulk = report.places
    assert (ann.tenant, ann.klass, ann.weight) == ("ann", "interactive", 4)
    assert (ann.items, ann.cost, ann.share) == (3, 300, pytest.approx(0.9 * 0.8))
    assert ann.oldest_s == pytest.approx(0.2)
    # the model is busy for 0.3 s more; of bulk one item, 50 tokens, may come first
    assert (ann.ahead, ann.starts_s) == (50, pytest.approx(0.3 + 50 * report.cost_s))
    assert ann.ends_s == pytest.approx(0.3 + 410 * report.cost_s)  # all of it, at most
    assert ann.effective_priority == 100
    assert (bob.tenant, bob.share, bob.oldest_s) == ("bob", pytest.approx(0.9 * 0.2), 0)
    assert (bob.ahead, bob.effective_priority) == (150, 100)
    assert (bulk.tenant, bulk.klass, bulk.share) == ("ann", "bulk", pytest.approx(0.1))
    assert one.batcher.report("default", "r1", 1).places == (ann,)
    await one.release()


async def test_who_was_served_lately_stands_behind(rig):
    """`100 * second / (lead + second)`, where a second is what the model does in one."""
    one = rig(tokens_min=500, tokens_max=500, target_ms=1)
    await one.hold()
    for _ in range(3):
        await one.start(of_length(500), tenant="ann")
    await one.start(of_length(500), tenant="bob")
    await one.device.step()  # the occupant's; now ann's first is at the model
    ann, bob = one.batcher.report("default", "r1", 10).places
    assert (ann.tenant, bob.tenant) == ("ann", "bob")
    assert (bob.effective_priority, bob.ahead) == (100, 0)
    second = 1 / one.batcher.report("default", "r1", 10).cost_s
    assert ann.effective_priority == pytest.approx(100 * second / (second + 500))
    assert ann.ahead == 500
    await one.release()


async def test_what_left_is_not_reported(rig):
    one = rig()
    await one.hold()
    task = await one.start(of_length(100), tenant="ann")
    await one.start(of_length(10), tenant="bob")
    await one.leave(task)
    report = one.batcher.report("default", "r1", 10)
    assert [(place.tenant, place.cost) for place in report.places] == [("bob", 10)]
    await one.release()


async def test_small_hand_outs_say_nothing_of_what_cost_takes(rig):
    """One text at a time costs the fixed time of its batch, which a queue would share."""
    one = rig(overhead_s=0.01)
    before = one.batcher.report("default", "r1", 10).cost_s
    for _ in range(20):
        await one.ask(of_length(1))
    assert one.batcher.report("default", "r1", 10).cost_s == before


async def test_what_waits_is_counted_by_class_and_tier_also_for_a_model(rig, clock):
    one = rig(loose="n")
    one.loader.held = True
    await one.hold()
    await one.start(of_length(30), of_length(20), tier="free")
    clock.advance(2)
    await one.start(of_length(10), tenant="bob", tier="free")
    await one.start(of_length(7), tenant="bob", klass="bulk")
    await one.start(of_length(5), tenant="cat", tier="premium", model="n")
    assert one.batcher.waiting() == {
        ("interactive", "free"): Waiting(3, 60, 2),
        ("bulk", "none"): Waiting(1, 7, 0),
        ("interactive", "premium"): Waiting(1, 5, 0),
    }
    await one.release()
    assert one.batcher.waiting() == {}


async def test_each_call_tells_once_how_long_it_waited(rig, clock):
    one = rig(tokens_min=10, tokens_max=10, target_ms=1)
    await one.hold()
    await one.start(of_length(10), of_length(10), tier="free")  # two hand-outs
    clock.advance(3)
    await one.release()
    waits = list(one.batcher.tally.waits.read("headrace_queue_wait_seconds", "default"))
    assert [(told.value >= 3, told.labels) for told in waits] == [
        (False, ("default", "interactive", "none")),  # the occupant
        (True, ("default", "interactive", "free")),
    ]


async def test_batches_tell_their_room_and_their_time(rig):
    one = rig(tokens_min=100, tokens_max=100)
    await one.ask(of_length(60), of_length(20))  # together they would be 120 with padding
    tally = one.batcher.tally
    assert (tally.tokens, tally.padded, tally.room) == (80, 80, 200)
    await one.ask(of_length(300))  # larger than what a batch may hold
    assert tally.room == 500
    assert sum(told.value for told in tally.passes.read("headrace_infer_seconds", "p")) == (
        pytest.approx(tally.model_s)
    )
