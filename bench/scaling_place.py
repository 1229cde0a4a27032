"""The service on a Ray cluster of this process, with pools of simulated devices: for `bench.scaling`.

Everything is the service's own but the engine, which sleeps (`serve.embedding.fake`). `Noted` is its
embedder with a stopwatch: when it was started, and what each hand-out was.
"""

import asyncio
import logging
import shutil
import tempfile
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import ray
import ray.serve

from bench import servers
from deployments.actors import LEDGER, STORE, UPSERTER, living, retire
from deployments.app import compose
from deployments.embedder import Embedder
from deployments.local import operators
from serve import config
from serve.config import Settings
from serve.flows.batching import Batcher
from serve.flows.operators import MadeKey
from serve.flows.pending import Slice


APPLICATION = "headrace"
CPUS = 0.1
"""Logical cores of a replica: a device that sleeps takes none."""
REPLICAS_MAX = 1 + 2 + 5 + 10
"""That ever run at once."""
NOTES_MAX = 10_000
READY_S_MAX = 240.0


@dataclass(frozen=True, slots=True)
class HandOut:
    """What a replica gave to its device at once; times are of the machine's monotonic clock.

    `padded` are tokens in `batches`, which say how long the device was busy.
    """

    began: float
    ended: float
    tokens: int
    padded: int
    batches: int


@dataclass(frozen=True, slots=True)
class Start:
    """How a replica came up, by the machine's monotonic clock: its code began, its device was ready."""

    replica: str
    began: float
    ready: float


class Stopwatch(Batcher):
    """The service's batcher, which notes its hand-outs."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.notes: deque[HandOut] = deque(maxlen=NOTES_MAX)

    async def _serve(self, slices: Sequence[Slice], *, full: bool) -> None:
        began, before = time.monotonic(), self.tally.counts()
        await super()._serve(slices, full=full)
        after = self.tally.counts()
        more = {name: int(after[name] - before[name]) for name in ("tokens", "padded", "batches")}
        self.notes.append(HandOut(began, time.monotonic(), **more))


class Noted(Embedder):
    """The service's embedder, which says how it came up and what it handed out."""

    batcher = Stopwatch

    async def __init__(self, pool: config.Pool, settings: Settings) -> None:  # type: ignore[misc]
        """As ever."""
        began = time.monotonic()
        await super().__init__(pool, settings)  # type: ignore[misc]
        replica = ray.serve.get_replica_context().replica_tag
        self._start = Start(replica, began, time.monotonic())

    async def start(self) -> Start:
        """When it came up."""
        return self._start

    async def handouts(self) -> list[HandOut]:
        """Those that have ended since the last time."""
        notes: deque[HandOut] = self._batcher.notes
        taken = list(notes)
        notes.clear()
        return taken


@dataclass(frozen=True, slots=True)
class Place:
    """A running service, and a key of a tenant without limits."""

    settings: Settings
    url: str
    key: str


@contextmanager
def cluster(replicas: int) -> Iterator[int]:
    """A Ray cluster of this process with room for so many replicas; the port that Serve listens on."""
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    temp = tempfile.mkdtemp(prefix="hr-")  # Ray's sockets lie below it: short
    port = servers.free_port()
    try:
        ray.init(
            address="local",
            _temp_dir=temp,
            num_cpus=2 + int(2 * replicas * CPUS),
            include_dashboard=False,
            log_to_driver=False,
            configure_logging=False,
        )
        ray.serve.start(http_options={"host": "127.0.0.1", "port": port})
        yield port
    finally:
        with redirect_stdout(StringIO()):  # Ray reports each actor that leaves as it was told to
            if ray.is_initialized():
                ray.serve.shutdown()
            ray.shutdown()
        shutil.rmtree(temp, ignore_errors=True)


@contextmanager
def deployed(port: int, pools: Sequence[config.Pool], **changes: Any) -> Iterator[Place]:
    """The service with these pools, ready; gone afterwards, its actors too."""
    with tempfile.TemporaryDirectory(prefix="hr-", ignore_cleanup_errors=True) as folder:
        settings = Settings(
            data_dir=folder,
            admission=config.Admission.model_validate({"tiers": {"bench": {"weight": 1}}}),
            limits=config.Limits(bulk_deadline_s=1800),
            cache=config.Cache(scope="none"),
            pools=tuple(pools),
            **changes,
        ).under(Path(folder))
        embedders = {pool.name: Noted for pool in pools}
        try:
            ray.serve.run(compose(settings, embedders), name=APPLICATION, route_prefix="/")
            url = f"http://127.0.0.1:{port}"
            _wait_ready(f"{url}{servers.READY}")
            made = asyncio.run(_make_key(settings))
            yield Place(settings, url, made.secret)
        finally:
            ray.serve.delete(APPLICATION)
            for role in (UPSERTER, STORE, LEDGER):
                for name in living(role):
                    retire(name, settings.actors.drain_s)


async def _make_key(settings: Settings) -> MadeKey:
    return await operators(settings).create_key("bench", tenant="bench", tier="bench")


def _wait_ready(url: str) -> None:
    until = time.monotonic() + READY_S_MAX
    while (answer := servers.ask(url)) is None or answer.status != servers.OK:
        if time.monotonic() > until:
            raise servers.StartFailed(f"not ready after {READY_S_MAX:g} s")
        time.sleep(0.1)


def handle_of(pool: config.Pool) -> Any:
    """Ray's handle to a pool's replicas."""
    return ray.serve.get_deployment_handle(f"embedder-{pool.name}", APPLICATION)
