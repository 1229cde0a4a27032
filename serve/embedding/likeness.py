"""How alike the vectors of two engines are: what a graph must pass before it is served.

Used by the programs that make graphs (`onnx_export`, `onnx_quantize`); imports neither torch nor a
runtime.
"""

import re
from collections.abc import Iterator, Sequence
from pydoc_data import topics

import numpy as np

from serve.config import Model
from serve.embedding.packing import pack
from serve.embedding.tokenizer import Tokenizer
from serve.ports import Engine
from serve.records import Input, Vector


TEXTS = (
    "x",
    "How do I reset my password?",
    "A headrace is the channel that holds water back and feeds it evenly to the turbines.",
    "Der Fluss führt im Frühling mehr Wasser als im Sommer.",
    "春天的河水比夏天多。",
    "The quick brown fox jumps over the lazy dog. " * 9,
)

PARAGRAPHS = 400
PARAGRAPH_CHARS = (60, 1000)
ALONE = 64
"""Of them, how many are also embedded by themselves."""

NEAREST = 10
BATCH_TOKENS, BATCH_ITEMS = 1024, 64


def checks(model: Model) -> Iterator[list[Input]]:
    """What every graph is checked with: texts of several lengths together, one alone, and the
    longest input that the settings allow.
    """
    longest = TEXTS[-1] * (model.tokens_max // 64 + 1)
    rows = inputs(model, [*TEXTS, longest])
    yield rows[:-1]
    yield rows[1:2]
    yield rows[-1:]


def inputs(model: Model, texts: Sequence[str]) -> list[Input]:
    """Texts as the model reads them, cut to its longest input."""
    tokenizer = Tokenizer.open(model)
    rows = tokenizer.encode(texts)
    return [Input(ids=tokenizer.truncate(row, model.tokens_max)) for row in rows]


def paragraphs() -> list[str]:
    """English as people write it, the same in every run: from the texts of Python's own `help()`,
    which every Python carries, at even distances.
    """
    shortest, longest = PARAGRAPH_CHARS
    found = []
    for name in sorted(topics.topics):
        for block in re.split(r"\n\s*\n", topics.topics[name]):
            text = " ".join(block.split())
            if shortest <= len(text) <= longest and re.match(r"[A-Z][a-z ]", text):
                found.append(text)
    step = max(len(found) / PARAGRAPHS, 1)
    return [found[int(at * step)] for at in range(min(PARAGRAPHS, len(found)))]


def cosine_min(original: Engine, ours: Engine, batch: Sequence[Input]) -> float:
    """The least cosine between the rows of two engines."""
    return float(np.sum(original.forward(batch) * ours.forward(batch), axis=1).min())


def loss(original: Engine, ours: Engine, batch: Sequence[Input]) -> dict[str, float]:
    """What a coarser engine costs over so many texts, which must be more than `NEAREST`.

    The cosine to the original; the share of each text's ten nearest others that stay among them; and
    the cosine of a text alone to itself among others, which engines without loss keep at 1.
    """
    exact, coarse = embed(original, batch), embed(ours, batch)
    cosines = np.sum(exact * coarse, axis=1)
    alone = np.concatenate([ours.forward([one]) for one in batch[:ALONE]])
    return {
        "texts": len(batch),
        "cosine_min": float(cosines.min()),
        "cosine_mean": float(cosines.mean()),
        "top10_overlap": overlap(exact, coarse),
        "cosine_alone_min": float(np.sum(alone * coarse[: len(alone)], axis=1).min()),
    }


def overlap(exact: Vector, coarse: Vector) -> float:
    """The share of each row's nearest others under one engine that the other one finds too."""
    there, here = _nearest(exact), _nearest(coarse)
    shared = sum(len(set(a) & set(b)) for a, b in zip(there, here, strict=True))
    return shared / (len(exact) * NEAREST)


def _nearest(vectors: Vector) -> list[list[int]]:
    similar = vectors @ vectors.T
    np.fill_diagonal(similar, -np.inf)
    nearest: list[list[int]] = np.argsort(-similar, axis=1, kind="stable")[:, :NEAREST].tolist()
    return nearest


def embed(engine: Engine, batch: Sequence[Input]) -> Vector:
    """All rows of an engine, in batches of like length as they are served."""
    tokens = [len(one.ids) if one.ids is not None else 0 for one in batch]
    vectors = np.zeros((len(batch), engine.dimensions), np.float32)
    for rows in pack(tokens, tokens_max=BATCH_TOKENS, items_max=BATCH_ITEMS):
        vectors[rows] = engine.forward([batch[row] for row in rows])
    return vectors
