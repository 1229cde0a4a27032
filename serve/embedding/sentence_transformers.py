"""A sentence-transformers model on torch: for GPUs, and for models that make no graph.

It runs the model's own modules on our token ids. `encode` would tokenise again, sort and pad by
itself; here `packing` has decided that. Importing this takes about 10 s: `pool` does, lazily.
"""

import importlib.util
import logging
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sentence_transformers import SentenceTransformer

from serve.config import Model, Precision
from serve.embedding.rows import Rows
from serve.errors import ModelUnavailable
from serve.records import Input, InputKind, Vector


log = logging.getLogger("headrace.torch")

AMPERE = (8, 0)
"""Compute capability of the first cards with bfloat16, and the least that flash attention takes."""

FLASH = "flash_attention_2"
FLASH_PACKAGE = "flash_attn"
"""Only where this is installed: in its absence transformers would download code."""

FLAT_TOKENS = (3, 17, 8)
FLAT_COSINE_MIN = 0.99
"""Half precision leaves 0.999 and more; a wrong position or a neighbour that shines through does not."""


class Composed(torch.nn.Module):
    """A model's own modules as one: ids and mask in, float32 rows of unit length out.

    It is what is served here and what `onnx_export` makes a graph of.
    """

    def __init__(self, modules: SentenceTransformer) -> None:
        super().__init__()
        self._composed = modules

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """Embed a padded batch."""
        return self.embed({"input_ids": input_ids, "attention_mask": attention_mask})

    def embed(self, features: dict[str, Any]) -> torch.Tensor:
        """Embed a batch in any form that the modules read."""
        pooled = self._composed(features)["sentence_embedding"].float()
        return torch.nn.functional.normalize(pooled, dim=1)


class InRows(torch.nn.Module):
    """The same for inputs that share rows, in the arrays of `rows.Shared`; for graphs.

    Tokens see those of their own input, wherever they lie, and know their positions in it. What
    follows the transformer reads inputs as if they had been padded.
    """

    def __init__(self, modules: SentenceTransformer, position_first: int) -> None:
        super().__init__()
        self._first, self._rest = modules[0], torch.nn.ModuleList(list(modules)[1:])
        self._position_first = position_first

    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        members: torch.Tensor,
        places: torch.Tensor,
        attention_mask: torch.Tensor,
    ) -> torch.Tensor:
        """Embed a batch: float32 rows of unit length."""
        seen = members[:, None, :, None] == members[:, None, None, :]
        features = {
            "input_ids": input_ids,
            "position_ids": positions + self._position_first,
            "attention_mask": seen,
        }
        tokens = self._first(features)["token_embeddings"].flatten(0, 1)
        features = {"token_embeddings": tokens[places], "attention_mask": attention_mask}
        for module in self._rest:
            features = module(features)
        return torch.nn.functional.normalize(features["sentence_embedding"].float(), dim=1)


class SentenceTransformersEngine:
    """Implements `ports.Engine`: equals `SentenceTransformer.encode` (cosine > 0.9999 in float32).

    Loads from a folder only: no network, no code from the model. `threads` sets torch's CPU
    threads for the whole process. Raises ModelUnavailable when the folder cannot be loaded or the
    model is not what the settings say. `composed` and `rows` are what it runs, and on what, `in_rows`
    what a graph may be made of; `flat`
    says whether batches go in without padding, which takes a GPU with flash attention.
    """

    accepts: frozenset[InputKind] = frozenset({"ids"})
    row_tokens = 0

    def __init__(self, model: Model, folder: Path, *, device: str, threads: int) -> None:
        torch.set_num_threads(threads)
        capability = capability_of(model, device)
        dtype = dtype_of(model.precision, capability)
        inner = _load(model, folder, device, dtype, flash=flash_fits(dtype, capability))
        self.dimensions = model.dimensions
        self._turn = threading.Lock()
        self._device = device
        _check(model, inner)
        self._modules = inner
        self.composed = Composed(inner).eval()
        tokenizer = inner.tokenizer
        self.rows = Rows(
            model,
            vocab_size=embedding_rows(model, inner.transformers_model),
            pad_id=tokenizer.pad_token_id or 0,
            pad_left=tokenizer.padding_side == "left",
        )
        first = inner[0]
        self._position_first = getattr(first, "_flatten_position_offset", 0)
        self.flat = bool(getattr(first, "can_flatten_inputs", False)) and self.reads_flat()

    def forward(self, batch: Sequence[Input]) -> Vector:
        """See `ports.Engine.forward`. Raises BadInput for what the model cannot read."""
        if not batch:
            return np.zeros((0, self.dimensions), np.float32)
        with self._turn:  # where it stands in for a graph several threads may call
            return self._embed(self._in_one_row(batch) if self.flat else self._padded(batch))

    def in_rows(self) -> InRows:
        """Its modules for inputs that share rows: whether that gives the same vectors shows a check."""
        return InRows(self._modules, self._position_first).eval()

    def reads_flat(self) -> bool:
        """Whether the model makes the same vectors without padding: nothing else would notice."""
        batch = [
            Input(ids=((np.arange(count) * 7919 + count) % self.rows.vocab_size).astype(np.int32))
            for count in FLAT_TOKENS
        ]
        padded = self._embed(self._padded(batch))
        try:
            cosine = float(np.sum(padded * self._embed(self._in_one_row(batch)), axis=1).min())
        except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
            log.warning("batches are padded, since without padding the model fails: %s", error)
            return False
        if not cosine >= FLAT_COSINE_MIN:  # NaN compares as false
            log.warning("batches are padded: without padding vectors differ, cosine %.4f", cosine)
            return False
        return True

    def _embed(self, features: dict[str, Any]) -> Vector:
        with torch.inference_mode():
            vectors: Vector = np.ascontiguousarray(self.composed.embed(features).cpu().numpy())
        return vectors

    def _padded(self, batch: Sequence[Input]) -> dict[str, Any]:
        ids, mask = self.rows.padded(batch)
        return {"input_ids": moved(ids, self._device), "attention_mask": moved(mask, self._device)}

    def _in_one_row(self, batch: Sequence[Input]) -> dict[str, Any]:
        """The names that transformers gives to the parts of a batch in one row."""
        flat = self.rows.flat(batch)
        starts = moved(flat.starts, self._device)
        return {
            "input_ids": moved(flat.ids, self._device),
            "position_ids": moved(flat.positions + self._position_first, self._device),
            "seq_idx": moved(flat.members, self._device),
            "cu_seq_lens_q": starts,
            "cu_seq_lens_k": starts,
            "max_length_q": flat.longest,
            "max_length_k": flat.longest,
        }

    def close(self) -> None:
        """Drop the weights, and give a GPU's memory back to others."""
        del self.composed, self._modules
        if self._device.startswith("cuda"):
            torch.cuda.empty_cache()


def moved(part: NDArray[Any], device: str) -> torch.Tensor:
    """On the device; from pinned memory, which a GPU reads while the CPU goes on."""
    tensor = torch.from_numpy(part)
    if device == "cpu":
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)


def capability_of(model: Model, device: str) -> tuple[int, int] | None:
    """Compute capability of a GPU; None on a CPU. Raises ModelUnavailable when torch sees no GPU."""
    if device == "cpu":
        return None
    if not torch.cuda.is_available():
        raise ModelUnavailable(f"Model {model.id}: torch sees no GPU.")
    return torch.cuda.get_device_capability(device)


def dtype_of(precision: Precision, capability: tuple[int, int] | None) -> torch.dtype:
    """What a model computes with on a GPU of that compute capability; without one on a CPU."""
    if precision != "auto":
        found: torch.dtype = getattr(torch, precision)
        return found
    if capability is None:
        return torch.float32
    return torch.bfloat16 if capability >= AMPERE else torch.float16


def flash_fits(dtype: torch.dtype, capability: tuple[int, int] | None) -> bool:
    """Whether flash attention is there for that dtype and GPU."""
    if dtype == torch.float32 or capability is None or capability < AMPERE:
        return False
    return importlib.util.find_spec(FLASH_PACKAGE) is not None


def _load(
    model: Model, folder: Path, device: str, dtype: torch.dtype, *, flash: bool
) -> SentenceTransformer:
    """With flash attention where the model has it, else with the attention it chooses."""
    wanted: dict[str, Any] = {"dtype": dtype}
    if flash:
        wanted["attn_implementation"] = FLASH
    try:
        return SentenceTransformer(
            str(folder),
            device=device,
            local_files_only=True,
            trust_remote_code=False,
            model_kwargs=wanted,
        )
    except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
        if flash:
            log.warning("model %s runs without flash attention: %s", model.id, error)
            return _load(model, folder, device, dtype, flash=False)
        raise ModelUnavailable(f"Model {model.id}: loading failed: {error}") from error


def _check(model: Model, inner: SentenceTransformer) -> None:
    found = inner.get_embedding_dimension()
    if found != model.dimensions:
        raise ModelUnavailable(
            f"Model {model.id}: its vectors have {found} dimensions, the settings say "
            f"{model.dimensions}."
        )
    longest = inner.max_seq_length
    if longest is not None and longest < model.tokens_max:
        raise ModelUnavailable(
            f"Model {model.id}: it reads {longest} tokens, the settings say {model.tokens_max}."
        )


def embedding_rows(model: Model, transformer: Any) -> int:
    """How many token ids the model itself knows; its tokenizer may know fewer.

    Raises ModelUnavailable when it knows none.
    """
    table = transformer.get_input_embeddings() if transformer is not None else None
    if not isinstance(table, torch.nn.Embedding):
        raise ModelUnavailable(f"Model {model.id}: it is not a text transformer.")
    return table.num_embeddings
