"""Files and the bytes of jobs: what is kept for how long, whatever goes wrong on the way; and repeats of
a request whose file or collection is gone by now.
"""

import os

import openai
import pytest

from serve.config import Files, Jobs
from serve.errors import StoreUnavailable
from serve.flows.files import KEPT_S_MAX, ORPHAN_S, Tidy
from tests.api.lines import counts, ended, line, submit, upload


DAY_S = 86_400.0
BATCH = {"endpoint": "/v1/embeddings", "completion_window": "24h"}
KEY = {"idempotency-key": "order-7"}


@pytest.fixture
async def idle(start):
    """A service whose worker has not been started."""
    return await start(working=False)


@pytest.fixture
async def ai(idle):
    return await idle.openai()


def tidy(whole, **rules):
    return Tidy(whole.store, whole.blobs, Files(**rules), whole.service.context.wall)


def aged(whole, name, days):
    """As if the blob, or what is in the folder, had been written so many days ago."""
    then = whole.service.context.wall() - days * DAY_S
    os.utime(whole.blobs._folder / name, (then, then))


def kept(whole):
    """Names of all blobs."""
    folder = whole.blobs._folder
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def folder_of(batch):
    return batch.id.replace("batch_", "job_")


# --- lists -----------------------------------------------------------------------------------


async def test_files_are_deleted_while_they_are_listed(ai, clock):
    for number in range(7):
        await upload(ai, str(number))
        clock.advance(1)
    seen = []
    async for file in ai.files.list(limit=2):
        seen.append(file.id)
        await ai.files.delete(file.id)
    assert len(set(seen)) == 7
    assert (await ai.files.list()).data == []


# --- handing over ----------------------------------------------------------------------------


async def test_reading_a_file_has_its_cost(ai, idle):
    text = line("a", "x" * 4000)
    batch = await submit(ai, text)
    (item,) = (await idle.store.claim("w", "prepare", 9, 1e9, 0)).items
    assert (item.job, item.task, item.cost) == (folder_of(batch), "expand", len(text) / 4)


async def test_a_job_that_there_is_no_room_for_leaves_no_copy(start):
    whole = await start(working=False, jobs=Jobs(open_jobs_max=1))
    ai = await whole.openai()
    file = await upload(ai, line("a"))
    first = await ai.batches.create(input_file_id=file.id, **BATCH)
    with pytest.raises(openai.RateLimitError):
        await ai.batches.create(input_file_id=file.id, **BATCH)
    assert kept(whole) == {file.id, f"{folder_of(first)}/input"}


async def test_what_may_have_been_accepted_keeps_its_copy(ai, idle, monkeypatch):
    lose_reply(idle, "submit_job", monkeypatch)
    file = await upload(ai, line("a"))
    with pytest.raises(openai.InternalServerError):
        await ai.batches.create(input_file_id=file.id, **BATCH)
    (batch,) = (await ai.batches.list()).data
    await idle.work("late")
    assert counts(await ended(idle, ai, batch)) == (1, 1, 0)


async def test_what_may_have_been_uploaded_keeps_its_bytes(ai, idle, monkeypatch):
    lose_reply(idle, "create_file", monkeypatch)
    with pytest.raises(openai.InternalServerError):
        await upload(ai, "abc")
    (file,) = (await ai.files.list()).data
    assert (await ai.files.content(file.id)).text == "abc"


async def test_what_was_refused_keeps_no_bytes(start):
    whole = await start(working=False, files=Files(tenant_files_max=1))
    ai = await whole.openai()
    first = await upload(ai, "abc")
    with pytest.raises(openai.RateLimitError):
        await upload(ai, "abc")
    assert kept(whole) == {first.id}


def lose_reply(whole, method, monkeypatch):
    """The Store does it, and nobody hears of it."""
    owner = whole.store._port
    plain = getattr(owner, method)

    async def lossy(*args):
        await plain(*args)
        raise StoreUnavailable("away")

    monkeypatch.setattr(owner, method, lossy)


async def test_a_file_is_read_again_when_there_is_room_for_its_lines(start, clock, monkeypatch):
    rules = Jobs(heartbeat_s=300, lease_s=600, open_items_max=4)
    whole = await start(working=False, jobs=rules)
    client, ai = await whole.client(), await whole.openai()
    await client.post("/v1/collections", json={"name": "books"})
    documents = [{"id": name, "text": name} for name in "ab"]
    made = await client.post("/v1/jobs", json={"collection": "books", "items": documents})
    other = made.json()["id"]
    await client.post(f"/v1/jobs/{other}/pause")
    batch = await submit(ai, line("a"), line("b"), line("c"))
    released = []
    plain = whole.store._port.settle

    async def settle(settlements):
        released.extend(one for one in settlements if one.word == "release")
        return await plain(settlements)

    monkeypatch.setattr(whole.store._port, "settle", settle)
    await whole.work("late")
    while not released:
        assert (await ai.batches.retrieve(batch.id)).status == "validating"
    assert (released[0].fault.code, released[0].delay_s) == ("open_items", 60)
    await client.post(f"/v1/jobs/{other}/cancel")
    clock.advance(60)
    await whole.store.tick()
    assert counts(await ended(whole, ai, batch)) == (3, 3, 0)


# --- repeats ---------------------------------------------------------------------------------


async def test_a_repeat_is_the_first_batch_though_its_file_is_gone(ai):
    file = await upload(ai, line("a"))
    first = await ai.batches.create(input_file_id=file.id, **BATCH, extra_headers=KEY)
    await ai.files.delete(file.id)
    again = await ai.batches.create(input_file_id=file.id, **BATCH, extra_headers=KEY)
    assert again.id == first.id
    with pytest.raises(openai.UnprocessableEntityError):
        await ai.batches.create(input_file_id="file-x", **BATCH, extra_headers=KEY)
    with pytest.raises(openai.NotFoundError):
        await ai.batches.create(input_file_id=file.id, **BATCH)


@pytest.mark.parametrize("gone", ["file", "collection"])
async def test_a_repeat_is_the_first_job_though_what_it_named_is_gone(ai, idle, gone):
    client = await idle.client()
    await client.post("/v1/collections", json={"name": "books"})
    file = await upload(ai, '{"id": "a", "text": "x"}')
    body = {"collection": "books", "file": file.id}
    first = await client.post("/v1/jobs", json=body, headers=KEY)
    if gone == "file":
        await ai.files.delete(file.id)
    else:
        await client.delete("/v1/collections/books")
    again = await client.post("/v1/jobs", json=body, headers=KEY)
    assert (again.status_code, again.json()["id"]) == (202, first.json()["id"])
    assert again.headers["idempotent-replayed"] == "true"
    assert (await client.post("/v1/jobs", json=body)).status_code == 404


@pytest.mark.parametrize("method", ["POST", "DELETE"])
async def test_a_repeat_of_a_write_is_the_first_though_its_collection_is_gone(idle, method):
    client = await idle.client()
    await client.post("/v1/collections", json={"name": "books"})
    path = "/v1/collections/books/documents?wait=accepted"
    body = {"ids": ["a"]} if method == "DELETE" else {"documents": [{"id": "a", "text": "x"}]}
    first = await client.request(method, path, json=body, headers=KEY)
    await client.delete("/v1/collections/books")
    again = await client.request(method, path, json=body, headers=KEY)
    assert (again.status_code, again.json()) == (202, first.json())
    assert again.headers["idempotent-replayed"] == "true"
    assert (await client.request(method, path, json=body)).status_code == 404


# --- tidying ---------------------------------------------------------------------------------


async def test_a_batch_that_stood_still_for_days_keeps_its_bytes(ai, idle):
    batch = await submit(ai, line("a"))
    folder = folder_of(batch)
    aged(idle, folder, days=20)
    await tidy(idle).once()
    assert f"{folder}/input" in kept(idle)
    await idle.work("late")
    assert counts(await ended(idle, ai, batch)) == (1, 1, 0)


async def test_the_bytes_of_a_job_go_when_it_has_ended(ai, idle):
    client = await idle.client()
    await client.post("/v1/collections", json={"name": "books"})
    file = await upload(ai, '{"id": "a", "text": "x"}')
    made = await client.post("/v1/jobs", json={"collection": "books", "file": file.id})
    job = made.json()["id"]
    await tidy(idle).once()
    assert kept(idle) == {file.id, f"{job}/input"}
    await client.post(f"/v1/jobs/{job}/cancel")
    await tidy(idle).once()
    assert kept(idle) == {file.id}


async def test_what_a_dead_line_may_be_tried_again_from_stays_until_the_batch_expires(
    ai, idle, clock
):
    batch = await submit(ai, line("a", "poison"))
    await idle.work("late")
    assert counts(await ended(idle, ai, batch)) == (1, 0, 1)
    await tidy(idle).once()
    assert f"{folder_of(batch)}/input" in kept(idle)
    clock.advance(DAY_S)
    await tidy(idle).once()
    assert not [name for name in kept(idle) if name.startswith("job_")]


async def test_bytes_of_no_job_are_removed_when_they_are_old(idle):
    for name in ("job_old", "job_young"):
        await idle.blobs.put(f"{name}/input", pieces(b"x"))
    aged(idle, "job_old", days=ORPHAN_S / DAY_S + 0.01)
    aged(idle, "job_young", days=ORPHAN_S / DAY_S - 0.01)
    await tidy(idle).once()
    assert kept(idle) == {"job_young/input"}


async def test_a_file_outlives_a_setting_that_was_lowered(ai, idle):
    file = await upload(ai, "abc")
    aged(idle, file.id, days=29)
    await idle.blobs.put("file-orphan", pieces(b"x"))
    aged(idle, "file-orphan", days=(KEPT_S_MAX + ORPHAN_S) / DAY_S + 0.01)
    await tidy(idle, kept_s=3600).once()
    assert kept(idle) == {file.id}


def test_no_setting_keeps_files_for_longer_than_their_bytes():
    assert Files(kept_s=KEPT_S_MAX).kept_s == KEPT_S_MAX
    with pytest.raises(ValueError, match="kept_s"):
        Files(kept_s=KEPT_S_MAX + 1)


async def pieces(*some):
    for piece in some:
        yield piece
