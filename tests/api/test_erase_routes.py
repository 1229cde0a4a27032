"""`DELETE /v1/admin/tenants/{tenant}/data`: what goes, what stays, and what an interruption leaves."""

import asyncio
import json

import pytest

from serve.errors import IndexUnavailable, StoreUnavailable
from serve.flows.erasure import EraseFlow


DATA = "/v1/admin/tenants/acme/data"
BOOKS = "/v1/collections/books"
NOTHING = {
    "keys": 0,
    "collections": 0,
    "documents": 0,
    "records": 0,
    "jobs": 0,
    "items": 0,
    "files": 0,
    "file_bytes": 0,
    "webhooks": 0,
}
LINE = json.dumps({"id": "late", "text": "more text"}).encode()


def problem(response, status):
    assert response.status_code == status, response.text
    return response.json()


@pytest.fixture
async def admin(whole):
    return await whole.client("admin")


async def fill(client) -> None:
    """A collection with a raw vector and documents, jobs, a file and a webhook."""
    await client.post("/v1/collections", json={"name": "books"})
    row = {"id": "raw", "vector": [1.0] * 16}
    await client.post(f"{BOOKS}/vectors", json={"vectors": [row]})
    documents = [{"id": "a", "text": "some text"}, {"id": "b", "text": "more text"}]
    answer = await client.post(f"{BOOKS}/documents", json={"documents": documents})
    assert answer.status_code == 200
    gone = await client.request("DELETE", f"{BOOKS}/documents", json={"ids": ["b"]})
    assert gone.status_code == 200
    form = {"file": ("lines.jsonl", LINE), "purpose": (None, "batch")}
    assert (await client.post("/v1/files", files=form)).status_code == 200
    hook = {"url": "https://example.com/hook"}
    assert (await client.post("/v1/webhooks", json=hook)).status_code == 201


async def seen(client) -> dict[str, int]:
    """How much of each there is, as its tenant sees it."""
    found = {}
    for name in ("collections", "jobs", "files", "webhooks"):
        found[name] = len((await client.get(f"/v1/{name}")).json()["data"])
    return found


async def erase(admin, query="", status=200):
    answer = await admin.delete(f"{DATA}{query}")
    assert answer.status_code == status, answer.text
    return answer.json()


async def test_all_of_a_tenant_goes_and_nothing_of_another(whole, admin):
    client, other = await whole.client(), await whole.client("other")
    await fill(client)
    await fill(other)
    before = await seen(other)
    assert await erase(admin) == {
        "object": "tenant.data",
        "tenant": "acme",
        "removed": {
            **NOTHING,
            "collections": 1,
            "documents": 2,
            "records": 2,
            "jobs": 2,
            "items": 3,
            "files": 1,
            "file_bytes": len(LINE),
            "webhooks": 1,
        },
    }
    assert await seen(client) == dict.fromkeys(before, 0)
    assert await seen(other) == before
    assert len(whole.index._spaces) == 1
    assert (await other.post(f"{BOOKS}/search", json={"text": "some text"})).json()["data"]
    assert (await client.get("/v1/stats")).json()["total"] == 0
    assert (await erase(admin))["removed"] == NOTHING
    stats = await whole.store.job_stats("stranger")
    assert stats.total == 3


async def test_bytes_of_files_go_too(whole, admin):
    client = await whole.client()
    await fill(client)
    kept = list(whole.blobs._folder.glob("file-*"))
    assert len(kept) == 1
    await erase(admin)
    assert not list(whole.blobs._folder.glob("file-*"))


async def test_a_tenant_can_begin_anew(whole, admin):
    client = await whole.client()
    await fill(client)
    await erase(admin)
    await fill(client)
    found = await client.post(f"{BOOKS}/search", json={"text": "some text", "top_k": 5})
    assert {hit["document"] for hit in found.json()["data"]} == {"raw", "a"}


async def test_open_jobs_go_with_what_was_to_be_done(start):
    whole = await start(working=False)
    client, admin = await whole.client(), await whole.client("admin")
    await client.post("/v1/collections", json={"name": "books"})
    items = [{"id": str(n), "text": "text"} for n in range(5)]
    for _ in range(12):
        await client.post("/v1/jobs", json={"collection": "books", "items": items})
    claim = await whole.store.claim("w", "prepare", 3, 1e9, 0.0)
    removed = (await erase(admin))["removed"]
    assert (removed["jobs"], removed["items"], removed["documents"]) == (12, 60, 5)
    assert (await seen(client))["jobs"] == 0
    assert await whole.store.keep("w", [item.id for item in claim.items]) == {
        item.id for item in claim.items
    }
    assert (await whole.store.claim("w", "prepare", 99, 1e9, 0.0)).items == ()
    await whole.store._port.tick()
    assert (await client.get("/v1/stats")).json()["total"] == 0


async def test_keys_stay_unless_they_are_to_be_revoked(whole, admin):
    client = await whole.client()
    assert (await erase(admin))["removed"]["keys"] == 0
    assert (await client.get("/v1/collections")).status_code == 200
    assert (await erase(admin, "?keys=revoke"))["removed"]["keys"] == 1
    whole.clock.advance(1)
    assert (await client.get("/v1/collections")).status_code == 401
    tenant = await admin.get("/v1/admin/tenants/acme")
    assert tenant.json()["tier"] == "premium"


async def test_the_last_admin_key_stays_and_then_so_does_all_else(whole, admin):
    await admin.post("/v1/collections", json={"name": "mine"})
    refused = await admin.delete("/v1/admin/tenants/operators/data?keys=revoke")
    assert problem(refused, 409)["code"] == "last_admin_key"
    assert len((await admin.get("/v1/collections")).json()["data"]) == 1


async def test_the_log_says_that_it_began_and_what_went(whole, admin):
    await fill(await whole.client())
    removed = (await erase(admin))["removed"]
    entries = (await admin.get("/v1/admin/audit?tenant=acme")).json()["data"]
    done, begun = (one for one in entries if one["action"] == "tenant.erase")
    assert begun["detail"]["new"] == {"keys": "keep", "state": "begun"}
    assert done["detail"]["new"] == {"keys": "keep", "state": "done", "removed": removed}
    assert done["by"] == begun["by"] == f"key:{whole.keys['admin'].split('_')[1]}"


async def test_what_is_asked_is_checked(whole, admin):
    assert problem(await admin.delete(f"{DATA}?keys=burn"), 400)["param"] == "keys"
    assert problem(await admin.delete("/v1/admin/tenants/nobody/data"), 404)["param"] == "tenant"
    user = await whole.client()
    assert problem(await user.delete(DATA), 403)["code"] == "admin_required"
    stranger = await whole.client("other")
    assert problem(await stranger.delete(DATA), 403)["code"] == "admin_required"


INTERRUPTIONS = (
    ("store", "delete_collection"),
    ("store", "erase_rest"),
    ("store", "deleted_collections"),
    ("upserter", "drop"),
    ("store", "purge_collection"),
    ("store", "list_jobs"),
    ("store", "erase_jobs"),
    ("store", "list_files"),
    ("store", "delete_file"),
)


@pytest.mark.parametrize(("port", "call"), INTERRUPTIONS)
async def test_a_repeat_finishes_what_was_interrupted(whole, admin, port, call):
    client = await whole.client()
    await fill(client)
    error = IndexUnavailable("Away.") if port == "upserter" else StoreUnavailable("Away.")
    ports = {"store": whole.store, "upserter": whole.upserter}
    ports[port].faults[call] = error
    refused = problem(await admin.delete(DATA), 503)
    assert refused["code"] == error.code
    ports[port].faults.clear()
    await erase(admin)
    assert await seen(client) == {"collections": 0, "jobs": 0, "files": 0, "webhooks": 0}
    assert not whole.index._spaces
    assert (await erase(admin))["removed"] == NOTHING


async def test_an_erasure_ends_in_time(whole, admin, monkeypatch):
    async def for_ever(*_):
        await asyncio.Event().wait()

    await fill(await whole.client())
    monkeypatch.setattr(whole.service.erasure, "_wait_s", 0.01)
    monkeypatch.setattr(EraseFlow, "_hide_collections", for_ever)
    assert problem(await admin.delete(DATA), 504)["code"] == "deadline_exceeded"
