"""torch as an engine: what it computes with on which card, and batches without padding.

There is no GPU where this runs: a stand-in for flash attention, which attends within each input of a
batch in one row, shows that everything around it is right.
"""

import importlib.machinery
import importlib.util
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AttentionInterface, AttentionMaskInterface, DataCollatorWithFlattening
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from serve.config import Settings
from serve.embedding import sentence_transformers as engines
from serve.embedding.files import model_folder
from serve.embedding.sentence_transformers import (
    SentenceTransformersEngine,
    dtype_of,
    flash_fits,
)
from serve.errors import ModelUnavailable
from serve.records import Input


pytestmark = pytest.mark.timeout(200)

MINILM = Settings().pools[0].models[0]
TURING, AMPERE, HOPPER = (7, 5), (8, 0), (9, 0)


@pytest.fixture(scope="module")
def engine() -> Iterator[SentenceTransformersEngine]:
    found = SentenceTransformersEngine(MINILM, model_folder(MINILM), device="cpu", threads=1)
    yield found
    found.close()


def batch(*lengths: int) -> list[Input]:
    rng = np.random.default_rng(3)
    return [Input(ids=rng.integers(999, 30522, count).astype(np.int32)) for count in lengths]


# --- precision ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("precision", "capability", "dtype"),
    [
        ("auto", None, torch.float32),
        ("auto", TURING, torch.float16),
        ("auto", AMPERE, torch.bfloat16),
        ("auto", HOPPER, torch.bfloat16),
        ("float32", HOPPER, torch.float32),
        ("float16", HOPPER, torch.float16),
    ],
)
def test_precision_follows_the_settings_or_the_card(precision, capability, dtype):
    assert dtype_of(precision, capability) == dtype


def test_flash_attention_takes_a_card_half_precision_and_its_package(monkeypatch):
    def installed(found: bool) -> None:
        spec = importlib.machinery.ModuleSpec("flash_attn", None) if found else None
        monkeypatch.setattr(importlib.util, "find_spec", lambda _: spec)

    installed(True)
    assert flash_fits(torch.bfloat16, AMPERE)
    assert flash_fits(torch.float16, HOPPER)
    assert not flash_fits(torch.float32, HOPPER)
    assert not flash_fits(torch.float16, TURING)
    assert not flash_fits(torch.bfloat16, None)
    installed(False)
    assert not flash_fits(torch.bfloat16, AMPERE)


def test_a_model_without_flash_attention_is_loaded_with_its_own(monkeypatch, caplog):
    monkeypatch.setattr(engines, "flash_fits", lambda *_: True)
    found = SentenceTransformersEngine(MINILM, model_folder(MINILM), device="cpu", threads=1)
    assert "runs without flash attention" in caplog.text
    assert not found.flat
    assert found.forward(batch(5)).shape == (1, 384)


def test_a_missing_gpu_is_named():
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(ModelUnavailable, match="torch sees no GPU"):
        SentenceTransformersEngine(MINILM, model_folder(MINILM), device="cuda", threads=1)


# --- batches without padding ------------------------------------------------------------------


def test_a_batch_in_one_row_has_the_parts_that_transformers_makes_of_it(engine):
    inputs = batch(3, 1, 7)
    collate = DataCollatorWithFlattening(
        return_seq_idx=True, return_flash_attn_kwargs=True, return_position_ids=True
    )
    wanted = collate([{"input_ids": one.ids.tolist()} for one in inputs])
    found = engine._in_one_row(inputs)
    assert found.keys() == wanted.keys() - {"labels"}
    for name, part in found.items():
        if isinstance(part, int):
            assert part == wanted[name]
        else:
            assert part.dtype == wanted[name].dtype, name
            assert part.tolist() == wanted[name].tolist(), name


def within_inputs(module: Any, query: Any, key: Any, value: Any, mask: Any, **more: Any) -> Any:
    """What flash attention does, without its speed."""
    starts = more.get("cu_seq_lens_q")
    if starts is None:
        return sdpa_attention_forward(module, query, key, value, mask, **more)
    attend = torch.nn.functional.scaled_dot_product_attention
    cuts = list(zip(starts.tolist()[:-1], starts.tolist()[1:], strict=True))
    parts = [attend(*(one[:, :, a:b] for one in (query, key, value))) for a, b in cuts]
    return torch.cat(parts, dim=2).transpose(1, 2).contiguous(), None


def across_inputs(module: Any, query: Any, key: Any, value: Any, mask: Any, **more: Any) -> Any:
    """An attention that takes no notice of where inputs begin."""
    return sdpa_attention_forward(module, query, key, value, mask, **more)


def broken(module: Any, query: Any, key: Any, value: Any, mask: Any, **more: Any) -> Any:
    if "cu_seq_lens_q" in more:
        raise RuntimeError("no kernel image is available")
    return sdpa_attention_forward(module, query, key, value, mask, **more)


@pytest.fixture
def attending(engine):
    model = engine.composed._composed.transformers_model
    before = model.config._attn_implementation

    def attend(by: Any) -> SentenceTransformersEngine:
        AttentionInterface.register("stand_in", by)
        AttentionMaskInterface.register("stand_in", sdpa_mask)
        model.set_attn_implementation("stand_in")
        return engine

    yield attend
    model.set_attn_implementation(before)
    engine.flat = False


def test_without_padding_the_vectors_are_the_same(engine, attending):
    inputs = batch(3, 120, 1, 256, 17, 17)
    padded = engine.forward(inputs)
    attending(within_inputs)
    assert engine.reads_flat()
    engine.flat = True
    np.testing.assert_allclose(engine.forward(inputs), padded, atol=1e-5)


def test_inputs_that_see_each_other_are_padded(attending, caplog):
    assert not attending(across_inputs).reads_flat()
    assert "without padding vectors differ" in caplog.text


def test_a_model_that_fails_without_padding_is_padded(attending, caplog):
    assert not attending(broken).reads_flat()
    assert "no kernel image is available" in caplog.text


def test_a_wrong_first_position_is_noticed(engine, attending, monkeypatch):
    attending(within_inputs)
    monkeypatch.setattr(engine, "_position_first", 2)
    assert not engine.reads_flat()
