"""What does the service serve over HTTP, beside another server on the same machine?

    python -m bench.http --serve                       # headrace serve, beside the ceiling
    python -m bench.http --url URL --key KEY           # a running Headrace, beside the ceiling
    python -m bench.http --serve --peer URL            # beside any OpenAI-compatible server
    python -m bench.http --smoke                       # two ceilings: ratios near 1, no Ray

The ceiling is the same service in one process, without Ray (`bench.ceiling`). Both servers stay
up and take turns, load by load; a ratio is ours / peer of one round, above 1 is better than the
peer. Requests ask for base64. The load program (`bench.load`) shares the cores with both.
"""

import argparse
import asyncio
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from bench import servers, texts
from bench.load import LOADS, Failed, Load, Sample, Target, embed, measure
from bench.report import ROOT, arguments, finish, percentile, ratios, spread, table
from deployments.places import PROFILES, DeployFile
from serve.records import Vector


Rounds = Mapping[str, Sequence[Sample]]
"""Samples of one target, by load, in the order of the rounds."""

CHECKED = 32
"""Texts whose vectors both servers must agree on, more or less."""


async def compare(pair: Sequence[Target], *, rounds: int, seconds: float) -> dict[str, Any]:
    """Let two targets take turns. Raises Failed at the first answer that is not a success."""
    answers = [await embed(target, texts.mixed(CHECKED)) for target in pair]
    taken: list[dict[str, list[Sample]]] = [{load.name: [] for load in LOADS} for _ in pair]
    for number in range(-1, rounds):  # the first is a warm-up
        for load in LOADS:
            for target, samples in zip(pair, taken, strict=True):
                part = load.stretch if number >= 0 else 0.3
                sample = await measure(target, load, part * seconds)
                if number >= 0:
                    samples[load.name].append(sample)
    return summary(taken[0], taken[1], cosine_min(*answers))


def cosine_min(ours: Vector, theirs: Vector) -> float:
    """The least likeness of two servers' vectors of one text. Raises Failed without a common size."""
    if ours.shape != theirs.shape:
        raise Failed(f"vectors of {ours.shape} beside {theirs.shape}: different models?")
    return float((ours * theirs).sum(axis=1).min())


def summary(ours: Rounds, peer: Rounds, likeness: float) -> dict[str, Any]:
    """The JSON's keys: ratios first, then percentiles, then what each target did."""
    requests = {load.name: _ratio(ours, peer, load, "rps") for load in LOADS if load.inputs == 1}
    both = {
        name: {load.name: describe(of[load.name]) for load in LOADS}
        for name, of in (("ours", ours), ("peer", peer))
    }
    return {
        **{f"rps_ratio_{name}": ratio for name, ratio in requests.items()},
        "texts_ratio_32": _ratio(ours, peer, LOADS[-1], "texts_s"),
        **{
            key: {name: one[key] for name, one in both["ours"].items()}
            for key in ("p50_ms", "p95_ms", "p99_ms")
        },
        "cosine_min": likeness,
        **both,
    }


def _ratio(ours: Rounds, peer: Rounds, load: Load, figure: str) -> dict[str, float]:
    return ratios(*([getattr(sample, figure) for sample in of[load.name]] for of in (ours, peer)))


def describe(samples: Sequence[Sample]) -> dict[str, Any]:
    """One load of one target: rates by round, percentiles over all requests."""
    latencies = [one for sample in samples for one in sample.latencies_ms]
    return {
        "requests": len(latencies),
        "rps": spread([sample.rps for sample in samples]),
        "texts_s": spread([sample.texts_s for sample in samples]),
        "p50_ms": percentile(latencies, 0.5),
        "p95_ms": percentile(latencies, 0.95),
        "p99_ms": percentile(latencies, 0.99),
    }


def shown(result: Mapping[str, Any], names: Sequence[str]) -> str:
    """The result for people."""
    rows = []
    for load in LOADS:
        key = f"rps_ratio_{load.name}" if load.inputs == 1 else "texts_ratio_32"
        for name, of in zip(names, (result["ours"], result["peer"]), strict=True):
            one = of[load.name]
            ratio = result[key] if of is result["ours"] else ""
            figures = [one[key] for key in ("rps", "texts_s", "p50_ms", "p95_ms", "p99_ms")]
            rows.append([f"{load.connections} x {load.inputs}", name, *figures, ratio])
    header = ("load", "server", "requests/s", "texts/s", "p50 ms", "p95 ms", "p99 ms", "ratio")
    return table(header, rows)


@contextmanager
def targets(options: argparse.Namespace) -> Iterator[tuple[Target, Target]]:
    """Ours and the peer; what was started here ends with the context."""
    with ExitStack() as stack:
        if options.smoke:
            pair = [stack.enter_context(servers.ceiling(name, fake=True)) for name in "ab"]
            yield pair[0], pair[1]
            return
        model = options.model or next(iter(DeployFile.read(ROOT / "config.yaml").settings.models))
        ours = Target("headrace", options.url or "", model, options.key)
        if options.serve:
            ours = stack.enter_context(servers.headrace(options.profile))
        peer = Target("peer", options.peer or "", options.peer_model or model, options.peer_key)
        if not options.peer:
            peer = stack.enter_context(servers.ceiling("ceiling"))
        yield ours, peer


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = arguments(__doc__)
    one = parser.add_mutually_exclusive_group()
    one.add_argument("--url", help="a Headrace that runs already, or its embeddings route")
    one.add_argument("--serve", action="store_true", help="start `headrace serve` for this")
    parser.add_argument("--key", default=os.environ.get("HEADRACE_KEY", ""))
    parser.add_argument("--model", help="default: the first of config.yaml")
    parser.add_argument("--peer", metavar="URL", help="a server to compare with; default: ceiling")
    parser.add_argument("--peer-key", default="")
    parser.add_argument("--peer-model", help="what the peer calls the model")
    parser.add_argument("--profile", choices=list(PROFILES), default="default")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=3, help="of a load, in a round")
    options = parser.parse_args(words)
    if not (options.smoke or options.serve or options.url):
        parser.error("give --serve, --url URL or --smoke")
    return options


def main(words: Sequence[str] | None = None) -> None:
    """Measure, show, and end with one line of JSON."""
    options = parse(words)
    rounds, seconds = (2, 0.3) if options.smoke else (options.rounds, options.seconds)
    try:
        with targets(options) as pair:
            result = asyncio.run(compare(pair, rounds=rounds, seconds=seconds))
    except (Failed, servers.StartFailed) as error:
        sys.exit(f"http: {error}")
    names = [target.name for target in pair]
    if options.smoke:
        print("smoke: a and b are the same program with a fake model; the ratio is noise about 1")
    print(shown(result, names))
    head = {"smoke": options.smoke, "targets": names, "rounds": rounds, "seconds": seconds}
    finish("http", options.profile, {**head, **result}, options.out)


if __name__ == "__main__":
    main()
