"""What does the service serve over HTTP, beside other servers on the same machine?

    python -m bench.http --serve                       # headrace serve, beside plain and ceiling
    python -m bench.http --url URL --key KEY           # a running Headrace, beside the same
    python -m bench.http --serve --peer plain --peer infinity --infinity VENV
    python -m bench.http --serve --peer URL            # beside any OpenAI-compatible server
    python -m bench.http --smoke                       # ceiling beside plain, a fake model, no Ray

The peers are those of `bench.peers`, or a server that runs already. All stay up and take turns,
load by load, in the opposite order each second round; a ratio is ours / peer of one round, above 1
is better than the peer. Requests ask for base64. The load program (`bench.load`) shares the cores
with all of them.
"""

import argparse
import asyncio
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from bench import peers, servers, texts
from bench.load import LOADS, Failed, Load, Sample, Target, embed, measure
from bench.processes import cpu_s
from bench.report import ROOT, arguments, finish, percentile, ratios, spread, table
from bench.servers import ceiling_recipe, plain_recipe, with_fake_model
from deployments.places import DeployFile
from serve.records import Vector


Rounds = Mapping[str, Sequence[Sample]]
"""Samples of one target, by load, in the order of the rounds."""

CHECKED = 32
"""Texts whose vectors all servers must agree on, more or less."""
PEERS = ("plain", "ceiling")
"""Beside these when no peer is named."""
FIGURES = ("rps", "texts_s", "p50_ms", "p95_ms", "p99_ms", "cpu_ms", "client_cpu_ms")


async def compare(targets: Sequence[Target], *, rounds: int, seconds: float) -> dict[str, Any]:
    """Let targets take turns; the first is ours.

    Raises Failed at the first answer that is not a success.
    """
    ours, *_ = names = [one.name for one in targets]
    answers = {one.name: await embed(one, texts.mixed(CHECKED)) for one in targets}
    likeness = {name: cosine_min(answers[ours], answers[name]) for name in names[1:]}
    taken: dict[str, dict[str, list[Sample]]] = {
        name: {load.name: [] for load in LOADS} for name in names
    }
    for number in range(-1, rounds):  # the first is a warm-up
        for load in LOADS:
            part = load.stretch if number >= 0 else 0.3
            for target in targets[:: -1 if number % 2 else 1]:
                sample = await _turn(target, targets, load, part * seconds)
                if number >= 0:
                    taken[target.name][load.name].append(sample)
    return summary(taken.pop(ours), taken, likeness)


async def _turn(target: Target, every: Sequence[Target], load: Load, seconds: float) -> Sample:
    """One load of one target, and what the others' processes used meanwhile."""
    others = [one.pid for one in every if one.pid and one is not target]
    used_s = sum(map(cpu_s, others))
    sample = await measure(target, load, seconds)
    sample.others_cpu_s = sum(map(cpu_s, others)) - used_s
    return sample


def cosine_min(ours: Vector, theirs: Vector) -> float:
    """The least likeness of two servers' vectors of one text. Raises Failed without a common size."""
    if ours.shape != theirs.shape:
        raise Failed(f"vectors of {ours.shape} beside {theirs.shape}: different models?")
    return float((ours * theirs).sum(axis=1).min())


def summary(
    ours: Rounds, others: Mapping[str, Rounds], likeness: Mapping[str, float]
) -> dict[str, Any]:
    """The JSON's keys: the ratios to the first peer, then our own figures, then what each did."""
    did = {load.name: describe(ours[load.name]) for load in LOADS}
    beside = {
        name: {**against(ours, theirs), "cosine_min": likeness[name]}
        for name, theirs in others.items()
    }
    first = next(iter(beside.values()))
    return {
        **{key: value for key, value in first.items() if key not in did},
        **{
            key: {name: one[key] for name, one in did.items()}
            for key in ("p50_ms", "p95_ms", "p99_ms", "cpu_ms", "client_cpu_ms")
        },
        "ours": did,
        "peers": beside,
    }


def against(ours: Rounds, theirs: Rounds) -> dict[str, Any]:
    """Ours over one peer, by round; the p99 and CPU over all rounds, where below 1 is better."""
    did = {load.name: describe(theirs[load.name]) for load in LOADS}
    over: dict[str, dict[str, float | None]] = {"p99_ratio": {}, "cpu_ratio": {}}
    for name, one in did.items():
        mine = describe(ours[name])
        over["p99_ratio"][name] = mine["p99_ms"] / one["p99_ms"]
        known = mine["cpu_ms"] is not None and one["cpu_ms"]
        over["cpu_ratio"][name] = mine["cpu_ms"] / one["cpu_ms"] if known else None
    rates = {_key(load): _ratio(ours, theirs, load) for load in LOADS}
    return {**rates, **over, **did}


def _key(load: Load) -> str:
    return f"rps_ratio_{load.name}" if load.inputs == 1 else f"texts_ratio_{load.inputs}"


def _ratio(ours: Rounds, theirs: Rounds, load: Load) -> dict[str, float]:
    figure = "rps" if load.inputs == 1 else "texts_s"
    return ratios(*([getattr(sample, figure) for sample in of[load.name]] for of in (ours, theirs)))


def describe(samples: Sequence[Sample]) -> dict[str, Any]:
    """One load of one target: rates by round, percentiles and CPU a request over all requests."""
    latencies = [one for sample in samples for one in sample.latencies_ms]
    spent = [sample.server_cpu_s for sample in samples if sample.server_cpu_s is not None]
    return {
        "requests": len(latencies),
        "rps": spread([sample.rps for sample in samples]),
        "texts_s": spread([sample.texts_s for sample in samples]),
        "p50_ms": percentile(latencies, 0.5),
        "p95_ms": percentile(latencies, 0.95),
        "p99_ms": percentile(latencies, 0.99),
        "cpu_ms": sum(spent) / len(latencies) * 1e3 if len(spent) == len(samples) else None,
        "client_cpu_ms": sum(one.client_cpu_s for one in samples) / len(latencies) * 1e3,
        "others_cores": sum(one.others_cpu_s for one in samples)
        / sum(one.elapsed_s for one in samples),
    }


def shown(result: Mapping[str, Any], ours: str) -> str:
    """The result for people: ratios are ours / that peer."""
    rows = []
    for load in LOADS:
        what = f"{load.connections} x {load.inputs}"
        for name, of in {ours: result["ours"], **result["peers"]}.items():
            rows.append([what, name, *_figures(of[load.name]), of.get(_key(load), "")])
    header = ("load", "server", "requests/s", "texts/s", "p50 ms", "p95 ms", "p99 ms")
    return table((*header, "CPU ms", "client's", "ours / it"), rows)


def _figures(one: Mapping[str, Any]) -> list[Any]:
    return ["?" if one[key] is None else one[key] for key in FIGURES]


@contextmanager
def targets(options: argparse.Namespace) -> Iterator[list[Target]]:
    """Ours and the peers; what was started here ends with the context. Raises StartFailed."""
    with ExitStack() as stack:

        def start(name: str) -> Target:
            recipe = stack.enter_context(peers.recipe(name, options))
            return stack.enter_context(servers.started(recipe))

        if options.smoke:
            made = (ceiling_recipe("ceiling", with_fake_model), plain_recipe("plain", fake=True))
            yield [stack.enter_context(servers.started(stack.enter_context(one))) for one in made]
            return
        model = options.model or next(iter(DeployFile.read(ROOT / "config.yaml").settings.models))
        found = [Target("headrace", options.url or "", model, options.key)]
        if options.serve:
            found = [start("headrace")]
        for name in options.peer:
            if name in peers.NAMES:
                found.append(start(name))
            else:
                found.append(Target(name, name, options.peer_model or model, options.peer_key))
        yield found


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = arguments(__doc__)
    one = parser.add_mutually_exclusive_group()
    one.add_argument("--url", help="a Headrace that runs already, or its embeddings route")
    one.add_argument("--serve", action="store_true", help="start `headrace serve` for this")
    parser.add_argument("--key", default=os.environ.get("HEADRACE_KEY", ""))
    parser.add_argument("--model", help="default: the first of config.yaml")
    parser.add_argument(
        "--peer",
        action="append",
        metavar="NAME",
        help=f"{', '.join(peers.NAMES)} or a URL; may be given again; default: {', '.join(PEERS)}",
    )
    parser.add_argument("--peer-key", default="", help="of a peer that is a URL")
    parser.add_argument("--peer-model", help="what a peer that is a URL calls the model")
    peers.add_options(parser)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=3, help="of a load, in a round")
    options = parser.parse_args(words)
    if not (options.smoke or options.serve or options.url):
        parser.error("give --serve, --url URL or --smoke")
    options.peer = options.peer or list(PEERS)
    for name in options.peer:
        if name not in peers.NAMES and not name.startswith("http://"):
            parser.error(f"--peer {name}: {', '.join(peers.NAMES)}, or a URL with http://")
    peers.check(parser, options)
    return options


def main(words: Sequence[str] | None = None) -> None:
    """Measure, show, and end with one line of JSON."""
    options = parse(words)
    rounds, seconds = (2, 0.3) if options.smoke else (options.rounds, options.seconds)
    try:
        with targets(options) as found:
            result = asyncio.run(compare(found, rounds=rounds, seconds=seconds))
    except (Failed, servers.StartFailed) as error:
        sys.exit(f"http: {error}")
    names = [target.name for target in found]
    if options.smoke:
        print("smoke: with a fake model; that it runs is all it shows")
    print(shown(result, names[0]))
    head = {"smoke": options.smoke, "targets": names, "rounds": rounds, "seconds": seconds}
    head |= {"precision": options.precision, "peer_versions": peers.versions(options)}
    finish("http", options.profile, {**head, **result}, options.out)


if __name__ == "__main__":
    main()
