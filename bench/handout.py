"""What does a small hand-out cost in throughput, and how long does one really take?

    python -m bench.handout               # about four minutes
    python -m bench.handout --smoke       # under 30 s

The service's batcher and the model of config.yaml, in this process. Eight callers always wait with
32 mixed texts each. The predicted time of a hand-out (`batch.target_ms`) takes turns; a newcomer
waits for the hand-out in flight, so it should be short, and the model likes it long.
"""

import asyncio
import contextlib
import statistics
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import cycle
from pathlib import Path
from typing import Any

from bench import texts
from bench.report import ROOT, arguments, finish, percentile, ratios, spread, table
from deployments.places import DeployFile
from serve import config
from serve.config.embedding import PRECISIONS
from serve.embedding.engines import slots_of
from serve.embedding.pool import Pool
from serve.embedding.tokenizer import Tokenizer
from serve.flows.batching import Batcher
from serve.flows.pending import Slice
from serve.records import EmbedCall, Input


TARGETS_MS = (25.0, 50.0, 100.0, 200.0, 400.0, 1600.0)
CALLERS, INPUTS = 8, 32


class Timed(Batcher):
    """The service's batcher, which notes how long each hand-out took."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.handout_ms: list[float] = []

    async def _serve(self, slices: Sequence[Slice], *, full: bool) -> None:
        began = time.monotonic()
        await super()._serve(slices, full=full)
        self.handout_ms.append((time.monotonic() - began) * 1e3)


@dataclass(slots=True)
class Sample:
    """What one target came to, round by round."""

    texts_s: list[float] = field(default_factory=list)
    tokens_s: list[float] = field(default_factory=list)
    tokens_cpu_s: list[float] = field(default_factory=list)
    padding: list[float] = field(default_factory=list)
    handout_ms: list[float] = field(default_factory=list)


class Bench:
    """The loaded model of a pool, and a batcher for each target."""

    def __init__(self, settings: config.Pool, executor: ThreadPoolExecutor) -> None:
        self._settings = settings
        self._executor = executor
        self._pool = Pool(settings, clock=time.monotonic)
        model = settings.models[0]
        rows = Tokenizer.open(model).encode(texts.mixed(16 * INPUTS))
        rows = [row[: model.tokens_max] for row in rows]
        self._calls = cycle(
            [
                EmbedCall(
                    request_id="",
                    tenant="bench",
                    weight=1.0,
                    klass="interactive",
                    model=model.id,
                    inputs=tuple(Input(ids=row) for row in rows[at : at + INPUTS]),
                    tokens=tuple(len(row) for row in rows[at : at + INPUTS]),
                    deadline_s=3600,
                )
                for at in range(0, len(rows), INPUTS)
            ]
        )

    def load(self) -> None:
        """Load and warm the model."""
        self._pool.load()

    async def play(self, target_ms: float, seconds: float, sample: Sample) -> None:
        """Serve the callers for some seconds with hand-outs of that size."""
        batch = self._settings.batch.model_copy(update={"target_ms": target_ms})
        batcher = Timed(
            self._pool,
            [self._settings.models[0].id],
            admission=config.Admission(),
            batch=batch,
            executor=self._executor,
            clock=time.monotonic,
        )
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(batcher.run())]
            tasks += [group.create_task(self._ask(batcher)) for _ in range(CALLERS)]
            await asyncio.sleep(min(0.5, seconds))  # until the pace has learned
            began, cpu = time.monotonic(), time.process_time()
            tokens, padded = batcher.tally.tokens, batcher.tally.padded
            inputs = batcher.tally.inputs
            batcher.handout_ms.clear()
            await asyncio.sleep(seconds)
            while not batcher.handout_ms:  # noqa: ASYNC110  on a busy machine one takes longer
                await asyncio.sleep(0.1)
            took_s, cpu_s = time.monotonic() - began, time.process_time() - cpu
            for task in tasks:
                task.cancel()
        tokens = max(batcher.tally.tokens - tokens, 1)
        sample.texts_s.append((batcher.tally.inputs - inputs) / took_s)
        sample.tokens_s.append(tokens / took_s)
        sample.tokens_cpu_s.append(tokens / cpu_s)
        sample.padding.append((batcher.tally.padded - padded) / tokens)
        sample.handout_ms += batcher.handout_ms

    async def _ask(self, batcher: Batcher) -> None:
        while True:
            await batcher.submit(next(self._calls))


def of_the_file(precision: config.Precision = "auto") -> config.Pool:
    """The pool of config.yaml, its models in that precision."""
    file = DeployFile.read(ROOT / "config.yaml")
    [settings] = file.settings.under(file.data_dir(None)).pools
    models = (one.model_copy(update={"precision": precision}) for one in settings.models)
    return settings.model_copy(update={"models": tuple(models)})


async def measure(
    pool: config.Pool, targets_ms: Sequence[float], *, rounds: int, seconds: float
) -> dict[float, Sample]:
    """Every target in every round."""
    samples = {target: Sample() for target in targets_ms}
    with ThreadPoolExecutor(slots_of(pool), "model") as executor:
        bench = Bench(pool, executor)
        await asyncio.get_running_loop().run_in_executor(executor, bench.load)
        for number in range(rounds):
            turns = list(samples.items())
            for target, sample in turns if number % 2 == 0 else turns[::-1]:
                with contextlib.suppress(asyncio.CancelledError):
                    await bench.play(target, seconds, sample)
    return samples


def summary(samples: Mapping[float, Sample]) -> dict[str, Any]:
    """By target; the ratios are to the target that is best in the median, round by round.

    Not to the best of each round: of six that are equal, chance makes one the best by 20 %.
    """
    best = max(samples.values(), key=lambda one: statistics.median(one.tokens_s))
    return {
        "targets": {
            f"{target:g}": {
                "tokens_s": spread(one.tokens_s),
                "ratio_of_best": ratios(one.tokens_s, best.tokens_s),
                "cpu_ratio_of_best": ratios(one.tokens_cpu_s, best.tokens_cpu_s),
                "padded_over_tokens": spread(one.padding),
                "handout_ms": {
                    f"p{part * 100:.0f}": percentile(one.handout_ms, part) for part in (0.5, 0.95)
                },
            }
            for target, one in samples.items()
        }
    }


def shown(result: Mapping[str, Any]) -> str:
    """The result for people."""
    rows = [
        [
            f"{target} ms",
            one["tokens_s"],
            one["ratio_of_best"],
            one["cpu_ratio_of_best"],
            one["padded_over_tokens"],
            one["handout_ms"]["p50"],
            one["handout_ms"]["p95"],
        ]
        for target, one in result["targets"].items()
    ]
    head = (
        "target",
        "tokens/s",
        "of the best",
        "by CPU",
        "padded/real",
        "hand-out p50 ms",
        "p95 ms",
    )
    return table(head, rows)


def main(words: Sequence[str] | None = None) -> None:
    """Measure, show, and end with one line of JSON."""
    parser = arguments(__doc__)
    parser.add_argument(
        "--targets", type=float, nargs="+", default=TARGETS_MS, metavar="MS", help="to compare"
    )
    parser.add_argument("--precision", choices=sorted(PRECISIONS["onnx"]), default="auto")
    parser.add_argument("--rounds", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=2, help="of a target, in a round")
    options = parser.parse_args(words)
    rounds, seconds = (1, 1.5) if options.smoke else (options.rounds, options.seconds)
    pool = of_the_file(options.precision)
    result = summary(asyncio.run(measure(pool, options.targets, rounds=rounds, seconds=seconds)))
    print(shown(result))
    head = {"smoke": options.smoke, "precision": options.precision}
    head |= {"rounds": rounds, "seconds": seconds}
    out: Path | None = options.out
    finish("handout", "default", {**head, **result}, out)


if __name__ == "__main__":
    main()
