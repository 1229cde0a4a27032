"""`bench.fairness` without Ray: the service's batcher, in this process and in real time, over a
SIMULATED device (60,000 padded tokens/s and 6 ms a batch, slept away). It measures order, not models.

Three policies take turns (`bench.policies`): the fair queue, first in first out, and the priority
formula it replaces. In each round a policy meets four phases: light tenants alone; the same while a
tenant of each tier and a bulk one keep a backlog; six tenants of one tier with unequal demands; and
a fixed heap of work, timed, which says what order costs in throughput.
"""

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from bench.policies import POLICIES, TOKENS_S, Opener, Policy, simulated
from bench.report import finish, jain, percentile, ratios, spread, table
from bench.tenants import ASKERS, FLOODS, TIERS, Phase, demand, drain, flood


@dataclass(frozen=True)
class Plan:
    """How long each phase lasts, and how much each flooding tenant keeps waiting."""

    rounds: int = 3
    idle_s: float = 2
    flood_s: float = 6
    demand_s: float = 2.5
    backlog_s: float = 0.4


SMOKE = Plan(rounds=1, idle_s=0.5, flood_s=1.5, demand_s=0.8, backlog_s=0.1)


@dataclass(frozen=True, slots=True)
class Round:
    """The phases of one policy."""

    idle: Phase
    flood: Phase
    demand: Phase
    drain: Phase


Rounds = Sequence[Round]


async def take_turns(opener: Opener, plan: Plan) -> dict[Policy, list[Round]]:
    """Every policy in every round, each phase on an idle target."""
    taken: dict[Policy, list[Round]] = {policy: [] for policy in POLICIES}
    for number in range(plan.rounds):
        for policy, rounds in taken.items():
            rounds.append(await _play(opener, policy, plan, number))
    return taken


async def _play(opener: Opener, policy: Policy, plan: Plan, number: int) -> Round:
    async with opener(policy) as target:
        idle = await flood(target, number, seconds=plan.idle_s, backlog_s=0)
    async with opener(policy) as target:
        busy = await flood(target, number, seconds=plan.flood_s, backlog_s=plan.backlog_s)
    async with opener(policy) as target:
        asked = await demand(target, seconds=plan.demand_s)
    async with opener(policy) as target:
        return Round(idle, busy, asked, await drain(target, number, backlog_s=plan.backlog_s))


def describe(rounds: Rounds) -> dict[str, Any]:
    """What one policy did. Percentiles and shares are over all rounds together."""
    cost = {name: sum(one.flood.cost.get(name, 0) for one in rounds) for name in FLOODS.values()}
    handouts = [one for each in rounds for one in each.flood.handout_ms]
    return {
        "queue_p95_ms": _p95([one.flood for one in rounds], "queue_ms"),
        "p95_ms": _p95([one.flood for one in rounds], "call_ms"),
        "idle_p95_ms": _p95([one.idle for one in rounds], "call_ms"),
        "unanswered": sum(waits.unanswered for one in rounds for waits in one.flood.waits.values()),
        "share": {word: cost[name] / sum(cost.values()) for word, name in FLOODS.items()},
        "share_over_free": {
            tier: _over(cost[FLOODS[tier]], cost[FLOODS["free"]]) for tier in TIERS
        },
        "interactive_over_bulk": _over(
            sum(sum(one.flood.cost.values()) for one in rounds) - cost[FLOODS["bulk"]],
            cost[FLOODS["bulk"]],
        ),
        "jain": spread([_jain(one.demand.tokens) for one in rounds]),
        "jain_of_cost": spread([_jain(one.demand.cost) for one in rounds]),
        "tokens_s": spread([one.drain.tokens_s for one in rounds]),
        "handout_ms": {
            f"p{part}": percentile(handouts, part / 100) if handouts else None for part in (50, 95)
        },
    }


def _p95(phases: Sequence[Phase], figure: Literal["queue_ms", "call_ms"]) -> dict[str, float]:
    """By tier, over the light calls of all rounds."""
    return {
        tier: percentile([ms for one in phases for ms in getattr(one.waits[tier], figure)], 0.95)
        for tier in TIERS
    }


def _jain(served: Mapping[str, int]) -> float:
    return jain([served.get(name, 0) for name in ASKERS])


def _over(one: float, other: float) -> float | None:
    """How many times the other; None when the other got nothing."""
    return one / other if other else None


def summary(taken: Mapping[Policy, Rounds]) -> dict[str, Any]:
    """The JSON's keys: the fair queue's own figures first, then every policy's."""
    policies = {policy: describe(rounds) for policy, rounds in taken.items()}
    pace = {policy: [one.drain.tokens_s for one in rounds] for policy, rounds in taken.items()}
    return {
        **policies["fair"],
        "throughput_ratio": ratios(pace["fair"], pace["fifo"]),
        "policies": policies,
    }


def shown(policies: Mapping[str, Mapping[str, Any]]) -> str:
    """The result for people, in two tables."""
    waits = [
        [name, tier, *(one[key][tier] for key in ("queue_p95_ms", "p95_ms", "idle_p95_ms"))]
        for name, one in policies.items()
        for tier in TIERS
    ]
    whole = [
        [
            name,
            " : ".join(f"{part:.3f}" for part in one["share"].values()),
            one["jain_of_cost"],
            one["tokens_s"],
            str(one["handout_ms"]["p50"] and round(one["handout_ms"]["p50"], 3)),
            one["unanswered"],
        ]
        for name, one in policies.items()
    ]
    heads = (
        ("policy", "light tenant of", "queue p95 ms", "p95 ms", "idle p95 ms"),
        ("policy", " : ".join(FLOODS), "jain of cost", "tokens/s", "hand-out ms", "unanswered"),
    )
    return "\n\n".join(map(table, heads, (waits, whole)))


def run(*, smoke: bool, rounds: int, out: Path | None) -> None:
    """Measure, show, and end with one line of JSON."""
    plan = SMOKE if smoke else Plan(rounds=rounds)
    result = summary(asyncio.run(take_turns(simulated, plan)))
    print(
        f"simulated device: {TOKENS_S} padded tokens/s and 6 ms a batch; order is what is measured"
    )
    print(shown(result["policies"]))
    head = {"smoke": smoke, "device": "simulated", **asdict(plan)}
    finish("fairness", "simulated", {**head, **result}, out)
