"""`/v1/jobs` over a real Store: what was handed over, how far it is, and what became of it.

No worker runs here: the tests claim and settle items themselves.
"""

import asyncio
import json

import pytest

from serve.config import Chunking, Jobs
from serve.errors import StoreUnavailable
from serve.flows.jobs import REPORTS_KEPT_S
from serve.items import ENDS, Fault, Settlement
from serve.records import QueuePlace, QueueReport


JOBS = "/v1/jobs"
POISON = Fault("poison", "input_failed", "The model fails on it.")


@pytest.fixture
async def idle(start):
    return await start(working=False)


async def docs_client(whole, who="enterprise"):
    client = await whole.client(who)
    made = await client.post("/v1/collections", json={"name": "docs"})
    assert made.status_code == 201
    return client


@pytest.fixture
async def client(idle):
    return await docs_client(idle)


def body(count=3, **changes):
    items = [{"id": f"d{n}", "text": f"text {n}"} for n in range(count)]
    return {"collection": "docs", "items": items, **changes}


async def submit(client, count=3, headers=None, **changes):
    answer = await client.post(JOBS, json=body(count, **changes), headers=headers)
    assert answer.status_code == 202, answer.text
    return answer.json()["id"]


async def show(client, job):
    answer = await client.get(f"{JOBS}/{job}")
    assert answer.status_code == 200
    return answer.json()


async def end(whole, word="done", count=100, **values):
    """A worker's turn: settle up to `count` items that are ready with this word."""
    claim = await whole.store.claim("w", "prepare", count, 1e9, 0)
    values = {"result": {"status": "indexed", "chunks": 1}, "tokens": 5} | values
    settled = [Settlement(item.id, item.lease, word, **values) for item in claim.items]
    assert all(await whole.store.settle(settled))
    return len(settled)


def counts(shown):
    words = ("total", "processed", "succeeded", "skipped", "failed", "cancelled")
    return tuple(shown[word] for word in words)


# --- hand over -------------------------------------------------------------------------------


async def test_a_job_is_accepted_with_a_receipt(client, idle):
    sent = body(2, priority=70, on_error="stop", expires_in=60, metadata={"run": "7"})
    answer = await client.post(JOBS, json={**sent, "class": "interactive"})
    shown = answer.json()
    assert answer.status_code == 202
    assert answer.headers["location"] == f"{JOBS}/{shown['id']}"
    assert shown["receipt"] == {
        "object": "receipt",
        "id": shown["id"].replace("job_", "rcpt_"),
        "job": shown["id"],
        "level": "accepted",
        "documents": 2,
        "status_url": f"{JOBS}/{shown['id']}",
    }
    assert {
        "kind": "documents",
        "class": "interactive",
        "state": "queued",
        "is_complete": False,
        "paused": False,
        "priority": 70,
        "collection": "docs",
        "on_error": "stop",
        "webhook": None,
        "metadata": {"run": "7"},
        "expires_at": shown["created_at"] + 60,
        "total": 2,
        "progress": 0.0,
        "errors": [],
    }.items() <= shown.items()
    view = await idle.store.find_job("mighty", shown["id"])
    assert view.job.key == idle.keys["enterprise"].split("_")[1]
    assert view.job.weight == 1000


async def test_what_a_worker_gets(client, idle):
    document = {"id": "d", "text": "x" * 40, "metadata": {"year": 7}}
    await submit(client, items=[document])
    claim = await idle.store.claim("w", "prepare", 10, 1e9, 0)
    (item,) = claim.items
    assert (item.name, item.task, item.generation) == ("d", "document", 1)
    assert item.payload == {"text": "x" * 40, "metadata": {"year": 7}}
    assert item.cost == 40 / 4 + 32
    assert len(item.sha256) == 64


BAD_JOBS = [
    ({"items": []}, "items"),
    ({"items": [{"id": "a", "text": "x"}, {"id": "a", "text": "y"}]}, "items[1].id"),
    ({"items": [{"id": "a", "text": " "}]}, "items[0].text"),
    ({"items": [{"id": "a", "text": "x", "metadata": {"a": None}}]}, "items[0].metadata.a"),
    ({"items": [{"id": str(n), "text": "x"} for n in range(6)]}, "items"),
    ({"collection": ""}, "collection"),
    ({"kind": "images"}, "kind"),
    ({"class": "slow"}, "class"),
    ({"priority": 101}, "priority"),
    ({"on_error": "ignore"}, "on_error"),
    ({"expires_in": 0}, "expires_in"),
    ({"expires_in": 3601}, "expires_in"),
    ({"metadata": {str(n): "" for n in range(17)}}, "metadata"),
    ({"metadata": {"k": "v" * 513}}, "metadata.k"),
    ({"metadata": {"k" * 65: "v"}}, "metadata"),
    ({"webhook": ""}, "webhook"),
    ({"colour": "red"}, "colour"),
]


async def test_bad_jobs_name_their_fault(start):
    whole = await start(jobs=Jobs(items_max=5, expires_s_max=3600), working=False)
    client = await docs_client(whole)
    for change, param in BAD_JOBS:
        answer = await client.post(JOBS, json=body(1) | change)
        problem = answer.json()
        assert (answer.status_code, problem["code"]) == (400, "invalid_request"), change
        assert problem["param"].startswith(param)
    assert (await client.get(JOBS)).json()["data"] == []


async def test_there_must_be_a_collection(idle):
    client = await idle.client()
    answer = await client.post(JOBS, json=body())
    assert (answer.status_code, answer.json()["code"]) == (404, "collection_not_found")


async def test_there_must_be_a_webhook(client):
    answer = await client.post(JOBS, json=body(webhook="wh_1"))
    assert (answer.status_code, answer.json()["code"]) == (404, "webhook_not_found")
    assert (await client.get(JOBS)).json()["data"] == []


async def test_a_tenant_has_room_for_so_many(start):
    whole = await start(jobs=Jobs(open_jobs_max=1), working=False)
    client = await docs_client(whole)
    await submit(client)
    answer = await client.post(JOBS, json=body())
    assert (answer.status_code, answer.json()["code"]) == (429, "open_jobs")
    assert answer.headers["retry-after"] == "60"


async def test_submitting_is_charged_and_looking_is_not(idle):
    client = await docs_client(idle, "free")
    job = await submit(client)
    statuses = {(await client.post(JOBS, json=body())).status_code for _ in range(20)}
    assert statuses == {202, 429}
    assert (await client.get(JOBS)).status_code == 200
    assert (await client.post(f"{JOBS}/{job}/cancel")).status_code == 200
    assert (await client.post(f"{JOBS}/{job}/retry", json={"all": True})).status_code == 429


# --- idempotency -----------------------------------------------------------------------------

KEY = {"idempotency-key": "k-1"}


async def test_the_same_key_and_body_is_the_same_job(client, idle):
    first = await client.post(JOBS, json=body(), headers=KEY)
    assert "idempotent-replayed" not in first.headers
    await end(idle)
    again = await client.post(JOBS, json=body(priority=50), headers=KEY)  # the default
    assert again.status_code == 202
    assert again.headers["idempotent-replayed"] == "true"
    assert again.headers["location"] == first.headers["location"]
    assert (again.json()["id"], again.json()["state"]) == (first.json()["id"], "completed")
    other = await client.post(JOBS, json=body(), headers={"idempotency-key": "k-2"})
    assert other.json()["id"] != first.json()["id"]


async def test_the_same_key_with_another_body_is_refused(client):
    await submit(client, headers=KEY)
    answer = await client.post(JOBS, json=body(2), headers=KEY)
    assert (answer.status_code, answer.json()["code"]) == (422, "idempotency_mismatch")
    assert len((await client.get(JOBS)).json()["data"]) == 1


async def test_concurrent_twins_are_one_job(client):
    answers = await asyncio.gather(*(client.post(JOBS, json=body(), headers=KEY) for _ in range(8)))
    assert {answer.status_code for answer in answers} == {202}
    assert len({answer.json()["id"] for answer in answers}) == 1
    replayed = [answer.headers.get("idempotent-replayed") for answer in answers]
    assert (replayed.count(None), replayed.count("true")) == (1, 7)


async def test_a_key_is_its_tenants_own(client, idle):
    mine = await submit(client, headers=KEY)
    other = await docs_client(idle, "other")
    assert await submit(other, headers=KEY) != mine


async def test_odd_keys_are_refused(client):
    for key in ("", "a b", "k" * 256, "clé".encode("latin-1")):
        answer = await client.post(JOBS, json=body(), headers={"idempotency-key": key})
        assert (answer.status_code, answer.json()["param"]) == (400, "Idempotency-Key")


# --- how far it is ---------------------------------------------------------------------------


async def test_counts_are_truthful(client, idle):
    job = await submit(client, 4)
    assert counts(await show(client, job)) == (4, 0, 0, 0, 0, 0)
    await end(idle, count=1)
    await end(idle, "dead", count=1, fault=POISON)
    await end(idle, "skipped", count=1)
    shown = await show(client, job)
    assert counts(shown) == (4, 3, 2, 1, 1, 0)
    assert (shown["state"], shown["is_complete"], shown["progress"]) == ("running", False, 75.0)
    assert {(one["stage"], one["state"]): one["items"] for one in shown["stages"]} == {
        ("prepare", "dead"): 1,
        ("prepare", "done"): 1,
        ("prepare", "ready"): 1,
        ("prepare", "skipped"): 1,
    }
    await end(idle)
    shown = await show(client, job)
    assert counts(shown) == (4, 4, 3, 1, 1, 0)
    assert (shown["state"], shown["is_complete"]) == ("completed_with_errors", True)
    assert (shown["progress"], shown["eta_seconds"], shown["tokens"]) == (100.0, 0, 20)
    assert list(shown["times"]) == ["queued", "running", "completed_with_errors"]


async def test_progress_is_rounded_down(client, idle):
    job = await submit(client, 3)
    await end(idle, count=2)
    assert (await show(client, job))["progress"] == 66.6


async def test_unchanged_documents_are_skipped_and_say_so(client, idle):
    first = await submit(client, 2)
    await end(idle, chunks=1)
    again = await submit(client, 3)
    shown = await show(client, again)
    assert (counts(shown), shown["state"]) == ((3, 2, 2, 2, 0, 0), "queued")
    items = (await client.get(f"{JOBS}/{again}/items?state=skipped")).json()["data"]
    assert [one["result"]["status"] for one in items] == ["unchanged", "unchanged"]
    assert [one["id"] for one in items] == ["d0", "d1"]
    assert first != again


async def test_changed_documents_are_not_skipped(client, idle):
    document = {"id": "d", "text": "text"}
    noted = {"metadata": {"a": 1}}
    for change in ({}, noted, noted | {"text": "other"}):
        job = await submit(client, items=[document | change])
        assert (await show(client, job))["skipped"] == 0
        await end(idle, chunks=1)


async def test_another_chunking_is_another_content(start):
    hashes = set()
    for tokens in (32, 48):
        whole = await start(chunking=Chunking(tokens=tokens, overlap=8), working=False)
        await submit(await docs_client(whole), items=[{"id": "d", "text": "text"}])
        (item,) = (await whole.store.claim("w", "prepare", 1, 1e9, 0)).items
        hashes.add(item.sha256)
    assert len(hashes) == 2


def report(cost_s=0.01, tenants=4, share=0.25, pool="default"):
    place = QueuePlace("mighty", "bulk", 1, 1, 1, share, 0, 0, 0, 0, 0)
    return QueueReport(pool, "r", 1, 1, cost_s, tenants, (place,) if share else ())


PACES = [
    ((), None),
    ((report(pool="other"),), None),
    ((report(cost_s=0),), None),
    ((report(),), 2 * 34 * 0.01 / 0.25),
    ((report(), report(cost_s=0.02)), 2 * 34 / (0.25 / 0.01 + 0.25 / 0.02)),
    ((report(tenants=0, share=0),), 2 * 34 * 0.01),
    ((report(tenants=3, share=0),), 2 * 34 * 0.01 * 4),
]


async def test_the_eta_is_cost_over_the_tenants_own_pace(client, idle, clock):
    """A cost of 8 / 4 characters and 32 for each of two items."""
    items = [{"id": str(n), "text": "x" * 8} for n in range(2)]
    job = await submit(client, items=items)
    for reports, seconds in PACES:
        clock.advance(REPORTS_KEPT_S)
        idle.queues._port.reports = {"mighty": reports}
        shown = await show(client, job)
        assert shown["eta_seconds"] == (seconds if seconds is None else pytest.approx(seconds))


async def test_no_eta_is_no_failure(client, idle):
    idle.queues.faults = {"queue_reports": StoreUnavailable("away")}
    job = await submit(client)
    assert (await show(client, job))["eta_seconds"] is None


async def test_jobs_are_listed_newest_first(client, idle, clock):
    made = []
    for _ in range(5):
        made.append(await submit(client, 1))
        clock.advance(0.01)
    page = (await client.get(f"{JOBS}?limit=2")).json()
    assert ([one["id"] for one in page["data"]], page["has_more"]) == (made[:2:-1], True)
    assert "stages" not in page["data"][0]
    rest = (await client.get(f"{JOBS}?limit=3&after={made[3]}")).json()
    assert ([one["id"] for one in rest["data"]], rest["has_more"]) == (made[2::-1], False)
    await end(idle, count=1)
    ended = (await client.get(f"{JOBS}?state=completed&state=failed")).json()
    assert [one["id"] for one in ended["data"]] == made[:1]
    assert (await client.get(f"{JOBS}?kind=embeddings")).json()["data"] == []


async def test_items_by_state_and_page(client, idle):
    job = await submit(client, 5)
    await end(idle, "dead", count=2, fault=POISON)
    page = (await client.get(f"{JOBS}/{job}/items?limit=2&after=0")).json()
    assert ([one["seq"] for one in page["data"]], page["has_more"]) == ([1, 2], True)
    dead = (await client.get(f"{JOBS}/{job}/items?state=dead")).json()["data"]
    assert [one["id"] for one in dead] == ["d0", "d1"]
    assert dead[0]["error"] == {
        "kind": "poison",
        "code": "input_failed",
        "message": "The model fails on it.",
    }
    assert (await client.get(f"{JOBS}/{job}/items?after=4")).json()["data"] == []


async def test_bad_queries_are_400(client):
    job = await submit(client)
    for query in ("state=lost", "state=", "limit=0", "limit=1001", "limit=x", "after=x"):
        answer = await client.get(f"{JOBS}/{job}/items?{query}")
        assert (answer.status_code, answer.json()["param"]) == (400, query.split("=")[0])
    assert (await client.get(f"{JOBS}?kind=images")).status_code == 400


async def test_results_are_lines_of_what_has_ended(client, idle, monkeypatch):
    monkeypatch.setattr("serve.flows.jobs.RESULTS_PAGE", 3)
    job = await submit(client, 10)
    await end(idle, count=6)
    await end(idle, "dead", count=1, fault=POISON)
    answer = await client.get(f"{JOBS}/{job}/results")
    assert answer.headers["content-type"] == "application/jsonl"
    lines = [json.loads(line) for line in answer.text.splitlines()]
    assert [line["seq"] for line in lines] == list(range(7))
    assert [line["state"] for line in lines] == ["done"] * 6 + ["dead"]
    assert all(line["state"] in ENDS for line in lines)
    assert lines[0]["result"] == {"status": "indexed", "chunks": 1}
    assert (await client.get(f"{JOBS}/{await submit(client)}/results")).text == ""


# --- change ----------------------------------------------------------------------------------


async def change(client, job, word):
    answer = await client.post(f"{JOBS}/{job}/{word}")
    assert answer.status_code == 200, answer.text
    return answer.json()


async def test_cancel_keeps_what_is_done(client, idle):
    job = await submit(client, 3)
    await end(idle, count=1)
    shown = await change(client, job, "cancel")
    assert (shown["state"], counts(shown)) == ("cancelled", (3, 3, 1, 0, 0, 2))
    again = await client.post(f"{JOBS}/{job}/cancel")
    assert (again.status_code, again.json()["code"]) == (409, "job_ended")
    assert await end(idle) == 0


async def test_what_is_worked_on_while_cancelled_may_be_done(client, idle):
    job = await submit(client, 2)
    claim = await idle.store.claim("w", "prepare", 1, 1e9, 0)
    assert (await change(client, job, "cancel"))["state"] == "cancelling"
    (item,) = claim.items
    await idle.store.settle([Settlement(item.id, item.lease, "done")])
    shown = await show(client, job)
    assert (shown["state"], counts(shown)) == ("cancelled", (2, 2, 1, 0, 0, 1))


async def test_pause_and_resume(client, idle):
    idle.queues._port.reports = {"mighty": (report(),)}
    job = await submit(client, 2)
    shown = await change(client, job, "pause")
    assert (shown["paused"], shown["eta_seconds"]) == (True, None)
    assert await end(idle) == 0
    shown = await change(client, job, "resume")
    assert shown["paused"] is False
    assert await end(idle) == 2
    assert (await show(client, job))["state"] == "completed"


async def retry(client, job, **wanted):
    answer = await client.post(f"{JOBS}/{job}/retry", json=wanted)
    assert answer.status_code == 200, answer.text
    return answer.json()["items"]


async def test_retry_of_a_group_of_one_and_of_all(client, idle):
    job = await submit(client, 4)
    await end(idle, "dead", count=3, fault=POISON)
    await end(idle, "dead", count=1, fault=Fault("server", "overloaded", "full"))
    assert (await show(client, job))["state"] == "failed"
    assert await retry(client, job, all=True, dry_run=True) == 4
    assert await retry(client, job, error_code="overloaded", dry_run=True) == 1
    assert (await show(client, job))["state"] == "failed"
    assert await retry(client, job, seq=0) == 1
    shown = await show(client, job)
    assert (shown["state"], shown["failed"], shown["is_complete"]) == ("queued", 3, False)
    assert await retry(client, job, error_code="overloaded") == 1
    assert await retry(client, job, error_code="unheard_of") == 0
    assert await end(idle) == 2
    assert (await show(client, job))["state"] == "completed_with_errors"
    assert await retry(client, job, all=True) == 2
    assert await end(idle) == 2
    assert counts(await show(client, job)) == (4, 4, 4, 0, 0, 0)


async def test_a_large_job_is_retried_in_parts(client, idle, monkeypatch):
    monkeypatch.setattr("serve.flows.jobs.RETRIED_ITEMS", 2)
    job = await submit(client, 5)
    await end(idle, "dead", fault=POISON)
    parts, plain = [], idle.store._port.retry_items

    async def retry_items(op, tenant, job_id, replay):
        parts.append(replay.part)
        return await plain(op, tenant, job_id, replay)

    monkeypatch.setattr(idle.store._port, "retry_items", retry_items)
    assert await retry(client, job, all=True) == 5
    assert parts == [(0, 2), (2, 4), (4, 6)]
    assert await end(idle) == 5


async def test_a_cancelled_job_is_not_retried(client, idle):
    job = await submit(client, 2)
    await end(idle, "dead", count=1, fault=POISON)
    await change(client, job, "cancel")
    answer = await client.post(f"{JOBS}/{job}/retry", json={"all": True})
    assert (answer.status_code, answer.json()["code"]) == (409, "job_stopped")


async def test_a_retry_says_exactly_what(client):
    job = await submit(client)
    bad = ({}, {"all": False}, {"all": True, "seq": 1}, {"seq": -1}, {"dry_run": True})
    for wanted in bad:
        assert (await client.post(f"{JOBS}/{job}/retry", json=wanted)).status_code == 400


# --- tenants ---------------------------------------------------------------------------------


async def test_tenants_see_their_own_only(client, idle):
    job = await submit(client, 2)
    await end(idle, "dead", count=1, fault=POISON)
    other = await docs_client(idle, "other")
    for method, path in [
        ("GET", ""),
        ("GET", "/items"),
        ("GET", "/results"),
        ("GET", "/events"),
        ("POST", "/cancel"),
        ("POST", "/pause"),
        ("POST", "/resume"),
        ("POST", "/retry"),
    ]:
        json_body = {"all": True} if path == "/retry" else None
        answer = await other.request(method, f"{JOBS}/{job}{path}", json=json_body)
        assert (answer.status_code, path) == (404, path)
    assert (await other.get(JOBS)).json()["data"] == []
    assert (await other.get("/v1/stats")).json()["total"] == 0
    assert counts(await show(client, job)) == (2, 1, 0, 0, 1, 0)


async def test_every_route_needs_a_key(idle):
    nobody = await idle.client(None)
    reads = [f"{JOBS}/j/{path}" for path in ("items", "results", "events")]
    acts = [f"{JOBS}/j/{path}" for path in ("cancel", "pause", "resume", "retry")]
    for path in (JOBS, f"{JOBS}/j", "/v1/stats", "/v1/stats/events", *reads):
        assert (await nobody.get(path)).status_code == 401
    for path in (JOBS, *acts):
        assert (await nobody.post(path, json={})).status_code == 401


# --- the Store -------------------------------------------------------------------------------


async def test_without_the_store_nothing_is_accepted(client, idle):
    idle.store.faults = {"submit_job": StoreUnavailable("away", retry_after_s=1)}
    answer = await client.post(JOBS, json=body(), headers=KEY)
    assert (answer.status_code, answer.json()["code"]) == (503, "store_unavailable")
    idle.store.faults = {}
    again = await client.post(JOBS, json=body(), headers=KEY)
    assert "idempotent-replayed" not in again.headers


# --- figures ---------------------------------------------------------------------------------


async def test_stats_are_by_how_far_items_are(client, idle, clock):
    await submit(client, 6)
    await end(idle, count=1)
    await end(idle, "dead", count=1, fault=POISON)
    await end(idle, "advance", count=1, result={}, payload={})
    await idle.store.claim("w", "prepare", 1, 1e9, 0)
    shown = (await client.get("/v1/stats")).json()
    assert shown == {
        "object": "stats",
        "lag": {"landings": 0, "indexed": None, "searchable": None},
        "total": 6,
        "uploaded": 2,
        "preparing": 1,
        "predicting": 0,
        "embedding": 1,
        "ready": 1,
        "failed": 1,
        "cancelled": 0,
    }
    await end(idle)
    assert (await client.get("/v1/stats")).json() == shown  # for five seconds
    clock.advance(5)
    assert (await client.get("/v1/stats")).json()["ready"] == 3
