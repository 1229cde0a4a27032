"""How many hand-outs are at the model, and when the next of them ends."""

from serve.flows.slots import Slots


def test_a_free_slot_is_no_wait() -> None:
    slots = Slots(2, beside_min=100)
    assert (slots.busy, slots.busy_s(10.0, 1)) == (0, 0.0)
    slots.enter(11.0)
    assert (slots.busy, slots.busy_s(10.0, 100)) == (1, 0.0)


def test_all_taken_the_first_to_end_is_waited_for() -> None:
    slots = Slots(2, beside_min=100)
    late, early = slots.enter(13.0), slots.enter(11.5)
    assert slots.busy_s(10.0, 100) == 1.5
    slots.leave(early)
    assert slots.busy_s(10.0, 100) == 0.0
    slots.enter(15.0)
    assert slots.busy_s(10.0, 100) == 3.0
    slots.leave(late)
    assert slots.busy == 1


def test_one_that_takes_longer_than_predicted_ends_at_any_moment() -> None:
    slots = Slots(1, beside_min=100)
    slots.enter(9.0)
    assert slots.busy_s(10.0, 100) == 0.0


def test_beside_another_only_a_large_hand_out_begins() -> None:
    slots = Slots(2, beside_min=100)
    assert slots.takes(1)
    visit = slots.enter(1.0)
    assert not slots.takes(99.9)
    assert slots.takes(100)
    slots.leave(visit)
    assert slots.takes(1)


def test_what_is_too_little_to_begin_beside_another_waits_for_its_end() -> None:
    slots = Slots(2, beside_min=100)
    slots.enter(13.0)
    assert slots.busy_s(10.0, 99) == 3.0
    assert slots.busy_s(10.0, 100) == 0.0
