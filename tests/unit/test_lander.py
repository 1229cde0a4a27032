"""Landing writes of items: what the index says of each record, as the fate of its item."""

from collections.abc import Sequence

import numpy as np
import pytest

from serve.config import Index, Settings
from serve.errors import IndexUnavailable, Internal
from serve.flows.lander import Lander, Landing
from serve.flows.landing import chunk_id
from serve.freshness import UNPROVED
from serve.items import Item
from serve.pressure import Sender
from serve.records import Collection, Outcome, Record, Tombstone, Write


COLLECTION = Collection("0" * 32, "acme", "books", "plain", "r", 2, 0.0)
ME = Sender("acme", 4.0)


class Answers:
    """Answers each record by its id, all others have landed."""

    def __init__(self, **words: str) -> None:
        self.words = words
        self.offers: list[Sequence[Write]] = []
        self.tokens: dict[type[Write], int | None] = {}

    async def offer(
        self, sender: Sender, _ns: str, writes: Sequence[Write], _deadline_s: float
    ) -> list[Outcome]:
        assert sender is ME
        self.offers.append(writes)
        tokens = self.tokens.get(type(writes[0]))
        words = (self.words.get(one.document, "landed") for one in writes)
        return [Outcome(word, "No.", tokens) for word in words]


def landing(number: int, *, chunks: int = 1, before: int = 0) -> Landing:
    name = f"d{number}"
    item = Item(number, 1, "job", number, name, "document", "embed", 1.0, 0, {}, "", 5, before)
    made = [
        Record(
            id=chunk_id(COLLECTION, name, ordinal),
            document=name,
            generation=5,
            ordinal=ordinal,
            vector=np.zeros(2, np.float32),
            text="x",
            start=0,
            end=1,
            metadata={},
        )
        for ordinal in range(chunks)
    ]
    return Landing(item, made)


def lander(index: Answers, items_max: int = 3) -> Lander:
    return Lander(index, Settings(index=Index(max_items=items_max)))


async def test_each_item_has_its_own_fate():
    index = Answers(d2="superseded", d3="rejected")
    landfall = await lander(index).land(ME, COLLECTION, [landing(n, chunks=2) for n in range(1, 5)])
    fates = landfall.fates
    assert {item: error and error.code for item, error in fates.items()} == {
        2: None,
        3: "invalid_request",
    }
    assert [len(writes) for writes in index.offers] == [3, 3, 2]


async def test_what_came_back_untried_is_a_fault_of_the_index_and_not_of_the_items():
    index = Answers(d2="released")
    with pytest.raises(IndexUnavailable) as raised:
        await lander(index).land(ME, COLLECTION, [landing(1, before=3), landing(2)])
    assert raised.value.retryable
    assert [len(writes) for writes in index.offers] == [2]  # no chunk is removed before all landed


async def test_chunks_that_earlier_versions_had_more_are_removed_after_the_new_ones_landed():
    index = Answers(d2="superseded")
    await lander(index).land(ME, COLLECTION, [landing(1, chunks=1, before=3), landing(2, before=3)])
    last = index.offers[-1]
    assert last == [Tombstone(chunk_id(COLLECTION, "d1", n), "d1", 5) for n in (1, 2)]


@pytest.mark.parametrize(
    ("word", "error"), [("released", IndexUnavailable), ("rejected", Internal)]
)
async def test_a_delete_that_was_not_done_is_raised(word: str, error: type[Exception]):
    with pytest.raises(error):
        await lander(Answers(d1=word)).land(ME, COLLECTION, [landing(1, chunks=0, before=2)])


async def test_the_token_is_that_of_the_last_write_of_any_kind():
    index = Answers()
    made = [landing(1, before=3)]
    assert (await lander(index).land(ME, COLLECTION, made)).token is None
    index.tokens = {Record: 7}
    assert (await lander(index).land(ME, COLLECTION, made)).token == 7
    index.tokens = {Record: 7, Tombstone: UNPROVED}
    assert (await lander(index).land(ME, COLLECTION, made)).token == UNPROVED
