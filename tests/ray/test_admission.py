"""Limits over two ingress replicas and the Ledger: exact, and nobody is wronged, whoever is killed."""

import asyncio
import itertools
import math
import threading
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import httpx
import pytest

from bench.redis_server import BINARY, redis_server
from deployments.handles import LedgerPort
from serve.admission.limits import limits_of
from serve.admission.quotas import Quotas
from serve.admission.redis import RedisLedger
from serve.allowance import Allowance, Quota
from serve.errors import QuotaExceeded
from serve.ports import Ledger
from serve.records import Caller, UsageRow


pytestmark = [pytest.mark.ray, pytest.mark.timeout(150)]

TOLERANCE = 1.02
TEXT = "twenty bytes of text"


def embed(client: httpx.Client, *texts: str, **headers: str) -> httpx.Response:
    return client.post("/v1/embeddings", json={"model": "fake", "input": texts}, headers=headers)


class Traffic:
    """Requests of one key from several threads, and what became of them."""

    def __init__(self, whole, tenant: str, *, pause_s: float = 0, **limits: float) -> None:
        self.limits = limits
        self.admitted = 0
        self.refused: list[str] = []
        self.tokens = 0
        self._pause_s = pause_s
        self._whole = whole
        self._key = whole.key(tenant, limits={"interactive": limits}).secret
        self._began = self._ended = 0.0

    def run(self, stop: threading.Event) -> None:
        self._began = self._began or time.monotonic()
        with self._whole.client(key=self._key) as client:
            for turn in itertools.count(1):
                reply = embed(client, TEXT)
                if reply.status_code == 200:
                    self.admitted += 1
                    self.tokens += reply.json()["usage"]["total_tokens"]
                else:
                    self.refused.append(reply.json()["error"]["message"])
                due = self._began + turn * self._pause_s
                if stop.wait(max(due - time.monotonic(), 0)):
                    break
        self._ended = time.monotonic()

    def allowed(self, word: str) -> float:
        """What may pass in the time that it took: burst + rate * T."""
        minutes = (self._ended - self._began) / 60
        return self.limits[f"{word}_burst"] + self.limits[f"{word}_per_minute"] * minutes


@contextmanager
def running(*traffic: tuple[Traffic, int]) -> Iterator[None]:
    stop = threading.Event()
    with ThreadPoolExecutor(sum(count for _, count in traffic)) as threads:
        futures = [threads.submit(one.run, stop) for one, count in traffic for _ in range(count)]
        try:
            yield
        finally:
            stop.set()
            for future in futures:
                future.result(timeout=90)


def test_a_flood_over_http_stays_within_its_limits_when_the_ledger_is_killed(whole):
    requests = Traffic(whole, "many", requests_per_minute=300, requests_burst=20)
    tokens = Traffic(whole, "wordy", tokens_per_minute=6000, tokens_burst=400)
    steady = Traffic(whole, "calm", pause_s=1 / 6, requests_per_minute=600, requests_burst=10)
    with running((requests, 2), (tokens, 2), (steady, 1)):
        whole.until(lambda: requests.admitted >= 35 and requests.refused and tokens.refused)
        whole.kill("ray::LedgerActor")
        whole.until(lambda: requests.admitted >= 55 and steady.admitted >= 30)
    assert requests.admitted <= TOLERANCE * requests.allowed("requests")
    assert tokens.tokens <= TOLERANCE * tokens.allowed("tokens")
    assert all("key_requests_per_minute" in message for message in requests.refused)
    assert all("key_tokens_per_minute" in message for message in tokens.refused)
    assert steady.refused == []


class Unkept:
    """In place of the Store: nothing was used, and nobody wants to know."""

    async def report_usage(self, _session: str, _rows: Sequence[UsageRow]) -> None: ...

    async def month_usage(self, _tenant: str, _month: str) -> Sequence[UsageRow]:
        return ()


def payer(tenant: str, **limits: float) -> Caller:
    allowed = limits_of(f"t/{tenant}", "tenant", Allowance(interactive=Quota(**limits)))
    return Caller(tenant, "free", 1.0, tenant, limits=allowed)


async def passes(quotas: Quotas, caller: Caller, tokens: int) -> bool:
    try:
        async with quotas.admitted(caller, "interactive", tokens=tokens):
            return True
    except QuotaExceeded:
        return False


@dataclass
class Books:
    """Where the limits are kept, and how that is killed and started again."""

    ledger: Ledger
    kill: Callable[[], None]
    revive: Callable[[], None] = lambda: None  # Ray does it
    close: Callable[[], Awaitable[None]] | None = None


@pytest.fixture(params=["actor", "redis"])
def books(request, whole) -> Iterator[Books]:
    settings = whole.settings
    if request.param == "actor":
        yield Books(LedgerPort(settings), partial(whole.kill, "ray::LedgerActor"))
        return
    if BINARY is None:
        pytest.skip("redis-server is not installed (Debian: apt-get install redis-server)")
    with redis_server() as server:
        ledger = RedisLedger(server.url, settings.ledger, wall=time.time)
        yield Books(ledger, server.kill, server.start, ledger.aclose)


async def test_two_replicas_at_full_speed_share_a_limit_exactly(whole, books, rng):
    """As fast as two replicas can ask, with blocks: a hundred times HTTP's pace."""
    flood = payer("fast", requests_per_minute=30_000, requests_burst=1000)
    words = payer("chatty", tokens_per_minute=600_000, tokens_burst=20_000)
    calm = payer("quiet", requests_per_minute=30_000, requests_burst=1000)
    replicas = [
        Quotas(
            books.ledger,
            Unkept(),
            whole.settings.ledger,
            replica=f"test-{name}",
            replicas=2,
            owners_max=100,
            clock=time.monotonic,
            wall=time.time,
        )
        for name in "ab"
    ]
    background = [asyncio.create_task(quotas.run()) for quotas in replicas]
    steps = iter([(1.5, books.kill), (2.5, books.revive)])
    at, step = next(steps)
    admitted, used, asked_calm, refused_calm = 0, 0, 0, 0
    began = time.monotonic()
    while (took := time.monotonic() - began) < 4 or any(quotas.away for quotas in replicas):
        quotas = rng.choice(replicas)
        admitted += await passes(quotas, flood, 1)
        used += 100 * await passes(quotas, words, 100)
        while asked_calm < 300 * took:  # 60 % of its limit
            asked_calm += 1
            refused_calm += not await passes(rng.choice(replicas), calm, 1)
        if took > at:
            step()
            at, step = next(steps, (math.inf, books.kill))
        await asyncio.sleep(0)
    took = time.monotonic() - began
    for task, quotas in zip(background, replicas, strict=True):
        task.cancel()
        await quotas.close()
    if books.close is not None:
        await books.close()
    assert admitted <= TOLERANCE * (1000 + 500 * took)
    assert used <= TOLERANCE * (20_000 + 10_000 * took)
    assert refused_calm == 0
    assert sum(quotas.tally.local_grants for quotas in replicas) > 0


def everywhere(client: httpx.Client, status: int, limit: str | None = None) -> bool:
    """Whether eight requests in a row, over both replicas, are answered so."""
    replies = [embed(client, "x") for _ in range(8)]
    return all(
        reply.status_code == status
        and (limit is None or reply.headers["x-ratelimit-limit-requests"] == limit)
        for reply in replies
    )


def test_a_change_by_an_operator_holds_on_every_replica(whole):
    admin = whole.key("boss", role="admin").secret
    made = whole.key("changing", "free")
    with whole.client(key=admin) as operator, whole.client(key=made.secret) as client:
        assert everywhere(client, 200, "600")
        operator.put("/v1/admin/tenants/changing", json={"tier": "premium"}).raise_for_status()
        whole.until(lambda: everywhere(client, 200, "3000"), timeout_s=20)
        limits = {"interactive": {"requests_per_minute": 77}}
        operator.patch(f"/v1/admin/keys/{made.key.id}", json={"limits": limits}).raise_for_status()
        whole.until(lambda: everywhere(client, 200, "77"), timeout_s=20)
        operator.delete(f"/v1/admin/keys/{made.key.id}").raise_for_status()
        whole.until(lambda: everywhere(client, 401), timeout_s=20)
        assert client.get("/v1/admin/keys").status_code == 401
        log = operator.get("/v1/admin/audit", params={"tenant": "changing"}).json()["data"]
    actions = [entry["action"] for entry in log]
    assert actions[:3] == ["key.revoke", "key.change", "tenant.set"]


def test_what_waits_is_explained_and_what_expired_never_reaches_the_model(whole):
    """One tenant's own work waits behind its own: 100 batches of 30 ms."""
    long = ["a word " * 72] * 100
    key = whole.key("waiting").secret
    before = whole.embedder_stats()
    with whole.client(key=key) as client, ThreadPoolExecutor(1) as threads:
        busy = threads.submit(embed, client, *long, **{"x-deadline-ms": "60000"})
        seen: list[dict] = []

        def shown() -> bool:
            seen.append(client.get("/v1/queue").raise_for_status().json())
            return seen[-1]["waiting"] is not None

        whole.until(shown)
        late = embed(client, "too late", **{"x-deadline-ms": "200"})
        assert late.json()["error"]["code"] in ("deadline_exceeded", "overloaded"), late.text
        assert busy.result(timeout=90).status_code == 200
        whole.until(lambda: client.get("/v1/queue").json()["waiting"] is None)
    waiting = seen[-1]["waiting"]
    assert 0 < waiting["items"] <= 101
    assert 0 < waiting["share"] <= 1
    assert waiting["ends_s"] > waiting["starts_s"] >= 0
    assert "inputs" in seen[-1]["why"]
    after = whole.embedder_stats()
    assert after["inputs"] - before["inputs"] == len(long)
