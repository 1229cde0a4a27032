"""Which way a batch goes through a graph: by all threads, or by the one that calls."""

import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from serve.config import Model
from serve.embedding.graph_engine import IDS, MASK, MEMBERS, PLACES, POSITIONS, GraphEngine
from serve.embedding.graphs import Graph
from serve.errors import BadInput
from serve.records import Input


MODEL = Model(id="m", engine="fake", dimensions=2, tokens_max=64)
GRAPH = Graph(
    Path(), {}, vocab_size=100, pad_id=0, pad_left=False, row_tokens=0, cosine_min=1.0, made_by={}
)


class Ways:
    """Both ways: a row is (its tokens, 1 if it came through the wide way)."""

    def __init__(self) -> None:
        self.taken: list[tuple[str, int, int]] = []
        self.wait = threading.Event()
        self.wait.set()
        self.entered = threading.Event()

    def wide(self, feed):
        return self._rows("wide", feed)

    def narrow(self, feed):
        return self._rows("narrow", feed)

    def _rows(self, way, feed):
        self.taken.append((way, *feed[IDS].shape))
        self.feed = feed
        self.entered.set()
        assert self.wait.wait(20)
        mask = feed[MASK]
        columns = [mask.sum(axis=1), np.full(len(mask), way == "wide")]
        return np.stack(columns, axis=1, dtype=np.float32)


def engine(ways: Ways, row_tokens: int = 0) -> GraphEngine:
    return GraphEngine(
        MODEL,
        replace(GRAPH, row_tokens=row_tokens),
        wide=ways.wide,
        narrow=ways.narrow,
        small=lambda _, tokens: tokens <= 20,
    )


def batch(*tokens: int) -> list[Input]:
    return [Input(ids=np.ones(count, np.int32)) for count in tokens]


@pytest.mark.parametrize(
    ("tokens", "way"), [((5, 3, 1, 5), "wide"), ((5, 3, 1, 6), "narrow"), ((21,), "narrow")]
)
def test_a_small_batch_that_is_alone_has_all_threads(tokens, way) -> None:
    ways = Ways()
    vectors = engine(ways).forward(batch(*tokens))
    assert vectors[:, 0].tolist() == list(tokens)
    assert ways.taken == [(way, len(tokens), max(tokens))]


def test_a_graph_that_can_reads_rows_that_inputs_share() -> None:
    ways = Ways()
    assert engine(ways, row_tokens=8).forward(batch(5, 3, 1, 5))[:, 0].tolist() == [5, 3, 1, 5]
    assert ways.taken == [("wide", 2, 8)]
    assert ways.feed.keys() == {IDS, MASK, MEMBERS, PLACES, POSITIONS}
    assert engine(ways).forward(batch(5, 3)).shape == (2, 2)
    assert ways.feed.keys() == {IDS, MASK}


def test_one_in_company_has_its_own_until_it_is_alone_again() -> None:
    ways = Ways()
    made = engine(ways)
    ways.wait.clear()
    first = threading.Thread(target=made.forward, args=(batch(5),))
    first.start()
    assert ways.entered.wait(20)
    second = threading.Thread(target=made.forward, args=(batch(6),))
    second.start()
    while len(ways.taken) < 2:
        second.join(0.01)
    ways.wait.set()
    first.join()
    second.join()
    made.forward(batch(7))
    assert ways.taken == [("wide", 1, 5), ("narrow", 1, 6), ("wide", 1, 7)]


def test_a_batch_that_fails_is_no_company() -> None:
    ways = Ways()
    made = engine(ways)
    ways.wide = lambda *_: 1 / 0  # type: ignore[method-assign]
    broken = GraphEngine(MODEL, GRAPH, wide=ways.wide, narrow=ways.narrow, small=lambda *_: True)
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            broken.forward(batch(1))
    for bad in ([Input(ids=np.array([100], np.int32))], [Input(text="x")]):
        with pytest.raises(BadInput):
            made.forward(bad)
    made.forward(batch(2))
    assert made.forward([]).shape == (0, 2)
