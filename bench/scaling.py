"""Do ten embedder replicas do ten times the work of one, and how soon does a backlog bring them?

    python -m bench.scaling                     # about fifteen minutes
    python -m bench.scaling --only efficiency   # one of the parts
    python -m bench.scaling --smoke             # under 30 s

The whole service on a Ray cluster of this process, over SIMULATED devices that sleep 300 ms and more for a
batch: what is measured is routing, queues, batching and the policy, not a model. `efficiency`: pools of 1, 2,
5 and 10 replicas by turns, always with more calls than their devices take, by Ray's handles and by conduits.
`decision`: a pool that its own policy scales between 1 and 10, and a backlog that arrives at once.
"""

import argparse
import asyncio
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from bench.report import arguments, finish
from serve.config import Pool


if TYPE_CHECKING:
    from bench.scaling_place import Place


@dataclass(frozen=True, slots=True)
class Part:
    """What it needs deployed, and what it finds there."""

    pools: Sequence[Pool]
    changes: Mapping[str, Any]
    measure: Callable[["Place"], dict[str, Any]]


def efficiency(options: argparse.Namespace) -> Part:
    """Pools of fixed numbers of replicas."""
    from bench import scaling_load as load  # noqa: PLC0415  Ray reads its environment on import

    plan = load.Plan(rounds=options.rounds)
    if options.smoke:
        plan = load.Plan((2,), rounds=1, warm_s=0.3, seconds=1, ms_per_batch=60)
    pools = load.pools_of(plan)

    def measure(_: "Place") -> dict[str, Any]:
        ways = load.summary(asyncio.run(load.measure(plan, pools)))
        print(load.shown(ways))
        most = str(max(plan.replicas))
        shape = {"inputs": load.INPUTS, "tokens": load.TOKENS, "calls_each": load.CALLS}
        return {
            f"efficiency_at_{most}": {way: one[most]["efficiency"] for way, one in ways.items()},
            "efficiency": {**asdict(plan), **shape, "ways": ways},
        }

    return Part(pools, {}, measure)


def decision(options: argparse.Namespace) -> Part:
    """A pool that grows and shrinks."""
    from bench import scaling_events as events  # noqa: PLC0415
    from bench import scaling_step as step  # noqa: PLC0415

    plan = step.Plan(steps=options.steps)
    if options.smoke:
        short = {"steps": 1, "kinds": ("queued",), "part": 3.0, "warm": 8, "most": 2, "drain_s": 4}
        quick = {"up_s": 0, "down_s": 1, "ms_per_batch": 60, "ms_per_token": 0.1}
        plan = step.Plan(**{**short, **quick})
    pool = step.pool_of(plan)

    def measure(place: "Place") -> dict[str, Any]:
        kinds = events.summary(asyncio.run(step.measure(place, pool, plan)), plan)
        print(events.shown(kinds))
        when = {kind: one["events_s"] for kind, one in kinds.items()}
        shape = {"documents": plan.documents, "tokens": step.TOKENS, "alone_s": plan.alone_s}
        return {
            "decision_s": {kind: one["decided"] for kind, one in when.items()},
            "all_run_s": {kind: one["all_run"] for kind, one in when.items()},
            **{name: kinds.get("stored", {}).get(name) for name in events.DRAINED},
            "decision": {**asdict(plan), **shape, "kinds": kinds},
        }

    return Part([pool], step.changes(), measure)


PARTS: Mapping[str, Callable[[argparse.Namespace], Part]] = {
    "efficiency": efficiency,
    "decision": decision,
}


def measure(parts: Mapping[str, Part], *, together: bool) -> dict[str, Any]:
    """Each part over a deployment of its own, or all over one, which starts sooner."""
    from bench import scaling_place as place  # noqa: PLC0415

    result: dict[str, Any] = {}
    groups = [parts] if together else [{name: part} for name, part in parts.items()]
    with place.cluster(place.REPLICAS_MAX) as port:
        for group in groups:
            pools = [pool for part in group.values() for pool in part.pools]
            changes = {name: one for part in group.values() for name, one in part.changes.items()}
            with place.deployed(port, pools, **changes) as running:
                for name, part in group.items():
                    print(f"{name}: begins", file=sys.stderr, flush=True)
                    result |= part.measure(running)
    return result


def main(words: Sequence[str] | None = None) -> None:
    """Measure, show, and end with one line of JSON."""
    parser = arguments(__doc__)
    parser.add_argument("--rounds", type=int, default=4, help="of efficiency")
    parser.add_argument("--steps", type=int, default=2, help="of decision, of each kind")
    parser.add_argument("--only", default=",".join(PARTS), help="parts, with commas between")
    options = parser.parse_args(words)
    only = options.only.split(",")
    if unknown := set(only) - set(PARTS):
        parser.error(f"there is no part {min(unknown)!r}")
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    parts = {name: PARTS[name](options) for name in only}
    result = measure(parts, together=options.smoke)
    finish(
        "scaling", "default", {"smoke": options.smoke, "device": "simulated", **result}, options.out
    )


if __name__ == "__main__":
    main()
