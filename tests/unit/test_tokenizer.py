import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from serve.config import Model, Settings
from serve.embedding.files import model_folder
from serve.embedding.tokenizer import Tokenizer
from serve.errors import BadInput, ModelUnavailable


MINILM = Settings().pools[0].models[0]
FAKE = Model(id="fake", engine="fake", dimensions=8, tokens_max=64)
CLS, SEP = 101, 102

TEXTS = [
    "",
    "Hello, world!",
    "Ünïcödé and ACCENTS",
    "unbelievably hyperparameterisation",
    "春天的河水",
    "👍🏽 family 👨‍👩‍👧",
    "tabs\tand\nnewlines  ",
    "[CLS] special [SEP] words [MASK]",
    "long " * 700,
]


@pytest.fixture(scope="module")
def minilm() -> Tokenizer:
    return Tokenizer.open(MINILM)


@pytest.fixture(scope="module")
def fake() -> Tokenizer:
    return Tokenizer.open(FAKE)


def test_ids_equal_those_of_transformers(minilm: Tokenizer) -> None:
    from transformers import AutoTokenizer  # noqa: PLC0415

    theirs = AutoTokenizer.from_pretrained(str(model_folder(MINILM)), local_files_only=True)
    theirs.model_max_length = 10_000
    wanted = theirs(TEXTS, truncation=False, padding=False)["input_ids"]
    assert [row.tolist() for row in minilm.encode(TEXTS)] == wanted


def test_the_files_own_truncation_and_padding_are_off(minilm: Tokenizer) -> None:
    short, long = minilm.encode(["word", "word " * 1000])  # the file says: cut and pad to 128
    assert len(short) == 3
    assert len(long) == 1002
    assert short.dtype == np.int32


def test_facts(minilm: Tokenizer, fake: Tokenizer) -> None:
    assert (minilm.vocab_size, minilm.special_tokens) == (30522, 2)
    assert (fake.vocab_size, fake.special_tokens) == (258, 2)


def test_count_leaves_out_special_tokens(minilm: Tokenizer, fake: Tokenizer) -> None:
    for tokenizer in (minilm, fake):
        assert [tokenizer.count(text) + 2 for text in TEXTS] == list(
            map(len, tokenizer.encode(TEXTS))
        )


def test_spans_point_at_the_tokens_characters(minilm: Tokenizer, fake: Tokenizer) -> None:
    text = "Äpfel 👍🏽 grow"
    assert [text[start:end] for start, end in minilm.spans(text)] == [
        "Äp",
        "fe",
        "l",
        "👍🏽",
        "grow",
    ]
    text = "Ä b"
    assert [text[start:end] for start, end in fake.spans(text)] == ["Ä", "Ä", " ", "b"]


@pytest.mark.parametrize("piece", ["turbine water ", "line of words\n", "unbroken"])
def test_spans_of_a_long_text_are_those_of_its_whole(minilm: Tokenizer, piece: str) -> None:
    text = piece * (150_000 // len(piece))
    spans = minilm.spans(text)
    whole = minilm._inner.encode(text, add_special_tokens=False).offsets
    if piece == "unbroken":  # one unknown word, seen in stretches
        assert spans.tolist() == [[0, 65_536], [65_536, 131_072], [131_072, len(text)]]
    else:
        assert spans.tolist() == [list(span) for span in whole]


def test_spans_of_nothing(minilm: Tokenizer) -> None:
    assert minilm.spans("").shape == (0, 2)


def test_fake_is_one_token_per_byte(fake: Tokenizer) -> None:
    for text in TEXTS:
        assert fake.count(text) == len(text.encode())
    (row,) = fake.encode(["ab a"])
    assert row[0] == 256
    assert row[-1] == 257
    assert row[1] == row[4]


def test_a_lone_surrogate_names_its_input(minilm: Tokenizer) -> None:
    with pytest.raises(BadInput) as caught:
        minilm.encode(["fine", "broken \ud800"])
    assert caught.value.param == "input[1]"
    with pytest.raises(BadInput):
        minilm.count("\udfff")


def test_threads_share_it(minilm: Tokenizer) -> None:
    alone = [row.tolist() for row in minilm.encode(TEXTS)]
    with ThreadPoolExecutor(4) as threads:
        runs = list(threads.map(lambda _: minilm.encode(TEXTS), range(16)))
    assert all([row.tolist() for row in run] == alone for run in runs)


# --- token ids from callers -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "taken"),
    [
        ([7592], [CLS, 7592, SEP]),
        ([CLS, 7592, SEP], [CLS, 7592, SEP]),
        ([CLS, 7592], [CLS, 7592, SEP]),
        ([7592, SEP], [CLS, 7592, SEP]),
        ([CLS], [CLS, SEP]),
        ([0, 30521], [CLS, 0, 30521, SEP]),
    ],
)
def test_special_tokens_are_completed(
    minilm: Tokenizer, given: list[int], taken: list[int]
) -> None:
    row = minilm.accept_ids(given)
    assert row.tolist() == taken
    assert row.dtype == np.int32


@pytest.mark.parametrize(
    "given", [[], [-1], [30522], [2**70], [True], [1.0], ["7592"], [7592, None], [[7592]]]
)
def test_ids_that_are_not_the_models_are_refused(minilm: Tokenizer, given: list) -> None:
    with pytest.raises(BadInput):
        minilm.accept_ids(given)


def test_ids_made_by_encode_are_taken_as_they_are(minilm: Tokenizer) -> None:
    for row in minilm.encode(TEXTS):
        assert minilm.accept_ids(row.tolist()).tolist() == row.tolist()


# --- truncation -----------------------------------------------------------------------------


def test_truncate_drops_the_side_named_and_keeps_special_tokens(minilm: Tokenizer) -> None:
    row = np.array([CLS, 1, 2, 3, 4, 5, SEP], np.int32)
    assert minilm.truncate(row, 5).tolist() == [CLS, 1, 2, 3, SEP]
    assert minilm.truncate(row, 5, "START").tolist() == [CLS, 3, 4, 5, SEP]
    assert minilm.truncate(row, 7).tolist() == row.tolist()
    assert minilm.truncate(row, 3).dtype == np.int32


def test_truncate_refuses_when_it_may_not_or_cannot(minilm: Tokenizer) -> None:
    row = np.array([CLS, 1, 2, 3, SEP], np.int32)
    with pytest.raises(BadInput) as caught:
        minilm.truncate(row, 4, "NONE")
    assert caught.value.code == "context_length_exceeded"
    with pytest.raises(BadInput):
        minilm.truncate(row, 2)


# --- files ----------------------------------------------------------------------------------


@pytest.mark.parametrize("content", [None, "", "{}", "not json"])
def test_a_folder_without_a_usable_tokenizer_is_unavailable(tmp_path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content)
    model = MINILM.model_copy(update={"source": str(tmp_path)})
    with pytest.raises(ModelUnavailable, match=r"tokenizer\.json"):
        Tokenizer.open(model)


def test_importing_it_imports_nothing_heavy() -> None:
    program = (
        "import sys, serve.embedding.tokenizer, serve.embedding.files, serve.embedding.pool, "
        "serve.content.chunking, serve.content.documents\n"
        "print([name for name in ('torch', 'transformers', 'sentence_transformers', 'ray') "
        "if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=50
    )
    assert done.stdout.strip() == "[]"
