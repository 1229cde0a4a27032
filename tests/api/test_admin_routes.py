"""`/v1/admin/…`: keys, tenants and the audit log; secrets once, and only for operators."""

import asyncio
import json

import pytest

from serve.config import Ingress, Store, Worker, WorkerScaling
from serve.errors import LedgerUnavailable
from serve.scaling import Decision


KEYS, TENANTS, AUDIT = "/v1/admin/keys", "/v1/admin/tenants", "/v1/admin/audit"
SCALING = "/v1/admin/autoscaling"


@pytest.fixture
async def admin(whole):
    return await whole.client("admin")


async def ok(request, status=200):
    answer = await request
    assert answer.status_code == status, answer.text
    return answer.json()


def problem(answer, status):
    assert answer.status_code == status, answer.text
    return answer.json()


async def made(admin, tenant="acme", **body):
    return await ok(admin.post(KEYS, json={"tenant": tenant, **body}), 201)


async def status(whole, secret):
    whole.keys["new"] = secret
    return (await (await whole.client("new")).get("/v1/models")).status_code


def cache_lapses(whole):
    whole.clock.advance(whole.service.context.settings.admission.key_cache_s)


# --- keys ------------------------------------------------------------------------------------


async def test_a_key_is_made_shown_once_and_works(admin, whole):
    answer = await admin.post(KEYS, json={"tenant": "new", "tier": "free", "name": "laptop"})
    key = problem(answer, 201)
    assert answer.headers["cache-control"] == "no-store"
    assert key | {"secret": "-", "id": "-", "family": "-"} == {
        "object": "key",
        "id": "-",
        "family": "-",
        "tenant": "new",
        "tier": "free",
        "role": "user",
        "name": "laptop",
        "limits": {},
        "created": 1_700_000_000,
        "expires": None,
        "secret": "-",
    }
    assert key["secret"].startswith(f"hr_{key['id']}_")
    assert await status(whole, key["secret"]) == 200
    listed = await admin.get(KEYS, params={"tenant": "new"})
    assert listed.json()["data"] == [{k: v for k, v in key.items() if k != "secret"}]
    assert key["secret"].removeprefix(f"hr_{key['id']}_") not in listed.text
    assert len((await ok(admin.get(KEYS)))["data"]) == 6


async def test_keys_are_listed_in_pages(admin):
    whole = [key["id"] for key in (await ok(admin.get(KEYS)))["data"]]
    ids = []
    while page := (await ok(admin.get(KEYS, params={"limit": 2, "after": (ids or [""])[-1]})))[
        "data"
    ]:
        assert len(page) <= 2
        ids += [key["id"] for key in page]
    assert ids == whole == sorted(ids)
    assert len(ids) == 5


async def test_a_revoked_key_is_refused_once_the_cache_lapses(admin, whole):
    key = await made(admin)
    assert await status(whole, key["secret"]) == 200
    gone = await ok(admin.delete(f"{KEYS}/{key['id']}"))
    assert gone == {"object": "key", "id": key["id"], "revoked": True}
    cache_lapses(whole)
    assert await status(whole, key["secret"]) == 401
    assert problem(await admin.delete(f"{KEYS}/{key['id']}"), 404)["param"] == "id"


async def test_a_rotated_key_lives_beside_its_successor_then_ends(admin, whole):
    old = await made(admin, name="ci", limits={"interactive": {"requests_per_minute": 5}})
    answer = await admin.post(f"{KEYS}/{old['id']}/rotate", json={"overlap_s": 60})
    new = problem(answer, 201)
    assert answer.headers["cache-control"] == "no-store"
    assert new["id"] != old["id"]
    assert new["secret"] != old["secret"]
    assert [new[word] for word in ("family", "name", "limits", "tenant")] == [
        old[word] for word in ("family", "name", "limits", "tenant")
    ]
    taken = problem(await admin.post(f"{KEYS}/{old['id']}/rotate", json={}), 409)
    assert taken["code"] == "conflict"
    cache_lapses(whole)
    assert [await status(whole, key["secret"]) for key in (old, new)] == [200, 200]
    whole.clock.advance(60)
    assert [await status(whole, key["secret"]) for key in (old, new)] == [401, 200]


async def test_two_live_keys_are_one_payer(admin, whole):
    old = await made(admin, limits={"interactive": {"requests_per_minute": 2}})
    new = await ok(admin.post(f"{KEYS}/{old['id']}/rotate", json={}), 201)
    statuses = []
    for key in (old, new, old, new):
        whole.keys["new"] = key["secret"]
        client = await whole.client("new")
        answer = await client.post("/v1/embeddings", json={"model": "plain", "input": "x"})
        statuses.append(answer.status_code)
    assert statuses == [200, 200, 429, 429]


async def test_a_keys_name_and_limits_are_changed(admin, whole):
    key = await made(admin)
    url = f"{KEYS}/{key['id']}"
    limits = {"interactive": {"requests_per_minute": 60, "requests_burst": 1}}
    changed = await ok(admin.patch(url, json={"name": "ci", "limits": limits}))
    assert (changed["name"], changed["limits"]) == ("ci", limits)
    assert "secret" not in changed
    cache_lapses(whole)
    whole.keys["new"] = key["secret"]
    client = await whole.client("new")
    answer = await client.get("/v1/models")
    assert answer.headers["x-ratelimit-limit-requests"] == "1"
    assert (await ok(admin.patch(url, json={})))["limits"] == limits
    assert (await ok(admin.patch(url, json={"limits": {}})))["limits"] == {}


async def test_the_last_admin_key_stays(admin, whole):
    mine = whole.keys["admin"].split("_")[1]
    refused = problem(await admin.delete(f"{KEYS}/{mine}"), 409)
    assert refused["code"] == "last_admin_key"


# --- tenants ---------------------------------------------------------------------------------


async def test_a_new_tier_and_limits_hold_once_the_cache_lapses(admin, whole):
    client = await whole.client("free")
    before = await client.get("/v1/models")
    assert before.headers["x-ratelimit-limit-requests"] == "10"
    shown = await ok(admin.put(f"{TENANTS}/frugal", json={"tier": "premium"}))
    assert shown == await ok(admin.get(f"{TENANTS}/frugal"))
    assert (shown["tier"], shown["limits"]) == ("premium", {})
    cache_lapses(whole)
    assert (await client.get("/v1/models")).headers["x-ratelimit-limit-requests"] == "1000"
    limits = {"interactive": {"requests_per_minute": 7}, "tokens_per_month": 5}
    await ok(admin.put(f"{TENANTS}/frugal", json={"limits": limits}))
    cache_lapses(whole)
    own = await client.get("/v1/models")
    assert own.headers["x-ratelimit-limit-requests"] == "7"
    assert own.headers["x-ratelimit-limit-tokens"] == "10000"
    assert '"tenant_tokens_per_month";q=5;' in own.headers["ratelimit-policy"]


async def test_a_new_tiers_weight_reaches_the_embedder(admin, whole):
    client = await whole.client("free")
    body = {"model": "plain", "input": "x"}
    await client.post("/v1/embeddings", json=body)
    await ok(admin.put(f"{TENANTS}/frugal", json={"tier": "premium"}))
    cache_lapses(whole)
    await client.post("/v1/embeddings", json=body)
    assert [call.weight for call in whole.embedder.calls] == [1, 100]


async def test_tenants_are_listed_in_pages(admin):
    for name in ("zoe", "yan"):
        await ok(admin.put(f"{TENANTS}/{name}", json={"tier": "free"}))
    names = []
    while page := (await ok(admin.get(TENANTS, params={"limit": 2, "after": (names or [""])[-1]})))[
        "data"
    ]:
        assert len(page) <= 2
        names += [one["tenant"] for one in page]
    assert names == ["acme", "frugal", "mighty", "operators", "stranger", "yan", "zoe"]
    assert problem(await admin.get(f"{TENANTS}/nobody"), 404)["param"] == "tenant"


# --- input -----------------------------------------------------------------------------------


async def test_wrong_input_is_named(admin, subtests):
    for method, url, body, param in (
        ("POST", KEYS, {}, "tenant"),
        ("POST", KEYS, {"tenant": "A b"}, "tenant"),
        ("POST", KEYS, {"tenant": "acme", "tier": "gold"}, "tier"),
        ("POST", KEYS, {"tenant": "acme", "role": "root"}, "role"),
        ("POST", KEYS, {"tenant": "acme", "name": "x" * 129}, "name"),
        ("POST", KEYS, {"tenant": "acme", "limits": []}, "limits"),
        ("POST", KEYS, {"tenant": "acme", "limits": {"colour": 1}}, "limits.colour"),
        ("POST", KEYS, {"tenant": "acme", "colour": 1}, "colour"),
        ("PUT", f"{TENANTS}/acme", {"tier": "gold"}, "tier"),
        ("PUT", f"{TENANTS}/acme", {"limits": {"tokens_per_month": 0}}, "limits.tokens_per_month"),
        ("PUT", f"{TENANTS}/A%20b", {"tier": "free"}, "tenant"),
        ("GET", f"{KEYS}?limit=0", None, "limit"),
        ("GET", f"{TENANTS}?limit=0", None, "limit"),
        ("GET", f"{TENANTS}?limit=x", None, "limit"),
        ("GET", f"{AUDIT}?limit=1001", None, "limit"),
        ("GET", f"{AUDIT}?before=-1", None, "before"),
        ("POST", f"{KEYS}/{'0' * 16}/rotate", {"overlap_s": -1}, "overlap_s"),
    ):
        with subtests.test(url=url, body=str(body)[:60]):
            answer = await admin.request(method, url, json=body)
            assert problem(answer, 400)["param"] == param
    for method, path in (("PATCH", ""), ("POST", "/rotate"), ("DELETE", "")):
        body = None if method == "DELETE" else {}
        answer = await admin.request(method, f"{KEYS}/{'0' * 16}{path}", json=body)
        assert problem(answer, 404)["param"] == "id"
    new = await admin.post(KEYS, json={"tenant": "nobody"})
    assert problem(new, 404)["param"] == "tenant"


async def test_live_keys_are_bounded(start):
    whole = await start(store=Store(keys_max=3))
    admin = await whole.client("admin")
    answers = await asyncio.gather(*(admin.post(KEYS, json={"tenant": "acme"}) for _ in range(5)))
    assert sorted(answer.status_code for answer in answers) == [201] * 2 + [409] * 3
    assert {answer.json().get("code") for answer in answers} == {None, "too_many_keys"}


# --- who may, and who did --------------------------------------------------------------------


def operations(openapi):
    for path, methods in openapi["paths"].items():
        for method in methods:
            if path.startswith("/v1/admin"):
                yield method.upper(), path.replace("{key_id}", "0" * 16).replace("{tenant}", "acme")


async def test_users_are_refused_before_anything_is_read(whole, admin, subtests):
    user, stranger = await whole.client("enterprise"), await whole.client(None)
    found = list(operations(whole.app.openapi()))
    assert len(found) == 12
    for method, url in found:
        with subtests.test(method=method, url=url):
            answer = await user.request(method, url, content=b"no json")
            assert problem(answer, 403)["code"] == "admin_required"
            assert "x-ratelimit-limit-requests" in answer.headers
            assert problem(await stranger.request(method, url), 401)
    assert (await ok(admin.get(AUDIT)))["data"][0]["by"] == ""  # nothing since the fixture


async def test_a_demoted_key_cannot_use_what_was_cached(admin, whole):
    key = await made(admin, role="admin")
    whole.keys["new"] = key["secret"]
    second = await whole.client("new")
    assert (await second.get(AUDIT)).status_code == 200
    await ok(admin.delete(f"{KEYS}/{key['id']}"))
    cache_lapses(whole)
    assert (await second.get(AUDIT)).status_code == 401


async def test_the_log_says_who_did_what_and_no_secret(admin, whole):
    by = f"key:{whole.keys['admin'].split('_')[1]}"
    key = await made(admin, "new", tier="free")
    new = await ok(admin.post(f"{KEYS}/{key['id']}/rotate", json={"overlap_s": 5}), 201)
    await ok(admin.patch(f"{KEYS}/{new['id']}", json={"name": "ci"}))
    await ok(admin.put(f"{TENANTS}/new", json={"tier": "premium"}))
    await ok(admin.delete(f"{KEYS}/{key['id']}"))
    page = await admin.get(AUDIT, params={"tenant": "new"})
    entries = page.json()["data"]
    assert [(one["action"], one["subject"]) for one in entries] == [
        ("key.revoke", key["id"]),
        ("tenant.set", ""),
        ("key.change", new["id"]),
        ("key.rotate", key["id"]),
        ("key.create", key["id"]),
        ("tenant.set", ""),
    ]
    assert {one["by"] for one in entries} == {by}
    assert {one["at"] for one in entries} == {1_700_000_000.0}
    assert entries[1]["detail"] == {"new": {"tier": "premium"}, "old": {"tier": "free"}}
    for one in (key, new):
        assert one["secret"].split("_", 2)[2] not in page.text
    assert "sha256" not in page.text
    numbers = [one["number"] for one in entries]
    assert numbers == sorted(numbers, reverse=True)
    older = await ok(admin.get(AUDIT, params={"tenant": "new", "before": numbers[3], "limit": 1}))
    assert older["data"] == [entries[4]]


async def test_no_other_tenants_key_shows_on_any_other_route(admin, whole):
    theirs = await made(admin, "stranger", name="theirs")
    whole.keys["new"] = theirs["secret"]
    other, mine = await whole.client("new"), await whole.client("premium")
    embed = {"model": "plain", "input": "x"}
    await other.post("/v1/embeddings", json=embed)
    await mine.post("/v1/embeddings", json=embed)
    await whole.service.context.quotas._report()
    for path in ("/v1/usage", "/v1/queue", "/v1/models", "/v1/collections"):
        answer = await mine.get(path)
        shown = answer.text + json.dumps(dict(answer.headers))
        assert theirs["id"] not in shown
        assert "stranger" not in shown
    own = await mine.get("/v1/usage")
    assert {row["key"] for row in own.json()["data"]} == {whole.keys["premium"].split("_")[1]}


# --- autoscaling -----------------------------------------------------------------------------


async def test_every_deployment_says_how_many_replicas_it_should_have_and_why(start):
    worker = Worker(autoscaling=WorkerScaling(min=2, max=9))
    whole = await start(ingress=Ingress(replicas=3), workers=(worker,))
    admin = await whole.client("admin")
    shown = {one["deployment"]: one for one in (await ok(admin.get(SCALING)))["data"]}
    assert set(shown) == {"ingress", "worker-items", "embedder-default"}
    door, undecided = shown["ingress"], shown["worker-items"]
    assert (door["fixed"], door["min"], door["max"], door["wanted"]) == (True, 3, 3, None)
    assert "`replicas`" in door["reason"]
    assert (undecided["fixed"], undecided["min"], undecided["max"]) == (False, 2, 9)
    assert (undecided["wanted"], undecided["at"], undecided["inputs"]) == (None, None, {})
    inputs = {"items": 1500.0, "backlog_age_s": None}
    whole.queues._port.decided = (
        Decision("worker-items", 4, 3, 2, "Rises from 3 to 4.", inputs, 5.0),
        Decision("worker-of-old", 1, 1, 1, "Stays.", {}, 5.0),
    )
    shown = {one["deployment"]: one for one in (await ok(admin.get(SCALING)))["data"]}
    assert len(shown) == 3
    assert shown["worker-items"] == undecided | {
        "wanted": 4,
        "target": 3,
        "running": 2,
        "at": 5.0,
        "inputs": inputs,
        "reason": "Rises from 3 to 4.",
    }


async def test_nobody_can_say_while_the_ledger_is_away(admin, whole):
    whole.queues.faults = {"decisions": LedgerUnavailable("Away.", retry_after_s=1)}
    assert problem(await admin.get(SCALING), 503)["code"] == "ledger_unavailable"
