"""Starts the whole service for `bench.fairness`: a pool a policy, a key a tenant, no limits but one.

The service is `headrace serve` on a free port with a data folder of its own. `Cluster` asks its
embedders what they gave to whom, and the kernel what all its processes have used.
"""

import asyncio
import json
import sys
import tempfile
import time
import urllib.request
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from bench import processes, servers
from bench.crowd import ASKED, TIERS, Town
from bench.report import ROOT
from deployments.places import DeployFile, find_cluster
from serve.admission.keys import new_key
from serve.config import Precision
from serve.jobs.owner import StoreOwner


TENANTS: Mapping[str, str] = {
    **{f"light-{tier}": tier for tier in TIERS},
    **{f"flood-{tier}": tier for tier in TIERS},
    "job": "premium",
    "tiny": "premium",
    "capped": "capped",
    **{f"asks-{inputs}": "premium" for inputs in ASKED},
}
"""Every tenant and its tier."""
CAPPED = {"weight": 1, "interactive": {"requests_per_minute": 60}}
"""The tier of the tenant that is refused: one request a second."""


@dataclass(frozen=True, slots=True)
class Cluster:
    """The service's processes."""

    pid: int

    def counts(self, policy: str) -> dict[str, Any]:
        """What a policy's embedder gave since the last time."""
        from ray.serve import get_deployment_handle  # noqa: PLC0415  after the environment is set

        handle = get_deployment_handle(f"embedder-{policy}", "headrace")
        counts: dict[str, Any] = handle.counts.remote().result(timeout_s=120)
        return counts

    def cpu_s(self) -> float:
        """CPU seconds of all its processes until now."""
        return processes.cpu_s(self.pid)


@contextmanager
def running(
    policies: Sequence[str], *, target_ms: float, cpus: float, precision: Precision
) -> Iterator[tuple[dict[str, Town], Cluster]]:
    """A town for each policy, over one cluster; `cpus` are the threads of each model."""
    with tempfile.TemporaryDirectory(prefix="hr-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        pool = {"cpus": cpus, "precision": precision, "target_ms": target_ms}
        config = _config(folder, policies, pool)
        keys = asyncio.run(_keys(folder, config))
        port = servers.free_port()
        program = Path(sys.executable).with_name("headrace")
        command = [str(program), "serve", "--config", str(config), "--no-demo-keys"]
        command += ["--data-dir", str(folder), "--port", str(port)]
        command += ["--ray-temp-dir", str(folder / "ray"), "--timeout", "240"]
        url = f"http://127.0.0.1:{port}"
        with servers.running(command, folder, url) as process, _connected(folder):
            towns = {one: Town(url, _model(one), keys) for one in policies}
            for policy, town in towns.items():
                _make_collection(town, policy)
            yield towns, Cluster(process.pid)


def _model(policy: str) -> str:
    return f"minilm-{policy}"


def _config(folder: Path, policies: Sequence[str], changed: Mapping[str, Any]) -> Path:
    raw = yaml.safe_load((ROOT / "config.yaml").read_text(encoding="utf-8"))
    application = raw["applications"][0]
    application["import_path"] = "bench.cluster:build"
    args = application["args"]
    args["admission"]["tiers"] = {
        **{tier: {"weight": weight} for tier, weight in TIERS.items()},
        "capped": CAPPED,
    }
    args["limits"] = {"interactive_deadline_s": 120, "bulk_deadline_s": 280}
    args["cache"] = {"scope": "none"}  # loads repeat their texts
    pool = args["pools"][0]
    args["pools"] = [
        {
            **pool,
            "name": policy,
            "graphs": str(servers.GRAPHS),
            "models": [
                {**pool["models"][0], "id": _model(policy), "precision": changed["precision"]}
            ],
            "batch": {**pool["batch"], "target_ms": changed["target_ms"]},
            "cpus": changed["cpus"],
        }
        for policy in policies
    ]
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(raw, sort_keys=False), encoding="utf-8")
    return path


async def _keys(folder: Path, config: Path) -> dict[str, str]:
    """Before the service opens the Store."""
    settings = DeployFile.read(config).settings
    owner = StoreOwner(folder / settings.store.path, settings.store, time.time)
    made: dict[str, str] = {}
    try:
        for tenant, tier in TENANTS.items():
            key, made[tenant] = new_key(tenant, tier, time.time())
            await owner.create_key(uuid.uuid4().hex, key)
    finally:
        owner.close()
    return made


@contextmanager
def _connected(folder: Path) -> Iterator[None]:
    from deployments.local import connected  # noqa: PLC0415  Ray reads its environment on import

    with connected(find_cluster(folder).address):
        yield


def _make_collection(town: Town, name: str) -> None:
    body = json.dumps({"name": name, "model": town.model}).encode()
    headers = {"authorization": f"Bearer {town.keys['job']}"}
    request = urllib.request.Request(f"{town.url}/v1/collections", body, headers)  # noqa: S310  ours
    with urllib.request.urlopen(request, timeout=30):  # noqa: S310
        return
