"""One Ray cluster for the tier: its own temp dir and ports, the fake engine, two ingress replicas."""

import asyncio
import os
import shutil
import signal
import socket
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import httpx
import pytest
import ray
import ray.serve

from deployments.app import compose
from deployments.local import operators
from serve.config import Actors, Batch, Cache, Ingress, Jobs, Limits, Model, Pool, Settings
from serve.flows.operators import MadeKey, OperatorFlow


T = TypeVar("T")

MODEL = Model(
    id="fake",
    engine="fake",
    dimensions=32,
    tokens_max=512,
    matryoshka=True,
    fake_ms_per_batch=20,
    fake_ms_per_token=0.02,
)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass
class Whole:
    """The running service, as a client and as an operator see it."""

    settings: Settings
    url: str
    keys: dict[str, str]

    def client(self, tier: str = "enterprise", *, key: str | None = None) -> httpx.Client:
        """With the key given, else with that of the tier's own tenant."""
        headers = {"authorization": f"Bearer {key or self.keys[tier]}"}
        return httpx.Client(base_url=self.url, headers=headers, timeout=90)

    def operate(self, ask: Callable[[OperatorFlow], Awaitable[T]]) -> T:
        """As the command line does it."""

        async def asked() -> T:
            return await ask(operators(self.settings))

        return asyncio.run(asked())

    def key(self, tenant: str, tier: str = "enterprise", **options: Any) -> MadeKey:
        """A key of a tenant, which is made when it is new."""
        return self.operate(
            lambda flow: flow.create_key("test", tenant=tenant, tier=tier, **options)
        )

    @staticmethod
    def until(condition: Callable[[], bool], *, timeout_s: float = 60) -> float:
        """Wait for a condition; the seconds it took. Fails the test when it never holds."""
        began = time.monotonic()
        while not condition():
            assert time.monotonic() - began < timeout_s, f"not within {timeout_s} s"
            time.sleep(0.1)
        return time.monotonic() - began

    @classmethod
    def kill(cls, title: str) -> None:
        """`kill -9` of one process of this cluster: Ray names its workers after their class."""
        found: list[int] = []
        cls.until(lambda: found.extend(_workers(title)) or bool(found), timeout_s=10)
        os.kill(found[0], signal.SIGKILL)

    def deploy(self, settings: Settings, embedders: Mapping[str, type] = {}) -> None:
        """Deploy, and wait until every part is usable; `embedders` as `compose` takes them."""
        ray.serve.run(compose(settings, embedders), name="headrace", route_prefix="/")
        self.settings = settings
        self.until(self.ready)

    def delete(self) -> None:
        """Delete the application."""
        ray.serve.delete("headrace")

    def ready(self) -> bool:
        try:
            return httpx.get(f"{self.url}/health/ready", timeout=10).status_code == 200
        except httpx.HTTPError:
            return False

    @staticmethod
    def replicas(part: str) -> dict[str, int]:
        """Process ids by actor, of the replicas of a deployment that live, those that leave included."""
        found = ray.util.list_named_actors(all_namespaces=True)
        names = [one["name"] for one in found if f"SERVE_REPLICA::headrace#{part}#" in one["name"]]
        return {name: pid for name in names if (pid := _pid_of(name))}

    def embedder_stats(self) -> dict[str, float]:
        """Of one replica: callers that need a total use one replica's worth of work."""
        handle = ray.serve.get_deployment_handle("embedder-default", "headrace")
        return handle.stats.remote().result(timeout_s=20)


def _pid_of(actor: str) -> int | None:
    try:
        return ray.get(ray.get_actor(actor, "serve").__ray_call__.remote(_own_pid), timeout=20)
    except (ValueError, ray.exceptions.RayError):  # it has left meanwhile
        return None


def _own_pid(_actor: object) -> int:
    return os.getpid()


def _workers(title: str) -> list[int]:
    """At a bad moment none: Ray renames a worker at every call, letter by letter."""
    raylet = ray._private.worker.global_worker.node.get_session_dir_path()
    return [
        int(folder.name)
        for folder in Path("/proc").glob("[0-9]*")
        if _title(folder.name).startswith(title) and raylet in _title(_parent(folder.name))
    ]


def _title(pid: str) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    except OSError:
        return ""


def _parent(pid: str) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1]
    except OSError:
        return "0"


def settings_in(folder: Path) -> Settings:
    return Settings(
        data_dir=str(folder),
        pools=(Pool(models=(MODEL,), replicas=1, cpus=0.5, batch=Batch(tokens_max=512)),),
        ingress=Ingress(tokenizer_threads=1, replicas=2),
        cache=Cache(scope="none"),  # tests send one text again and again, and mean work
        limits=Limits(bulk_deadline_s=60),
        jobs=Jobs(retry_s=1, retry_factor=1.5),
        actors=Actors(orphan_grace_s=6, drain_s=5),
    ).under(folder)  # as the application deploys them: actors are named after their settings


@pytest.fixture(scope="package")
def cluster() -> Iterator[int]:
    """A local cluster with Serve on a free port; ended, with every process, afterwards."""
    temp = tempfile.mkdtemp(prefix="hr", dir="/tmp")  # short: it holds unix sockets
    port = free_port()
    ray.init(
        address="local",
        _temp_dir=temp,
        num_cpus=4,
        include_dashboard=False,
        log_to_driver=False,
        configure_logging=False,
    )
    ray.serve.start(http_options={"host": "127.0.0.1", "port": port})
    yield port
    ray.serve.shutdown()
    ray.shutdown()
    shutil.rmtree(temp, ignore_errors=True)


@pytest.fixture(scope="package")
def service(cluster: int, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    settings = settings_in(tmp_path_factory.mktemp("data"))
    service = Whole(settings, f"http://127.0.0.1:{cluster}", {})
    service.deploy(settings)
    service.keys = {
        tier: service.key(f"tenant-{tier}", tier).secret for tier in settings.admission.tiers
    }
    return service


@pytest.fixture
def whole(service: Whole) -> Whole:
    """The service, deployed again where a test has deleted it."""
    if "headrace" not in ray.serve.status().applications:
        service.deploy(service.settings)
    return service
