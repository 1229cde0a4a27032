import pytest

from serve.config import Limits
from serve.content.documents import Document, validate_documents
from serve.errors import BadInput


LIMITS = Limits(
    documents_max=3, document_chars_max=20, document_id_bytes_max=8, metadata_bytes_max=64
)


def doc(**fields) -> Document:
    return Document(**{"id": "a", "text": "some text", **fields})


def fault(*documents: Document, limits: Limits = LIMITS) -> str | None:
    with pytest.raises(BadInput) as caught:
        validate_documents(documents, limits)
    return caught.value.param


def test_good_documents_pass() -> None:
    metadata = {"s": "x", "n": 1, "f": 1.5, "b": True, "tags": ["x", "y"], "none": []}
    validate_documents([doc(), doc(id="ä b/1", metadata=metadata), doc(id="c")], LIMITS)


def test_bounds_are_inclusive() -> None:
    long = doc(id="12345678", text="x" * 20, metadata={"k": "v" * 56})  # {"k":"…"} has 8 more
    validate_documents([long], LIMITS)
    assert fault(doc(id="123456789")) == "documents[0].id"
    assert fault(doc(id="äöüßé")) == "documents[0].id"  # bytes, not characters
    assert fault(doc(text="x" * 21)) == "documents[0].text"
    assert fault(doc(metadata={"k": "v" * 57})) == "documents[0].metadata"


def test_the_number_of_documents() -> None:
    assert fault() == "documents"
    assert fault(*[doc(id=str(n)) for n in range(4)]) == "documents"


def test_a_repeated_id_names_the_second() -> None:
    assert fault(doc(), doc(id="b"), doc()) == "documents[2].id"


@pytest.mark.parametrize("bad", ["", "  ", "a\nb", "a\x00", "a\x7f", "\x85a", "\ud800"])
def test_bad_ids(bad: str) -> None:
    assert fault(doc(), doc(id=bad)) == "documents[1].id"


@pytest.mark.parametrize("bad", ["", " \n\t", "x \udfff"])
def test_bad_texts(bad: str) -> None:
    assert fault(doc(text=bad)) == "documents[0].text"


@pytest.mark.parametrize(
    "bad",
    [
        None,
        float("nan"),
        float("inf"),
        10**400,
        {"deep": 1},
        [1],
        ["x", None],
        [["x"]],
        b"bytes",
        "\ud800",
    ],
)
def test_bad_metadata_values_are_named(bad: object) -> None:
    assert (
        fault(doc(), doc(id="b", metadata={"ok": 1, "year": bad})) == "documents[1].metadata.year"
    )


def test_a_bad_item_of_a_list_is_named() -> None:
    assert fault(doc(metadata={"tags": ["x", "\ud800"]})) == "documents[0].metadata.tags[1]"


@pytest.mark.parametrize("bad", ["", "x" * 257, "$eq", "a\nb", "\ud800", 1])
def test_bad_metadata_keys(bad: object) -> None:
    assert fault(doc(metadata={bad: 1}), limits=Limits()) == "documents[0].metadata"


def test_metadata_keys_are_bounded_in_number_and_length() -> None:
    validate_documents([doc(metadata={"x" * 256: 1})], Limits())
    validate_documents([doc(metadata={str(n): 1 for n in range(256)})], Limits())
    assert fault(doc(metadata={str(n): 1 for n in range(257)}), limits=Limits()) == (
        "documents[0].metadata"
    )


def test_no_metadata_fits_a_bound_of_nothing() -> None:
    validate_documents([doc()], Limits(metadata_bytes_max=0))
    assert fault(doc(metadata={"k": 1}), limits=Limits(metadata_bytes_max=0)) == (
        "documents[0].metadata"
    )
