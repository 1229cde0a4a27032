"""A sentence-transformers model on torch: for GPUs, and for models that make no graph.

It runs the model's own modules on our token ids. `encode` would tokenise again, sort and pad by
itself; here `packing` has decided that. Importing this takes about 10 s: `pool` does, lazily.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from sentence_transformers import SentenceTransformer

from serve.config import Model
from serve.embedding.rows import Rows
from serve.errors import ModelUnavailable
from serve.records import Input, InputKind, Vector


class Composed(torch.nn.Module):
    """A model's own modules as one: ids and mask in, float32 rows of unit length out.

    It is what is served here and what `onnx_export` makes a graph of.
    """

    def __init__(self, modules: SentenceTransformer) -> None:
        super().__init__()
        self._composed = modules

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """Embed a padded batch."""
        features = {"input_ids": input_ids, "attention_mask": attention_mask}
        pooled = self._composed(features)["sentence_embedding"].float()
        return torch.nn.functional.normalize(pooled, dim=1)


class SentenceTransformersEngine:
    """Implements `ports.Engine`: equals `SentenceTransformer.encode` (cosine > 0.9999).

    Loads from a folder only: no network, no code from the model. `threads` sets torch's CPU
    threads for the whole process. Raises ModelUnavailable when the folder cannot be loaded or the
    model is not what the settings say. `composed` and `rows` are what it runs, and on what.
    """

    accepts: frozenset[InputKind] = frozenset({"ids"})

    def __init__(self, model: Model, folder: Path, *, device: str, threads: int) -> None:
        torch.set_num_threads(threads)
        # bf16 weights run at a sixth of the speed on a CPU; elsewhere as they are stored.
        dtype = torch.float32 if device == "cpu" else "auto"
        try:
            inner = SentenceTransformer(
                str(folder),
                device=device,
                local_files_only=True,
                trust_remote_code=False,
                model_kwargs={"dtype": dtype},
            )
        except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
            raise ModelUnavailable(f"Model {model.id}: loading failed: {error}") from error
        self.dimensions = model.dimensions
        self._device = device
        _check(model, inner)
        self.composed = Composed(inner).eval()
        tokenizer = inner.tokenizer
        self.rows = Rows(
            model,
            vocab_size=_embedding_rows(model, inner),
            pad_id=tokenizer.pad_token_id or 0,
            pad_left=tokenizer.padding_side == "left",
        )

    def forward(self, batch: Sequence[Input]) -> Vector:
        """See `ports.Engine.forward`. Raises BadInput for what the model cannot read."""
        if not batch:
            return np.zeros((0, self.dimensions), np.float32)
        ids, mask = (torch.from_numpy(part).to(self._device) for part in self.rows.padded(batch))
        with torch.inference_mode():
            vectors: Vector = np.ascontiguousarray(self.composed(ids, mask).cpu().numpy())
        return vectors

    def close(self) -> None:
        """Drop the weights, and give a GPU's memory back to others."""
        del self.composed
        if self._device.startswith("cuda"):
            torch.cuda.empty_cache()


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


def _embedding_rows(model: Model, inner: SentenceTransformer) -> int:
    """How many token ids the model itself knows; its tokenizer may know fewer."""
    transformer = inner.transformers_model
    table = transformer.get_input_embeddings() if transformer is not None else None
    if not isinstance(table, torch.nn.Embedding):
        raise ModelUnavailable(f"Model {model.id}: it is not a text transformer.")
    return table.num_embeddings
