"""Ray's own autoscaler over fake nodes: raylets of this machine, each of which counts as a machine.

`ray.cluster_utils.AutoscalingCluster` is not used: Ray's wheel lacks the file that it reads, and it begins
with a `ray stop --force`, which would end every cluster of the machine.
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from ray.autoscaler._private.fake_multi_node.node_provider import (
    FAKE_HEAD_NODE_ID,
    FAKE_HEAD_NODE_TYPE,
    FakeMultiNodeProvider,
)
from ray.autoscaler.v2.sdk import get_cluster_status
from ray.util import get_node_ip_address

from tests.e2e.conftest import descendants


STORE_BYTES = 80 * 2**20
"""Of each node's object store, in shared memory. Ray takes no less than 75 MiB."""

START_S_MAX = 60


@dataclass
class Head:
    """The head of a cluster that grows by fake nodes: it has no room for any work itself."""

    address: str
    process: subprocess.Popen[bytes]

    def nodes(self) -> int:
        """Beside the head, those that Ray counts as alive."""
        status = get_cluster_status(self.address)
        return len(status.active_nodes) + len(status.idle_nodes) - 1

    def homeless(self) -> int:
        """Actors and tasks that fit on no node, as the autoscaler sees them."""
        demands = get_cluster_status(self.address).resource_demands.ray_task_actor_demand
        return sum(bundle.count for demand in demands for bundle in demand.bundles_by_count)

    def processes(self) -> dict[int, str]:
        """All that it started, fake nodes included, with their titles."""
        return descendants(self.process.pid)


def _free_ports(count: int) -> list[int]:
    with_sockets = [socket.socket() for _ in range(count)]
    for one in with_sockets:
        one.bind(("", 0))
    ports = [int(one.getsockname()[1]) for one in with_sockets]
    for one in with_sockets:
        one.close()
    return ports


def _config(address: str, resources: Mapping[str, float], *, most: int, idle_s: float) -> str:
    """What Ray's autoscaler reads. A node has `resources`, and leaves after `idle_s` without work."""
    provider = {
        "type": "external",
        "module": f"{FakeMultiNodeProvider.__module__}.{FakeMultiNodeProvider.__name__}",
        "head_node_id": FAKE_HEAD_NODE_ID,
        "gcs_address": address,
        "launch_multiple": True,
        "use_node_id_as_ip": True,
        "disable_node_updaters": True,
    }
    worker = {
        "resources": {**resources, "object_store_memory": STORE_BYTES},
        "node_config": {},
        "min_workers": 0,
        "max_workers": most,
    }
    head = {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0}
    return json.dumps(
        {
            "cluster_name": "fake",
            "max_workers": most,
            "idle_timeout_minutes": idle_s / 60,
            "provider": provider,
            "available_node_types": {FAKE_HEAD_NODE_TYPE: head, "worker": worker},
            "head_node_type": FAKE_HEAD_NODE_TYPE,
            # Asked for, though such nodes are set up by nobody.
            **{f"{who}setup_commands": [] for who in ("", "head_", "worker_")},
            **{key: [] for key in ("initialization_commands", "cluster_synced_files")},
            "file_mounts": {},
        }
    )


@contextmanager
def running(resources: Mapping[str, float], *, most: int, idle_s: float) -> Iterator[Head]:
    """A head, and a fake node with `resources` for what it has no room for; all of it is ended after."""
    temp = Path(tempfile.mkdtemp(prefix="hr", dir="/tmp"))  # short: it holds unix sockets
    gcs, client, metrics, agent = _free_ports(4)
    # Of the machine: Ray replaces 127.0.0.1 by it, and fake nodes would not find the head.
    address = f"{get_node_ip_address()}:{gcs}"
    config = temp / "autoscaler.json"
    config.write_text(_config(address, resources, most=most, idle_s=idle_s))
    command = (
        f"ray start --head --block --port={gcs} --num-cpus=0 --num-gpus=0 --temp-dir={temp} "
        f"--object-store-memory={STORE_BYTES} --include-dashboard=false "
        f"--ray-client-server-port={client} --dashboard-agent-listen-port={agent} "
        f"--min-worker-port=0 --max-worker-port=0 --autoscaling-config={config}"
    )
    environment = {
        "RAY_AUTH_MODE": "disabled",
        "RAY_FAKE_CLUSTER": "1",
        "RAY_enable_autoscaler_v2": "1",
        "RAY_CLOUD_INSTANCE_ID": FAKE_HEAD_NODE_ID,
        "RAY_OVERRIDE_NODE_ID_FOR_TESTING": FAKE_HEAD_NODE_ID,
        "AUTOSCALER_UPDATE_INTERVAL_S": "1",
        "AUTOSCALER_METRIC_PORT": str(metrics),
    }
    log = temp / "head.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [Path(sys.executable).with_name("ray"), *command.split()[1:]],
            env=os.environ | environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    head = Head(address, process)
    try:
        _await(head, log)
        yield head
    finally:
        _end(head, temp)
        shutil.rmtree(temp, ignore_errors=True)


def _await(head: Head, log: Path) -> None:
    """Until the head counts itself; its autoscaler may come later, and if that fails the head ends."""
    deadline = time.monotonic() + START_S_MAX
    while True:
        assert head.process.poll() is None, f"the head ended:\n{log.read_text()}"
        assert time.monotonic() < deadline, f"the head did not start:\n{log.read_text()}"
        with suppress(Exception):  # nobody listens yet
            if head.nodes() == 0:
                return
        time.sleep(0.2)


def _end(head: Head, temp: Path) -> None:
    """All at once, since nothing of it is kept. Fake nodes are their own, and do not end with the head."""
    left = set(head.processes())
    head.process.kill()
    head.process.wait()
    for pid in left | _naming(temp):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def _naming(temp: Path) -> set[int]:
    """Processes with this cluster's own folder in their command line, as a raylet that came at the last moment."""
    found = set()
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if f"{temp}/".encode() in (folder / "cmdline").read_bytes():
                found.add(int(folder.name))
    return found
