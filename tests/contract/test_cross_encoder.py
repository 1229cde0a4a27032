"""The cross-encoder over torch, on a tiny model of random weights that the test makes."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from sentence_transformers import CrossEncoder
from tokenizers import Tokenizer as Inner
from tokenizers import models, normalizers, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from serve.config import Model
from serve.config import Pool as PoolSettings
from serve.embedding.cross_encoder import CrossEncoderEngine, sides
from serve.embedding.files import WEIGHTS
from serve.embedding.guard import checked
from serve.embedding.pool import Pool
from serve.embedding.tokenizer import Tokenizer
from serve.errors import BadInput, ModelUnavailable
from serve.records import Input


WORDS = "what does a pump valve do in the tide at noon and why is it loud or rare"
SPECIALS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")
TOKENS_MAX = 48
QUERY = "what does a pump do"
TEXTS = [
    "a pump",
    "the tide at noon is loud",
    "why",
    "",
    "a valve in a pump and a pump in the tide or at noon and why it is rare",
]


def save_tokenizer(folder: Path, pair: str) -> None:
    vocab = {word: at for at, word in enumerate((*SPECIALS, *WORDS.split()))}
    inner = Inner(models.WordLevel(vocab, unk_token="[UNK]"))  # noqa: S106
    inner.normalizer = normalizers.Lowercase()
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair=pair,
        special_tokens=[(word, vocab[word]) for word in ("[CLS]", "[SEP]")],
    )
    PreTrainedTokenizerFast(
        tokenizer_object=inner,
        model_max_length=TOKENS_MAX,
        pad_token="[PAD]",  # noqa: S106
        unk_token="[UNK]",  # noqa: S106
        cls_token="[CLS]",  # noqa: S106
        sep_token="[SEP]",  # noqa: S106
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    ).save_pretrained(folder)


def shape(**changes: object) -> dict[str, object]:
    return {
        "vocab_size": len(SPECIALS) + len(WORDS.split()),
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "max_position_embeddings": TOKENS_MAX + 4,
        "num_labels": 1,
        "initializer_range": 0.6,  # else all scores are alike
        **changes,
    }


def bert(folder: Path, **changes: object) -> Path:
    torch.manual_seed(7)
    BertForSequenceClassification(BertConfig(**shape(**changes))).save_pretrained(folder)
    save_tokenizer(folder, "[CLS] $A [SEP] $B:1 [SEP]:1")
    return folder


def roberta(folder: Path) -> Path:
    torch.manual_seed(7)
    config = RobertaConfig(**shape(type_vocab_size=1, pad_token_id=0))
    RobertaForSequenceClassification(config).save_pretrained(folder)
    save_tokenizer(folder, "[CLS] $A [SEP] [SEP] $B [SEP]")
    return folder


def model_of(folder: Path, **changes: object) -> Model:
    values = {
        "id": "cross",
        "kind": "reranker",
        "engine": "sentence_transformers",
        "source": str(folder),
        "sha256": "0" * 64,
        "dimensions": 1,
        "tokens_max": TOKENS_MAX,
    }
    return Model(**{**values, **changes})


def made(folder: Path) -> CrossEncoderEngine:
    return CrossEncoderEngine(model_of(folder), folder, device="cpu", threads=1)


@pytest.fixture(scope="module", params=[bert, roberta], ids=["bert", "roberta"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return request.param(tmp_path_factory.mktemp("cross"))


@pytest.fixture(scope="module")
def engine(folder: Path) -> Iterator[CrossEncoderEngine]:
    found = made(folder)
    yield found
    found.close()


def pairs(folder: Path, query: str = QUERY, texts: list[str] = TEXTS) -> list[Input]:
    tokenizer = Tokenizer.open(model_of(folder))
    return [Input(ids=row) for row in tokenizer.encode_pairs(query, texts)]


def predicted(folder: Path, query: str, texts: list[str]) -> np.ndarray:
    original = CrossEncoder(str(folder), device="cpu", local_files_only=True)
    sigmoid = torch.nn.Sigmoid()
    return original.predict([(query, text) for text in texts], activation_fn=sigmoid)


def test_scores_are_those_of_predict(folder: Path, engine: CrossEncoderEngine) -> None:
    scores, bad = checked(engine, pairs(folder))
    assert not bad
    assert (scores.dtype, scores.shape) == (np.float32, (len(TEXTS), 1))
    np.testing.assert_allclose(scores[:, 0], predicted(folder, QUERY, TEXTS), atol=1e-5)
    assert scores.max() - scores.min() > 0.05  # else nothing would be compared


def test_a_pair_alone_scores_as_in_company(folder: Path, engine: CrossEncoderEngine) -> None:
    together = engine.forward(pairs(folder))
    for row, one in enumerate(pairs(folder)):
        np.testing.assert_allclose(engine.forward([one])[0], together[row], atol=1e-5)
    assert engine.forward([]).shape == (0, 1)


def test_which_side_is_which_matters(folder: Path, engine: CrossEncoderEngine) -> None:
    turned = engine.forward(pairs(folder, TEXTS[1], [QUERY]))[0, 0]
    straight = engine.forward(pairs(folder, QUERY, [TEXTS[1]]))[0, 0]
    assert abs(turned - straight) > 1e-4


def test_a_pair_that_was_cut_scores_as_one_that_was_as_short(
    folder: Path, engine: CrossEncoderEngine
) -> None:
    tokenizer = Tokenizer.open(model_of(folder))
    [long] = tokenizer.encode_pairs(QUERY, ["pump " * 100])
    [bare] = tokenizer.encode_pairs(QUERY, [""])
    cut = tokenizer.cut_pair(long, TOKENS_MAX)
    assert len(cut) == TOKENS_MAX
    room = TOKENS_MAX - len(bare)
    [short] = tokenizer.encode_pairs(QUERY, ["pump " * room])
    assert cut.tolist() == short.tolist()
    assert tokenizer.cut_pair(short, TOKENS_MAX) is short
    [score] = engine.forward([Input(ids=cut)])[:, 0]
    np.testing.assert_allclose(score, predicted(folder, QUERY, ["pump " * room])[0], atol=1e-5)
    with pytest.raises(BadInput, match="takes 1 to 48"):
        engine.forward([Input(ids=long)])


def test_ids_beyond_the_table_are_refused(engine: CrossEncoderEngine) -> None:
    with pytest.raises(BadInput, match="token ids below"):
        engine.forward([Input(ids=np.array([2, 999, 3], np.int32))])


def test_the_text_is_what_stands_behind_the_first_separator() -> None:
    ids = np.array([[2, 5, 3, 6, 3, 0], [2, 5, 7, 8, 6, 3], [2, 3, 3, 0, 0, 0]])
    mask = (ids > 0).astype(np.int64)
    assert sides(ids, mask, 3).tolist() == [
        [0, 0, 0, 1, 1, 0],
        [0, 0, 0, 0, 0, 0],
        [0, 0, 1, 0, 0, 0],
    ]


def test_activations_in_the_files_are_not_asked(tmp_path: Path) -> None:
    folder = bert(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    config["sentence_transformers"] = {"activation_fn": "torch.nn.modules.linear.Identity"}
    (folder / "config.json").write_text(json.dumps(config))
    original = CrossEncoder(str(folder), device="cpu", local_files_only=True)
    logits = original.predict([(QUERY, text) for text in TEXTS])
    scores = made(folder).forward(pairs(folder))[:, 0]
    np.testing.assert_allclose(scores, 1 / (1 + np.exp(-logits)), atol=1e-5)


def test_a_pool_loads_it_as_any_model(tmp_path: Path, clock) -> None:
    import hashlib  # noqa: PLC0415

    folder = bert(tmp_path / "cross")
    digest = hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest()
    settings = PoolSettings(
        models=(model_of(folder, sha256=digest),), profiles=str(tmp_path / "profiles")
    )
    pool = Pool(settings, clock=clock)
    pool.load()
    assert pool.slots == 1
    pool.probe("cross")
    scores = pool.engine("cross").forward(pairs(folder))
    np.testing.assert_allclose(scores[:, 0], predicted(folder, QUERY, TEXTS), atol=1e-5)
    pool.close()


@pytest.mark.parametrize("labels", [2, 3])
def test_a_model_of_several_labels_is_refused(tmp_path: Path, labels: int) -> None:
    with pytest.raises(ModelUnavailable, match="one label"):
        made(bert(tmp_path, num_labels=labels))


def test_a_model_that_reads_less_than_the_settings_say_is_refused(tmp_path: Path) -> None:
    folder = bert(tmp_path)
    with pytest.raises(ModelUnavailable, match="reads 48 tokens"):
        CrossEncoderEngine(model_of(folder, tokens_max=64), folder, device="cpu", threads=1)


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelUnavailable, match="loading failed"):
        made(tmp_path)


def test_a_model_without_a_head_is_not_served_with_a_random_one(tmp_path: Path) -> None:
    BertModel(BertConfig(**shape())).save_pretrained(tmp_path)
    save_tokenizer(tmp_path, "[CLS] $A [SEP] $B:1 [SEP]:1")
    with pytest.raises(ModelUnavailable, match="lacks classifier"):
        made(tmp_path)
