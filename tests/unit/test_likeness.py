"""What is said of a coarser engine is true of it, over engines whose loss is known."""

import numpy as np
import pytest

from serve.config import Model
from serve.embedding.fake import FakeEngine
from serve.embedding.likeness import (
    ALONE,
    NEAREST,
    PARAGRAPH_CHARS,
    PARAGRAPHS,
    checks,
    cosine_min,
    embed,
    inputs,
    loss,
    overlap,
    paragraphs,
)


MODEL = Model(id="fake", engine="fake", dimensions=16, tokens_max=64)


class Rounded(FakeEngine):
    """Keeps one digit, in steps of the batch's largest value as int8 does."""

    def forward(self, batch):
        vectors = super().forward(batch)
        step = np.abs(vectors).max() / 4
        vectors = (vectors / step).round() * step
        return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


@pytest.fixture(scope="module")
def batch():
    return inputs(MODEL, [text[:60] for text in paragraphs()])


def test_paragraphs_are_english_the_same_in_every_run_and_all_different():
    found = paragraphs()
    assert found == paragraphs()
    assert len(set(found)) > 0.95 * PARAGRAPHS
    shortest, longest = PARAGRAPH_CHARS
    assert all(shortest <= len(text) <= longest for text in found)
    assert sum(" the " in text for text in found) > 0.7 * len(found)


def test_a_graph_is_checked_with_several_lengths_together_and_with_the_longest():
    mixed, alone, longest = checks(MODEL)
    assert len({len(one.ids) for one in mixed}) > 4
    assert len(alone) == 1
    assert [len(one.ids) for one in longest] == [MODEL.tokens_max]


def test_an_engine_without_loss_loses_nothing(batch):
    engine = FakeEngine(MODEL)
    lost = loss(engine, engine, batch)
    assert lost.pop("texts") == len(batch)
    assert lost == {key: pytest.approx(1, abs=1e-6) for key in lost}


def test_what_a_coarser_engine_loses_is_told(batch):
    lost = loss(FakeEngine(MODEL), Rounded(MODEL), batch)
    assert 0.5 < lost["cosine_min"] < lost["cosine_mean"] < 0.999
    assert 0.2 < lost["top10_overlap"] < 0.99
    assert lost["cosine_alone_min"] < 0.9999
    assert len(batch) > ALONE


def test_rows_come_back_in_the_order_of_their_inputs(batch):
    engine = FakeEngine(MODEL)
    np.testing.assert_array_equal(embed(engine, batch), engine.forward(batch))


def test_the_least_cosine_is_the_worst_rows(batch):
    exact, coarse = FakeEngine(MODEL), Rounded(MODEL)
    rows = np.sum(exact.forward(batch) * coarse.forward(batch), axis=1)
    assert cosine_min(exact, coarse, batch) == pytest.approx(rows.min())


def test_neighbours_that_are_kept_are_counted_without_the_text_itself():
    angles = np.linspace(0, 3, 40)
    circle = np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)
    assert overlap(circle, circle) == 1
    moved = circle[np.random.default_rng(1).permutation(len(circle))]
    assert overlap(circle, moved) < 2.5 * NEAREST / len(circle)
