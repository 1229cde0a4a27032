"""How a batch goes through a graph: the wide way, one thread, or a part for each."""

import threading
from pathlib import Path

import numpy as np
import pytest

from serve.config import Model
from serve.embedding.graph_engine import GraphEngine
from serve.embedding.graphs import Graph
from serve.errors import BadInput
from serve.records import Input


MODEL = Model(id="m", engine="fake", dimensions=2, tokens_max=64)
GRAPH = Graph(Path(), {}, vocab_size=100, pad_id=0, pad_left=False, cosine_min=1.0, made_by={})


class Ways:
    """Both ways: a row is (its tokens, 1 if it came through the wide way)."""

    def __init__(self) -> None:
        self.shapes: list[tuple[str, int, int]] = []
        self.threads: set[str] = set()

    def wide(self, ids, mask):
        return self._rows("wide", ids, mask)

    def narrow(self, ids, mask):
        self.threads.add(threading.current_thread().name)
        return self._rows("narrow", ids, mask)

    def _rows(self, way, ids, mask):
        self.shapes.append((way, *ids.shape))
        return np.stack(
            [mask.sum(axis=1), np.full(len(ids), way == "wide")], axis=1, dtype=np.float32
        )


def engine(ways: Ways, count: int) -> GraphEngine:
    return GraphEngine(
        MODEL, GRAPH, wide=ways.wide, narrow=ways.narrow, threads=3, parts=lambda _: count
    )


def batch(*tokens: int) -> list[Input]:
    return [Input(ids=np.ones(count, np.int32)) for count in tokens]


@pytest.mark.parametrize(
    ("count", "shapes"),
    [
        (0, [("wide", 4, 9)]),
        (1, [("narrow", 4, 9)]),
        (2, [("narrow", 1, 9), ("narrow", 3, 5)]),
        (9, [("narrow", 1, 1), ("narrow", 1, 3), ("narrow", 1, 5), ("narrow", 1, 9)]),
    ],
)
def test_a_batch_is_cut_as_it_is_said_and_comes_back_in_order(count, shapes) -> None:
    ways = Ways()
    vectors = engine(ways, count).forward(batch(3, 9, 1, 5))
    assert vectors[:, 0].tolist() == [3, 9, 1, 5]
    assert vectors.dtype == np.float32
    assert sorted(ways.shapes) == shapes


def test_one_part_stays_in_the_thread_that_asks() -> None:
    ways = Ways()
    engine(ways, 1).forward(batch(2, 2))
    assert ways.threads == {threading.current_thread().name}
    engine(ways, 2).forward(batch(2, 2))
    assert any(name.startswith("graph") for name in ways.threads)


def test_the_tokens_of_each_input_are_what_is_decided_on() -> None:
    asked: list[list[int]] = []

    def parts(tokens) -> int:
        asked.append(list(tokens))
        return 0

    made = GraphEngine(MODEL, GRAPH, wide=Ways().wide, narrow=Ways().narrow, threads=2, parts=parts)
    made.forward(batch(3, 1))
    assert made.forward([]).shape == (0, 2)
    assert asked == [[3, 1]]


def test_what_a_part_cannot_read_is_raised() -> None:
    with pytest.raises(BadInput, match="token ids below 100"):
        engine(Ways(), 2).forward([*batch(3), Input(ids=np.array([100], np.int32))])
    with pytest.raises(BadInput, match="not text"):
        engine(Ways(), 2).forward([*batch(3), Input(text="x")])
