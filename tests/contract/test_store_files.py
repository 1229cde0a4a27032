"""What every Store promises of files."""

from itertools import count

import pytest

from serve.errors import NotFound, QuotaExceeded
from serve.items import FileRoom, Job, NewItem, StoredFile
from serve.job_ports import Files
from serve.records import Collection


_ops = count()


def op() -> str:
    return f"file-op-{next(_ops)}"


@pytest.fixture
def make(clock):
    def made(
        file_id: str, tenant: str = "acme", *, at: float = 0, for_s: float = 100, size: int = 3
    ):
        return StoredFile(
            f"file-{file_id}",
            tenant,
            "batch",
            f"{file_id}.jsonl",
            size,
            "ab" * 32,
            clock() + at,
            clock() + for_s,
        )

    return made


async def test_a_file_is_found_by_its_tenant_until_its_time_is_over(store: Files, make, clock):
    file = make("a")
    assert await store.create_file(op(), file) == file
    assert await store.find_file("acme", file.id) == file
    assert await store.find_file("other", file.id) is None
    assert await store.expired_files(10) == []
    clock.advance(100)
    assert await store.find_file("acme", file.id) is None
    assert await store.list_files("acme", None, "asc", "", 10) == []
    assert await store.expired_files(10) == [file]
    assert await store.delete_file(op(), "acme", file.id)
    assert await store.expired_files(10) == []


async def test_a_repeat_of_the_same_id_replaces_it(store: Files, make):
    await store.create_file(op(), make("a", size=3))
    again = make("a", size=5)
    await store.create_file(op(), again)
    assert await store.list_files("acme", None, "asc", "", 10) == [again]


async def test_files_are_listed_by_age_in_pages(store: Files, make):
    files = [make("c", at=1), make("b", at=2), make("a", at=2), make("d", at=3)]
    for file in (*files, make("x", "other", at=1)):
        await store.create_file(op(), file)
    oldest = [files[0], files[2], files[1], files[3]]  # of one moment: by id
    assert await store.list_files("acme", None, "asc", "", 10) == oldest
    assert await store.list_files("acme", None, "desc", "", 10) == oldest[::-1]
    for order, whole in (("asc", oldest), ("desc", oldest[::-1])):
        pages, after = [], ""
        while page := await store.list_files("acme", None, order, after, 2):
            pages += page
            after = page[-1].id
        assert pages == whole
    assert await store.list_files("acme", "batch_output", "asc", "", 10) == []
    with pytest.raises(NotFound):
        await store.list_files("acme", None, "asc", "file-x", 10)


async def test_a_tenant_has_room_for_so_many_files_and_bytes(store: Files, make):
    room = FileRoom(files=2, size=10)
    await store.create_file(op(), make("a", size=6), room)
    with pytest.raises(QuotaExceeded) as refused:
        await store.create_file(op(), make("b", size=5), room)
    assert refused.value.code == "stored_bytes"
    await store.create_file(op(), make("b", size=4), room)
    with pytest.raises(QuotaExceeded) as refused:
        await store.create_file(op(), make("c", size=0), room)
    assert refused.value.code == "stored_files"
    await store.create_file(op(), make("c", "other"), room)
    await store.create_file(op(), make("d"))  # what a batch writes


async def test_a_file_is_deleted_once_by_its_tenant(store: Files, make):
    file = make("a")
    await store.create_file(op(), file)
    assert not await store.delete_file(op(), "other", file.id)
    first = op()
    assert await store.delete_file(first, "acme", file.id)
    assert await store.delete_file(first, "acme", file.id)  # the same call again
    assert not await store.delete_file(op(), "acme", file.id)


async def test_each_input_of_a_request_is_a_chunk_of_its_document(store, clock):
    """Known before any lands, so that a later write with fewer removes the others."""
    made = Collection("f" * 32, "acme", "books", "m", "r1", 384, 0.0)
    await store.create_collection(op(), made)
    job = Job("job_1", "acme", "k1", "embeddings", "bulk", 1.0, clock(), collection=made.uuid)
    request = NewItem("a", "request", "embed", 1.0, {"inputs": 3})
    await store.submit_job(op(), job, [request])
    claim = await store.claim("w", "embed", 1, 1e9, 0)
    assert [(item.generation, item.chunks_max) for item in claim.items] == [(1, 3)]
