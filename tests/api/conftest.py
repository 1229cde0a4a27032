"""The whole service in one process: everything but Ray, on the fake engine and in-memory index.

Every reply that passes through a client of these fixtures is compared with our own OpenAPI.
"""

import asyncio
import json
import pickle
import random
import re
import socket
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any

import httpx
import httpx2
import jsonschema_rs
import openai
import pytest
import stamina
import uvicorn
from fastapi import FastAPI

from serve.admission.bank import BankLedger
from serve.admission.keys import Door, new_key
from serve.admission.quotas import Quotas
from serve.allowance import Quota, Tier
from serve.api.app import create_app
from serve.api.service import Service
from serve.canary import CanaryReport, CanaryReports
from serve.config import Admission, Buffer, Cache, Chunking, Index, Jobs, Model, Settings
from serve.config import Pool as PoolSettings
from serve.content.blobs import LocalBlobs
from serve.embedding.fake import FakeEngine, Faults
from serve.embedding.pool import Pool
from serve.embedding.tokenizer import Tokenizer
from serve.flows.batch import BatchFlow
from serve.flows.batch_work import batch_handlers
from serve.flows.batching import Batcher
from serve.flows.canaries import Canaries
from serve.flows.collections import CollectionFlow
from serve.flows.context import Context
from serve.flows.document_work import DocumentWork
from serve.flows.embed import EmbedFlow
from serve.flows.erasure import EraseFlow
from serve.flows.exports import ExportFlow
from serve.flows.feed import Feed
from serve.flows.files import FileFlow
from serve.flows.ingest import IngestFlow
from serve.flows.jobs import JobFlow
from serve.flows.models import Models
from serve.flows.operators import OperatorFlow
from serve.flows.queues import QueueFlow
from serve.flows.receipts import ReceiptFlow
from serve.flows.rerank import RerankFlow
from serve.flows.room import LANDING, away_s
from serve.flows.scalings import ScalingFlow
from serve.flows.search import SearchFlow
from serve.flows.streams import Streams
from serve.flows.trial_reports import TrialReports
from serve.flows.usage import UsageFlow
from serve.flows.vectors import VectorFlow
from serve.flows.webhooks import WebhookFlow
from serve.index.lags import Lags, TimedWriter
from serve.index.memory import MemoryIndex
from serve.index.probes import Probes
from serve.index.writer import Writer
from serve.jobs.faults import Retries
from serve.jobs.owner import StoreOwner
from serve.jobs.runner import Runner
from serve.jobs.vault import Vault
from serve.ports import Keys
from serve.records import EmbedCall, EmbedReply, Key, QueueReport, Role
from serve.scaling import Decision
from tests.api.lagging import LaggingIndex


PLAIN = Model(id="plain", engine="fake", dimensions=16, tokens_max=64, created=7)
NESTED = Model(id="org/nested", engine="fake", dimensions=32, tokens_max=64, matryoshka=True)

POISON, NOT_FINITE = "poison", "not finite"
"""Texts on which the model fails, and for which it returns NaN."""


NOW = 1_700_000_000.0
"""The frozen time of day: 14 November 2023, 22:13:20 UTC."""


def tier(scale: int, **changes: Any) -> Tier:
    """Tokens of the fake models are bytes, plus two for each input."""

    def quota(tokens_burst: int) -> Quota:
        return Quota(
            requests_per_minute=60 * scale,
            requests_burst=10 * scale,
            tokens_per_minute=600 * scale,
            tokens_burst=tokens_burst * scale,
        )

    values = {"weight": min(scale, 1000), "interactive": quota(100), "bulk": quota(200)}
    return Tier(**{**values, **changes})


TIERS = {"free": tier(1), "premium": tier(100), "enterprise": tier(100_000)}
OWNERS: dict[str, tuple[str, str, Role]] = {
    "free": ("frugal", "free", "user"),
    "premium": ("acme", "premium", "user"),
    "enterprise": ("mighty", "enterprise", "user"),
    "other": ("stranger", "premium", "user"),
    "admin": ("operators", "enterprise", "admin"),
}
"""Who a client is -> tenant, tier and role of its key."""


def small(**changes: Any) -> Settings:
    """Settings of the tests: two fake models, tiers of round figures, no waiting for writes.

    Workers are silent: their leases end when the clock is moved, never because a test is slow. Every input
    reaches the model, since tests count what it sees.
    """
    values: dict[str, Any] = {
        "pools": (PoolSettings(models=(PLAIN, NESTED)),),
        "admission": Admission(tiers=TIERS),
        "cache": Cache(scope="none"),
        "chunking": Chunking(tokens=32, overlap=8),
        "buffer": Buffer(age_s_start=0.001, age_s_min=0.001),
        "index": Index(probe_s=0.05),
        "jobs": Jobs(heartbeat_s=300, lease_s=600, retry_s=5),
    }
    return Settings(**{**values, **changes})


class LocalEmbedder:
    """Implements `ports.Embedder` over a batcher in this process; `fault` is raised instead."""

    def __init__(self, batcher: Batcher) -> None:
        self.batcher = batcher
        self.calls: list[EmbedCall] = []
        self.fault: Exception | None = None
        self.before: Callable[[], Awaitable[None]] | None = None

    async def embed(self, call: EmbedCall) -> EmbedReply:
        self.calls.append(call)
        if self.before is not None:
            await self.before()
        if self.fault is not None:
            raise self.fault
        return await self.batcher.submit(call)

    async def ready(self) -> bool:
        return self.batcher.healthy


@dataclass
class FakeQueues:
    """Implements `ports.Queues` and `ports.Decisions`: what a test says that was told. And `canary.Trials`:
    what replicas told by themselves.
    """

    trials: TrialReports
    reports: Mapping[str, tuple[QueueReport, ...]] = field(default_factory=dict)
    decided: tuple[Decision, ...] = ()

    async def report_canaries(
        self, replica: str, reports: Sequence[CanaryReport]
    ) -> Mapping[str, str]:
        return self.trials.keep(replica, pickle.loads(pickle.dumps(reports)))  # noqa: S301  as Ray does

    async def canary_reports(self) -> CanaryReports:
        return self.trials.all()

    async def queue_reports(self, tenant: str) -> tuple[QueueReport, ...]:
        return self.reports.get(tenant, ())

    async def decisions(self) -> tuple[Decision, ...]:
        return self.decided


class Sabotage:
    """Any port, of which named methods raise instead."""

    def __init__(self, port: object) -> None:
        self._port = port
        self.faults: dict[str, Exception] = {}

    def __getattr__(self, name: str) -> Any:
        if name in self.faults:
            return self._fail
        return getattr(self._port, name)

    async def _fail(self, *_: object) -> None:
        raise next(iter(self.faults.values()))


@dataclass
class Ports:
    """What stands behind handles and actors in the service."""

    embedder: LocalEmbedder
    store: Any
    upserter: Any
    index: MemoryIndex
    probes: Probes
    lags: Lags
    ledger: Any
    queues: Any
    blobs: LocalBlobs
    vault: Vault


@dataclass
class Whole:
    """A running service and the ways in. `clock` is of the service and, moved, of the day."""

    app: FastAPI
    service: Service
    ports: Ports
    clock: Any
    keys: Mapping[str, str]
    stack: AsyncExitStack = field(repr=False)
    worker: asyncio.Task[None] | None = field(default=None, repr=False)

    def __getattr__(self, name: str) -> Any:
        """A port: `whole.embedder`."""
        return getattr(self.ports, name)

    async def client(self, who: str | None = "premium") -> httpx.AsyncClient:
        """A client with the key of one of `OWNERS`, or without a key."""
        headers = {} if who is None else {"authorization": f"Bearer {self.keys[who]}"}
        return await self.stack.enter_async_context(
            httpx.AsyncClient(
                transport=httpx.ASGITransport(self.app),
                base_url="http://service",
                headers=headers,
                event_hooks={"response": [Conformance()]},
            )
        )

    async def work(self, owner: str) -> asyncio.Task[None]:
        """Start a worker; it ends with the test, or, as if it was killed, when it is cancelled."""
        context = self.service.context
        rules = context.settings.jobs
        rng = random.Random(1)  # noqa: S311  jitter
        retries = Retries(rules.retry_s, rules.retry_factor, rules.retry_s_max, rng)
        documents = DocumentWork(context, self.service.embed, self.ports.upserter, retries)
        batches = batch_handlers(
            context,
            self.service.embed,
            self.ports.store,
            upserter=self.ports.upserter,
            blobs=self.ports.blobs,
            retries=retries,
        )
        runner = Runner(
            self.ports.store,
            {**documents.handlers(), **batches},
            owner=owner,
            worker=context.settings.workers[0],
            rules=rules,
            retries=retries,
            gates={LANDING: partial(away_s, self.ports.upserter)},
        )
        return await background(self.stack, runner.run())

    async def openai(self, who: str = "premium", **options: Any) -> openai.AsyncOpenAI:
        """The official client, without retries unless `options` say otherwise."""
        http = httpx2.AsyncClient(transport=httpx2.ASGITransport(self.app))
        return await self.stack.enter_async_context(
            openai.AsyncOpenAI(
                base_url="http://service/v1",
                http_client=http,
                **{"api_key": self.keys.get(who, who), "max_retries": 0, **options},
            )
        )


@cache
def described() -> dict[str, Any]:
    """Our OpenAPI: the same for every service, and 0.2 s to make."""
    return create_app(lambda: pytest.fail("no request was made")).openapi()


class Conformance:
    """Compares a reply with what OpenAPI says of its route and status."""

    def __init__(self) -> None:
        self._openapi = described()

    async def __call__(self, response: httpx.Response) -> None:
        await response.aread()
        assert response.headers["x-request-id"]
        assert "Traceback" not in response.text
        schema = self._schema(response)
        if schema is not None:
            whole = {**schema, "components": self._openapi["components"]}
            jsonschema_rs.validate(whole, json.loads(response.content))

    def _schema(self, response: httpx.Response) -> dict[str, Any] | None:
        for template, operations in self._openapi["paths"].items():
            operation = operations.get(response.request.method.lower())
            pattern = re.sub(r"\{\w+\}", "[^/]*", template.replace("{model_id}", ".*"))
            if operation is not None and re.fullmatch(pattern, response.request.url.path):
                known = operation["responses"]
                described = known.get(str(response.status_code), known.get("default"))
                if response.status_code == 204:
                    return None
                media = response.headers["content-type"].split(";")[0]
                schema = described["content"][media]["schema"]
                return schema if media.endswith("json") else None
        return None


async def make_keys(store: Keys) -> dict[str, str]:
    made = {
        who: new_key(tenant, tier_name, 0.0, role=role)
        for who, (tenant, tier_name, role) in OWNERS.items()
    }
    await asyncio.gather(*(store.create_key(f"key-{who}", made[who][0]) for who in made))
    return {who: text for who, (_, text) in made.items()}


def faulty(model: Model, _: PoolSettings) -> FakeEngine:
    tokenizer = Tokenizer.open(model)

    def row(text: str) -> frozenset[tuple[int, ...]]:
        return frozenset({tuple(tokenizer.encode([text])[0].tolist())})

    return FakeEngine(model, faults=Faults(poison=row(POISON), not_finite=row(NOT_FINITE)))


async def background(stack: AsyncExitStack, work: Any) -> asyncio.Task[None]:
    """Start it; it is cancelled when the stack ends."""
    task = asyncio.create_task(work)

    async def end() -> None:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task

    stack.push_async_callback(end)
    return task


@dataclass
class Builder:
    """Makes services; each ends with the test."""

    stack: AsyncExitStack
    folder: Path
    clock: Any
    made: int = 0

    def __post_init__(self) -> None:
        self.began = self.clock()

    async def __call__(
        self,
        *,
        serving: bool = True,
        working: bool = True,
        lagging: bool = False,
        **changes: Any,
    ) -> Whole:
        """`changes` are of the settings; the model runs only when `serving`, a worker when
        `working`; the index is a `LaggingIndex` when `lagging`.
        """
        settings = small(**changes)
        self.made += 1
        owner = StoreOwner(
            self.folder / f"{self.made}.db", settings.store, self.wall, jobs=settings.jobs
        )
        self.stack.callback(owner.close)
        await owner.tick()  # the first one, which spares the leases of before
        index = (LaggingIndex if lagging else MemoryIndex)(settings.index)
        writer = Writer(
            index,
            owner,
            name="upserter",
            epoch=await owner.take_epoch("upserter", 1),
            settings=settings.buffer,
            clock=time.monotonic,
            rng=random.Random(1),  # noqa: S311  jitter
        )
        await self.background(writer.run())
        probes = Probes(index, settings.index.probe_s)
        await self.background(probes.run())
        lags = Lags(probes, self.wall)
        embedder = LocalEmbedder(self._batcher(settings))
        if serving:
            await self.background(embedder.batcher.run())
        ledger = BankLedger(settings.ledger, keys_max=10_000, clock=self.clock, wall=self.wall)
        ports = Ports(
            embedder,
            store=Sabotage(owner),
            upserter=Sabotage(TimedWriter(writer, lags)),
            index=index,
            probes=probes,
            lags=lags,
            ledger=Sabotage(ledger),
            queues=Sabotage(FakeQueues(TrialReports(self.clock))),
            blobs=LocalBlobs(self.folder / f"{self.made}.blobs"),
            vault=Vault(Vault.new_key()),
        )
        service = self.service(settings, ports)
        await self.background(service.context.quotas.run())
        await self.background(service.feed.run())
        await self.background(service.canaries.run())
        keys = await make_keys(owner)
        whole = Whole(create_app(lambda: service), service, ports, self.clock, keys, self.stack)
        whole.worker = await whole.work("worker") if working else None
        return whole

    def wall(self) -> float:
        """Seconds since the epoch."""
        return NOW + self.clock() - self.began

    def _batcher(self, settings: Settings) -> Batcher:
        executor = self.stack.enter_context(ThreadPoolExecutor(1, "model"))
        pool = Pool(settings.pools[0], clock=self.clock, builders={"fake": faulty})
        pool.load()
        return Batcher(
            pool,
            list(settings.models),
            admission=settings.admission,
            batch=settings.pools[0].batch,
            executor=executor,
            clock=self.clock,
        )

    def service(self, settings: Settings, ports: Ports, replica: str = "one") -> Service:
        """One ingress replica over the ports, which several may share."""
        quotas = Quotas(
            ports.ledger,
            ports.store,
            settings.ledger,
            replica=replica,
            replicas=1,
            owners_max=1000,
            clock=self.clock,
            wall=self.wall,
        )
        context = Context(
            settings,
            Models.open(settings, {"default": ports.embedder}),
            quotas,
            self.stack.enter_context(ThreadPoolExecutor(2, "tokenizer")),
            self.clock,
            self.wall,
        )
        canaries = Canaries(context, ports.queues, replica)
        embed = EmbedFlow(context, kept_bytes_max=settings.cache.bytes_max, canaries=canaries)
        rerank = RerankFlow(context, embed)
        collections = CollectionFlow(context, ports.store, ports.upserter)
        feed = Feed(ports.store, self.clock)
        ingest = IngestFlow(context, collections, ports.store, feed, ports.probes)
        receipts = ReceiptFlow(context, collections, ports.store, feed, ports.probes)
        vectors = VectorFlow(
            context,
            collections,
            ports.store,
            upserter=ports.upserter,
            index=ports.index,
            ingest=ingest,
            probes=ports.probes,
        )
        files = FileFlow(context, ports.store, ports.blobs)

        async def ready() -> dict[str, bool]:
            return {"embedder-default": await ports.embedder.ready()}

        return Service(
            context,
            Door(ports.store, settings.admission, clock=self.clock, wall=self.wall),
            embed,
            collections,
            ingest,
            receipts,
            SearchFlow(context, collections, embed, rerank, index=ports.index, receipts=receipts),
            rerank,
            vectors,
            QueueFlow(context, collections, ingest, vectors),
            ExportFlow(context, collections, ports.index),
            OperatorFlow(settings, ports.store, ports.store, self.wall),
            EraseFlow(
                ports.store,
                upserter=ports.upserter,
                index=ports.index,
                blobs=ports.blobs,
                wait_s=settings.limits.deadline_s_max,
            ),
            UsageFlow(context, ports.store, ports.queues),
            ScalingFlow(settings, ports.queues),
            canaries,
            JobFlow(
                context, collections, ports.store, ports.store, queues=ports.queues, files=files
            ),
            feed,
            Streams(settings),
            files,
            BatchFlow(context, collections, ports.store, files),
            WebhookFlow(context, ports.store, ports.vault),
            ready,
        )

    async def background(self, work: Any) -> None:
        await background(self.stack, work)


@pytest.fixture(autouse=True)
def _no_pauses() -> Iterator[None]:
    """Tries inside a lease come at once."""
    with stamina.set_testing(testing=True, attempts=2, cap=True):
        yield


@pytest.fixture
async def start(tmp_path: Path, clock: Any) -> AsyncIterator[Builder]:
    """Starts a service: `await start(limits=Limits(...))`. Time is frozen but for index writes."""
    async with AsyncExitStack() as stack:
        yield Builder(stack, tmp_path, clock)


@pytest.fixture
async def whole(start: Builder) -> Whole:
    return await start()


@pytest.fixture
async def client(whole: Whole) -> httpx.AsyncClient:
    return await whole.client()


@dataclass(frozen=True)
class Served:
    """A service behind a real HTTP server on the loopback."""

    url: str
    headers: Mapping[str, str]


async def serve_over_http(folder: Path, found: "Future[Served]", stop: Callable[[], bool]) -> None:
    """Build a service and serve it until `stop` says so; the address goes to `found`."""
    async with AsyncExitStack() as stack:
        jobs = Jobs(stream_s=0.05)  # who reads a stream here waits for its end
        whole = await Builder(stack, folder, time.monotonic)(jobs=jobs)
        listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        server = uvicorn.Server(uvicorn.Config(whole.app, log_config=None, lifespan="off"))
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        headers = {"authorization": f"Bearer {whole.keys['admin']}"}
        found.set_result(Served(url, headers))
        while not stop():  # noqa: ASYNC110  told from another thread
            await asyncio.sleep(0.01)
        server.should_exit = True
        await serving


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A service over HTTP, in a thread with a loop of its own, for clients that block."""
    found: Future[Served] = Future()
    stop = threading.Event()
    folder = tmp_path_factory.mktemp("served")
    with ThreadPoolExecutor(1, "server") as thread:
        running = thread.submit(asyncio.run, serve_over_http(folder, found, stop.is_set))
        running.add_done_callback(
            lambda done: found.done() or found.set_exception(done.exception())
        )
        try:
            yield found.result(30)
        finally:
            stop.set()
        running.result(30)


@pytest.fixture
def key_of() -> Callable[[str, str], tuple[Key, str]]:
    return lambda tenant, tier_name: new_key(tenant, tier_name, 0.0)
