"""Token ids into the arrays that a text model reads."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from serve.config import Model
from serve.embedding.sharing import share
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


@dataclass(frozen=True, slots=True)
class Shared:
    """A batch whose inputs share rows. Of each token, (rows, tokens): its id, its position in its
    input and that input's number, -1 for padding. Of each input, (inputs, its tokens): where they lie,
    counted over all rows, and which of them there are.
    """

    ids: NDArray[np.int64]
    positions: NDArray[np.int64]
    members: NDArray[np.int64]
    places: NDArray[np.int64]
    mask: NDArray[np.int64]


def as_it_is(tokens: int) -> int:
    """The length that a row of so many tokens is padded to, for who takes any."""
    return tokens


@dataclass(slots=True)
class Rows:
    """How one model wants its inputs: `vocab_size` ids exist, padding is `pad_id` on one side."""

    model: Model
    vocab_size: int
    pad_id: int
    pad_left: bool

    def padded(
        self, batch: Sequence[Input], rounded: Callable[[int], int] = as_it_is
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Ids and mask of a batch that is not empty, padded to its longest input, rounded up.

        Ids are checked against the embedding table: an index beyond it ends a CUDA process. Raises
        BadInput for what the model cannot read.
        """
        rows = [self._ids(one) for one in batch]
        longest = rounded(max(len(row) for row in rows))
        ids = np.full((len(rows), longest), self.pad_id, np.int64)
        mask = np.zeros((len(rows), longest), np.int64)
        for position, row in enumerate(rows):
            place = slice(longest - len(row), None) if self.pad_left else slice(0, len(row))
            ids[position, place] = row
            mask[position, place] = 1
        self._check(ids)
        return ids, mask

    def shared(
        self,
        batch: Sequence[Input],
        row_tokens: int,
        rounded: Callable[[int], int] = as_it_is,
    ) -> Shared:
        """A batch that is not empty in rows of `sharing.share`, whose lengths are rounded up.

        Raises BadInput like `padded`.
        """
        inputs = [self._ids(one) for one in batch]
        counts = np.array([len(one) for one in inputs])
        rows = share(counts.tolist(), row_tokens)
        order = [index for row in rows for index in row]
        wide = rounded(max(int(counts[row].sum()) for row in rows))
        starts = np.zeros(len(inputs), np.int64)
        for at, row in enumerate(rows):
            starts[row] = at * wide + np.cumsum(counts[row]) - counts[row]
        ids = np.full(len(rows) * wide, self.pad_id, np.int64)
        positions = np.zeros(len(rows) * wide, np.int64)
        members = np.full(len(rows) * wide, -1, np.int64)
        held, number = counts[order], np.repeat(order, counts[order])
        within = np.arange(len(number)) - np.repeat(np.cumsum(held) - held, held)
        lies = starts[number] + within
        ids[lies] = np.concatenate([inputs[index] for index in order])
        positions[lies], members[lies] = within, number
        self._check(ids)
        longest = rounded(int(counts.max()))
        places = np.zeros((len(inputs), longest), np.int64)
        mask = np.zeros((len(inputs), longest), np.int64)
        column = within + (longest - counts[number] if self.pad_left else 0)
        places[number, column], mask[number, column] = lies, 1
        shape = (len(rows), wide)
        return Shared(
            ids.reshape(shape), positions.reshape(shape), members.reshape(shape), places, mask
        )

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
