"""The memory of a GPU, as a pool sees it. What needs a card is marked."""

import sys
from types import SimpleNamespace

import pytest

import serve.embedding
from serve.config import Model
from serve.config import Pool as PoolSettings
from serve.embedding.fake import FakeEngine
from serve.embedding.pool import Pool
from serve.errors import ModelUnavailable


class Card:
    """In place of `serve.embedding.cuda`: 1,000 bytes."""

    def __init__(self) -> None:
        self.held = 0
        self.shares: list[float] = []
        self.given_back = 0

    def install(self, monkeypatch) -> None:
        module = SimpleNamespace(
            device_name=lambda: "a card",
            held_bytes=lambda: self.held,
            reserve=self.reserve,
            give_back=self.give_back,
            card_bytes=lambda: (400, 1000),
        )
        monkeypatch.setitem(sys.modules, "serve.embedding.cuda", module)
        monkeypatch.setattr(serve.embedding, "cuda", module, raising=False)

    def reserve(self, share: float) -> int:
        self.shares.append(share)
        return int(share * 1000)

    def give_back(self) -> None:
        self.given_back += 1


@pytest.fixture
def card(monkeypatch, tmp_path) -> Card:
    monkeypatch.chdir(tmp_path)
    found = Card()
    found.install(monkeypatch)
    return found


def pool(card: Card, clock, *sizes: int, **fields) -> Pool:
    models = [
        Model(
            id=f"{number}",
            engine="sentence_transformers",
            source="/x",
            sha256=f"{number}" * 64,
            dimensions=8,
            tokens_max=64,
        )
        for number in range(len(sizes))
    ]

    def build(model: Model, _: PoolSettings) -> FakeEngine:
        card.held += sizes[int(model.id)]
        return FakeEngine(model)

    settings = PoolSettings(models=models, **fields)
    return Pool(settings, clock=clock, builders={"sentence_transformers": build})


@pytest.fixture(autouse=True)
def _no_files(monkeypatch) -> None:
    monkeypatch.setattr("serve.embedding.pool.verify", lambda _: None)


def test_a_share_of_a_card_bounds_the_models_on_it(card, clock) -> None:
    loaded = pool(card, clock, 150, 100, gpus=0.25)
    loaded.load()
    assert card.shares == [0.25]
    assert (loaded.holdings.bytes, loaded.holdings.bytes_max) == (250, 250)
    with pytest.raises(ModelUnavailable, match=r"1 takes 101 bytes beside 150 .* has 250"):
        pool(card, clock, 150, 101, gpus=0.25).load()


def test_the_smaller_bound_holds_and_a_whole_card_has_none_of_its_own(card, clock) -> None:
    for gpus, most, wanted in ((0.5, 300, 300), (0.5, 800, 500), (1, None, None), (1, 800, 800)):
        loaded = pool(card, clock, 10, gpus=gpus, memory_bytes_max=most)
        loaded.load()
        assert loaded.holdings.bytes_max == wanted


def test_what_the_allocator_keeps_is_given_back(card, clock) -> None:
    loaded = pool(card, clock, 10, gpus=1)
    loaded.load()
    loaded.relieve()
    loaded.unload("0")
    assert card.given_back == 2


def test_a_pool_on_a_cpu_does_not_ask_for_a_card(card, clock) -> None:
    loaded = pool(card, clock, 10)
    loaded.load()
    loaded.relieve()
    assert (card.shares, card.given_back) == ([], 0)
    assert loaded.card_bytes() is None


def test_the_memory_of_the_card_is_told(card, clock) -> None:
    assert pool(card, clock, 10, gpus=1).card_bytes() == (400, 1000)


@pytest.mark.gpu
def test_a_share_is_enforced() -> None:
    import torch  # noqa: PLC0415  2 s

    from serve.embedding import cuda  # noqa: PLC0415

    most = cuda.reserve(0.05)
    before = cuda.held_bytes()
    held = torch.ones(2**20, device="cuda")
    assert cuda.held_bytes() - before == held.nbytes
    taken, total = cuda.card_bytes()
    assert held.nbytes <= taken < total
    with pytest.raises(torch.OutOfMemoryError):
        torch.ones(most, dtype=torch.uint8, device="cuda")
    cuda.give_back()
