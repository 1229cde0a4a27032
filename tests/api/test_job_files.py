"""Jobs whose documents stand in an uploaded file, worked on by a real worker over the fake engine."""

import json

import pytest


@pytest.fixture
async def client(whole):
    client = await whole.client("enterprise")
    assert (await client.post("/v1/collections", json={"name": "docs"})).status_code == 201
    return client


async def upload(client, *lines):
    data = "\n".join(one if isinstance(one, str) else json.dumps(one) for one in lines)
    answer = await client.post(
        "/v1/files", files={"file": ("documents.jsonl", data)}, data={"purpose": "batch"}
    )
    assert answer.status_code == 200, answer.text
    return answer.json()["id"]


async def handed_over(whole, client, file, **changes):
    """The job once it has ended."""
    answer = await client.post("/v1/jobs", json={"collection": "docs", "file": file, **changes})
    assert answer.status_code == 202, answer.text
    job = answer.json()["id"]
    with whole.service.feed.watch(job) as watch:
        await watch.ended(20)
    return (await client.get(f"/v1/jobs/{job}")).json()


async def test_every_line_becomes_a_document(whole, client):
    lines = [{"id": f"d{n}", "text": f"river {n}", "metadata": {"n": n}} for n in range(1200)]
    file = await upload(client, *lines[:600], "", *lines[600:])
    job = await handed_over(whole, client, file)
    assert (job["state"], job["total"], job["succeeded"]) == ("completed", 1200, 1200)
    assert (await client.get("/v1/collections/docs")).json()["records"] == 1200
    found = await client.post(
        "/v1/collections/docs/search", json={"text": "river 7", "top_k": 1, "filter": {"n": 7}}
    )
    assert found.json()["data"][0]["document"] == "d7"


@pytest.mark.parametrize(
    ("line", "code", "param"),
    [
        ("no json", "invalid_json_line", None),
        ("[1]", "invalid_json_line", None),
        ({"id": "a"}, "invalid_request", "text"),
        ({"id": "a", "text": " "}, "invalid_request", "text"),
        ({"id": "a", "text": "x", "metadata": {"k": None}}, "invalid_request", "metadata.k"),
        ({"id": "a", "text": "x", "typo": 1}, "invalid_request", "typo"),
        ({"id": "good", "text": "again"}, "duplicate_id", "id"),
    ],
)
async def test_one_bad_line_fails_the_job_before_anything_is_written(
    whole, client, line, code, param
):
    file = await upload(client, {"id": "good", "text": "x"}, line)
    job = await handed_over(whole, client, file)
    assert (job["state"], job["total"]) == ("failed", 0)
    (error,) = job["errors"]
    assert (error["line"], error["code"], error["param"]) == (2, code, param)
    assert (await client.get("/v1/collections/docs")).json()["records"] == 0


async def test_items_and_file_exclude_each_other(client):
    for changes in ({}, {"file": "file-1", "items": [{"id": "a", "text": "x"}]}):
        answer = await client.post("/v1/jobs", json={"collection": "docs", **changes})
        assert answer.status_code == 400
        assert answer.json()["param"] == "items"


async def test_another_tenants_file_is_not_found(whole, client):
    other = await whole.client("other")
    file = await upload(other, {"id": "a", "text": "x"})
    answer = await client.post("/v1/jobs", json={"collection": "docs", "file": file})
    assert (answer.status_code, answer.json()["param"]) == (404, "file")
