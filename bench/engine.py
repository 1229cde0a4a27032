"""How fast are the engines, and what does packing by length gain?

    python -m bench.engine                # about ten minutes
    python -m bench.engine --smoke        # under 30 s
    python -m bench.engine --device cuda --model-folder PATH   # untested on a GPU so far

The model of config.yaml, and any others, in this process. Ways take turns within each round: an engine
(torch's forward pass, a graph in ONNX Runtime) with its packing (as the service plans batches; in order
of arrival), and `SentenceTransformer.encode` over the same texts: all at once, or in `requests` that
all wait. Ours get token ids, as an embedder does; `encode` tokenises by itself, which is at most 4 % of
its time on a CPU.
"""

import argparse
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from bench.arithmetic import Shape, limit
from bench.engine_loads import FIXED, Load, loads
from bench.engine_ways import Encode, forward, model_in, on_cpu, on_gpu, pace
from bench.report import ROOT, arguments, finish, percentile, ratios, spread, table
from deployments.places import DeployFile
from serve import config
from serve.embedding.files import model_folder
from serve.ports import Engine


GPU_TIMES = 32
"""As many texts for a GPU."""
GPU_TOKENS_MAX, GPU_ITEMS_MAX = 16_384, 4096
SINGLES = 40
ENCODE = "encode"


@dataclass(frozen=True, slots=True)
class Device:
    """What differs between a CPU and a GPU: precisions, and which way is the service's."""

    name: str
    encode_in: str
    ours: str
    ours_in: str
    times: int = 1

    def batch(self, settings: config.Batch) -> config.Batch:
        """The pool's settings, which are a CPU's; a GPU takes more at once."""
        if self.name == "cpu":
            return settings
        sizes = {"tokens_max": GPU_TOKENS_MAX, "items_max": GPU_ITEMS_MAX}
        return settings.model_copy(update={**sizes, "tokens_min": GPU_TOKENS_MAX})


DEVICES = {
    "cpu": Device("cpu", "float32", "onnx_planned", "float32"),
    "cuda": Device("cuda", "float16", "torch_bfloat16_planned", "bfloat16", GPU_TIMES),
}


@dataclass(slots=True)
class Sample:
    """What one way came to on one load, round by round."""

    texts_s: list[float] = field(default_factory=list)
    cpu_ms: list[float] = field(default_factory=list)

    def add(self, count: int, wall_s: float, cpu_s: float) -> None:
        """One round."""
        self.texts_s.append(count / wall_s)
        self.cpu_ms.append(cpu_s / count * 1e3)


@dataclass(slots=True)
class Results:
    """By threads, load and way; single texts by threads and engine; the rest is the same each round."""

    samples: dict[int, dict[str, dict[str, Sample]]] = field(default_factory=dict)
    single_ms: dict[int, dict[str, list[float]]] = field(default_factory=dict)
    waste: dict[str, dict[str, float]] = field(default_factory=dict)
    cosines: dict[str, float] = field(default_factory=dict)
    limits: dict[int, float] = field(default_factory=dict)

    def of(self, threads: int, load: str, way: str) -> Sample:
        """Made when new."""
        loads = self.samples.setdefault(threads, {})
        return loads.setdefault(load, {}).setdefault(way, Sample())


class Bench:
    """One model under every engine of a device."""

    def __init__(
        self, model: config.Model, encode: Encode, pool: config.Pool, device: Device, shrink: int
    ) -> None:
        self._model, self._encode, self._device = model, encode, device
        self._batch, self._graphs = device.batch(pool.batch), Path(pool.graphs)
        self.loads = loads(model, shrink, device.times)
        self.results = Results()

    def _engines(self, threads: int) -> dict[str, Engine]:
        if self._device.name == "cuda":
            return dict(on_gpu(self._model))
        return dict(on_cpu(self._model, self._graphs, threads))

    def measure(self, threads: int, rounds: int) -> None:
        """Every way on every load, by turns."""
        found = self._engines(threads)
        self.results.limits[threads] = limit(self._device.name, self._device.ours_in)
        longest = min(self._model.tokens_max, self._batch.tokens_max)
        paces = {name: pace(one, longest, self._batch.tokens_max) for name, one in found.items()}
        self._check(found)
        for number in range(rounds):
            for load in self.loads:
                ways: dict[str, Callable[[], object]] = {ENCODE: _encoding(self._encode, load)}
                for name, engine in found.items():
                    planned = load.planned(paces[name], self._batch, engine.row_tokens)
                    if self._device.ours == f"{name}_planned":
                        self._waste(load, planned, engine.row_tokens)
                    for packing, batches in (("planned", planned), ("arrival", load.arrival())):
                        ways[f"{name}_{packing}"] = _forwarding(engine, load, batches, threads)
                names = list(ways) if number % 2 == 0 else list(ways)[::-1]
                for way in names:
                    self._time(threads, load, way, ways[way])
            self._singles(threads, found)
        for engine in found.values():
            engine.close()

    def _waste(self, load: Load, planned: Sequence[Sequence[int]], row_tokens: int) -> None:
        self.results.waste[load.name] = {
            "planned": load.waste(planned, row_tokens),
            "arrival": load.waste(load.arrival(), row_tokens),
            ENCODE: load.waste(load.by_length()),
        }

    def _check(self, found: Mapping[str, Engine]) -> None:
        """The least cosine of each engine to `encode`, over a part of every load; warms both up."""
        for load in self.loads:
            count = min(len(load.texts), FIXED)
            theirs = self._encode(load.texts[:count])
            for name, engine in found.items():
                ours = engine.forward(load.inputs[:count])
                least = float(np.min(np.sum(ours * theirs, axis=1)))
                self.results.cosines[name] = min(self.results.cosines.get(name, 1.0), least)

    def _time(self, threads: int, load: Load, way: str, embed: Callable[[], object]) -> None:
        wall, cpu = time.perf_counter(), time.process_time()
        embed()
        wall_s, cpu_s = time.perf_counter() - wall, time.process_time() - cpu
        self.results.of(threads, load.name, way).add(len(load.texts), wall_s, cpu_s)

    def _singles(self, threads: int, found: Mapping[str, Engine]) -> None:
        """Short texts one at a time: the median of this round."""
        load = self.loads[0]
        took: dict[str, list[float]] = {ENCODE: [], **{name: [] for name in found}}
        for at in range(min(SINGLES, len(load.texts))):
            for name, times in took.items():
                began = time.perf_counter()
                if name == ENCODE:
                    self._encode([load.texts[at]])
                else:
                    found[name].forward([load.inputs[at]])
                times.append((time.perf_counter() - began) * 1e3)
        singles = self.results.single_ms.setdefault(threads, {})
        for name, times in took.items():
            singles.setdefault(name, []).append(percentile(times, 0.5))


def _encoding(encode: Encode, load: Load) -> Callable[[], object]:
    return lambda: encode.requests(load)


def _forwarding(
    engine: Engine, load: Load, batches: Sequence[Sequence[int]], threads: int
) -> Callable[[], object]:
    return lambda: forward(engine, load, batches, threads)


def summary(results: Results, ours: str, every: Sequence[Load], shape: Shape) -> dict[str, Any]:
    """Everything by threads; at the top what `ours` came to with most threads, by load."""
    by_threads = {
        str(threads): {
            load: {way: _against(one, ways[ENCODE]) for way, one in ways.items()}
            for load, ways in found.items()
        }
        for threads, found in results.samples.items()
    }
    most = max(results.samples)
    top = {load: ways[ours] for load, ways in by_threads[str(most)].items()}
    rates = {load.name: top[load.name]["texts_s"]["median"] / len(load.texts) for load in every}
    return {
        "texts_s": {load: one["texts_s"] for load, one in top.items()},
        "ratio_vs_encode": {load: one["ratio_vs_encode"] for load, one in top.items()},
        "tokens_s": {load.name: rates[load.name] * sum(load.tokens) for load in every},
        "of_limit": {
            load.name: rates[load.name] * shape.operations(load.tokens) / results.limits[most]
            for load in every
        },
        "limit_tflops": {str(threads): one / 1e12 for threads, one in results.limits.items()},
        "padding_waste": results.waste,
        "cosine_min": results.cosines,
        "single_ms": {
            str(threads): {name: spread(times) for name, times in found.items()}
            for threads, found in results.single_ms.items()
        },
        "threads": by_threads,
    }


def _against(one: Sample, encode: Sample) -> dict[str, Any]:
    return {
        "texts_s": spread(one.texts_s),
        "cpu_ms": spread(one.cpu_ms),
        "ratio_vs_encode": ratios(one.texts_s, encode.texts_s),
        "cpu_ratio_vs_encode": ratios(encode.cpu_ms, one.cpu_ms),
    }


def shown(result: Mapping[str, Any]) -> str:
    """The result for people."""
    parts = []
    for threads, every in result["threads"].items():
        rows = [
            [f"{load}: {way}", one["texts_s"], one["ratio_vs_encode"], one["cpu_ms"]]
            for load, ways in every.items()
            for way, one in ways.items()
        ]
        header = (f"{threads} threads", "texts/s", "/ encode", "CPU-ms/text")
        parts.append(table(header, rows))
        singles = [[name, times] for name, times in result["single_ms"][threads].items()]
        parts.append(table(("one short text", "ms"), singles))
    waste = result["padding_waste"]
    packings = list(next(iter(waste.values())))
    rows = [[load, *(one[packing] for packing in packings)] for load, one in waste.items()]
    parts.append(table(("padding", *packings), rows))
    rows = [[load, rate, result["of_limit"][load]] for load, rate in result["tokens_s"].items()]
    parts.append(table(("ours", "tokens/s", "of the limit"), rows))
    parts.append(f"least cosine to encode: {result['cosine_min']}")
    return "\n\n".join(parts)


def main(words: Sequence[str] | None = None) -> None:
    """Measure, show, and end with one line of JSON."""
    parser = arguments(__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", choices=tuple(DEVICES), default="cpu")
    parser.add_argument("--threads", type=int, help="CPU threads; default: 1, then the pool's")
    parser.add_argument(
        "--model-folder",
        type=Path,
        action="append",
        default=[],
        metavar="PATH",
        help="one more model, in the form of sentence-transformers; may be repeated",
    )
    options = parser.parse_args(words)
    _require(parser, options.device)
    file = DeployFile.read(ROOT / "config.yaml")
    [pool] = file.settings.under(file.data_dir(None)).pools
    device = DEVICES[options.device]
    rounds, shrink = (1, 16) if options.smoke else (options.rounds, 1)
    most = options.threads or max(1, int(pool.cpus))
    alone = options.smoke or device.name == "cuda"
    folders = [model_folder(pool.models[0]), *(one.resolve() for one in options.model_folder)]
    found = {}
    for folder in folders:
        encode = Encode(folder, device.name, device.encode_in)
        own = folder == folders[0]
        model = pool.models[0] if own else model_in(folder, encode, pool.models[0].engine)
        bench = Bench(model, encode, pool, device, shrink)
        for threads in (most,) if alone else sorted({1, most}):
            bench.measure(threads, rounds)
        found[model.id] = summary(bench.results, device.ours, bench.loads, Shape.read(folder))
        print(f"\n{model.id}\n\n{shown(found[model.id])}")
    head = {"smoke": options.smoke, "rounds": rounds, "device": device.name, "ours": device.ours}
    first, *others = found
    more = {"model": first, **found[first], "others": {name: found[name] for name in others}}
    finish("engine", "default", {**head, **more}, options.out)


def _require(parser: argparse.ArgumentParser, device: str) -> None:
    if device == "cuda":
        import torch  # noqa: PLC0415  10 s

        if not torch.cuda.is_available():
            parser.error("--device cuda: torch sees no GPU here")


if __name__ == "__main__":
    main()
