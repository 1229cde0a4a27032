"""The whole service in one process, without Ray: what Ray's price is judged against.

    python -m bench.ceiling --config config.yaml --data-dir FOLDER --port 8001

Same API, tokenizer, quotas, keys, fair queue, batcher and engines as the service; only the proxy,
the handle calls and the processes between are missing. It keeps its index in memory, and its Ledger
beside the quotas.
"""

import argparse
import asyncio
import random
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import uvicorn
import uvloop

from deployments.places import DeployFile
from serve.admission.bank import BankLedger
from serve.admission.keys import Door
from serve.admission.quotas import Quotas
from serve.api.app import create_app
from serve.api.service import Service
from serve.canary import CanaryReport, CanaryReports
from serve.config import Pool as PoolSettings
from serve.config import Settings
from serve.content.blobs import LocalBlobs
from serve.embedding.pool import Pool
from serve.flows.batch import BatchFlow
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
from serve.records import EmbedCall, EmbedReply, QueueReport
from serve.scaling import Decision


UPSERTER = "upserter"


class InProcess:
    """`ports.Embedder` without a handle between."""

    def __init__(self, batcher: Batcher) -> None:
        self.batcher = batcher

    @classmethod
    async def load(cls, settings: PoolSettings, whole: Settings) -> "InProcess":
        """Load and warm the pool's models."""
        pool = Pool(settings, clock=time.monotonic)
        executor = ThreadPoolExecutor(pool.slots, "model")
        await asyncio.get_running_loop().run_in_executor(executor, pool.load)
        return cls(
            Batcher(
                pool,
                [model.id for model in settings.models],
                admission=whole.admission,
                batch=settings.batch,
                executor=executor,
                clock=time.monotonic,
            )
        )

    async def embed(self, call: EmbedCall) -> EmbedReply:
        """See `serve.ports.Embedder`."""
        return await self.batcher.submit(call)

    async def ready(self) -> bool:
        """See `serve.ports.Embedder`."""
        return self.batcher.healthy


class Unreported:
    """`ports.Queues`, `ports.Decisions` and `canary.Trials` without a report."""

    async def queue_reports(self, _tenant: str) -> tuple[QueueReport, ...]:
        """See `serve.ports.Queues`."""
        return ()

    async def decisions(self) -> tuple[Decision, ...]:
        """See `serve.ports.Decisions`."""
        return ()

    async def report_canaries(
        self, _replica: str, _reports: Sequence[CanaryReport]
    ) -> Mapping[str, str]:
        """See `serve.canary.Trials`."""
        return {}

    async def canary_reports(self) -> CanaryReports:
        """See `serve.canary.Trials`."""
        return CanaryReports((), {})


class Ceiling:
    """Everything of one process; `run` serves until the process is told to end."""

    def __init__(
        self, settings: Settings, embedders: Mapping[str, InProcess], store: StoreOwner, epoch: int
    ) -> None:
        self._embedders = embedders
        self._index = MemoryIndex(settings.index)
        self._writer = Writer(
            self._index,
            store,
            name=UPSERTER,
            epoch=epoch,
            settings=settings.buffer,
            clock=time.monotonic,
            rng=random.Random(),
        )
        self._probes = Probes(
            self._index, settings.index.probe_s
        )  # searches see at once what landed
        self._upserter = TimedWriter(self._writer, Lags(self._probes, time.time))
        self._quotas = _quotas(settings, store)
        self._feed = Feed(store, time.monotonic)
        self._service = self._wire(settings, store)
        self._runner = self._worker(settings, store)
        self._ticking = partial(_tick, store, settings.jobs.tick_s)

    @classmethod
    async def open(cls, settings: Settings, store: StoreOwner) -> "Ceiling":
        """Load every pool, one after the other."""
        embedders = {pool.name: await InProcess.load(pool, settings) for pool in settings.pools}
        return cls(settings, embedders, store, await store.take_epoch(UPSERTER, 1))

    def _context(self, settings: Settings) -> Context:
        return Context(
            settings,
            Models.open(settings, self._embedders),
            self._quotas,
            ThreadPoolExecutor(settings.ingress.tokenizer_threads, "tokenizer"),
            time.monotonic,
            time.time,
        )

    def _wire(self, settings: Settings, store: StoreOwner) -> Service:
        """As `deployments.ingress` does it on a replica."""
        context = self._context(settings)
        canaries = Canaries(context, Unreported(), "one")
        embed = EmbedFlow(context, kept_bytes_max=settings.cache.bytes_max, canaries=canaries)
        rerank = RerankFlow(context, embed)
        collections = CollectionFlow(context, store, self._upserter)
        ingest = IngestFlow(context, collections, store, self._feed, self._probes)
        receipts = ReceiptFlow(context, collections, store, self._feed, self._probes)
        vectors = VectorFlow(
            context,
            collections,
            store,
            upserter=self._upserter,
            index=self._index,
            ingest=ingest,
            probes=self._probes,
        )
        blobs = LocalBlobs(Path(settings.data_dir) / settings.files.folder)
        files = FileFlow(context, store, blobs)
        return Service(
            context,
            Door(store, settings.admission, clock=time.monotonic, wall=time.time),
            embed,
            collections,
            ingest,
            receipts,
            SearchFlow(context, collections, embed, rerank, index=self._index, receipts=receipts),
            rerank,
            vectors,
            QueueFlow(context, collections, ingest, vectors),
            ExportFlow(context, collections, self._index),
            OperatorFlow(settings, store, store, time.time),
            EraseFlow(
                store,
                upserter=self._upserter,
                index=self._index,
                blobs=blobs,
                wait_s=settings.limits.deadline_s_max,
            ),
            UsageFlow(context, store, Unreported()),
            ScalingFlow(settings, Unreported()),
            canaries,
            JobFlow(context, collections, store, store, queues=Unreported(), files=files),
            self._feed,
            Streams(settings),
            files,
            BatchFlow(context, collections, store, files),
            WebhookFlow(context, store, Vault(Vault.new_key())),
            self._ready,
        )

    def _worker(self, settings: Settings, store: StoreOwner) -> Runner:
        """As `deployments.worker` does it on a replica, for documents."""
        rules, (worker, *_) = settings.jobs, settings.workers
        retries = Retries(rules.retry_s, rules.retry_factor, rules.retry_s_max, random.Random())
        work = DocumentWork(self._service.context, self._service.embed, self._upserter, retries)
        return Runner(
            store,
            work.handlers(),
            owner="worker",
            worker=worker,
            rules=rules,
            retries=retries,
            gates={LANDING: partial(away_s, self._upserter)},
        )

    async def _ready(self) -> Mapping[str, bool]:
        return {name: await one.ready() for name, one in self._embedders.items()}

    async def run(self, port: int) -> None:
        """Serve on 127.0.0.1 until SIGTERM or SIGINT."""
        config = uvicorn.Config(
            create_app(lambda: self._service), port=port, log_level="warning", access_log=False
        )
        async with asyncio.TaskGroup() as group:
            work = [one.batcher.run() for one in self._embedders.values()]
            work += [self._writer.run(), self._quotas.run(), self._feed.run()]
            work += [self._runner.run(), self._ticking()]
            tasks = [group.create_task(one) for one in work]
            await uvicorn.Server(config).serve()
            for task in tasks:
                task.cancel()


async def _tick(store: StoreOwner, every_s: float) -> None:
    while True:
        await asyncio.sleep(every_s)
        await store.tick()


def _quotas(settings: Settings, store: StoreOwner) -> Quotas:
    owners_max = settings.admission.tenants_tracked_max
    ledger = BankLedger(
        settings.ledger, keys_max=8 * owners_max, clock=time.monotonic, wall=time.time
    )
    return Quotas(
        ledger,
        store,
        settings.ledger,
        replica="ceiling",
        replicas=1,
        owners_max=owners_max,
        clock=time.monotonic,
        wall=time.time,
    )


async def serve(settings: Settings, folder: Path, port: int) -> None:
    """Own the Store and serve; the Store is closed in the end."""
    store = await asyncio.to_thread(
        StoreOwner, folder / settings.store.path, settings.store, time.time, jobs=settings.jobs
    )
    try:
        await (await Ceiling.open(settings.under(folder), store)).run(port)
    finally:
        store.close()


def main() -> None:
    """Read the options and serve."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", type=Path, default=Path("config.yaml"), help="deploy file")
    parser.add_argument("--data-dir", type=Path, required=True, help="folder of the Store")
    parser.add_argument("--port", type=int, default=8001)
    options = parser.parse_args()
    settings = DeployFile.read(options.config).settings
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(serve(settings, options.data_dir, options.port))


if __name__ == "__main__":
    main()
