"""What `bench.engine` compares: the service's engines, and `encode` as its users call it."""

import hashlib
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from bench.engine_loads import FIXED, Load
from serve import config
from serve.embedding import cpu
from serve.embedding.files import WEIGHTS, model_folder
from serve.embedding.graphs import Graphs
from serve.embedding.packing import Pace
from serve.ports import Engine
from serve.records import Input, Vector


class Encode:
    """`SentenceTransformer.encode` in some precision, as its users call it."""

    def __init__(self, folder: Path, device: str, precision: str) -> None:
        from sentence_transformers import SentenceTransformer  # noqa: PLC0415  10 s

        self._inner = SentenceTransformer(
            str(folder), device=device, local_files_only=True, model_kwargs={"dtype": precision}
        )
        self.dimensions: int = self._inner.get_embedding_dimension()
        self.tokens_max: int = self._inner.max_seq_length

    def __call__(self, lines: Sequence[str]) -> Vector:
        """Embed texts; 32 at a time is what it does unless told otherwise."""
        vectors: Vector = self._inner.encode(
            list(lines), batch_size=FIXED, normalize_embeddings=True, show_progress_bar=False
        )
        return vectors

    def requests(self, load: Load) -> None:
        """A load as a server calls it that knows nothing of batches: call by call."""
        for call in load.calls:
            self([load.texts[at] for at in call])


def model_in(folder: Path, encode: Encode, engine: str) -> config.Model:
    """Settings for a sentence-transformers folder. Raises OSError when its weights are not there."""
    with (folder / WEIGHTS).open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return config.Model.model_validate(
        {
            "id": folder.name,
            "engine": engine,
            "source": str(folder),
            "sha256": digest,
            "dimensions": encode.dimensions,
            "tokens_max": encode.tokens_max,
        }
    )


def on_cpu(model: config.Model, graphs: Path, threads: int) -> Iterator[tuple[str, Engine]]:
    """By name, with so many threads; torch has one number for the whole process.

    The service's own comes first, next to `encode` in time: a busy machine changes its mood in seconds.
    """
    from serve.embedding.onnx import OnnxEngine  # noqa: PLC0415  they set nothing of the process
    from serve.embedding.sentence_transformers import (  # noqa: PLC0415  10 s
        SentenceTransformersEngine,
    )

    folder = model_folder(model)
    for name, precision in (("onnx", "float32"), ("onnx_int8", "int8")):
        one = _in(model, "onnx", precision)
        graph = Graphs(graphs).take(one, threads=threads)
        yield name, OnnxEngine(one, graph, threads=threads)
    if cpu.has_bfloat16():
        from serve.embedding.openvino import OpenVinoEngine  # noqa: PLC0415

        one = _in(model, "onnx", "bfloat16")
        yield (
            "bfloat16",
            OpenVinoEngine(one, Graphs(graphs).take(one, threads=threads), threads=threads),
        )
    plain = _in(model, "sentence_transformers", "float32")
    yield "torch", SentenceTransformersEngine(plain, folder, device="cpu", threads=threads)


def on_gpu(model: config.Model) -> Iterator[tuple[str, Engine]]:
    """Three precisions, each once more with padding where it does without."""
    from serve.embedding.sentence_transformers import (  # noqa: PLC0415  10 s
        SentenceTransformersEngine,
    )

    for precision in ("float32", "float16", "bfloat16"):
        one = _in(model, "sentence_transformers", precision)
        engine = SentenceTransformersEngine(one, model_folder(one), device="cuda", threads=1)
        yield f"torch_{precision}", engine
        if engine.flat:
            engine = SentenceTransformersEngine(one, model_folder(one), device="cuda", threads=1)
            engine.flat = False
            yield f"torch_{precision}_padded", engine


def _in(model: config.Model, engine: str, precision: str) -> config.Model:
    return model.model_copy(update={"engine": engine, "precision": precision})


def forward(engine: Engine, load: Load, batches: Sequence[Sequence[int]], threads: int) -> Vector:
    """All texts of a load, in their order, so many batches at once: what a pool calls its slots."""
    vectors = np.zeros((len(load.inputs), engine.dimensions), np.float32)

    def embed(batch: Sequence[int]) -> None:
        vectors[batch] = engine.forward([load.inputs[at] for at in batch])

    with ThreadPoolExecutor(threads) as pool:
        for _ in pool.map(embed, batches):
            """Each has put its rows in their places."""
    return vectors


def pace(engine: Engine, longest: int, tokens_max: int) -> Pace:
    """As the pool finds it out at warm-up: the shortest input, the longest, a full batch of those."""
    times = []
    for inputs, tokens in ((1, 3), (1, longest), (max(tokens_max // longest, 1), longest)):
        batch = [Input(ids=np.ones(tokens, np.int32))] * inputs
        engine.forward(batch)
        began = time.perf_counter()
        engine.forward(batch)
        times.append((inputs * tokens, time.perf_counter() - began))
    return Pace.fit(times)
