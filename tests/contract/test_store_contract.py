"""What every Store promises of collections, documents and fences, written against the ports."""

import asyncio
from collections.abc import Iterable
from itertools import count
from typing import Protocol

import pytest

from serve.errors import BadInput, Conflict, Fenced, NotFound
from serve.items import Item, Job, NewItem, Settlement, Task, new_id
from serve.job_ports import Jobs, Queue
from serve.ports import Collections, Fence, Keys
from serve.records import Collection, Key


class Store(Keys, Collections, Jobs, Queue, Fence, Protocol):
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


def job(uuid: str) -> Job:
    return Job(new_id("job", 5.25), "acme", "k", "documents", "bulk", 1.0, 5.25, collection=uuid)


def units(*names: str, task: Task = "document") -> list[NewItem]:
    """Items that are ready for the stage that lands them."""
    return [NewItem(name, task, "embed", 1.0, {}) for name in names]


async def accept(store: Store, uuid: str, *names: str, task: Task = "document") -> dict[str, int]:
    """Accept a write, or a delete, of each document; generations by name."""
    made = job(uuid)
    await store.submit_job(op(), made, units(*names, task=task))
    views = await store.list_items("acme", made.id, (), -1, len(names))
    return {view.name: view.generation for view in views}


async def claimed(store: Store) -> dict[tuple[str, int], Item]:
    """All that waits, by name and generation."""
    found = (await store.claim("w", "embed", 500, 1e9, 0.0)).items
    return {(item.name, item.generation): item for item in found}


async def begin_to_land(store: Store, items: Iterable[Item], chunks: int) -> None:
    """They are about to put so many chunks into the index."""
    told = [Settlement(one.id, one.lease, "advance", chunks=chunks) for one in items]
    assert all(await store.settle(told))


async def land(store: Store, items: Iterable[Item], chunks: int) -> None:
    told = [Settlement(one.id, one.lease, "done", chunks=chunks) for one in items]
    assert all(await store.settle(told))


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
    await accept(store, old.uuid, "a", "b")
    await store.delete_collection(op(), "acme", "docs")
    await store.purge_collection(old.uuid)
    assert await store.deleted_collections() == []
    await store.purge_collection(old.uuid)  # a repeat is no error
    # Its documents are gone too: the same uuid would start anew.
    await store.create_collection(op(), old)
    assert await accept(store, old.uuid, "a") == {"a": 1}


async def test_a_live_collection_is_not_purged(store: Store):
    uuid = await made(store)
    await accept(store, uuid, "a")
    with pytest.raises(Conflict):
        await store.purge_collection(uuid)
    assert await accept(store, uuid, "a") == {"a": 2}


# Documents


async def test_each_write_raises_its_documents_generation(store: Store):
    uuid = await made(store)
    assert await accept(store, uuid, "a", "b") == {"a": 1, "b": 1}
    assert await accept(store, uuid, "c", "a") == {"c": 1, "a": 2}


async def test_documents_of_two_collections_share_nothing(store: Store):
    one, two = await made(store), await made(store)
    await accept(store, one, "a")
    assert await accept(store, two, "a") == {"a": 1}


async def test_a_worker_is_told_what_may_lie_in_the_index(store: Store):
    uuid = await made(store)
    await accept(store, uuid, "a", "b")
    await begin_to_land(store, (await claimed(store)).values(), 9)
    held = await claimed(store)
    assert [item.chunks_max for item in held.values()] == [9, 9]
    await land(store, [held["a", 1]], 2)  # and the other one never lands
    await accept(store, uuid, "a", "b")
    await begin_to_land(store, (await claimed(store)).values(), 3)
    held = await claimed(store)
    assert held["a", 2].chunks_max == 3
    assert held["b", 2].chunks_max == 9


async def test_an_older_write_that_lands_late_settles_nothing(store: Store):
    uuid = await made(store)
    await accept(store, uuid, "a")
    old = (await claimed(store))["a", 1]
    await accept(store, uuid, "a")
    new = (await claimed(store))["a", 2]
    await begin_to_land(store, [new], 7)
    assert not old.superseded
    await land(store, [old], 2)
    assert (await claimed(store))["a", 2].chunks_max == 7


async def test_a_document_named_twice_is_refused_as_a_whole(store: Store):
    uuid = await made(store)
    for task in ("document", "delete"):
        with pytest.raises(BadInput, match="'a'") as caught:
            await accept(store, uuid, "a", "b", "a", task=task)
        assert caught.value.param == "documents[2]"
    assert await accept(store, uuid, "b") == {"b": 1}
    assert len(await store.list_jobs("acme", None, (), "", 10)) == 1


async def test_a_collection_that_is_gone_takes_no_documents(store: Store):
    gone = collection("docs")
    await store.create_collection(op(), gone)
    await accept(store, gone.uuid, "a")
    held = await claimed(store)
    await store.delete_collection(op(), "acme", "docs")
    for uuid in (gone.uuid, "f" * 32):
        for task in ("document", "delete"):
            with pytest.raises(NotFound) as caught:
                await accept(store, uuid, "a", task=task)
            assert caught.value.param == "collection"
    await land(store, held.values(), 1)  # nobody will know, no error


async def test_a_delete_is_a_write_that_leaves_a_tombstone(store: Store):
    uuid = await made(store)
    await accept(store, uuid, "a")
    await begin_to_land(store, (await claimed(store)).values(), 3)
    await land(store, (await claimed(store)).values(), 3)
    assert await accept(store, uuid, "new", "a", task="delete") == {"new": 0, "a": 2}
    held = await claimed(store)  # of the one that never was nothing is to be done
    assert [(item.chunks_max, item.payload) for item in held.values()] == [(3, {"existed": True})]
    await land(store, held.values(), 0)
    assert await accept(store, uuid, "a", "new") == {"a": 3, "new": 1}
    assert {item.chunks_max for item in (await claimed(store)).values()} == {0}


async def test_an_interrupted_delete_is_finished_by_what_comes_next(store: Store):
    uuid = await made(store)
    await accept(store, uuid, "a", "b")
    await begin_to_land(store, (await claimed(store)).values(), 3)
    await land(store, (await claimed(store)).values(), 3)
    await accept(store, uuid, "a", "b", task="delete")
    await claimed(store)  # and it was never done
    await accept(store, uuid, "a", task="delete")
    await accept(store, uuid, "b")
    held = await claimed(store)
    assert held["a", 3].payload == {"existed": False}
    assert {item.chunks_max for item in held.values()} == {3}


async def test_thousands_of_documents_in_one_call(store: Store):
    uuid = await made(store)
    names = [f"document-{n}" for n in range(2500)]
    for generation in (1, 2):
        assert await accept(store, uuid, *names) == dict.fromkeys(names, generation)
    assert await accept(store, uuid, *names, task="delete") == dict.fromkeys(names, 3)
    epoch = await store.take_epoch("w", 1)
    assert await store.superseded("w", epoch, uuid, dict.fromkeys(names, 2)) == set(names)


async def test_names_are_data(store: Store):
    uuid = await made(store)
    odd = ["", "'; DROP TABLE documents; --", "%", "ä", "Ä", "日本語", "a\nb", "A", "a"]
    await accept(store, uuid, *odd)
    assert await accept(store, uuid, *odd, task="delete") == dict.fromkeys(odd, 2)


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
    await accept(store, uuid, "written", "same", "deleted")
    await accept(store, uuid, "written")
    await accept(store, uuid, "deleted", task="delete")
    asked = {"written": 1, "same": 1, "deleted": 1, "unknown": 1}
    assert await store.superseded("w", epoch, uuid, asked) == {"written", "deleted"}


async def test_more_documents_than_a_statement_takes_values(store: Store):
    uuid = await made(store)
    epoch = await store.take_epoch("w", 1)
    await accept(store, uuid, "n39999", "n0")
    asked = {f"n{n}": 0 for n in range(40_000)}  # SQLite takes 32,766, Postgres 65,535
    assert await store.superseded("w", epoch, uuid, asked) == {"n0", "n39999"}


async def test_everything_is_superseded_when_the_collection_is_gone(store: Store):
    gone = collection("docs")
    epoch = await store.take_epoch("w", 1)
    await store.create_collection(op(), gone)
    await accept(store, gone.uuid, "a")
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
    repeated, handed = op(), job(docs.uuid)
    for _ in range(2):
        accepted = await store.submit_job(repeated, handed, units("a", "b"))
        assert (accepted.job.id, accepted.job.total) == (handed.id, 2)
    assert await accept(store, docs.uuid, "a") == {"a": 2}
    repeated = op()
    for _ in range(2):
        assert await store.delete_collection(repeated, "acme", "docs") == docs
    repeated = op()
    for _ in range(2):
        assert await store.delete_collection(repeated, "acme", "docs") is None


async def test_concurrent_repeats_act_once(store: Store):
    uuid = await made(store)
    repeated, handed = op(), job(uuid)
    results = await asyncio.gather(
        *(store.submit_job(repeated, handed, units("a")) for _ in range(50))
    )
    assert {accepted.job.id for accepted in results} == {handed.id}
    assert await accept(store, uuid, "a") == {"a": 2}


async def test_an_operation_belongs_to_one_method(store: Store):
    uuid = await made(store)
    used = op()
    await store.submit_job(used, job(uuid), units("a"))
    with pytest.raises(Conflict) as caught:
        await store.delete_collection(used, "acme", "docs")
    assert caught.value.param == "op"
    assert await accept(store, uuid, "a") == {"a": 2}


async def test_a_failed_operation_may_be_tried_again(store: Store):
    docs = collection("docs")
    repeated, handed = op(), job(docs.uuid)
    with pytest.raises(NotFound):
        await store.submit_job(repeated, handed, units("a"))
    await store.create_collection(op(), docs)
    accepted = await store.submit_job(repeated, handed, units("a"))
    assert accepted.job.total == 1


async def test_concurrent_writes_of_one_document_get_different_generations(store: Store):
    uuid = await made(store)
    results = await asyncio.gather(*(accept(store, uuid, "a") for _ in range(40)))
    assert sorted(given["a"] for given in results) == list(range(1, 41))
