"""Raw vectors: what is refused before anything is written, and what becomes of the rest."""

import base64
from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from serve.config import Index, Limits
from serve.content.vectors import SentVector, checked, decoded, in_base64
from serve.errors import BadInput, IndexUnavailable, Overloaded
from serve.flows.raw_receipts import RawReceipt
from serve.flows.vectors import VectorFlow, _checked
from serve.index.memory import MemoryIndex
from serve.index.probes import Probes
from serve.pressure import Pressure, Sender
from serve.records import Caller, Collection, Outcome, Record


COLLECTION = Collection("0" * 32, "acme", "books", "plain", "r", 2, 0.0)
CALLER = Caller("acme", "premium", 4.0, "k")
LIMITS = Limits(vectors_max=5, vector_text_chars_max=4, document_id_bytes_max=8)


def sent(**fields) -> SentVector:
    return SentVector(**{"id": "a", "vector": [1.0, 2.0], **fields})


def fault(**fields) -> str | None:
    with pytest.raises(BadInput) as caught:
        checked(sent(**fields), "vectors[3]", LIMITS)
    return caught.value.param


def in_bytes(*values: float, kind: str = "<f4") -> str:
    return base64.b64encode(np.array(values, kind).tobytes()).decode()


def test_numbers_and_base64_are_the_same_row():
    for value in ([1, -2.5, 1e-3], in_bytes(1, -2.5, 1e-3)):
        row = decoded(value, "v")
        assert row.dtype == np.float32
        assert row.tolist() == np.array([1, -2.5, 1e-3], np.float32).tolist()
    assert decoded(in_bytes(1.0, kind=">f4"), "v").tolist() != [1.0]  # little-endian


def test_what_is_written_in_base64_is_read_again():
    for kind in (np.float32, ">f4"):
        row = np.array([1, -2.5, 3e38], kind)
        assert decoded(in_base64(row), "v").tolist() == row.tolist()


def test_what_is_no_vector_is_named():
    for value, param in (
        (None, "vectors[3].vector"),
        ([], "vectors[3].vector"),
        ("", "vectors[3].vector"),
        (1.0, "vectors[3].vector"),
        ({"0": 1}, "vectors[3].vector"),
        ([1.0, True], "vectors[3].vector[1]"),
        ([1.0, "2"], "vectors[3].vector[1]"),
        ([1.0, None], "vectors[3].vector[1]"),
        ([[1.0, 2.0]], "vectors[3].vector[0]"),
        ([10**400, 1], "vectors[3].vector"),
        ("not base64!", "vectors[3].vector"),
        ("\u00e9", "vectors[3].vector"),
        (base64.b64encode(b"12345").decode(), "vectors[3].vector"),
    ):
        assert fault(vector=value) == param, value


def test_ids_texts_and_metadata_keep_the_rules_of_documents():
    assert fault(id="") == "vectors[3].id"
    assert fault(id="123456789") == "vectors[3].id"
    assert fault(id="a\nb") == "vectors[3].id"
    assert fault(text="12345") == "vectors[3].text"
    assert fault(text="\ud800") == "vectors[3].text"
    assert fault(metadata={"year": None}) == "vectors[3].metadata.year"
    assert fault(metadata={"year": float("inf")}) == "vectors[3].metadata.year"
    good = checked(sent(id="12345678", text="1234", metadata={"tags": ["x"]}), "v", LIMITS)
    assert (good.id, good.text, good.metadata) == ("12345678", "1234", {"tags": ["x"]})


def test_what_does_not_fit_the_collection_leaves_the_others_alone():
    beyond = 1e300  # finite as JSON has it, and not as the index does
    rows = [[1.0, 2.0], [1.0], [1.0, 2.0, 3.0], [0.0, 0.0], [beyond, 1.0], in_bytes(np.nan, 1)]
    many = [sent(id=str(at), vector=row) for at, row in enumerate(rows)]
    found = _checked([*many, sent(id="0"), BadInput("No.", param="x")], COLLECTION, LIMITS)
    params = {at: one.param for at, one in found.items() if isinstance(one, BadInput)}
    assert params == {
        **{at: f"vectors[{at}].vector" for at in range(1, 6)},
        6: "vectors[6].id",
        7: "x",
    }


class Answers:
    """Stands for the Store, the writer and the collections of a flow."""

    def __init__(self, *parts: Sequence[str] | Exception, taken: Sequence[str] = ()) -> None:
        self.parts = list(parts)
        self.taken = taken
        self.grants: list[Sequence[str]] = []
        self.offers: list[Sequence[Record]] = []
        self.presses = Pressure()

    async def find(self, *_) -> Collection:
        return COLLECTION

    async def grant_vectors(self, _: str, names: Sequence[str], sent: Sequence[None]) -> list[int]:
        assert list(sent) == [None] * len(names)
        self.grants.append(names)
        return [0 if name in self.taken else 7 for name in names]

    async def pressure(self) -> Pressure:
        return self.presses

    async def offer(
        self, sender: Sender, _: str, records: Sequence[Record], deadline_s: float
    ) -> list[Outcome]:
        assert deadline_s > 0
        assert sender == Sender("acme", 4.0)
        self.offers.append(records)
        words = self.parts.pop(0)
        if isinstance(words, Exception):
            raise words
        return [Outcome(word, "No.") for word in words]


class Admits:
    def admitted(self, *_, **__):
        return self

    async def __aenter__(self):
        return None

    async def __aexit__(self, *_):
        return None


def flow(answers: Answers, clock) -> VectorFlow:
    settings = SimpleNamespace(limits=LIMITS, index=SimpleNamespace(max_items=2))
    context = SimpleNamespace(
        settings=settings, quotas=Admits(), threads=None, clock=clock, wall=clock
    )
    probes = Probes(MemoryIndex(Index()), 1)
    return VectorFlow(
        context,
        answers,
        answers,
        upserter=answers,
        index=None,
        ingest=None,
        probes=probes,
    )


async def write(answers: Answers, clock, count: int = 4):
    many = [sent(id=f"v{at}") for at in range(count)]
    return (await flow(answers, clock).write(CALLER, "books", many)).results


async def test_each_has_its_own_outcome_and_the_store_is_asked_once(clock):
    answers = Answers(["landed", "superseded"], ["rejected"], taken=["v1"])
    results = await write(answers, clock)
    assert [one.status for one in results] == ["indexed", "failed", "superseded", "failed"]
    assert [one.generation for one in results] == [7, 0, 7, 0]
    assert (results[1].error.code, results[1].error.param) == ("id_of_document", "vectors[1].id")
    assert results[3].error.param == "vectors[3]"
    assert len(answers.grants) == 1
    assert [[record.document for record in part] for part in answers.offers] == [
        ["v0", "v2"],
        ["v3"],
    ]


async def test_a_fault_before_any_landed_is_the_answer(clock):
    for parts in ([Overloaded("Full.")], [["released", "released"]]):
        with pytest.raises((Overloaded, IndexUnavailable)):
            await write(Answers(*parts), clock)


async def test_a_fault_after_some_landed_befalls_the_rest_only(clock):
    for rest in (Overloaded("Full."), ["released", "released"]):
        results = await write(Answers(["landed", "released"], rest), clock)
        assert [one.status for one in results] == ["indexed", *["failed"] * 3]
        assert all(one.error.retryable for one in results[1:])


async def test_nothing_is_asked_for_what_is_all_refused(clock):
    answers = Answers()
    written = await flow(answers, clock).write(CALLER, "books", [BadInput("No.")])
    (result,) = written.results
    assert written.receipt is None
    assert result.status == "failed"
    assert not answers.grants


async def test_the_number_of_vectors_is_bounded(clock):
    for count in (0, 6):
        with pytest.raises(BadInput) as caught:
            await write(Answers(), clock, count)
        assert caught.value.param == "vectors"


@pytest.mark.parametrize(
    ("presses", "error", "wait_s"),
    [
        (Pressure(4.0, paused=True), IndexUnavailable, 4.0),
        (Pressure(3.0), Overloaded, 3.0),
        (Pressure(tenants={"acme": 2.0}), Overloaded, 2.0),
    ],
)
async def test_what_could_not_land_takes_no_generation(clock, presses, error, wait_s):
    answers = Answers()
    answers.presses = presses
    with pytest.raises(error) as caught:
        await write(answers, clock)
    assert caught.value.retry_after_s == wait_s
    assert not answers.grants
    answers.presses = Pressure(tenants={"other": 2.0})
    answers.parts = [["landed"] * 2] * 2
    assert {one.status for one in await write(answers, clock)} == {"indexed"}


async def test_the_receipt_counts_what_landed_and_holds_the_last_token(clock):
    class Later(Answers):
        async def offer(
            self, sender: Sender, ns: str, records: Sequence[Record], deadline_s: float
        ):
            outcomes = await super().offer(sender, ns, records, deadline_s)
            token = 10 - len(self.offers)
            return [replace(one, token=token) for one in outcomes]

    answers = Later(["landed", "landed"], ["rejected", "landed"])
    many = [sent(id=f"v{at}") for at in range(4)]
    written = await flow(answers, clock).write(CALLER, "books", many)
    at_ms = int(clock() * 1e3)
    assert written.receipt == RawReceipt(COLLECTION.uuid, at_ms, 4, 1, 9)
    assert written.level == "indexed"
