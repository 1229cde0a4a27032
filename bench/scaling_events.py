"""What came of the steps of `bench.scaling_step`: when each event was, and whether in order. Pure."""

import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from bench.report import spread, table
from bench.scaling_place import Start
from bench.scaling_step import TOGETHER, TOKENS, Kind, Plan, Step
from serve.scaling import Decision


ORDER = ("known", "decided", "code_began", "ready", "all_run", "done", "falls", "least")
DRAINED = ("drained_s", "drained_over_aimed", "speedup")
"""Of a step that is followed to its end."""


def described(step: Step, plan: Plan, epoch: float) -> dict[str, Any]:
    """Seconds from the backlog's arrival, and what became of the replicas.

    `epoch` is the wall clock's time at 0 of the monotonic one.
    """
    told = [one for one in step.decisions if one.at - epoch >= step.arrived]
    most = max(one.wanted for one in step.seen)
    ran = max(one.running for one in step.seen)
    new = sorted((one for one in step.starts.values() if one.began > step.arrived), key=_ready)
    after = [one for one in step.seen if one.at > step.done]
    at = {
        "known": _first("known", (one.at - epoch for one in told if _work(one) > 0)),
        "decided": _first("decided", (one.at for one in step.seen if one.wanted > 1)),
        "most_decided": _first("decided", (one.at for one in step.seen if one.wanted == most)),
        "code_began": _first("begun", sorted(one.began for one in new)),
        "ready": _first("ready", (one.ready for one in new)),
        "last_ready": _first("ready", (one.ready for one in new[::-1])),
        "all_run": _first("run", (one.at for one in step.seen if one.running == ran)),
        "done": step.done,
        "falls": _first("fallen", (one.at for one in after if one.wanted < most)),
        "least": _first("fallen", (one.at for one in after if one.running == 1)),
    }
    events = {name: moment - step.arrived for name, moment in at.items()}
    moments = [events[name] for name in ORDER]
    return {
        "events_s": events,
        "in_order": moments == sorted(moments),
        "most": {"wanted": most, "running": ran},
        "start_s": spread([one.ready - at["decided"] for one in new]),
        "warm_up_s": spread([one.ready - one.began for one in new]),
        "replicas": _changes(step),
        "reasons": _reasons(told),
        "cores": dict(step.cores),
        **_drained(step, plan, at),
    }


def _first(word: str, moments: Iterable[float]) -> float:
    found = next(iter(moments), None)
    if found is None:
        raise RuntimeError(f"a step was never {word}")
    return found


def _ready(one: Start) -> float:
    return one.ready


def _work(one: Decision) -> float:
    """Tokens that the policy knew of."""
    return sum(one.inputs.get(name) or 0.0 for name in ("queued_tokens", "backlog_tokens"))


def _drained(step: Step, plan: Plan, at: Mapping[str, float]) -> dict[str, Any]:
    """Of a step that was followed to its end."""
    if not step.handouts:
        return {}
    passed = at["done"] - step.arrived
    busy_s = plan.batch_s * sum(one.tokens for one in step.handouts) / (TOGETHER * TOKENS)
    full_s = at["done"] - at["all_run"]
    return {
        "drained_s": passed,
        "drained_over_aimed": passed / plan.drain_s,
        "drained_full_s": full_s,
        "speedup": busy_s / passed,
    }


def _changes(step: Step) -> list[tuple[float, int, int]]:
    """(seconds, wanted, running) whenever one of them changed."""
    found: list[tuple[float, int, int]] = []
    for one in step.seen:
        if not found or found[-1][1:] != (one.wanted, one.running):
            found.append((one.at - step.arrived, one.wanted, one.running))
    return found


def _reasons(told: Sequence[Decision]) -> list[str]:
    """What the policy said when it changed its mind."""
    found: list[tuple[int, str]] = []
    for one in told:
        if not found or found[-1][0] != one.wanted:
            found.append((one.wanted, one.reason))
    return [reason for _, reason in found]


def summary(taken: Mapping[Kind, Sequence[Step]], plan: Plan) -> dict[str, Any]:
    """By kind: spreads over the steps, and each step."""
    epoch = time.time() - time.monotonic()
    found: dict[str, Any] = {}
    for kind, steps in taken.items():
        each = [described(step, plan, epoch) for step in steps]
        names = each[0]["events_s"]
        found[kind] = {
            "events_s": {name: spread([one["events_s"][name] for one in each]) for name in names},
            "in_order": all(one["in_order"] for one in each),
            **{name: spread([one[name] for one in each]) for name in DRAINED if name in each[0]},
            "steps": each,
        }
    return found


def shown(result: Mapping[str, Any]) -> str:
    """The result for people."""
    kinds = list(result)
    names = list(result[kinds[0]]["events_s"])
    rows = [[name, *(result[kind]["events_s"][name] for kind in kinds)] for name in names]
    return table(("seconds after the backlog came", *kinds), rows)
