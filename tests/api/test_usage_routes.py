"""`GET /v1/usage` and `GET /v1/queue`: the caller's own figures, in numbers and in words."""

from serve.allowance import Tier
from serve.config import Admission
from serve.errors import LedgerUnavailable, StoreUnavailable
from serve.records import QueuePlace, QueueReport


EMBED = "/v1/embeddings"


def family(whole, who):
    return whole.keys[who].split("_")[1]


async def test_usage_of_the_month_by_key_and_class(whole):
    client = await whole.client("free")
    body = {"model": "plain", "input": "x" * 28}
    for _ in range(4):  # 30 of 100 tokens each: the last one is refused
        await client.post(EMBED, json=body)
    books = "/v1/collections/books"
    await client.post("/v1/collections", json={"name": "books"})
    await client.post(f"{books}/documents", json={"documents": [{"id": "1", "text": "tide"}]})
    await whole.service.context.quotas._report()
    shown = (await client.get("/v1/usage")).json()
    key = family(whole, "free")
    assert {k: shown[k] for k in ("tenant", "tier", "weight", "month")} == {
        "tenant": "frugal",
        "tier": "free",
        "weight": 1,
        "month": "2023-11",
    }
    assert shown["data"] == [
        {"key": key, "class": "bulk", "requests": 1, "tokens": 6, "refused": 0},
        {"key": key, "class": "interactive", "requests": 4, "tokens": 90, "refused": 1},
    ]
    assert shown["limits"]["interactive"] == [
        {
            "name": "tenant_requests_per_minute",
            "kind": "rate",
            "unit": "requests",
            "limit": 10,
            "per_minute": 60,
            "remaining": 6,
            "reset_s": 4,
        },
        {
            "name": "tenant_tokens_per_minute",
            "kind": "rate",
            "unit": "tokens",
            "limit": 100,
            "per_minute": 600,
            "remaining": 10,
            "reset_s": 9,
        },
    ]
    assert [limit["remaining"] for limit in shown["limits"]["bulk"]] == [9, 194]


async def test_levels_and_months_are_limits_too(start):
    tier = Tier(weight=2, interactive={"concurrent_max": 3}, tokens_per_month=100)
    whole = await start(
        admission=Admission(tiers={"free": tier, "premium": tier, "enterprise": tier})
    )
    client = await whole.client("free")
    await client.post(EMBED, json={"model": "plain", "input": "x" * 8})
    limits = (await client.get("/v1/usage")).json()["limits"]
    level, month = limits["interactive"]
    assert level | {"remaining": 3, "reset_s": None, "per_minute": None} == level
    assert (month["kind"], month["limit"], month["remaining"]) == ("month", 100, 90)
    assert month["reset_s"] == 16 * 86_400 + 6400
    assert limits["bulk"] == [month]


async def test_usage_and_queue_answer_one_who_is_refused(whole):
    client = await whole.client("free")
    while (await client.post(EMBED, json={"model": "plain", "input": "x"})).status_code == 200:
        pass
    assert (await client.get("/v1/usage")).status_code == 200
    assert (await client.get("/v1/queue")).status_code == 200


async def test_nothing_waits(whole):
    shown = (await (await whole.client()).get("/v1/queue")).json()
    assert shown == {
        "object": "queue",
        "why": "Nothing of yours is waiting.",
        "waiting": None,
        "classes": {},
        "everyone_tokens": 0,
    }


def place(klass, **changes):
    values = {
        "tenant": "frugal",
        "klass": klass,
        "weight": 1.0,
        "items": 8,
        "cost": 400.0,
        "share": 0.05,
        "ahead": 900.0,
        "starts_s": 1.5,
        "ends_s": 6.0,
        "oldest_s": 0.5,
        "effective_priority": 40.0,
    }
    return QueuePlace(**{**values, **changes})


async def test_why_mine_is_waiting(whole):
    places = (place("interactive"), place("bulk", starts_s=3.0, ends_s=9.0))
    report = QueueReport("default", "r1", 100, 5000.0, 1e-3, 4, places)
    whole.queues._port.reports = {"frugal": (report,)}
    shown = (await (await whole.client("free")).get("/v1/queue")).json()
    assert set(shown["classes"]) == {"interactive", "bulk"}
    assert shown["classes"]["interactive"] == {
        "items": 8,
        "tokens": 400,
        "share": 0.05,
        "ahead_tokens": 900,
        "starts_s": 1.5,
        "ends_s": 6,
        "oldest_s": 0.5,
        "effective_priority": 40,
    }
    assert (shown["waiting"]["items"], shown["waiting"]["ends_s"]) == (16, 9)
    assert shown["everyone_tokens"] == 5000
    assert "weight 1 among 4 waiting tenants" in shown["why"]
    other = (await (await whole.client("other")).get("/v1/queue")).json()
    assert other["waiting"] is None


async def test_away_is_a_503(whole):
    client = await whole.client()
    whole.queues.faults = {"queue_reports": LedgerUnavailable("Away.", retry_after_s=1)}
    answer = await client.get("/v1/queue")
    assert (answer.status_code, answer.json()["code"]) == (503, "ledger_unavailable")
    whole.store.faults = {"month_usage": StoreUnavailable("Away.", retry_after_s=1)}
    answer = await client.get("/v1/usage")
    assert (answer.status_code, answer.json()["code"]) == (503, "store_unavailable")
    assert (await (await whole.client(None)).get("/v1/queue")).status_code == 401
