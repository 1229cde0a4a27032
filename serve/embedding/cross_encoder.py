"""A cross-encoder on torch: it reads a query and a text together, and scores the text.

Pairs come as token ids of one input, as everything does; which tokens are the text's is seen from the
separator. Importing this takes about 10 s: `engines` does, lazily.
"""

import json
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sentence_transformers import CrossEncoder

from serve.config import Model
from serve.embedding.files import WEIGHTS
from serve.embedding.rows import Rows
from serve.embedding.sentence_transformers import (
    capability_of,
    dtype_of,
    embedding_rows,
    moved,
)
from serve.errors import ModelUnavailable
from serve.records import Input, InputKind, Vector


CLASSIFIER = "ForSequenceClassification"
"""How transformers calls a model that scores pairs; rerankers that answer yes or no in words want a
prompt around the pair, and are another thing.
"""


class CrossEncoderEngine:
    """Implements `ports.Engine` in one dimension: the sigmoid of the model's one label.

    Equals `CrossEncoder.predict` with that activation, whatever else the model's files say: a score
    from 0 to 1. Loads from a folder only: no network, no code from the model. `threads` sets torch's CPU
    threads for the whole process. Raises ModelUnavailable when the folder cannot be loaded or the
    model is not what the settings say.
    """

    accepts: frozenset[InputKind] = frozenset({"ids"})
    dimensions = 1
    row_tokens = 0

    def __init__(self, model: Model, folder: Path, *, device: str, threads: int) -> None:
        torch.set_num_threads(threads)
        dtype = dtype_of(model.precision, capability_of(model, device))
        inner = _load(model, folder, device, dtype)
        transformer: Any = inner.transformers_model
        _check(model, inner)
        _check_head(model, folder, transformer)
        self._inner = inner.eval()
        self._device = device
        self._turn = threading.Lock()
        tokenizer = inner.tokenizer
        self.rows = Rows(
            model,
            vocab_size=embedding_rows(model, transformer),
            pad_id=tokenizer.pad_token_id or 0,
            pad_left=tokenizer.padding_side == "left",
        )
        kinds = getattr(transformer.config, "type_vocab_size", 0)
        self._separator = tokenizer.sep_token_id if kinds > 1 else None

    def forward(self, batch: Sequence[Input]) -> Vector:
        """See `ports.Engine.forward`. Raises BadInput for what the model cannot read."""
        if not batch:
            return np.zeros((0, 1), np.float32)
        ids, mask = self.rows.padded(batch)
        parts = {"input_ids": ids, "attention_mask": mask}
        if self._separator is not None:
            parts["token_type_ids"] = sides(ids, mask, self._separator)
        features = {name: moved(part, self._device) for name, part in parts.items()}
        # One at a time, though graphs beside it may be called from several threads.
        with self._turn, torch.inference_mode():
            scores = torch.sigmoid(self._inner(features)["scores"].float())
            rows: Vector = np.ascontiguousarray(scores.cpu().numpy().reshape(-1, 1))
        return rows

    def close(self) -> None:
        """Drop the weights, and give a GPU's memory back to others."""
        del self._inner
        if self._device.startswith("cuda"):
            torch.cuda.empty_cache()


def sides(ids: NDArray[np.int64], mask: NDArray[np.int64], separator: int) -> NDArray[np.int64]:
    """1 for each token behind the first separator of its row, 0 for the others and for padding."""
    ends = (ids == separator).astype(np.int64) * mask
    behind = np.cumsum(ends, axis=1) - ends
    found: NDArray[np.int64] = np.minimum(behind, 1) * mask
    return found


def _load(model: Model, folder: Path, device: str, dtype: torch.dtype) -> CrossEncoder:
    wanted: dict[str, Any] = {"dtype": dtype}
    try:
        found: CrossEncoder = CrossEncoder(
            str(folder),
            device=device,
            local_files_only=True,
            trust_remote_code=False,
            model_kwargs=wanted,
        )
    except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
        raise ModelUnavailable(f"Model {model.id}: loading failed: {error}") from error
    return found


def _check(model: Model, inner: CrossEncoder) -> None:
    kind = type(inner.transformers_model).__name__
    if not kind.endswith(CLASSIFIER) or inner.num_labels != 1:
        raise ModelUnavailable(
            f"Model {model.id}: a reranker is a {CLASSIFIER} of one label, this a {kind} of "
            f"{inner.num_labels}."
        )
    longest = inner.max_seq_length
    if longest is not None and longest < model.tokens_max:
        raise ModelUnavailable(
            f"Model {model.id}: it reads {longest} tokens, the settings say {model.tokens_max}."
        )


def _check_head(model: Model, folder: Path, transformer: Any) -> None:
    """What the file has no weights for, transformers fills at random, and only logs it."""
    with (folder / WEIGHTS).open("rb") as file:
        header = file.read(int.from_bytes(file.read(8), "little"))
    held = json.loads(header)
    inside = f"{transformer.base_model_prefix}."
    names = [name for name, _ in transformer.named_parameters() if not name.startswith(inside)]
    if missing := [name for name in names if name not in held]:
        raise ModelUnavailable(f"Model {model.id}: {WEIGHTS} lacks {', '.join(missing)}.")
