"""How fast do items go through the Store, and how soon does an idle worker have a new one?

    python -m bench.jobs            # SQLite and Postgres by turns: about three minutes
    python -m bench.jobs --serve    # and the whole service with the real model
    python -m bench.jobs --smoke    # under 30 s

In one process: jobs of short documents by many tenants go through both stages, claimed and settled by
the service's own `Runner`, whose handlers do nothing (a fake engine of no time). Then one runner waits
idle, and single items are handed over at random moments: `kick_ms` is from the acknowledgement to the
handler's call. `stats_ms` is a tenant's statistics, asked of the Store while so many of its items wait.
With `--serve`: one job of a thousand short texts, embedded and searchable, over HTTP.
"""

import asyncio
import json
import random
import shutil
import sys
import tempfile
import time
import urllib.request
import uuid
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from bench import postgres_server, servers, texts
from bench.load import Target
from bench.report import arguments, finish, percentile, ratios, spread, table
from serve.config import Jobs, Store, Worker
from serve.items import Claim, Item, Job, NewItem, Settlement, new_id
from serve.jobs.faults import Retries
from serve.jobs.owner import StoreOwner
from serve.jobs.runner import Handler, Runner
from serve.records import Collection, Key


Backend = Literal["sqlite", "postgres"]
TENANTS = 20
JOB_ITEMS = 250
PAYLOAD = {"text": "x" * 300, "metadata": {"source": "bench"}}
KICK_PAUSE_S = (0.005, 0.05)
REAL_DOCUMENTS = 1000
STATS_CALLS = 20


@dataclass(frozen=True)
class Plan:
    """How much of everything."""

    rounds: int = 3
    items: int = 5000
    kicks: int = 200
    open_items: int = 20_000


class Instant:
    """Handlers that do nothing, and remember when they were called."""

    def __init__(self) -> None:
        self.called: dict[str, float] = {}
        self._left = 0
        self._ended = asyncio.Event()

    def expect(self, items: int) -> asyncio.Event:
        """Set once so many more items are being settled."""
        self._left += items
        return self._ended

    async def __call__(self, items: Sequence[Item], _claim: Claim) -> list[Settlement]:
        """Advance what is to be prepared, end what is to be embedded."""
        now = time.perf_counter()
        made = []
        for item in items:
            self.called.setdefault(item.name, now)
            if item.stage == "prepare":
                payload = {**item.payload, "spans": [[0, 300]]}
                made.append(
                    Settlement(item.id, item.lease, "advance", cost=107, payload=payload, chunks=1)
                )
            else:
                self._left -= 1
                made.append(Settlement(item.id, item.lease, "done", tokens=75, chunks=1))
        if not self._left:
            self._ended.set()
        return made


@asynccontextmanager
async def opened(backend: Backend) -> AsyncIterator[StoreOwner]:
    """An empty Store with its tenants, each with a collection."""
    folder = Path(tempfile.mkdtemp(prefix="hr-"))
    if backend == "postgres":
        with postgres_server.emptied() as url:
            store = await asyncio.to_thread(StoreOwner, url, Store(), None)
    else:
        store = await asyncio.to_thread(StoreOwner, folder / "store.db", Store(), time.time)
    try:
        for n in range(TENANTS):
            key = Key(f"k{n}", f"t{n}", "free", "", 0.0)
            await store.create_key(uuid.uuid4().hex, key)
            collection = Collection(f"c{n}", f"t{n}", "docs", "m", "r", 8, 0.0)
            await store.create_collection(uuid.uuid4().hex, collection)
        yield store
    finally:
        await asyncio.to_thread(store.close)
        shutil.rmtree(folder, ignore_errors=True)


@asynccontextmanager
async def working(store: StoreOwner) -> AsyncIterator[Instant]:
    """A runner over both stages."""
    handler = Instant()
    handlers: Mapping[Any, Handler] = {"document": handler}
    rules = Jobs()
    retries = Retries(rules.retry_s, rules.retry_factor, rules.retry_s_max, random.Random(1))
    runner = Runner(
        store,
        handlers,
        owner=uuid.uuid4().hex,
        worker=Worker(),
        rules=rules,
        retries=retries,
        gates={},
    )
    running = asyncio.create_task(runner.run())
    try:
        yield handler
    finally:
        await runner.drain(5)
        running.cancel()
        with suppress(asyncio.CancelledError):
            await running


async def hand_over(store: StoreOwner, tenant: int, names: Sequence[str]) -> None:
    """One job of these documents."""
    now = time.time()
    job = Job(
        new_id("job", now),
        f"t{tenant}",
        f"k{tenant}",
        "documents",
        "bulk",
        1.0,
        now,
        collection=f"c{tenant}",
    )
    items = [NewItem(name, "document", "prepare", 107, PAYLOAD) for name in names]
    await store.submit_job(uuid.uuid4().hex, job, items)


async def cycle(backend: Backend, plan: Plan) -> float:
    """Items a second from the first submit to the last settlement."""
    async with opened(backend) as store, working(store) as handler:
        ended = handler.expect(plan.items)
        began = time.perf_counter()
        for start in range(0, plan.items, JOB_ITEMS):
            tenant = start // JOB_ITEMS % TENANTS
            names = [f"d{n}" for n in range(start, min(start + JOB_ITEMS, plan.items))]
            await hand_over(store, tenant, names)
        await ended.wait()
        return plan.items / (time.perf_counter() - began)


async def kicks(backend: Backend, plan: Plan) -> list[float]:
    """Milliseconds from the acknowledgement of one item to its handler's call."""
    rng = random.Random(7)
    acknowledged: dict[str, float] = {}
    async with opened(backend) as store, working(store) as handler:
        ended = handler.expect(plan.kicks)
        for n in range(plan.kicks):
            await asyncio.sleep(rng.uniform(*KICK_PAUSE_S))
            await hand_over(store, n % TENANTS, [f"kick{n}"])
            acknowledged[f"kick{n}"] = time.perf_counter()
        await ended.wait()
        # A worker may be quicker than the acknowledgement's way back: that is no time at all.
        return [max(handler.called[name] - at, 0.0) * 1e3 for name, at in acknowledged.items()]


async def stats(backend: Backend, plan: Plan) -> list[float]:
    """Milliseconds of a tenant's statistics while its items wait in many jobs."""
    async with opened(backend) as store:
        for start in range(0, plan.open_items, JOB_ITEMS):
            await hand_over(store, 0, [f"d{n}" for n in range(start, start + JOB_ITEMS)])
        took = []
        for _ in range(STATS_CALLS):
            began = time.perf_counter()
            found = await store.job_stats("t0")
            took.append((time.perf_counter() - began) * 1e3)
            if found.uploaded != plan.open_items:
                raise RuntimeError(f"{found.uploaded} of {plan.open_items} items are open")
        return took


def measure(plan: Plan) -> dict[str, Any]:
    """Every backend in every round."""
    backends: list[Backend] = ["sqlite"]
    if postgres_server.PRESENT:
        backends.append("postgres")
    items: dict[str, list[float]] = {backend: [] for backend in backends}
    waits: dict[str, list[float]] = {backend: [] for backend in backends}
    looks: dict[str, list[float]] = {backend: [] for backend in backends}
    for number in range(plan.rounds):
        for backend in backends:
            items[backend].append(asyncio.run(cycle(backend, plan)))
            waits[backend] += asyncio.run(kicks(backend, plan))
            looks[backend] += asyncio.run(stats(backend, plan))
        print(f"round {number + 1} done", file=sys.stderr, flush=True)
    found: dict[str, Any] = {
        backend: {
            "items_s": spread(items[backend]),
            "kick_ms": _percentiles(waits[backend]),
            "stats_ms": _percentiles(looks[backend]),
        }
        for backend in backends
    }
    if "postgres" in found:
        found["sqlite_over_postgres"] = ratios(items["sqlite"], items["postgres"])
    return found


def _percentiles(values: Sequence[float]) -> dict[str, float]:
    return {f"p{part * 100:.0f}": percentile(values, part) for part in (0.5, 0.95, 0.99)}


def real() -> dict[str, Any]:
    """One job of many short texts through the whole service."""
    with servers.headrace("default") as target:
        return _real(target)


def _real(target: Target) -> dict[str, Any]:
    base = target.url.rsplit("/v1/", 1)[0]
    _call(base, target.key, "/v1/collections", {"name": "bench", "model": target.model})
    documents = [
        {"id": f"d{n}", "text": text} for n, text in enumerate(texts.shorts(REAL_DOCUMENTS))
    ]
    began = time.perf_counter()
    asked = {"kind": "documents", "collection": "bench", "items": documents}
    job = _call(base, target.key, "/v1/jobs", asked)
    accepted_s = time.perf_counter() - began
    while not job["is_complete"]:
        time.sleep(0.2)
        job = _call(base, target.key, f"/v1/jobs/{job['id']}")
    total_s, looks = time.perf_counter() - began, []
    for _ in range(STATS_CALLS):
        asked_at = time.perf_counter()
        _call(base, target.key, "/v1/stats")
        looks.append((time.perf_counter() - asked_at) * 1e3)
    return {
        "documents": REAL_DOCUMENTS,
        "accepted_s": accepted_s,
        "total_s": total_s,
        "stats_ms": _percentiles(looks),
        "succeeded": job["succeeded"],
        "failed": job["failed"],
    }


def _call(base: str, key: str, path: str, body: Mapping[str, Any] | None = None) -> Any:
    data = None if body is None else json.dumps(body).encode()
    headers = {"authorization": f"Bearer {key}", "content-type": "application/json"}
    request = urllib.request.Request(f"{base}{path}", data, headers)  # noqa: S310  our own server
    with urllib.request.urlopen(request, timeout=120) as reply:  # noqa: S310
        return json.load(reply)


def shown(result: Mapping[str, Any]) -> str:
    """The result for people."""
    rows = [
        [name, one["items_s"], *one["kick_ms"].values(), one["stats_ms"]["p95"]]
        for name in ("sqlite", "postgres")
        if (one := result.get(name)) is not None
    ]
    return table(("store", "items/s", "kick p50 ms", "p95", "p99", "stats p95"), rows)


def main(words: Sequence[str] | None = None) -> None:
    """Measure, show, and end with one line of JSON."""
    parser = arguments(__doc__)
    parser.add_argument("--rounds", type=int, default=Plan.rounds)
    parser.add_argument("--serve", action="store_true", help="also the whole service")
    options = parser.parse_args(words)
    plan = Plan(1, 500, 20, 1000) if options.smoke else Plan(rounds=options.rounds)
    result = measure(plan)
    if options.serve and not options.smoke:
        result["real"] = real()
    print(shown(result))
    head = {"rounds": plan.rounds, "items": plan.items, "job_items": JOB_ITEMS}
    top = {
        "items_s": result["sqlite"]["items_s"],
        "kick_p95_ms": result["sqlite"]["kick_ms"]["p95"],
    }
    finish("jobs", "in process", {**head, **top, **result}, options.out)


if __name__ == "__main__":
    main()
