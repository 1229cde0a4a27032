"""Token ids into the arrays that a text model reads."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from serve.config import Model
from serve.errors import BadInput
from serve.records import Input, TokenIds


@dataclass(frozen=True, slots=True)
class Flat:
    """A batch in one row, without padding: (1, tokens).

    Of each token its id, its position in its input and that input's number; `starts` is where each
    input begins, and where the last one ends.
    """

    ids: NDArray[np.int64]
    positions: NDArray[np.int64]
    members: NDArray[np.int32]
    starts: NDArray[np.int32]
    longest: int


@dataclass(slots=True)
class Rows:
    """How one model wants its inputs: `vocab_size` ids exist, padding is `pad_id` on one side."""

    model: Model
    vocab_size: int
    pad_id: int
    pad_left: bool

    def padded(self, batch: Sequence[Input]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Ids and mask of a batch that is not empty, padded to its longest input.

        Ids are checked against the embedding table: an index beyond it ends a CUDA process. Raises
        BadInput for what the model cannot read.
        """
        rows = [self._ids(one) for one in batch]
        longest = max(len(row) for row in rows)
        ids = np.full((len(rows), longest), self.pad_id, np.int64)
        mask = np.zeros((len(rows), longest), np.int64)
        for position, row in enumerate(rows):
            place = slice(longest - len(row), None) if self.pad_left else slice(0, len(row))
            ids[position, place] = row
            mask[position, place] = 1
        self._check(ids)
        return ids, mask

    def flat(self, batch: Sequence[Input]) -> Flat:
        """A batch that is not empty as one row. Raises BadInput like `padded`."""
        rows = [self._ids(one) for one in batch]
        lengths = np.array([len(row) for row in rows])
        starts = np.concatenate(([0], np.cumsum(lengths)))
        members = np.repeat(np.arange(len(rows)), lengths)
        ids = np.concatenate(rows).astype(np.int64)
        self._check(ids)
        return Flat(
            ids=ids[None],
            positions=(np.arange(len(ids)) - starts[members])[None],
            members=members[None].astype(np.int32),
            starts=starts.astype(np.int32),
            longest=int(lengths.max()),
        )

    def _check(self, ids: NDArray[np.int64]) -> None:
        if ids.min() < 0 or ids.max() >= self.vocab_size:
            raise BadInput(f"The model {self.model.id} knows token ids below {self.vocab_size}.")

    def _ids(self, one: Input) -> TokenIds:
        if one.ids is None:
            raise BadInput(f"The model {self.model.id} takes token ids, not {one.kind}.")
        if not 0 < len(one.ids) <= self.model.tokens_max:
            raise BadInput(
                f"The input has {len(one.ids)} tokens; the model {self.model.id} takes 1 to "
                f"{self.model.tokens_max}.",
                code="context_length_exceeded",
            )
        return one.ids
