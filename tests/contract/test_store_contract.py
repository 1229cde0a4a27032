"""What every Store promises of collections, documents and fences, written against the ports."""

import asyncio
from itertools import count
from typing import Protocol

import pytest

from serve.errors import BadInput, Conflict, Fenced, NotFound
from serve.ports import Collections, Documents, Fence, Keys
from serve.records import Collection, DocumentVersion, DocumentWrite, Key


class Store(Keys, Collections, Documents, Fence, Protocol):
    pass


_ops = count()


def op() -> str:
    return f"op-{next(_ops)}"


def collection(name: str, tenant: str = "acme", uuid: str = "") -> Collection:
    return Collection(
        uuid=uuid or f"{next(_ops):032x}",
        tenant=tenant,
        name=name,
        model="m",
        revision="r1",
        dimensions=384,
        created_at=5.25,
    )


def writes(*pairs: tuple[str, int]) -> list[DocumentWrite]:
    return [DocumentWrite(*pair) for pair in pairs]


async def made(store: Store) -> str:
    return (await store.create_collection(op(), collection(f"c{next(_ops)}"))).uuid


# Collections


async def test_a_collection_is_found_by_its_tenant_only(store: Store):
    mine = collection("docs")
    assert await store.create_collection(op(), mine) == mine
    assert await store.find_collection("acme", "docs") == mine
    assert await store.find_collection("other", "docs") is None


async def test_collections_are_listed_by_name(store: Store):
    for each in (collection("b"), collection("a"), collection("c", tenant="other")):
        await store.create_collection(op(), each)
    assert [each.name for each in await store.list_collections("acme")] == ["a", "b"]


async def test_a_live_name_is_taken_once_per_tenant(store: Store):
    first = collection("docs")
    await store.create_collection(op(), first)
    with pytest.raises(Conflict) as caught:
        await store.create_collection(op(), collection("docs"))
    assert caught.value.param == "name"
    await store.create_collection(op(), collection("docs", tenant="other"))
    assert await store.find_collection("acme", "docs") == first


async def test_a_deleted_collection_is_found_by_nobody_and_frees_its_name(store: Store):
    old, new = collection("docs"), collection("docs")
    await store.create_collection(op(), old)
    assert await store.delete_collection(op(), "other", "docs") is None
    assert await store.delete_collection(op(), "acme", "docs") == old
    assert await store.delete_collection(op(), "acme", "docs") is None
    assert await store.find_collection("acme", "docs") is None
    await store.create_collection(op(), new)
    assert await store.find_collection("acme", "docs") == new
    assert await store.deleted_collections() == [old]


async def test_a_purged_collection_is_forgotten(store: Store):
    old = collection("docs")
    await store.create_collection(op(), old)
    await store.begin_documents(op(), old.uuid, writes(("a", 1), ("b", 1)))
    await store.delete_collection(op(), "acme", "docs")
    await store.purge_collection(old.uuid)
    assert await store.deleted_collections() == []
    await store.purge_collection(old.uuid)  # a repeat is no error
    # Its documents are gone too: the same uuid would start anew.
    await store.create_collection(op(), old)
    (version,) = await store.begin_documents(op(), old.uuid, writes(("a", 1)))
    assert version.generation == 1


async def test_a_live_collection_is_not_purged(store: Store):
    uuid = await made(store)
    await store.begin_documents(op(), uuid, writes(("a", 1)))
    with pytest.raises(Conflict):
        await store.purge_collection(uuid)
    (version,) = await store.begin_documents(op(), uuid, writes(("a", 1)))
    assert version.generation == 2


# Documents


async def test_each_write_raises_its_documents_generation(store: Store):
    uuid = await made(store)
    assert await store.begin_documents(op(), uuid, writes(("a", 3), ("b", 1))) == [
        DocumentVersion("a", 1, 3, existed=False),
        DocumentVersion("b", 1, 1, existed=False),
    ]
    assert await store.begin_documents(op(), uuid, writes(("c", 2), ("a", 1))) == [
        DocumentVersion("c", 1, 2, existed=False),
        DocumentVersion("a", 2, 3, existed=True),
    ]


async def test_documents_of_two_collections_share_nothing(store: Store):
    one, two = await made(store), await made(store)
    await store.begin_documents(op(), one, writes(("a", 3)))
    assert await store.begin_documents(op(), two, writes(("a", 1))) == [
        DocumentVersion("a", 1, 1, existed=False)
    ]


async def test_settling_lowers_the_bound_on_chunks(store: Store):
    uuid = await made(store)
    await store.begin_documents(op(), uuid, writes(("a", 9), ("b", 9)))
    await store.begin_documents(op(), uuid, writes(("a", 2)))
    await store.settle_documents(uuid, [("a", 2, 2)])
    assert await store.begin_documents(op(), uuid, writes(("a", 1), ("b", 1))) == [
        DocumentVersion("a", 3, 2),
        DocumentVersion("b", 2, 9),
    ]


async def test_an_older_generation_does_not_settle(store: Store):
    uuid = await made(store)
    await store.begin_documents(op(), uuid, writes(("a", 2)))
    await store.begin_documents(op(), uuid, writes(("a", 7)))
    await store.settle_documents(uuid, [("a", 1, 2)])
    (version,) = await store.begin_documents(op(), uuid, writes(("a", 1)))
    assert version.chunks_max == 7


async def test_a_document_named_twice_is_refused_as_a_whole(store: Store):
    uuid = await made(store)
    for call in (
        store.begin_documents(op(), uuid, writes(("a", 1), ("b", 1), ("a", 2))),
        store.delete_documents(op(), uuid, ["a", "b", "a"]),
    ):
        with pytest.raises(BadInput, match="'a'") as caught:
            await call
        assert caught.value.param == "documents[2]"
    (version,) = await store.begin_documents(op(), uuid, writes(("b", 1)))
    assert version == DocumentVersion("b", 1, 1, existed=False)


async def test_a_collection_that_is_gone_takes_no_documents(store: Store):
    gone = collection("docs")
    await store.create_collection(op(), gone)
    await store.delete_collection(op(), "acme", "docs")
    for uuid in (gone.uuid, "f" * 32):
        with pytest.raises(NotFound) as caught:
            await store.begin_documents(op(), uuid, writes(("a", 1)))
        assert caught.value.param == "collection"
        with pytest.raises(NotFound):
            await store.delete_documents(op(), uuid, ["a"])
        await store.settle_documents(uuid, [("a", 1, 1)])  # nothing to settle, no error


async def test_a_delete_is_a_write_that_leaves_a_tombstone(store: Store):
    uuid = await made(store)
    await store.begin_documents(op(), uuid, writes(("a", 3)))
    assert await store.delete_documents(op(), uuid, ["new", "a"]) == [
        DocumentVersion("new", 0, 0, existed=False),
        DocumentVersion("a", 2, 3, existed=True),
    ]
    await store.settle_documents(uuid, [("a", 2, 0)])
    assert await store.begin_documents(op(), uuid, writes(("a", 1), ("new", 1))) == [
        DocumentVersion("a", 3, 1, existed=False),
        DocumentVersion("new", 1, 1, existed=False),
    ]


async def test_an_interrupted_delete_is_finished_by_repeating_it(store: Store):
    uuid = await made(store)
    await store.begin_documents(op(), uuid, writes(("a", 3)))
    await store.delete_documents(op(), uuid, ["a"])  # and never settled
    assert await store.delete_documents(op(), uuid, ["a"]) == [
        DocumentVersion("a", 3, 3, existed=False)
    ]


async def test_an_interrupted_delete_is_cleaned_up_by_the_next_write(store: Store):
    uuid = await made(store)
    await store.begin_documents(op(), uuid, writes(("a", 3)))
    await store.delete_documents(op(), uuid, ["a"])
    assert await store.begin_documents(op(), uuid, writes(("a", 1))) == [
        DocumentVersion("a", 3, 3, existed=False)
    ]


async def test_thousands_of_documents_in_one_call(store: Store):
    uuid = await made(store)
    names = [f"document-{n}" for n in range(2500)]
    for generation in (1, 2):
        begun = await store.begin_documents(op(), uuid, writes(*((name, 2) for name in names)))
        assert [version.document for version in begun] == names
        assert {version.generation for version in begun} == {generation}
    await store.settle_documents(uuid, [(name, 2, 1) for name in names])
    gone = await store.delete_documents(op(), uuid, names)
    assert {(version.generation, version.chunks_max) for version in gone} == {(3, 1)}
    epoch = await store.take_epoch("w", 1)
    assert await store.superseded("w", epoch, uuid, dict.fromkeys(names, 2)) == set(names)


async def test_names_are_data(store: Store):
    uuid = await made(store)
    odd = ["", "'; DROP TABLE documents; --", "%", "ä", "Ä", "日本語", "a\nb", "A", "a"]
    await store.begin_documents(op(), uuid, writes(*((name, 1) for name in odd)))
    versions = await store.delete_documents(op(), uuid, odd)
    assert [(each.document, each.generation) for each in versions] == [(name, 2) for name in odd]


# Fence


async def test_each_taker_gets_the_next_epoch(store: Store):
    assert [await store.take_epoch("w", seq) for seq in (1, 1, 7)] == [1, 2, 3]
    assert await store.take_epoch("other", 1) == 1


async def test_an_earlier_deployment_takes_no_epoch(store: Store):
    await store.take_epoch("w", 7)
    with pytest.raises(Fenced):
        await store.take_epoch("w", 6)
    assert await store.take_epoch("w", 7) == 2


async def test_only_the_latest_epoch_may_ask_what_is_superseded(store: Store):
    uuid = await made(store)
    first = await store.take_epoch("w", 1)
    assert await store.superseded("w", first, uuid, {}) == frozenset()
    second = await store.take_epoch("w", 1)
    for name, epoch in (("w", first), ("w", second + 1), ("unknown", first)):
        with pytest.raises(Fenced):
            await store.superseded(name, epoch, uuid, {"a": 1})
    assert await store.superseded("w", second, uuid, {"a": 1}) == frozenset()


async def test_superseded_are_those_with_a_newer_generation(store: Store):
    uuid = await made(store)
    epoch = await store.take_epoch("w", 1)
    await store.begin_documents(op(), uuid, writes(("written", 1), ("same", 1), ("deleted", 1)))
    await store.begin_documents(op(), uuid, writes(("written", 1)))
    await store.delete_documents(op(), uuid, ["deleted"])
    asked = {"written": 1, "same": 1, "deleted": 1, "unknown": 1}
    assert await store.superseded("w", epoch, uuid, asked) == {"written", "deleted"}


async def test_more_documents_than_a_statement_takes_values(store: Store):
    uuid = await made(store)
    epoch = await store.take_epoch("w", 1)
    await store.begin_documents(op(), uuid, writes(("n39999", 1), ("n0", 1)))
    asked = {f"n{n}": 0 for n in range(40_000)}  # SQLite takes 32,766, Postgres 65,535
    assert await store.superseded("w", epoch, uuid, asked) == {"n0", "n39999"}


async def test_everything_is_superseded_when_the_collection_is_gone(store: Store):
    gone = collection("docs")
    epoch = await store.take_epoch("w", 1)
    await store.create_collection(op(), gone)
    await store.begin_documents(op(), gone.uuid, writes(("a", 1)))
    await store.delete_collection(op(), "acme", "docs")
    asked = {"a": 1, "b": 9}
    assert await store.superseded("w", epoch, gone.uuid, asked) == {"a", "b"}
    await store.purge_collection(gone.uuid)
    assert await store.superseded("w", epoch, gone.uuid, asked) == {"a", "b"}


# Operations


async def test_a_repeated_operation_returns_the_first_result(store: Store):
    docs = collection("docs")
    repeated = op()
    for _ in range(2):
        await store.create_key(repeated, Key("k1", "acme", "free", "ab" * 32, 5.25))
    repeated = op()
    for _ in range(2):
        assert await store.create_collection(repeated, docs) == docs
    repeated = op()
    begun = [DocumentVersion("a", 1, 2, existed=False), DocumentVersion("b", 1, 1, existed=False)]
    for _ in range(2):
        assert await store.begin_documents(repeated, docs.uuid, writes(("a", 2), ("b", 1))) == begun
    repeated = op()
    for _ in range(2):
        assert await store.delete_documents(repeated, docs.uuid, ["a"]) == [
            DocumentVersion("a", 2, 2)
        ]
    repeated = op()
    for _ in range(2):
        assert await store.delete_collection(repeated, "acme", "docs") == docs
    repeated = op()
    for _ in range(2):
        assert await store.delete_collection(repeated, "acme", "docs") is None


async def test_concurrent_repeats_act_once(store: Store):
    uuid = await made(store)
    repeated = op()
    results = await asyncio.gather(
        *(store.begin_documents(repeated, uuid, writes(("a", 2))) for _ in range(50))
    )
    assert results == [[DocumentVersion("a", 1, 2, existed=False)]] * 50
    (version,) = await store.begin_documents(op(), uuid, writes(("a", 1)))
    assert version.generation == 2


async def test_an_operation_belongs_to_one_method(store: Store):
    uuid = await made(store)
    used = op()
    await store.begin_documents(used, uuid, writes(("a", 1)))
    with pytest.raises(Conflict) as caught:
        await store.delete_documents(used, uuid, ["a"])
    assert caught.value.param == "op"
    (version,) = await store.begin_documents(op(), uuid, writes(("a", 1)))
    assert version == DocumentVersion("a", 2, 1)


async def test_a_failed_operation_may_be_tried_again(store: Store):
    docs = collection("docs")
    repeated = op()
    with pytest.raises(NotFound):
        await store.begin_documents(repeated, docs.uuid, writes(("a", 1)))
    await store.create_collection(op(), docs)
    (version,) = await store.begin_documents(repeated, docs.uuid, writes(("a", 1)))
    assert version.generation == 1


async def test_concurrent_writes_of_one_document_get_different_generations(store: Store):
    uuid = await made(store)
    results = await asyncio.gather(
        *(store.begin_documents(op(), uuid, writes(("a", n + 1))) for n in range(40))
    )
    assert sorted(version.generation for (version,) in results) == list(range(1, 41))
    assert max(version.chunks_max for (version,) in results) == 40
