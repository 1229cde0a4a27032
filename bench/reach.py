"""How much of what the model does in one process reaches clients of the service over HTTP?

    python -m bench.reach                             # about two minutes
    python -m bench.reach --device cuda --ingress 8   # untested on a GPU so far
    python -m bench.reach --smoke                     # a fake model, the service without Ray

Both sides get requests of 32 mixed texts. `in_process` is the service's batcher and engine in this
process, always with eight requests waiting; `http` is the whole service, with as many ingress replicas
as said, and four connections for each. They take turns; the one that waits holds its model, and does nothing.
"""

import argparse
import asyncio
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

from bench import servers
from bench.handout import Bench, Sample, of_the_file
from bench.load import Failed, Load, Target, measure
from bench.peers import PROFILES
from bench.report import arguments, finish, ratios, spread, table
from bench.servers import ceiling_recipe
from serve import config
from serve.embedding.engines import slots_of


INPUTS = 32
CONNECTIONS = 4
"""For each ingress replica: it tokenises some requests while others are at the model."""
GPU_BATCH: Mapping[str, int] = {"target_ms": 10, "tokens_max": 16_384, "tokens_min": 4096}
GPU_ITEMS_MAX = 1024


def changes(device: str, ingress: int) -> servers.Change:
    """The pool on that device, behind so many ingress replicas."""

    def change(args: dict[str, Any]) -> None:
        args["ingress"] = {"replicas": ingress}
        [pool] = args["pools"]
        if device == "cuda":
            pool |= {"gpus": 1, "cpus": 1, "batch": {**GPU_BATCH, "items_max": GPU_ITEMS_MAX}}
            for model in pool["models"]:
                model["engine"] = "sentence_transformers"

    return change


def pool_of(change: servers.Change) -> config.Pool:
    """The pool as the service will have it."""
    args: dict[str, Any] = {"pools": [of_the_file().model_dump(mode="json")]}
    change(args)
    return config.Pool.model_validate(args["pools"][0])


async def compare(
    bench: Bench, target: Target, load: Load, *, target_ms: float, rounds: int, seconds: float
) -> dict[str, Any]:
    """Let both take turns. Raises Failed at the first answer that is not a success."""
    inside, outside = Sample(), []
    await measure(target, load, seconds / 2)  # a warm-up
    for number in range(rounds):
        for turn in (0, 1) if number % 2 == 0 else (1, 0):
            if turn == 0:
                await bench.play(target_ms, seconds, inside)
            else:
                outside.append((await measure(target, load, seconds)).texts_s)
    return {
        "texts_ratio": ratios(outside, inside.texts_s),
        "in_process_texts_s": spread(inside.texts_s),
        "http_texts_s": spread(outside),
    }


@contextmanager
def service(options: argparse.Namespace, change: servers.Change) -> Iterator[Target]:
    """What is measured over HTTP."""
    if options.smoke:
        with (
            ceiling_recipe("ceiling", servers.with_fake_model) as recipe,
            servers.started(recipe) as target,
        ):
            yield target
    else:
        with servers.headrace(options.profile, change) as target:
            yield target


def main(words: Sequence[str] | None = None) -> None:
    """Measure, show, and end with one line of JSON."""
    parser = arguments(__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--ingress", type=int, default=1, metavar="N", help="ingress replicas")
    parser.add_argument("--profile", choices=list(PROFILES), default="fast")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--seconds", type=float, default=6, help="of a turn")
    options = parser.parse_args(words)
    rounds, seconds = (1, 1.0) if options.smoke else (options.rounds, options.seconds)
    change = servers.with_fake_model if options.smoke else changes(options.device, options.ingress)
    pool = pool_of(change)
    load = Load("x32", CONNECTIONS * options.ingress, INPUTS)
    try:
        threads = ThreadPoolExecutor(slots_of(pool), "model")
        with threads as executor, service(options, change) as target:
            bench = Bench(pool, executor)
            executor.submit(bench.load).result()
            turns = {"rounds": rounds, "seconds": seconds}
            result = asyncio.run(
                compare(bench, target, load, target_ms=pool.batch.target_ms, **turns)
            )
    except (Failed, servers.StartFailed) as error:
        sys.exit(f"reach: {error}")
    rows = [[name, result[f"{name}_texts_s"]] for name in ("in_process", "http")]
    print(table(("texts of 32 a request", "texts/s"), [*rows, ["ratio", result["texts_ratio"]]]))
    head = {"smoke": options.smoke, "device": options.device, "ingress": options.ingress, **turns}
    finish("reach", options.profile, {**head, **result}, options.out)


if __name__ == "__main__":
    main()
