"""Input that a parser, a database or a codec chokes on: refused at the door, with the field's name."""

import pytest


DEEP = 300
"""More levels than pydantic and orjson write, fewer than orjson reads."""


@pytest.fixture
async def idle(start):
    return await start(working=False)


@pytest.fixture
async def client(idle):
    found = await idle.client("enterprise")
    assert (await found.post("/v1/collections", json={"name": "docs"})).status_code == 201
    return found


def nested(levels):
    value = "x"
    for _ in range(levels):
        value = {"a": value}
    return value


def refused(answer, param):
    body = answer.json()
    found = body.get("error", body)
    assert (answer.status_code, found.get("param")) == (400, param), body


async def test_a_deep_body_with_an_idempotency_key_is_refused(client):
    document = {"id": "d", "text": "x", "metadata": nested(DEEP)}
    answer = await client.post(
        "/v1/jobs",
        json={"collection": "docs", "items": [document]},
        headers={"idempotency-key": "k"},
    )
    assert (answer.status_code, answer.json()["code"]) == (400, "invalid_json")


@pytest.mark.parametrize("seq", [2**31, 2**63, 2**64 - 1])
async def test_a_number_that_no_item_can_have_is_refused(client, seq):
    answer = await client.post("/v1/jobs/job_1/retry", json={"seq": seq})
    assert answer.status_code == 400
    refused(await client.get("/v1/jobs/job_1/items", params={"after": 2**31}), "after")


@pytest.mark.parametrize(
    "path",
    [
        "/v1/jobs/%00",
        "/v1/batches/%00",
        "/v1/files/a%00b",
        "/v1/webhooks/%00",
        "/v1/admin/keys/%00",
    ],
)
async def test_a_path_with_nul_is_refused(idle, path):
    client = await idle.client("admin")
    method = client.delete if "keys" in path else client.get
    refused(await method(path), "path")


@pytest.mark.parametrize("path", ["/v1/jobs", "/v1/files", "/v1/batches"])
async def test_a_query_with_nul_is_refused(client, path):
    refused(await client.get(f"{path}?after=a%00"), "after")


@pytest.mark.parametrize("field", ["collection", "webhook", "file"])
async def test_a_job_s_field_with_nul_is_refused(client, field):
    sent = {"collection": "docs", "items": [{"id": "d", "text": "x"}], field: "a\x00"}
    refused(await client.post("/v1/jobs", json=sent), field)


@pytest.mark.parametrize("name", ["x" * 513, "a\x00", "a\nb", "  "])
async def test_ids_to_delete_are_checked_like_those_to_write(client, name):
    path = "/v1/collections/docs/documents"
    answer = await client.request("DELETE", path, json={"ids": ["fine", name]})
    refused(answer, "ids[1]")


async def test_an_upload_in_a_charset_that_cannot_be_read_is_refused(client):
    form = b'--x\r\ncontent-disposition: form-data; name="purpose"\r\n\r\nbatch\r\n--x--\r\n'
    kind = "multipart/form-data; boundary=x; charset=undefined"
    answer = await client.post("/v1/files", content=form, headers={"content-type": kind})
    refused(answer, "content-type")


async def test_jobs_of_several_kinds_are_listed_together(client):
    sent = {"collection": "docs", "items": [{"id": "d", "text": "x"}]}
    assert (await client.post("/v1/jobs", json=sent)).status_code == 202
    listed = await client.get("/v1/jobs", params={"kind": ["embeddings", "documents"]})
    assert len(listed.json()["data"]) == 1
    listed = await client.get("/v1/jobs", params={"kind": "embeddings"})
    assert listed.json()["data"] == []


async def test_pausing_and_resuming_are_charged_and_cancelling_is_not(idle):
    client = await idle.client("free")
    assert (await client.post("/v1/collections", json={"name": "docs"})).status_code == 201
    sent = {"collection": "docs", "items": [{"id": "d", "text": "x"}]}
    job = (await client.post("/v1/jobs", json=sent)).json()["id"]
    statuses = [
        (await client.post(f"/v1/jobs/{job}/{word}")).status_code
        for word in ["pause", "resume"] * 10
    ]
    assert set(statuses) == {200, 429}
    assert (await client.post(f"/v1/jobs/{job}/cancel")).status_code == 200


async def test_a_file_is_read_in_ranges_and_not_found_without_its_bytes(idle, client):
    form = {"file": ("a.jsonl", b"{}\n"), "purpose": (None, "batch")}
    file = (await client.post("/v1/files", files=form)).json()["id"]
    path = f"/v1/files/{file}/content"
    assert (await client.get(path)).content == b"{}\n"
    for asked, status, got, span in (
        ("bytes=1-", 206, b"}\n", "bytes 1-2/3"),
        ("bytes=0-0", 206, b"{", "bytes 0-0/3"),
        ("bytes=1-99", 206, b"}\n", "bytes 1-2/3"),
        ("bytes=2-1", 200, b"{}\n", None),
        ("bytes=-1", 200, b"{}\n", None),
        ("lines=0-", 200, b"{}\n", None),
    ):
        answer = await client.get(path, headers={"range": asked})
        assert (answer.status_code, answer.content) == (status, got)
        assert answer.headers.get("content-range") == span
    assert (await client.get(path, headers={"range": "bytes=3-"})).status_code == 416
    await idle.blobs.delete(file)
    assert (await client.get(path)).status_code == 404
