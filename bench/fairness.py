"""How long does a light tenant wait while others flood, and who gets how much of the model?

    python -m bench.fairness            # about two minutes
    python -m bench.fairness --smoke

The service's batcher, in this process and in real time, over a SIMULATED device (60,000 padded
tokens/s and 6 ms a batch, slept away): it measures order, not models. Three policies take turns
(`bench.policies`): the fair queue, first in first out, and the priority formula it replaces.
In each round a policy meets three phases: light tenants alone; the same while a tenant of each
tier and a bulk one keep a backlog; six tenants of one tier with unequal demands.
"""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bench.policies import POLICIES, TOKENS_S, Opener, Policy, simulated
from bench.report import arguments, finish, jain, percentile, ratios, spread, table
from bench.tenants import TIERS, Phase, Waits, demand, flood


@dataclass(frozen=True, slots=True)
class Plan:
    """How long each phase lasts, and how much each flooding tenant keeps waiting."""

    rounds: int = 3
    idle_s: float = 3
    flood_s: float = 9
    demand_s: float = 3
    backlog_s: float = 0.75


SMOKE = Plan(rounds=1, idle_s=0.7, flood_s=2, demand_s=1, backlog_s=0.2)


@dataclass(frozen=True, slots=True)
class Round:
    """The three phases of one policy."""

    idle: Phase
    flood: Phase
    demand: Phase


Rounds = Sequence[Round]


async def take_turns(opener: Opener, plan: Plan) -> dict[Policy, list[Round]]:
    """Every policy in every round, each phase on an idle target."""
    taken: dict[Policy, list[Round]] = {policy: [] for policy in POLICIES}
    for number in range(plan.rounds):
        for policy, rounds in taken.items():
            async with opener(policy) as target:
                idle = await flood(target, number, seconds=plan.idle_s, backlog_s=0)
            async with opener(policy) as target:
                busy = await flood(
                    target, number, seconds=plan.flood_s, backlog_s=plan.backlog_s
                )
            async with opener(policy) as target:
                rounds.append(Round(idle, busy, await demand(target, seconds=plan.demand_s)))
    return taken


def describe(rounds: Rounds) -> dict[str, Any]:
    """What one policy did. Percentiles are over the calls of all rounds."""
    handouts = [one for each in rounds for one in each.flood.handout_ms]
    return {
        "queue_p95_ms": _p95(rounds, lambda one: one.flood.waits, "queue_ms"),
        "p95_ms": _p95(rounds, lambda one: one.flood.waits, "call_ms"),
        "idle_p95_ms": _p95(rounds, lambda one: one.idle.waits, "call_ms"),
        "unanswered": sum(
            waits.unanswered for one in rounds for waits in one.flood.waits.values()
        ),
        "share": shares(rounds),
        "share_of_free": {
            tier: spread([_of_free(one.flood.cost, tier) for one in rounds]) for tier in TIERS
        },
        "interactive_to_bulk": spread([_classes(one.flood.cost) for one in rounds]),
        "jain": spread([jain(_demanded(one.demand)) for one in rounds]),
        "tokens_s": spread([tokens_s(one) for one in rounds]),
        "handout_ms": {"p50": percentile(handouts, 0.5), "p95": percentile(handouts, 0.95)},
    }
