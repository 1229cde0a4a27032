"""The default engine: a sentence-transformers model on torch. The only door to both libraries.

It runs the model's own modules on our token ids. `encode` would tokenise again, sort and pad by
itself; here `packing` has decided that. Importing this takes about 10 s: `pool` does, lazily.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from sentence_transformers import SentenceTransformer

from serve.config import Model
from serve.errors import BadInput, ModelUnavailable
from serve.records import Input, InputKind, Vector


class SentenceTransformersEngine:
    """Implements `ports.Engine`: equals `SentenceTransformer.encode` (cosine > 0.9999).

    Loads from a folder only: no network, no code from the model. `threads` sets torch's CPU
    threads for the whole process. Raises ModelUnavailable when the folder cannot be loaded or the
    model is not what the settings say.
    """

    accepts: frozenset[InputKind] = frozenset({"ids"})

    def __init__(self, model: Model, folder: Path, *, device: str, threads: int) -> None:
        torch.set_num_threads(threads)
        # bf16 weights run at a sixth of the speed on a CPU; elsewhere as they are stored.
        dtype = torch.float32 if device == "cpu" else "auto"
        try:
            self._inner = SentenceTransformer(
                str(folder),
                device=device,
                local_files_only=True,
                trust_remote_code=False,
                model_kwargs={"dtype": dtype},
            ).eval()
        except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
            raise ModelUnavailable(f"Model {model.id}: loading failed: {error}") from error
        self._model = model
        self._device = device
        self.dimensions = model.dimensions
        self._check()
        self._vocab_size = self._embedding_rows()
        tokenizer = self._inner.tokenizer
        self._pad_id = tokenizer.pad_token_id or 0
        self._pad_left = tokenizer.padding_side == "left"

    def forward(self, batch: Sequence[Input]) -> Vector:
        """See `ports.Engine.forward`. Raises BadInput for what the model cannot read."""
        if not batch:
            return np.zeros((0, self.dimensions), np.float32)
        ids, mask = self._padded(batch)
        with torch.inference_mode():
            features = {
                "input_ids": torch.from_numpy(ids).to(self._device),
                "attention_mask": torch.from_numpy(mask).to(self._device),
            }
            pooled = self._inner(features)["sentence_embedding"].float()
            unit = torch.nn.functional.normalize(pooled, dim=1)
            vectors: Vector = np.ascontiguousarray(unit.cpu().numpy(), np.float32)
        return vectors

    def close(self) -> None:
        """Drop the weights, and give a GPU's memory back to others."""
        del self._inner
        if self._device.startswith("cuda"):
            torch.cuda.empty_cache()

    def _check(self) -> None:
        found = self._inner.get_embedding_dimension()
        if found != self._model.dimensions:
            raise ModelUnavailable(
                f"Model {self._model.id}: its vectors have {found} dimensions, the settings say "
                f"{self._model.dimensions}."
            )
        longest = self._inner.max_seq_length
        if longest is not None and longest < self._model.tokens_max:
            raise ModelUnavailable(
                f"Model {self._model.id}: it reads {longest} tokens, the settings say "
                f"{self._model.tokens_max}."
            )

    def _embedding_rows(self) -> int:
        """How many token ids the model itself knows; its tokenizer may know fewer."""
        transformer = self._inner.transformers_model
        table = transformer.get_input_embeddings() if transformer is not None else None
        if not isinstance(table, torch.nn.Embedding):
            raise ModelUnavailable(f"Model {self._model.id}: it is not a text transformer.")
        return table.num_embeddings

    def _padded(self, batch: Sequence[Input]) -> tuple[np.ndarray, np.ndarray]:
        """Ids and mask, int64, padded to the longest input on the side the model was trained with.

        Ids are checked against the embedding table: an index beyond it ends a CUDA process.
        """
        rows = [self._ids(one) for one in batch]
        longest = max(len(row) for row in rows)
        ids = np.full((len(rows), longest), self._pad_id, np.int64)
        mask = np.zeros((len(rows), longest), np.int64)
        for position, row in enumerate(rows):
            place = slice(longest - len(row), None) if self._pad_left else slice(0, len(row))
            ids[position, place] = row
            mask[position, place] = 1
        if ids.min() < 0 or ids.max() >= self._vocab_size:
            raise BadInput(f"The model {self._model.id} knows token ids below {self._vocab_size}.")
        return ids, mask

    def _ids(self, one: Input) -> np.ndarray:
        if one.ids is None:
            raise BadInput(f"The model {self._model.id} takes token ids, not {one.kind}.")
        if not 0 < len(one.ids) <= self._model.tokens_max:
            raise BadInput(
                f"The input has {len(one.ids)} tokens; the model {self._model.id} takes 1 to "
                f"{self._model.tokens_max}.",
                code="context_length_exceeded",
            )
        return one.ids
