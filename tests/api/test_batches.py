"""`/v1/files` and `/v1/batches`, driven by OpenAI's own client over a real Store and a worker."""

import asyncio
import random

import openai
import pytest

from serve.api.batches import shown
from serve.config import Files, Worker
from serve.errors import BadInput, ModelUnavailable, NotFound
from serve.flows import batch_requests
from serve.flows.batch_finish import FinishWork
from serve.flows.files import Tidy
from serve.items import Claim, Item, Job
from serve.jobs.faults import Retries
from tests.api.lines import counts, ended, line, lines_of, submit, upload


DAY_S = 86_400


@pytest.fixture
async def ai(whole):
    return await whole.openai()


@pytest.fixture
async def slow(start):
    """A service whose worker takes two lines at a time, and `gate` between its first and second."""
    whole = await start(workers=(Worker(items_max=2, claims_max=1),))
    whole.gate, whole.waits = asyncio.Event(), asyncio.Event()
    calls = []

    async def before():
        calls.append(1)
        if len(calls) == 2:
            whole.waits.set()
            await whole.gate.wait()

    whole.embedder.before = before
    return whole


# --- files -----------------------------------------------------------------------------------


async def test_a_file_is_kept_shown_read_and_deleted(ai, whole):
    data = b"x\n" * 1_000_000  # above what a form holds in memory
    file = await ai.files.create(file=("my file.jsonl", data), purpose="batch")
    assert (file.object, file.purpose, file.status) == ("file", "batch", "processed")
    assert (file.bytes, file.filename) == (2_000_000, "my file.jsonl")
    assert file.expires_at == file.created_at + 30 * DAY_S
    assert await ai.files.retrieve(file.id) == file
    assert (await ai.files.content(file.id)).content == data
    gone = await ai.files.delete(file.id)
    assert (gone.id, gone.deleted) == (file.id, True)
    for act in (ai.files.retrieve, ai.files.content, ai.files.delete):
        with pytest.raises(openai.NotFoundError) as refused:
            await act(file.id)
        assert refused.value.param == "file_id"


async def test_a_file_ends_when_its_upload_says(ai, whole, clock):
    file = await upload(ai, "x", expires_after={"anchor": "created_at", "seconds": 3600})
    assert file.expires_at == file.created_at + 3600
    tidy = Tidy(whole.store, whole.blobs, Files(), whole.service.context.wall)
    clock.advance(3599)
    await tidy.once()
    assert (await ai.files.content(file.id)).text == "x"
    clock.advance(1)
    with pytest.raises(openai.NotFoundError):
        await ai.files.retrieve(file.id)
    assert await whole.blobs.read(file.id, [(0, 1)]) == [b"x"]
    await tidy.once()
    with pytest.raises(NotFound):
        await whole.blobs.read(file.id, [(0, 1)])


async def test_files_are_listed_in_pages(ai, clock):
    made = []
    for number in range(5):
        made.append((await upload(ai, str(number))).id)
        clock.advance(1)
    assert [file.id async for file in ai.files.list(limit=2)] == made[::-1]
    assert [file.id async for file in ai.files.list(limit=2, order="asc")] == made
    first = await ai.files.list(limit=3)
    assert first.has_more
    assert [file.id for file in first.data] == made[:1:-1]
    assert (await ai.files.list(purpose="batch_output")).data == []
    assert not (await ai.files.list(limit=5)).has_more
    with pytest.raises(openai.BadRequestError):
        await ai.files.list(limit=0)


async def test_a_form_that_is_not_right_is_refused(client):
    file, purpose = {"file": b"x"}, {"purpose": "batch"}
    anchored = {**purpose, "expires_after[anchor]": "created_at"}
    for form, param in (
        ({"files": file, "data": {"purpose": "vision"}}, "purpose"),
        ({"files": file}, "purpose"),
        ({"files": {"other": b"x"}, "data": purpose}, "file"),
        ({"files": {"file": b""}, "data": purpose}, "file"),
        ({"files": {"file": b"x", "two": b"x"}, "data": purpose}, "body"),
        ({"data": purpose}, "content-type"),
        ({"json": purpose}, "content-type"),
        (
            {"files": file, "data": {**purpose, "expires_after[seconds]": "3600"}},
            "expires_after[anchor]",
        ),
        (
            {"files": file, "data": {**anchored, "expires_after[seconds]": "1"}},
            "expires_after[seconds]",
        ),
        ({"files": file, "data": anchored}, "expires_after[seconds]"),
    ):
        answer = await client.post("/v1/files", **form)
        assert answer.status_code == 400
        assert answer.json()["error"]["param"] == param
    assert (await client.get("/v1/files")).json()["data"] == []


async def test_an_upload_is_bounded_for_itself(start):
    whole = await start(files=Files(bytes_max=4096, tenant_files_max=1))
    ai = await whole.openai()
    client = await whole.client()
    for size, param in ((4097, "file"), (200_000, "body")):  # the latter before it is read
        with pytest.raises(openai.APIStatusError) as refused:
            await upload(ai, "x" * size)
        assert (refused.value.status_code, refused.value.param) == (413, param)
    await upload(ai, "x" * 4096)
    with pytest.raises(openai.RateLimitError) as refused:
        await upload(ai, "x")
    assert refused.value.type == "stored_files"
    assert refused.value.response.headers["x-should-retry"] == "false"
    # All others keep the bound of bodies.
    answer = await client.post("/v1/batches", content=b" " * (9 * 2**20))
    assert answer.status_code == 413


# --- batches ---------------------------------------------------------------------------------


async def test_a_batch_gives_what_direct_requests_give(ai, whole):
    bodies = {
        "one": {"input": "the tide"},
        "many": {"input": ["a turbine", "headrace", "x" * 50]},
        "floats": {"input": "as floats", "encoding_format": "float"},
        "base64": {"input": "as base64", "encoding_format": "base64"},
        "ids": {"input": [[104, 105], [106]]},
        "cut": {"input": "y" * 100, "truncate": "END"},
        "short": {"input": "in short", "dimensions": 8},
    }
    bodies = {name: {"model": "org/nested", **body} for name, body in bodies.items()}
    lines = [line(name, body=body) for name, body in bodies.items()]
    batch = await submit(ai, *lines, metadata={"run": "7"})
    assert (batch.object, batch.status) == ("batch", "validating")
    assert (batch.endpoint, batch.completion_window) == ("/v1/embeddings", "24h")
    assert batch.expires_at == batch.created_at + DAY_S
    done = await ended(whole, ai, batch)
    assert (done.status, counts(done)) == ("completed", (7, 7, 0))
    assert (done.errors, done.error_file_id, done.metadata) == (None, None, {"run": "7"})
    assert None not in (done.in_progress_at, done.finalizing_at, done.completed_at)
    assert (done.failed_at, done.expired_at, done.cancelled_at) == (None, None, None)
    output = await lines_of(ai, done.output_file_id)
    client = await whole.client()
    tokens = 0
    for name, body in bodies.items():
        direct = (await client.post("/v1/embeddings", json=body)).json()
        answer = output.pop(name)
        assert answer["response"] == {
            "status_code": 200,
            "request_id": answer["response"]["request_id"],
            "body": direct,
        }
        assert answer["error"] is None
        tokens += direct["usage"]["total_tokens"]
    assert output == {}
    assert done.usage.total_tokens == done.usage.input_tokens == tokens
    file = await ai.files.retrieve(done.output_file_id)
    assert (file.purpose, file.filename) == ("batch_output", f"{batch.id}_output.jsonl")
    assert file.expires_at == file.created_at + 30 * DAY_S
    # What it was made of is gone, but for the two files.
    left = [path for path in (whole.blobs._folder).rglob("*") if path.is_file()]
    assert sorted(path.name for path in left) == sorted([batch.input_file_id, file.id])


async def test_a_bad_file_fails_as_a_whole_and_names_its_lines(ai, whole):
    lines = [line("a"), "{", line("a"), line("b", body={"model": "none"}), line("c", url="/x")]
    done = await ended(whole, ai, await submit(ai, *lines))
    assert (done.status, counts(done)) == ("failed", (0, 0, 0))
    assert done.failed_at is not None
    assert done.completed_at is None
    assert [(fault.line, fault.code, fault.param) for fault in done.errors.data] == [
        (2, "invalid_json_line", None),
        (3, "duplicate_custom_id", "custom_id"),
        (4, "mismatched_model", "body.model"),
        (5, "invalid_url", "url"),
    ]
    assert (done.output_file_id, done.error_file_id) == (None, None)


async def test_a_line_that_fails_leaves_the_others_alone(ai, whole):
    names = [f"n{number}" for number in range(20)]
    lines = [line(name) for name in names]
    lines[3] = line("poison", body={"input": ["fine", "poison"]})
    lines[8] = line("long", body={"input": "x" * 1000})
    lines[9] = line("ids", body={"input": [[10**6]]})
    done = await ended(whole, ai, await submit(ai, *lines))
    assert (done.status, counts(done)) == ("completed", (20, 17, 3))
    output = await lines_of(ai, done.output_file_id)
    assert set(output) == set(names) - {"n3", "n8", "n9"}
    errors = await lines_of(ai, done.error_file_id)
    assert set(errors) == {"poison", "long", "ids"}
    assert all(one["error"] is None for one in errors.values())
    found = {
        name: (one["response"]["status_code"], one["response"]["body"]["error"])
        for name, one in errors.items()
    }
    assert found["poison"][0] == 422
    assert found["poison"][1]["param"] == "input[1]"
    assert found["long"][0] == 400
    assert found["long"][1]["code"] == "context_length_exceeded"
    assert found["long"][1]["type"] == "invalid_request_error"
    assert found["ids"][0] == 400


async def test_a_batch_of_nothing_but_failures_is_completed(ai, whole):
    done = await ended(whole, ai, await submit(ai, line("poison", "poison")))
    assert (done.status, counts(done), done.output_file_id) == ("completed", (1, 0, 1), None)
    assert set(await lines_of(ai, done.error_file_id)) == {"poison"}
    assert done.completed_at is not None


async def test_what_is_done_outlives_a_cancel(slow):
    ai = await slow.openai()
    batch = await submit(ai, *(line(f"n{number}") for number in range(10)))
    await asyncio.wait_for(slow.waits.wait(), 20)
    stopping = await ai.batches.cancel(batch.id)
    assert stopping.status == "cancelling"
    assert stopping.cancelling_at is not None
    slow.gate.set()
    done = await ended(slow, ai, batch)
    assert (done.status, counts(done)) == ("cancelled", (10, 4, 0))
    assert done.cancelled_at is not None
    assert set(await lines_of(ai, done.output_file_id)) == {"n0", "n1", "n2", "n3"}
    errors = await lines_of(ai, done.error_file_id)
    assert set(errors) == {f"n{number}" for number in range(4, 10)}
    assert {one["error"]["code"] for one in errors.values()} == {"batch_cancelled"}
    assert {one["response"] for one in errors.values()} == {None}
    with pytest.raises(openai.ConflictError):
        await ai.batches.cancel(batch.id)


async def test_what_is_done_outlives_the_expiry(slow, clock):
    ai = await slow.openai()
    batch = await submit(ai, *(line(f"n{number}") for number in range(10)))
    await asyncio.wait_for(slow.waits.wait(), 20)
    clock.advance(DAY_S)
    await slow.store.tick()
    assert (await ai.batches.retrieve(batch.id)).status in ("finalizing", "expired")
    slow.gate.set()
    done = await ended(slow, ai, batch)
    assert (done.status, done.expired_at) == ("expired", batch.expires_at)
    assert counts(done) == (10, 2, 0)
    assert set(await lines_of(ai, done.output_file_id)) == {"n0", "n1"}
    errors = await lines_of(ai, done.error_file_id)
    assert {one["error"]["code"] for one in errors.values()} == {"batch_expired"}
    assert len(errors) == 8


async def test_a_batch_that_is_cancelled_before_it_was_read_has_no_files(start):
    whole = await start(working=False)
    ai = await whole.openai()
    batch = await submit(ai, line("a"))
    assert (await ai.batches.cancel(batch.id)).status == "cancelling"
    await whole.work("late")
    done = await ended(whole, ai, batch)
    assert (done.status, counts(done)) == ("cancelled", (0, 0, 0))
    assert (done.output_file_id, done.error_file_id) == (None, None)


async def test_a_deleted_file_does_not_stop_its_batch(start):
    whole = await start(working=False)
    ai = await whole.openai()
    batch = await submit(ai, line("a"))
    await ai.files.delete(batch.input_file_id)
    await whole.work("late")
    done = await ended(whole, ai, batch)
    assert (done.status, counts(done)) == ("completed", (1, 1, 0))


async def test_what_may_pass_is_tried_again(start, clock):
    whole = await start()
    whole.embedder.fault = ModelUnavailable("It is loading.")
    ai = await whole.openai()
    batch = await submit(ai, line("a"))
    job = batch.id.replace("batch_", "job_")
    while True:
        [*items] = await whole.store.list_items("acme", job, (), -1, 10)
        if items and items[0].state == "delayed":
            break
        await asyncio.sleep(0)
    whole.embedder.fault = None
    clock.advance(120)
    await whole.store.tick()
    done = await ended(whole, ai, batch)
    assert (done.status, counts(done)) == ("completed", (1, 1, 0))


async def test_a_payer_over_its_limit_waits_and_loses_no_try(start, clock):
    whole = await start()
    ai = await whole.openai("free")  # 200 tokens at once, 600 a minute; each line has 42
    lines = [line(f"n{number}", "x" * 40) for number in range(8)]
    lines.append(line("never", ["x" * 40] * 5))
    batch = await submit(ai, *lines)
    job = batch.id.replace("batch_", "job_")
    while (await ai.batches.retrieve(batch.id)).status != "completed":
        items = await whole.store.list_items("frugal", job, ("ready", "leased"), -1, 10)
        if not items:
            clock.advance(10)
            await whole.store.tick()
        await asyncio.sleep(0)
    done = await ai.batches.retrieve(batch.id)
    assert counts(done) == (9, 8, 1)
    items = await whole.store.list_items("frugal", job, ("done",), -1, 10)
    assert {item.attempts for item in items} == {0}
    errors = await lines_of(ai, done.error_file_id)
    error = errors["never"]["response"]["body"]["error"]
    assert error["code"] == "tokens_exceed_quota"


async def test_batches_are_listed_newest_first_in_pages(ai, whole, clock):
    file = await upload(ai, line("a"))
    made = []
    for _ in range(5):
        batch = await ai.batches.create(
            input_file_id=file.id, endpoint="/v1/embeddings", completion_window="24h"
        )
        made.append(batch.id)
        clock.advance(1)
    assert [batch.id async for batch in ai.batches.list(limit=2)] == made[::-1]
    first = await ai.batches.list(limit=3)
    assert (first.has_more, [batch.id for batch in first.data]) == (True, made[:1:-1])
    assert (await ai.batches.list(after="nonsense")).data == []
    with pytest.raises(openai.BadRequestError):
        await ai.batches.list(limit=101)


async def test_another_tenant_sees_nothing(ai, whole):
    other = await whole.openai("other")
    batch = await submit(ai, line("a"))
    done = await ended(whole, ai, batch)
    assert (await other.files.list()).data == []
    assert (await other.batches.list()).data == []
    for act, ours in (
        (other.files.retrieve, done.input_file_id),
        (other.files.content, done.output_file_id),
        (other.files.delete, done.input_file_id),
        (other.batches.retrieve, batch.id),
        (other.batches.cancel, batch.id),
    ):
        with pytest.raises(openai.NotFoundError):
            await act(ours)
    with pytest.raises(openai.NotFoundError) as refused:
        await other.batches.create(
            input_file_id=done.input_file_id, endpoint="/v1/embeddings", completion_window="24h"
        )
    assert refused.value.param == "input_file_id"
    assert (await ai.files.retrieve(done.input_file_id)).id == done.input_file_id


async def test_a_batch_that_is_not_right_is_refused(ai):
    file = await upload(ai, line("a"))
    sound = {"endpoint": "/v1/embeddings", "completion_window": "24h"}
    for changes, param in (
        ({"endpoint": "/v1/chat/completions"}, "endpoint"),
        ({"completion_window": "1h"}, "completion_window"),
        ({"metadata": {"k" * 65: "v"}}, f"metadata.{'k' * 65}.[key]"),
        ({"metadata": {str(number): "v" for number in range(17)}}, "metadata"),
        (
            {"output_expires_after": {"anchor": "created_at", "seconds": 1}},
            "output_expires_after.seconds",
        ),
    ):
        with pytest.raises(openai.BadRequestError) as refused:
            await ai.batches.create(input_file_id=file.id, **{**sound, **changes})
        assert refused.value.param == param
    assert (await ai.batches.list()).data == []
    more = {"extra_body": {"priority_of_theirs": 1}}
    assert (await ai.batches.create(input_file_id=file.id, **sound, **more)).id


async def test_an_output_is_kept_as_told_and_is_no_input(ai, whole):
    kept = {"anchor": "created_at", "seconds": 7200}
    done = await ended(whole, ai, await submit(ai, line("a"), output_expires_after=kept))
    file = await ai.files.retrieve(done.output_file_id)
    assert file.expires_at == file.created_at + 7200
    with pytest.raises(openai.BadRequestError) as refused:
        await ai.batches.create(
            input_file_id=done.output_file_id, endpoint="/v1/embeddings", completion_window="24h"
        )
    assert refused.value.param == "input_file_id"


async def test_one_idempotency_key_makes_one_batch(ai, whole):
    headers = {"idempotency-key": "once"}
    file = await upload(ai, line("a"))
    request = {
        "input_file_id": file.id,
        "endpoint": "/v1/embeddings",
        "completion_window": "24h",
    }
    first = await ai.batches.create(**request, extra_headers=headers)
    again = await ai.batches.create(**request, extra_headers=headers)
    assert again.id == first.id
    await ended(whole, ai, first)
    assert len((await ai.batches.list()).data) == 1


async def test_writing_the_files_twice_changes_nothing(ai, whole):
    done = await ended(whole, ai, await submit(ai, *(line(f"n{n}") for n in range(3))))
    job_id = done.id.replace("batch_", "job_")
    job = (await whole.store.find_job("acme", job_id)).job
    before = [file async for file in ai.files.list()]
    output = await lines_of(ai, done.output_file_id)
    context = whole.service.context
    retries = Retries(1, 1, 1, random.Random(1))  # noqa: S311  jitter
    work = FinishWork(context, whole.store, whole.store, whole.blobs, retries)
    item = Item(1, 1, job.id, -2, "finish", "finish", "prepare", 1.0, 0, {})
    [settlement] = await work.finish([item], Claim((item,), {job.id: job}))
    assert settlement.result == {"output": done.output_file_id, "error": ""}
    assert [file async for file in ai.files.list()] == before
    assert await lines_of(ai, done.output_file_id) == output


async def test_lines_that_are_tried_again_come_with_the_others(ai, whole, clock, monkeypatch):
    monkeypatch.setattr(batch_requests, "size_of", refused_size)
    done = await ended(whole, ai, await submit(ai, line("a"), line("b", body={"dimensions": 16})))
    assert counts(done) == (2, 1, 1)
    assert set(await lines_of(ai, done.error_file_id)) == {"b"}
    monkeypatch.undo()
    clock.advance(1)
    client = await whole.client()
    job_id = done.id.replace("batch_", "job_")
    again = await client.post(f"/v1/jobs/{job_id}/retry", json={"all": True})
    assert again.json()["items"] == 1
    anew = await ended(whole, ai, done)
    assert (anew.status, counts(anew), anew.error_file_id) == ("completed", (2, 2, 0), None)
    assert anew.output_file_id != done.output_file_id
    assert set(await lines_of(ai, anew.output_file_id)) == {"a", "b"}
    with pytest.raises(NotFound):
        await whole.blobs.read(f"{job_id}/input", [(0, 1)])


def refused_size(served, wanted):
    """As a model that can not be cut would answer, for now."""
    if wanted.dimensions is not None:
        raise BadInput("Not now.")
    return served.model.dimensions


# --- collections -----------------------------------------------------------------------------


async def test_vectors_land_in_the_collection_that_a_batch_names(ai, whole):
    client = await whole.client()
    await client.post("/v1/collections", json={"name": "books", "model": "plain"})
    lines = [line("one", "the tide"), line("two", body={"input": ["a turbine", "headrace"]})]
    into = {"collection": "books"}
    done = await ended(whole, ai, await submit(ai, *lines, extra_body=into))
    assert (done.status, counts(done), done.collection) == ("completed", (2, 2, 0), "books")
    assert len(await lines_of(ai, done.output_file_id)) == 2

    async def nearest(text):
        answer = await client.post("/v1/collections/books/search", json={"text": text})
        return {(hit["document"], hit["chunk"], hit["text"]) for hit in answer.json()["data"]}

    assert await nearest("headrace") == {
        ("one", 0, "the tide"),
        ("two", 0, "a turbine"),
        ("two", 1, "headrace"),
    }
    again = await submit(ai, line("two", "a wheel"), extra_body=into)
    assert (await ended(whole, ai, again)).status == "completed"
    assert await nearest("wheel") == {("one", 0, "the tide"), ("two", 0, "a wheel")}


async def test_a_collection_takes_its_own_model_only(ai, whole):
    client = await whole.client()
    await client.post("/v1/collections", json={"name": "books", "model": "org/nested"})
    done = await ended(whole, ai, await submit(ai, line("a"), extra_body={"collection": "books"}))
    assert (done.status, done.errors.data[0].code) == ("failed", "mismatched_model")
    with pytest.raises(openai.NotFoundError):
        await submit(ai, line("a"), extra_body={"collection": "none"})


# --- states ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("state", "times", "errors", "status"),
    [
        ("validating", {}, (), "validating"),
        ("queued", {}, (), "in_progress"),
        ("running", {}, (), "in_progress"),
        ("finalizing", {}, (), "finalizing"),
        ("completed", {}, (), "completed"),
        ("completed_with_errors", {}, (), "completed"),
        ("failed", {}, (), "completed"),
        ("failed", {}, ({"code": "x", "message": "y"},), "failed"),
        ("cancelling", {"cancelling": 5}, (), "cancelling"),
        ("cancelling", {"cancelling": 5, "expiring": 6}, (), "cancelling"),
        ("cancelling", {"expiring": 6}, (), "finalizing"),
        ("cancelled", {}, (), "cancelled"),
        ("expired", {}, (), "expired"),
    ],
)
def test_each_state_of_a_job_is_a_word_of_openai(state, times, errors, status):
    job = Job(
        "job_1",
        "acme",
        "k",
        "embeddings",
        "bulk",
        1.0,
        1.0,
        state=state,
        times=times or {state: 7.5},
        errors=errors,
        files={"input": "file-1"},
        expires_at=9.0,
    )
    batch = shown(job)
    assert (batch["id"], batch["status"]) == ("batch_1", status)
    assert (batch["failed_at"] is not None) == (status == "failed")
    assert (batch["completed_at"] is not None) == (status == "completed")
