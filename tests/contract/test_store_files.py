"""What every Store promises of files."""

from itertools import count

import pytest

from serve.errors import QuotaExceeded
from serve.items import Fault, FileRoom, Job, NewItem, Settlement, StoredFile
from serve.job_ports import Files
from serve.records import Collection


_ops = count()


def op() -> str:
    return f"file-op-{next(_ops)}"


@pytest.fixture
def make(clock):
    def made(
        file_id: str,
        tenant: str = "acme",
        *,
        at: float = 0,
        for_s: float = 100,
        size: int = 3,
        purpose: str = "batch",
    ):
        return StoredFile(
            f"file-{file_id}",
            tenant,
            purpose,
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
    files = [make(name, at=at) for name, at in (("a", 1), ("b", 2), ("c", 2), ("d", 3))]
    for file in (*files[::-1], make("x", "other", at=1)):
        await store.create_file(op(), file)
    assert await store.list_files("acme", None, "asc", "", 10) == files
    assert await store.list_files("acme", None, "desc", "", 10) == files[::-1]
    for order, whole in (("asc", files), ("desc", files[::-1])):
        pages, after = [], ""
        while page := await store.list_files("acme", None, order, after, 2):
            pages += page
            after = page[-1].id
        assert pages == whole
    assert await store.list_files("acme", "batch_output", "asc", "", 10) == []


@pytest.mark.parametrize("order", ["asc", "desc"])
async def test_a_page_goes_on_behind_a_file_that_is_gone(store: Files, make, order):
    for name in "abcde":
        await store.create_file(op(), make(name))
    seen, after = [], ""
    while page := await store.list_files("acme", None, order, after, 2):
        seen += [file.id[-1] for file in page]
        after = page[-1].id
        for file in page:
            await store.delete_file(op(), "acme", file.id)
    assert sorted(seen) == ["a", "b", "c", "d", "e"]


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


async def test_what_batches_write_and_what_is_over_takes_no_room(store: Files, make, clock):
    room = FileRoom(files=1, size=10)
    await store.create_file(op(), make("out", size=99, purpose="batch_output"))
    await store.create_file(op(), make("a", size=9), room)
    with pytest.raises(QuotaExceeded):
        await store.create_file(op(), make("b", size=1), room)
    clock.advance(100)
    await store.create_file(op(), make("b", size=10), room)


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


async def test_the_store_knows_which_jobs_need_their_bytes_no_more(store, clock):
    """Lines of a batch that are dead may be tried again, until it expires."""
    ends = {"done": True, "dead": False, "open": False, "stopped": True}
    for name in ends:
        job = Job(name, "acme", "k1", "embeddings", "bulk", 1.0, clock(), expires_at=clock() + 50)
        await store.submit_job(op(), job, [NewItem(name, "request", "embed", 1.0, {})])
    claim = await store.claim("w", "embed", 9, 1e9, 0)
    await store.change_job(op(), "acme", "stopped", "cancel")
    fault = Fault("invalid", "bad", "It is bad.")
    words = {"done": "done", "dead": "dead", "stopped": "dead"}
    for item in claim.items:
        if item.name in words:
            word = words[item.name]
            await store.settle([Settlement(item.id, item.lease, word, fault=fault)])
    finish = (await store.claim("w", "prepare", 9, 1e9, 0)).items
    assert len(finish) == len(words)
    assert await store.jobs_over([*ends, "unknown"]) == dict.fromkeys(ends, False)
    await store.settle([Settlement(item.id, item.lease, "done") for item in finish])
    assert await store.jobs_over([*ends, "unknown"]) == ends
    clock.advance(50)
    assert (await store.jobs_over(["dead"])) == {"dead": True}
    assert await store.jobs_over([]) == {}
