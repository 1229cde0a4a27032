"""What every Store promises of raw vectors: generations that never supersede an accepted item."""

from collections.abc import Sequence
from itertools import count

import pytest

from serve.errors import BadInput, NotFound
from serve.items import VERSION, Job, NewItem, Settlement, Task, new_id
from serve.records import Collection


_ops = count()


def op() -> str:
    return f"op-{next(_ops)}"


@pytest.fixture
async def uuid(store) -> str:
    made = Collection(f"{next(_ops):032x}", "acme", "docs", "m", "r1", 4, 5.25)
    return (await store.create_collection(op(), made)).uuid


async def grant(store, uuid: str, names: Sequence[str]) -> Sequence[int | None]:
    return await store.grant_vectors(uuid, names, [None] * len(names))


async def accept(
    store, uuid: str, *names: str, task: Task = "document", version: int | None = None
) -> str:
    job = Job(new_id("job", 5.25), "acme", "k", "documents", "bulk", 1.0, 5.25, collection=uuid)
    payload = {} if version is None else {VERSION: version}
    items = [NewItem(name, task, "embed", 1.0, payload, sha256="abc") for name in names]
    await store.submit_job(op(), job, items)
    return job.id


async def settle_all(store, chunks: int) -> None:
    """Everything that waits has landed with so many chunks."""
    items = (await store.claim("w", "embed", 500, 1e9, 0.0)).items
    told = [Settlement(one.id, one.lease, "advance", chunks=chunks) for one in items]
    if chunks:
        await store.settle(told)
        items = (await store.claim("w", "embed", 500, 1e9, 0.0)).items
    told = [Settlement(one.id, one.lease, "done", chunks=chunks) for one in items]
    assert all(await store.settle(told))


async def states(store, job: str) -> dict[str, tuple[str, int]]:
    views = await store.list_items("acme", job, (), -1, 10)
    return {view.name: (view.state, view.generation) for view in views}


async def test_each_write_raises_the_generation(store, uuid):
    assert await grant(store, uuid, ["a", "b"]) == [1, 1]
    assert await grant(store, uuid, ["c", "a"]) == [1, 2]
    epoch = await store.take_epoch("w", 1)
    assert await store.superseded("w", epoch, uuid, {"a": 1, "b": 1, "c": 1}) == {"a"}


async def test_the_id_of_a_document_is_not_granted(store, uuid):
    await accept(store, uuid, "a", "b")
    assert await grant(store, uuid, ["a", "new"]) == [0, 1]
    (item,) = (await store.claim("w", "embed", 1, 1e9, 0.0)).items
    assert not item.superseded
    await store.settle([Settlement(item.id, item.lease, "release")])
    await settle_all(store, 2)
    assert await grant(store, uuid, ["a", "b"]) == [0, 0]  # nor once it has landed


async def test_an_id_is_free_when_its_delete_has_settled_and_not_before(store, uuid):
    await accept(store, uuid, "a")
    await settle_all(store, 3)
    await accept(store, uuid, "a", task="delete")
    assert await grant(store, uuid, ["a"]) == [0]
    await settle_all(store, 0)
    assert await grant(store, uuid, ["a"]) == [3]


async def test_a_document_takes_the_id_of_a_raw_vector_and_counts_its_chunk(store, uuid):
    await grant(store, uuid, ["a", "b"])
    job = await accept(store, uuid, "a")
    deleted = await accept(store, uuid, "b", task="delete")
    assert await states(store, job) == {"a": ("ready", 2)}
    assert await states(store, deleted) == {"b": ("ready", 2)}
    items = (await store.claim("w", "embed", 500, 1e9, 0.0)).items
    assert {item.name: item.chunks_max for item in items} == {"a": 1, "b": 1}
    assert await grant(store, uuid, ["a", "b"]) == [0, 0]


async def test_a_document_is_written_anew_over_a_raw_vector_whatever_its_hash(store, uuid):
    await accept(store, uuid, "a")
    await settle_all(store, 1)
    assert await states(store, await accept(store, uuid, "a")) == {"a": ("skipped", 1)}
    await accept(store, uuid, "a", task="delete")
    await settle_all(store, 0)
    await grant(store, uuid, ["a"])
    assert await states(store, await accept(store, uuid, "a")) == {"a": ("ready", 4)}


async def test_nothing_is_granted_in_a_collection_that_is_gone(store, uuid):
    await store.delete_collection(op(), "acme", "docs")
    with pytest.raises(NotFound):
        await grant(store, uuid, ["a"])


async def test_an_id_is_there_once(store, uuid):
    with pytest.raises(BadInput):
        await grant(store, uuid, ["a", "a"])


# Deletes of a version


async def test_the_delete_of_the_newest_version_is_a_delete(store, uuid):
    await accept(store, uuid, "a")
    await settle_all(store, 2)
    job = await accept(store, uuid, "a", task="delete", version=1)
    assert await states(store, job) == {"a": ("ready", 2)}
    epoch = await store.take_epoch("w", 1)
    assert await store.superseded("w", epoch, uuid, {"a": 1}) == {"a"}


async def test_the_delete_of_an_older_version_leaves_the_newer_one_alone(store, uuid):
    await accept(store, uuid, "a")
    await settle_all(store, 3)
    newer = await accept(store, uuid, "a", "b")
    assert await states(store, newer) == {"a": ("skipped", 1), "b": ("ready", 1)}
    await accept(store, uuid, "b")  # generation 2
    job = await accept(store, uuid, "b", task="delete", version=1)
    assert await states(store, job) == {"b": ("ready", 1)}
    epoch = await store.take_epoch("w", 1)
    assert await store.superseded("w", epoch, uuid, {"b": 2}) == frozenset()
    items = (await store.claim("w", "embed", 500, 1e9, 0.0)).items
    found = {(item.task, item.generation): item.superseded for item in items}
    assert found == {("document", 1): True, ("document", 2): False, ("delete", 1): False}
    await store.settle([Settlement(items[-1].id, items[-1].lease, "done", chunks=0)])
    assert await store.superseded("w", epoch, uuid, {"b": 2}) == frozenset()


async def test_the_delete_of_a_version_finishes_a_delete_that_was_cut_off(store, uuid):
    await accept(store, uuid, "a")
    await settle_all(store, 2)
    await accept(store, uuid, "a", task="delete")  # generation 2, and its worker died
    job = await accept(store, uuid, "a", task="delete", version=1)
    assert await states(store, job) == {"a": ("ready", 3)}
    items = (await store.claim("w", "embed", 500, 1e9, 0.0)).items
    assert [(item.generation, item.chunks_max, item.superseded) for item in items] == [
        (2, 2, True),
        (3, 2, False),
    ]


async def test_the_delete_of_a_version_in_a_collection_that_is_gone_is_superseded(store, uuid):
    await accept(store, uuid, "a", "a2")
    await accept(store, uuid, "a")
    await accept(store, uuid, "a", task="delete", version=1)
    await store.delete_collection(op(), "acme", "docs")
    items = (await store.claim("w", "embed", 500, 1e9, 0.0)).items
    assert all(item.superseded for item in items)
