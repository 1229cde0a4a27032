"""How fast are the engines, and what does packing by length gain?

    python -m bench.engine                # about eight minutes
    python -m bench.engine --smoke        # under 30 s
    python -m bench.engine --device cuda  # torch in three precisions; untested on a GPU so far

The model of config.yaml in this process. Ways take turns within each round: an engine (torch's forward
pass, a graph in ONNX Runtime) with its packing (as the service plans batches; 32 in order of arrival),
and `SentenceTransformer.encode` over the same texts. Ours get token ids, as an embedder does; `encode`
tokenises by itself, which is at most 4 % of its time on a CPU.
"""

import argparse
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from bench import texts
from bench.report import ROOT, arguments, finish, percentile, ratios, spread, table
from deployments.places import DeployFile
from serve import config
from serve.embedding.files import model_folder
from serve.embedding.graphs import Graphs
from serve.embedding.packing import Pace, padded, plan
from serve.embedding.tokenizer import Tokenizer
from serve.ports import Engine
from serve.records import Input, Vector


LOADS: Mapping[str, tuple[Callable[[int], list[str]], int]] = {
    "short": (texts.shorts, 256),
    "passages": (texts.passages, 64),
    "mixed": (texts.mixed, 128),
}
GPU_TIMES = 32
"""As many texts for a GPU."""
GPU_TOKENS_MAX = 16_384
FIXED = 32
"""Texts of a batch in order of arrival; also what `encode` takes unless told otherwise."""
SINGLES = 40
WARM_SHAPES = ((1, 3), (1, 256), (4, 256))
ENCODE = "encode"

Embed = Callable[[Sequence[int]], Vector]
"""Texts of a load, by index, into their vectors."""


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

    def of(self, threads: int, load: str, way: str) -> Sample:
        """Made when new."""
        loads = self.samples.setdefault(threads, {})
        return loads.setdefault(load, {}).setdefault(way, Sample())


@dataclass(frozen=True, slots=True)
class Load:
    """Texts with their ids, as the model takes them."""

    name: str
    texts: Sequence[str]
    inputs: Sequence[Input]
    tokens: Sequence[int]

    def arrival(self) -> list[list[int]]:
        """Batches of a fixed size in order of arrival."""
        every = list(range(len(self.texts)))
        return [every[at : at + FIXED] for at in range(0, len(every), FIXED)]

    def planned(self, pace: Pace, batch: config.Batch) -> list[list[int]]:
        """Batches as the service makes them of one hand-out."""
        return plan(
            self.tokens,
            overhead=pace.overhead,
            tokens_max=batch.tokens_max,
            items_max=batch.items_max,
        )

    def by_length(self) -> list[list[int]]:
        """Batches as `encode` makes them: sorted by characters, of a fixed size."""
        order = sorted(range(len(self.texts)), key=lambda at: -len(self.texts[at]))
        return [order[at : at + FIXED] for at in range(0, len(order), FIXED)]

    def waste(self, batches: Sequence[Sequence[int]]) -> float:
        """The share of what the model reads that is padding."""
        return 1 - sum(self.tokens) / sum(padded([self.tokens[i] for i in one]) for one in batches)


def loads(model: config.Model, shrink: int, times: int) -> list[Load]:
    """Every load, `times` as large as written above, or a `shrink`th of that."""
    tokenizer = Tokenizer.open(model)
    made = []
    for name, (make, count) in LOADS.items():
        lines = make(max(count * times // shrink, 8))
        rows = [tokenizer.truncate(row, model.tokens_max) for row in tokenizer.encode(lines)]
        inputs = [Input(ids=row) for row in rows]
        made.append(Load(name, lines, inputs, [len(row) for row in rows]))
    return made


class Encode:
    """`SentenceTransformer.encode`, as its users call it."""

    def __init__(self, model: config.Model, device: str) -> None:
        from sentence_transformers import SentenceTransformer  # noqa: PLC0415  10 s

        self._inner = SentenceTransformer(
            str(model_folder(model)), device=device, local_files_only=True
        )

    def __call__(self, lines: Sequence[str]) -> Vector:
        """Embed texts."""
        vectors: Vector = self._inner.encode(
            list(lines), batch_size=FIXED, normalize_embeddings=True, show_progress_bar=False
        )
        return vectors


def forward(engine: Engine, load: Load, batches: Sequence[Sequence[int]]) -> Vector:
    """All texts of a load, in their order."""
    vectors = np.zeros((len(load.inputs), engine.dimensions), np.float32)
    for batch in batches:
        vectors[batch] = engine.forward([load.inputs[at] for at in batch])
    return vectors


def pace(engine: Engine) -> Pace:
    """As the pool finds it out at warm-up."""
    times = []
    for inputs, tokens in WARM_SHAPES:
        batch = [Input(ids=np.ones(tokens, np.int32))] * inputs
        engine.forward(batch)
        began = time.perf_counter()
        engine.forward(batch)
        times.append((inputs * tokens, time.perf_counter() - began))
    return Pace.fit(times)


class Bench:
    """One model under every engine of a device."""

    def __init__(self, pool: config.Pool, every: Sequence[Load], device: str) -> None:
        self._model, self._batch, self._loads = pool.models[0], pool.batch, every
        self._pool, self._device = pool, device
        self._encode = Encode(self._model, device)
        self.results = Results()

    def engines(self, threads: int) -> Iterator[tuple[str, Engine]]:
        """By name, with so many threads; torch has one number for the whole process."""
        import torch  # noqa: PLC0415  10 s

        from serve.embedding.sentence_transformers import (  # noqa: PLC0415
            SentenceTransformersEngine,
        )

        folder = model_folder(self._model)
        if self._device == "cuda":
            for name in ("float32", "float16", "bfloat16"):
                engine = SentenceTransformersEngine(
                    self._model, folder, device="cuda", threads=threads
                )
                engine.composed.to(getattr(torch, name))
                yield f"torch_{name}", engine
            return
        from serve.embedding.onnx import OnnxEngine  # noqa: PLC0415  sets nothing of the process

        yield (
            "torch",
            SentenceTransformersEngine(self._model, folder, device="cpu", threads=threads),
        )
        graph = Graphs(Path(self._pool.graphs)).take(self._model, threads=threads)
        yield "onnx", OnnxEngine(self._model, graph, threads=threads)

    def measure(self, threads: int, rounds: int) -> None:
        """Every way on every load, by turns."""
        found = dict(self.engines(threads))
        batch = self._batch
        if self._device == "cuda":
            batch = batch.model_copy(update={"tokens_max": GPU_TOKENS_MAX, "items_max": 4096})
        paces = {name: pace(engine) for name, engine in found.items()}
        self._check(found)
        for number in range(rounds):
            for load in self._loads:
                ways: dict[str, Callable[[], Vector]] = {
                    ENCODE: lambda load=load: self._encode(load.texts)
                }
                for name, engine in found.items():
                    planned = load.planned(paces[name], batch)
                    self._waste(load, planned)
                    for packing, batches in (("planned", planned), ("arrival", load.arrival())):
                        ways[f"{name}_{packing}"] = _bound(engine, load, batches)
                names = list(ways) if number % 2 == 0 else list(ways)[::-1]
                for way in names:
                    self._time(threads, load, way, ways[way])
            self._singles(threads, found)
        for engine in found.values():
            engine.close()

    def _waste(self, load: Load, planned: Sequence[Sequence[int]]) -> None:
        self.results.waste[load.name] = {
            "planned": load.waste(planned),
            "arrival": load.waste(load.arrival()),
            ENCODE: load.waste(load.by_length()),
        }

    def _check(self, found: Mapping[str, Engine]) -> None:
        """The least cosine of each engine to `encode`, over a part of every load; warms both up."""
        for name, engine in found.items():
            for load in self._loads:
                count = min(len(load.texts), 2 * FIXED)
                ours = engine.forward(load.inputs[:count])
                least = float(np.min(np.sum(ours * self._encode(load.texts[:count]), axis=1)))
                self.results.cosines[name] = min(self.results.cosines.get(name, 1.0), least)

    def _time(self, threads: int, load: Load, way: str, embed: Callable[[], Vector]) -> None:
        wall, cpu = time.perf_counter(), time.process_time()
        embed()
        wall_s, cpu_s = time.perf_counter() - wall, time.process_time() - cpu
        self.results.of(threads, load.name, way).add(len(load.texts), wall_s, cpu_s)

    def _singles(self, threads: int, found: Mapping[str, Engine]) -> None:
        """Short texts one at a time: the median of this round."""
        load = self._loads[0]
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


def _bound(engine: Engine, load: Load, batches: Sequence[Sequence[int]]) -> Callable[[], Vector]:
    return lambda: forward(engine, load, batches)


def summary(results: Results, ours: str) -> dict[str, Any]:
    """Everything by threads; at the top what `ours` came to with most threads, by load."""
    by_threads = {
        str(threads): {
            load: {
                way: {
                    "texts_s": spread(one.texts_s),
                    "cpu_ms": spread(one.cpu_ms),
                    "ratio_vs_encode": ratios(one.texts_s, ways[ENCODE].texts_s),
                    "cpu_ratio_vs_encode": ratios(ways[ENCODE].cpu_ms, one.cpu_ms),
                }
                for way, one in ways.items()
            }
            for load, ways in every.items()
        }
        for threads, every in results.samples.items()
    }
    most = by_threads[str(max(results.samples))]
    return {
        "texts_s": {load: ways[ours]["texts_s"] for load, ways in most.items()},
        "ratio_vs_encode": {load: ways[ours]["ratio_vs_encode"] for load, ways in most.items()},
        "padding_waste": results.waste,
        "cosine_min": results.cosines,
        "single_ms": {
            str(threads): {name: spread(times) for name, times in every.items()}
            for threads, every in results.single_ms.items()
        },
        "threads": by_threads,
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
    parts.append(f"least cosine to encode: {result['cosine_min']}")
    return "\n\n".join(parts)


def main(words: Sequence[str] | None = None) -> None:
    """Measure, show, and end with one line of JSON."""
    parser = arguments(__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, help="CPU threads; default: 1, then the pool's")
    options = parser.parse_args(words)
    _require(parser, options.device)
    file = DeployFile.read(ROOT / "config.yaml")
    [pool] = file.settings.under(file.data_dir(None)).pools
    rounds, shrink = (1, 16) if options.smoke else (options.rounds, 1)
    every = loads(pool.models[0], shrink, GPU_TIMES if options.device == "cuda" else 1)
    bench = Bench(pool, every, options.device)
    most = options.threads or max(1, int(pool.cpus))
    alone = options.smoke or options.device == "cuda"
    for threads in (most,) if alone else sorted({1, most}):
        bench.measure(threads, rounds)
    ours = "onnx_planned" if options.device == "cpu" else "torch_bfloat16_planned"
    result = summary(bench.results, ours)
    print(shown(result))
    head = {"smoke": options.smoke, "rounds": rounds, "device": options.device, "ours": ours}
    finish("engine", "default", {**head, **result}, options.out)


def _require(parser: argparse.ArgumentParser, device: str) -> None:
    if device == "cuda":
        import torch  # noqa: PLC0415  10 s

        if not torch.cuda.is_available():
            parser.error("--device cuda: torch sees no GPU here")


if __name__ == "__main__":
    main()
