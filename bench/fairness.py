"""How long does a light tenant wait while others flood, and who gets how much of the model?

    python -m bench.fairness              # a real Ray cluster, the engine of config.yaml: 40 minutes
    python -m bench.fairness --simulated  # one process, a simulated device: about three minutes
    python -m bench.fairness --smoke      # the same, under 30 s

The whole service, over HTTP. Five policies take turns (`bench.cluster`), each with an embedder pool
of the same model: the fair queue, first in first out through the same batcher, `@serve.batch`,
strict priority and the priority formula. In each round a policy meets: light tenants alone; light
tenants while a free tenant floods with requests of 32 texts and another runs a bulk job; one
flooding tenant of each tier; four tenants of one tier with requests of unequal sizes. Then a flood
of tiny requests, served and refused.
"""

import asyncio
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from time import monotonic
from typing import Any

from bench import crowd, simulated, town
from bench.crowd import ASKED, POLICIES, TIERS, LightWaits, Policy, Pressure, Town
from bench.processes import Clock, median_cores
from bench.report import ROOT, arguments, finish, jain, percentile, ratios, spread, table
from bench.town import Cluster
from deployments.places import DeployFile
from serve.config import Precision
from serve.config.embedding import PRECISIONS


PARTS = (0.5, 0.95, 0.99)
WARM_S = 6.0
LEAD_S = 20.0
"""Flood and light requests run for so long before they are measured: longer than first in first out
makes anybody wait for them.
"""
PAIR: tuple[Policy, Policy] = ("fair", "fifo")
"""Whose throughput under flood is compared, in pairs of phases beside the rounds."""
TINY_CONNECTIONS = 32
"""Closed loops of the tenant that floods with single short texts."""


@dataclass(frozen=True)
class Plan:
    """How long each phase lasts. One core of two for the model: proxy and load program take the other."""

    rounds: int = 2
    target_ms: float = 50
    cpus: float = 1
    precision: Precision = "auto"
    idle_s: float = 5
    flood_s: float = 30
    pairs: int = 6
    shares_s: float = 25
    fair_shares_s: float = 120
    """Weighted fairness is exact to one text of each tenant. In these seconds the free one is given
    about 10,000 tokens, of which its longest text is 3 %.
    """
    jain_s: float = 15
    tiny_s: float = 10
    job: bool = True
    """Without it, fair and first in first out do the same mix of work."""


@dataclass(slots=True)
class Round:
    """What one policy did in one round."""

    flood: LightWaits
    handout_ms: Sequence[float]
    tokens_s: float
    cost_s: float
    """Tokens a second, and so many more for each text as the fair queue counts for it."""
    bulk_part: float
    """Of the tokens: passages, and a job's way to the index takes the same two cores."""
    busy: float
    """Seconds of hand-outs a second: the rest, the model waits for work."""
    cores: Mapping[str, float]
    """Busy: the machine's, and each role's of the load program and the service."""
    idle: LightWaits = field(default_factory=dict)
    shares: Mapping[str, float] = field(default_factory=dict)
    asked: Mapping[str, float] = field(default_factory=dict)


async def play(place: Town, cluster: Cluster, policy: Policy, plan: Plan, seed: str) -> Round:
    """All phases of one policy, each on a quiet service."""
    await crowd.settle(place, "tiny")
    idle = await crowd.light(place, f"{seed} idle", plan.idle_s)
    result = await flooded(place, cluster, policy, plan, seed)
    result.idle = idle
    await crowd.settle(place, "tiny")
    async with Pressure() as pressure:
        for tier in TIERS:
            crowd.flood(pressure, place, f"flood-{tier}", crowd.SHARE_CONNECTIONS)
        shares_s = plan.fair_shares_s if policy == "fair" else plan.shares_s
        result.shares = await _given(cluster, policy, shares_s)
    await crowd.settle(place, "tiny")
    async with Pressure() as pressure:
        for inputs in ASKED:
            crowd.ask(pressure, place, f"asks-{inputs}", inputs)
        result.asked = await _given(cluster, policy, plan.jain_s)
    return result


async def flooded(place: Town, cluster: Cluster, policy: Policy, plan: Plan, seed: str) -> Round:
    """Light tenants while a free tenant floods and a premium one runs a job."""
    await crowd.settle(place, "tiny")
    async with Pressure() as pressure:
        crowd.flood(pressure, place, "flood-free")
        if plan.job:
            crowd.bulk(pressure, place, "job", policy)
        # First in first out serves no light request until all that came before is done.
        ahead = asyncio.create_task(crowd.light(place, f"{seed} ahead", LEAD_S))
        await asyncio.sleep(LEAD_S - WARM_S)
        await _begun(cluster, policy)
        began, before = monotonic(), Clock.read()
        asking = asyncio.create_task(crowd.light(place, seed, plan.flood_s))
        await asyncio.sleep(plan.flood_s)
        # Not later: while some policies' light requests are still waited for, no new ones load it.
        given = await asyncio.to_thread(cluster.counts, policy)
        took_s, cores = monotonic() - began, Clock.read().cores(before)
        light = await asking
        await ahead
    tokens = sum(given["tokens"].values())
    return Round(
        light,
        given["handout_ms"],
        tokens_s=tokens / took_s,
        cost_s=sum(given["cost"].values()) / took_s,
        bulk_part=given["tokens"].get("job", 0) / tokens,
        busy=sum(given["handout_ms"]) / 1e3 / took_s,
        cores=cores,
    )


async def _begun(cluster: Cluster, policy: Policy) -> None:
    """Let the loops fill the queue, and forget what was counted until then.

    What first in first out finds waiting at first holds no light requests.
    """
    await asyncio.sleep(WARM_S)
    await asyncio.to_thread(cluster.counts, policy)


async def _given(cluster: Cluster, policy: Policy, seconds: float) -> Mapping[str, float]:
    """The cost that each tenant was given."""
    await _begun(cluster, policy)
    await asyncio.sleep(seconds)
    cost: Mapping[str, float] = (await asyncio.to_thread(cluster.counts, policy))["cost"]
    return cost


async def tiny(place: Town, cluster: Cluster, plan: Plan) -> dict[str, Any]:
    """Floods of single short texts: served, and refused while light tenants go on."""
    await crowd.settle(place, "flood-free")
    idle = await crowd.light(place, "tiny idle", plan.idle_s)
    bodies = [crowd.embedding(place, [f"tiny request {number}"]) for number in range(64)]
    served = await _burn(place, cluster, "tiny", bodies, plan)
    refused = await _burn(place, cluster, "capped", bodies, plan)
    return {
        "connections": TINY_CONNECTIONS,
        "idle_p95_ms": _percentiles([idle], "call_ms")["p95"],
        "served": served,
        "refused": refused,
    }


async def _burn(
    place: Town, cluster: Cluster, tenant: str, bodies: Sequence[bytes], plan: Plan
) -> dict[str, Any]:
    """Closed loops of one tenant; CPU of the service's processes by answer, model included."""
    async with Pressure() as pressure:
        pressure.start(place.target(tenant), bodies, TINY_CONNECTIONS)
        await asyncio.sleep(2)
        pressure.answers.clear()
        began, cpu_s = monotonic(), cluster.cpu_s()
        beside = await crowd.light(place, f"tiny {tenant}", plan.tiny_s)
        took_s, used_s = monotonic() - began, cluster.cpu_s() - cpu_s
    answers = sum(pressure.answers.values())
    return {
        "answers_s": answers / took_s,
        "refused_part": pressure.answers.get(crowd.REFUSED, 0) / answers,
        "cpu_ms": used_s / answers * 1e3,
        "others_p95_ms": _percentiles([beside], "call_ms")["p95"],
        "others_unanswered": sum(waits.unanswered for waits in beside.values()),
    }


def _percentiles(phases: Sequence[LightWaits], figure: str) -> dict[str, dict[str, float]]:
    """p50, p95 and p99 by tier, over all rounds together."""
    found: dict[str, dict[str, float]] = {}
    for part in PARTS:
        found[f"p{part * 100:.0f}"] = {
            tier: percentile([ms for one in phases for ms in getattr(one[tier], figure)], part)
            for tier in TIERS
        }
    return found


def describe(rounds: Sequence[Round], paired: Sequence[Round] = ()) -> dict[str, Any]:
    """What one policy did. Percentiles and shares are over all rounds together, those under flood
    over the pairs as well.
    """
    flooded = [*rounds, *paired]
    floods = [one.flood for one in flooded]
    queue, call = _percentiles(floods, "queue_ms"), _percentiles(floods, "call_ms")
    handouts = [ms for one in flooded for ms in one.handout_ms]
    cost = {tier: sum(one.shares.get(f"flood-{tier}", 0) for one in rounds) for tier in TIERS}
    return {
        "queue_p95_ms": queue["p95"],
        "p95_ms": call["p95"],
        "idle_p95_ms": _percentiles([one.idle for one in rounds], "call_ms")["p95"],
        "queue_ms": queue,
        "call_ms": call,
        "samples": {tier: sum(len(one[tier].queue_ms) for one in floods) for tier in TIERS},
        "unanswered": sum(waits.unanswered for one in floods for waits in one.values()),
        "handout_ms": {f"p{part * 100:.0f}": percentile(handouts, part) for part in PARTS},
        "tokens_s": spread([one.tokens_s for one in flooded]),
        "cost_s": spread([one.cost_s for one in flooded]),
        "bulk_part": spread([one.bulk_part for one in flooded]),
        "busy": spread([one.busy for one in flooded]),
        "cores": median_cores([one.cores for one in flooded]),
        "share_over_free": {
            tier: cost[tier] / cost["free"] if cost["free"] else None for tier in TIERS
        },
        "jain": spread([jain([one.asked.get(f"asks-{n}", 0) for n in ASKED]) for one in rounds]),
    }


def summary(
    taken: Mapping[Policy, Sequence[Round]], paired: Mapping[Policy, Sequence[Round]]
) -> dict[str, Any]:
    """The JSON's keys: the fair queue's own figures first, then every policy's."""
    policies = {
        policy: describe(rounds, paired.get(policy, ())) for policy, rounds in taken.items()
    }
    pace = {policy: [one.tokens_s for one in rounds] for policy, rounds in taken.items()}
    pairs = {policy: [one.tokens_s for one in paired[policy]] for policy in PAIR}
    return {
        **policies["fair"],
        "throughput_ratio": ratios(*(pace[policy] + pairs[policy] for policy in PAIR)),
        "paired_tokens_s": pairs,
        "throughput_over_serve_batch": ratios(pace["fair"], pace["serve_batch"]),
        "policies": policies,
    }


def shown(result: Mapping[str, Any]) -> str:
    """The result for people."""
    policies: Mapping[str, Mapping[str, Any]] = result["policies"]
    waits = [
        [
            name,
            tier,
            *(one["queue_ms"][part][tier] for part in ("p50", "p95", "p99")),
            *(one["call_ms"][part][tier] for part in ("p50", "p95", "p99")),
            one["idle_p95_ms"][tier],
        ]
        for name, one in policies.items()
        for tier in TIERS
    ]
    whole = [
        [
            name,
            " : ".join(f"{part or 0:.2f}" for part in one["share_over_free"].values()),
            one["jain"],
            one["tokens_s"],
            one["handout_ms"]["p50"],
            one["handout_ms"]["p95"],
            one["unanswered"],
        ]
        for name, one in policies.items()
    ]
    heads: tuple[tuple[str, ...], ...] = (
        ("policy", "light", "queue p50", "p95", "p99", "whole p50", "p95", "p99", "idle p95"),
        ("policy", " : ".join(TIERS), "jain", "tokens/s", "hand-out p50", "p95", "unanswered"),
    )
    return "\n\n".join(map(table, heads, (waits, whole)))


def measure(plan: Plan) -> dict[str, Any]:
    """Every policy in every round, over one cluster."""
    target_ms, cpus, precision = plan.target_ms, plan.cpus, plan.precision
    running = town.running(POLICIES, target_ms=target_ms, cpus=cpus, precision=precision)
    with running as (towns, cluster):
        return asyncio.run(_measure(towns, cluster, plan))


async def _measure(towns: Mapping[str, Town], cluster: Cluster, plan: Plan) -> dict[str, Any]:
    taken: dict[Policy, list[Round]] = {policy: [] for policy in POLICIES}
    for number in range(plan.rounds):
        for policy, rounds in taken.items():
            rounds.append(await play(towns[policy], cluster, policy, plan, str(number)))
            print(f"round {number + 1}: {policy} done", file=sys.stderr, flush=True)
    paired: dict[Policy, list[Round]] = {policy: [] for policy in PAIR}
    for number in range(plan.pairs):
        # The first of a pair takes turns: a machine that slows down favours neither.
        for policy in PAIR if number % 2 else PAIR[::-1]:
            one = await flooded(towns[policy], cluster, policy, plan, f"pair {number}")
            paired[policy].append(one)
            print(f"pair {number + 1}: {policy} {one.tokens_s:.0f} tokens/s", file=sys.stderr)
    return {**summary(taken, paired), "tiny": await tiny(towns["fair"], cluster, plan)}


def main(words: Sequence[str] | None = None) -> None:
    """Measure, show, and end with one line of JSON."""
    parser = arguments(__doc__)
    parser.add_argument("--simulated", action="store_true", help="in this process, without Ray")
    parser.add_argument("--rounds", type=int, default=Plan.rounds)
    parser.add_argument("--pairs", type=int, default=Plan.pairs, help="more of fair and fifo alone")
    parser.add_argument("--target-ms", type=float, default=Plan.target_ms)
    parser.add_argument("--cpus", type=float, default=Plan.cpus, help="threads of the model")
    parser.add_argument("--precision", choices=sorted(PRECISIONS["onnx"]), default=Plan.precision)
    parser.add_argument("--no-job", action="store_true", help="flood and light tenants alone")
    options = parser.parse_args(words)
    if options.smoke or options.simulated:
        simulated.run(smoke=options.smoke, rounds=options.rounds, out=options.out)
        return
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    bounds = options.target_ms, options.cpus, options.precision
    plan = Plan(options.rounds, *bounds, pairs=options.pairs, job=not options.no_job)
    result = measure(plan)
    print(shown(result))
    loads = {
        "flood_connections": crowd.FLOOD_CONNECTIONS,
        "flood_texts": crowd.FLOOD_TEXTS,
        "bulk_connections": crowd.BULK_CONNECTIONS,
        "light_rate": crowd.LIGHT_RATE,
    }
    settings = DeployFile.read(ROOT / "config.yaml").settings
    engine = next(iter(settings.models.values())).engine
    head = {"device": f"cpu, {engine}", **asdict(plan), **loads}
    finish("fairness", "default", {**head, **result}, options.out)


if __name__ == "__main__":
    main()
