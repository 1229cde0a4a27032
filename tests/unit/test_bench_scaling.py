"""What `bench.scaling` makes of what it saw: paces of whole hand-outs, events in their order."""

from dataclasses import replace

import pytest

from bench.scaling_events import described
from bench.scaling_load import Plan, Turn, pace_of, summary
from bench.scaling_place import HandOut, Start
from bench.scaling_step import Plan as StepPlan
from bench.scaling_step import Seen, Step
from serve.scaling import Decision


PLAN = Plan(ms_per_batch=300, ms_per_token=0.05)


def handout(began: float, tokens: int = 2000) -> HandOut:
    return HandOut(began, began + 0.4, tokens, tokens, 1)


def test_a_pace_is_of_whole_hand_outs_with_the_pauses_between_them():
    pace = pace_of([handout(10), handout(10.5), handout(11, tokens=1), handout(11.5)], PLAN, 60)
    assert pace.tokens_s == pytest.approx(4001 / 1.5)
    assert pace.busy == pytest.approx((0.4 + 0.4 + 0.30005) / 1.5)


def test_a_replica_without_work_has_no_pace():
    assert pace_of([], PLAN, 12).tokens_s == 0
    assert pace_of([handout(3)], PLAN, 12).busy == pytest.approx(0.4 / 12)


def test_efficiency_is_to_one_replica_of_the_same_round():
    def turn(*begins: list[float]) -> Turn:
        some = [[handout(at) for at in one] for one in begins]
        paces = [pace_of(one, PLAN, 10) for one in some]
        return Turn(paces, [one for each in some for one in each], 5, [1.0], {"machine": 1})

    quick, slow = [0, 0.5, 1.0], [0, 1.0, 2.0]
    found = summary(
        {"handles": {1: [turn(quick), turn(slow)], 2: [turn(quick, slow), turn(slow, slow)]}}
    )
    two = found["handles"]["2"]
    assert two["efficiency"] == pytest.approx({"median": 0.875, "min": 0.75, "max": 1.0})
    assert two["tokens_s"]["max"] == pytest.approx(6000)
    assert found["handles"]["1"]["efficiency"]["max"] == 1
    assert found["handles"]["1"]["batch_ms"]["median"] == pytest.approx(400)


def told(at: float, wanted: int, tokens: float) -> Decision:
    inputs = {"queued_tokens": 0.0, "backlog_tokens": tokens}
    return Decision("embedder-scaled", wanted, 1, 1, f"{wanted} for {tokens:.0f}", inputs, at)


def step() -> Step:
    """One that came at 100, of the clock that is 1,000 behind the wall's."""
    return Step(
        100.0,
        seen=[
            Seen(100, 1, 1),
            Seen(104, 3, 1),
            Seen(110, 3, 3),
            Seen(140, 2, 3),
            Seen(145, 1, 1),
        ],
        decisions=[told(1099, 1, 0), told(1102, 1, 50), told(1104, 3, 50), told(1141, 2, 0)],
        starts={
            "old": Start("old", 50, 52),
            "a": Start("a", 106, 108),
            "b": Start("b", 107, 109.5),
        },
        handouts=[HandOut(101, 102, 512, 512, 1), HandOut(111, 112, 512, 512, 1)],
        done=130.0,
    )


def test_events_are_counted_from_the_arrival_and_stand_in_order():
    found = described(step(), StepPlan(drain_s=20), 1000.0)
    assert found["in_order"]
    assert found["events_s"] == {
        "known": 2,
        "decided": 4,
        "most_decided": 4,
        "code_began": 6,
        "ready": 8,
        "last_ready": 9.5,
        "all_run": 10,
        "done": 30,
        "falls": 40,
        "least": 45,
    }
    assert found["start_s"] == {"median": 4.75, "min": 4, "max": 5.5}
    assert found["drained_over_aimed"] == 1.5
    assert found["speedup"] == pytest.approx(2 * StepPlan().batch_s / 30)
    assert found["replicas"][0] == (0, 1, 1)
    assert found["reasons"] == ["1 for 50", "3 for 50", "2 for 0"]


def test_what_happened_in_another_order_is_said():
    early = replace(step(), done=105.0)
    assert not described(early, StepPlan(), 1000.0)["in_order"]


def test_a_step_is_nearly_what_the_most_replicas_drain_in_time():
    plan = StepPlan(most=10, drain_s=20)
    assert 0.9 * plan.drain_s < plan.alone_s / plan.most < plan.drain_s
    assert plan.batch_s >= 0.3
