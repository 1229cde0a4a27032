"""Text into token ids, once, at the door.

Only the `tokenizers` library is needed, which releases the GIL while it works: the ingress
imports this, and must not import torch or transformers.
"""

from collections.abc import Iterator, Sequence
from typing import Literal

import numpy as np
import tokenizers
from numpy.typing import NDArray
from tokenizers import models, pre_tokenizers, processors

from serve.config import Model
from serve.embedding.files import model_folder
from serve.errors import BadInput, ModelUnavailable
from serve.records import TokenIds


Side = Literal["NONE", "START", "END"]

SPAN_CHARS = 65_536
"""The library needs about 800 bytes for a token with its place: up to 50 MB at a time, not more."""

FAKE_SPECIALS = ("<s>", "</s>")


class Tokenizer:
    """One model's own tokenizer, without any limit of length. Safe to use from many threads.

    `vocab_size` bounds the ids; `special_tokens` is how many every input gets on top of its text.
    """

    def __init__(self, inner: tokenizers.Tokenizer) -> None:
        # Model files often switch these on (MiniLM: cut and pad to 128); limits are ours to show.
        inner.no_truncation()
        inner.no_padding()
        self._inner = inner
        mask = inner.encode("a").special_tokens_mask
        ids = inner.encode("a").ids
        first, last = mask.index(0), len(mask) - 1 - mask[::-1].index(0)
        self._opening, self._closing = ids[:first], ids[last + 1 :]
        self.special_tokens = len(self._opening) + len(self._closing)
        pair = inner.encode("a", "a").special_tokens_mask
        self._closing_a_pair = pair[::-1].index(0)
        self.vocab_size = max(inner.get_vocab(with_added_tokens=True).values()) + 1

    @classmethod
    def open(cls, model: Model) -> "Tokenizer":
        """Read `tokenizer.json` of the model; `fake` models get one token per UTF-8 byte.

        Raises ModelUnavailable when the file is missing or not a tokenizer.
        """
        if model.engine == "fake":
            return cls(_byte_level())
        path = model_folder(model) / "tokenizer.json"
        try:
            raw = path.read_text("utf-8")
        except OSError as error:
            raise ModelUnavailable(f"Model {model.id}: there is no tokenizer.json.") from error
        try:
            return cls(tokenizers.Tokenizer.from_str(raw))
        except Exception as error:  # the Rust library raises nothing narrower
            raise ModelUnavailable(f"Model {model.id}: tokenizer.json is not valid.") from error

    @property
    def made_of(self) -> str:
        """All that decides which ids a text gets, as JSON; 700 kB for a vocabulary of 30,000."""
        return self._inner.to_str()

    def encode(self, texts: Sequence[str]) -> list[TokenIds]:
        """Token ids of each text with the special tokens, never truncated.

        Raises BadInput naming `input[i]` for a text that is not Unicode (a lone surrogate).
        """
        _check_unicode(texts)
        found = self._inner.encode_batch_fast(list(texts))
        return [np.asarray(one.ids, np.int32) for one in found]

    def encode_pairs(self, query: str, texts: Sequence[str]) -> list[TokenIds]:
        """Token ids of the query with each text, as cross-encoders read them, never truncated.

        Raises BadInput like `encode`.
        """
        _check_unicode([query, *texts])
        found = self._inner.encode_batch_fast([(query, text) for text in texts])
        return [np.asarray(one.ids, np.int32) for one in found]

    def cut_pair(self, ids: TokenIds, tokens_max: int) -> TokenIds:
        """At most `tokens_max` ids of a pair: the end of its text goes. The query must leave room."""
        if len(ids) <= tokens_max:
            return ids
        closing = self._closing_a_pair
        return np.concatenate([ids[: tokens_max - closing], ids[len(ids) - closing :]])

    def count(self, text: str) -> int:
        """Tokens of a text, special tokens not counted. Raises BadInput like `encode`."""
        _check_unicode([text])
        return len(self._inner.encode_batch_fast([text], add_special_tokens=False)[0].ids)

    def spans(self, text: str) -> NDArray[np.int64]:
        """Start and end of each token in the text, in characters: shape (tokens, 2).

        Special tokens have none. Works on `SPAN_CHARS` characters at a time. Raises BadInput like
        `encode`.
        """
        _check_unicode([text])
        parts = [np.zeros((0, 2), np.int64)]
        for start, stop in _segments(text):
            found = self._inner.encode(text[start:stop], add_special_tokens=False)
            parts.append(np.array(found.offsets, np.int64).reshape(-1, 2) + start)
        return np.concatenate(parts)

    def accept_ids(self, ids: Sequence[int]) -> TokenIds:
        """Take token ids a caller made with this model's own tokenizer.

        Opening and closing special tokens are added, each unless the list already starts or ends
        with them, so ids made with and without special tokens mean the same.
        Raises BadInput when there are none, or one is not an integer in 0..vocab_size-1.
        """
        if not ids:
            raise BadInput("A list of token ids must not be empty.")
        for position, one in enumerate(ids):
            if type(one) is not int or not 0 <= one < self.vocab_size:  # True is an int, too
                raise BadInput(
                    f"Token {position} is not an integer from 0 to {self.vocab_size - 1}: ids must "
                    "be those of this model's own tokenizer.",
                    code="invalid_token_id",
                )
        row = list(ids)
        opening, closing = self._opening, self._closing
        if row[: len(opening)] != opening:
            row = opening + row
        if row[len(row) - len(closing) :] != closing:
            row = row + closing
        return np.asarray(row, np.int32)

    def truncate(self, ids: TokenIds, tokens_max: int, side: Side = "END") -> TokenIds:
        """At most `tokens_max` ids: `side` of the text goes, the special tokens stay.

        Raises BadInput when it is too long and `side` is NONE, or when only special tokens fit.
        """
        if len(ids) <= tokens_max:
            return ids
        if side == "NONE":
            raise BadInput(
                f"The input has {len(ids)} tokens; at most {tokens_max} are allowed.",
                code="context_length_exceeded",
            )
        opening, closing = len(self._opening), len(self._closing)
        room = tokens_max - opening - closing
        if room < 1:
            raise BadInput(f"At most {tokens_max} tokens leave no room for the text.")
        content = ids[opening : len(ids) - closing]
        kept = content[-room:] if side == "START" else content[:room]
        return np.concatenate([ids[:opening], kept, ids[len(ids) - closing :]])


def _segments(text: str) -> Iterator[tuple[int, int]]:
    """Cut before the last space or line end of each stretch; inside a word when it has none."""
    start = 0
    while len(text) - start > SPAN_CHARS:
        stop = start + SPAN_CHARS
        gap = max(text.rfind(" ", start + 1, stop), text.rfind("\n", start + 1, stop))
        yield start, gap if gap > 0 else stop
        start = gap if gap > 0 else stop
    yield start, len(text)


def _check_unicode(texts: Sequence[str]) -> None:
    """A lone surrogate has no UTF-8 form; the library answers it with an unclear TypeError."""
    for position, text in enumerate(texts):
        try:
            text.encode()
        except UnicodeEncodeError:
            raise BadInput(
                "The text holds a lone surrogate, which is not valid Unicode.",
                param=f"input[{position}]",
            ) from None


def _byte_level() -> tokenizers.Tokenizer:
    """Ids 0..255 for the bytes, in the order of the library's alphabet; then two specials."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [*alphabet, *FAKE_SPECIALS]
    vocab = {word: position for position, word in enumerate(words)}
    inner = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.post_processor = processors.TemplateProcessing(
        single=f"{FAKE_SPECIALS[0]} $A {FAKE_SPECIALS[1]}",
        pair=f"{FAKE_SPECIALS[0]} $A {FAKE_SPECIALS[1]} $B:1 {FAKE_SPECIALS[1]}:1",
        special_tokens=[(word, vocab[word]) for word in FAKE_SPECIALS],
    )
    return inner
