"""The profile `fast` from `config.yaml`: what it opens, and what is left of it after a kill."""

import shutil
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.e2e.conftest import Served, descendants, start, stop


pytestmark = [pytest.mark.e2e, pytest.mark.timeout(400)]

ENDED_S_MAX = 60
LISTENS = "0A"
LOOPBACK = {"0100007F", "00000000000000000000000001000000"}
REPLICAS = range(30_000, 31_001)
"""Where Ray lets ingress replicas listen for HAProxy."""


@pytest.fixture
def fast(tmp_path) -> Iterator[Served]:
    service = start(tmp_path / "data", "--profile=fast")
    yield service
    stop(service)


def listening(pid: int) -> set[tuple[str, int]]:
    """Addresses, as the kernel writes them, and ports of TCP where a process listens."""
    folder = Path(f"/proc/{pid}")
    held = {str(link.readlink()) for link in (folder / "fd").iterdir()}
    found = set()
    for table in ("tcp", "tcp6"):
        for line in (folder / "net" / table).read_text().splitlines()[1:]:
            _, local, _, state, *_, inode = line.split()[:10]
            if state == LISTENS and f"socket:[{inode}]" in held:
                address, _, port = local.partition(":")
                found.add((address, int(port, 16)))
    return found


def is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def haproxies(served: Served) -> dict[int, str]:
    return {
        pid: title
        for pid, title in descendants(served.process.pid).items()
        if title.partition("\0")[0].endswith("/haproxy")
    }


def test_it_opens_what_the_default_profile_opens_and_nothing_of_it_outlives_a_kill(fast):
    body = {"model": "all-MiniLM-L6-v2", "input": "the wheel turns"}
    headers = {"authorization": f"Bearer {fast.key}"}
    reply = httpx.post(f"{fast.url}/v1/embeddings", json=body, headers=headers, timeout=30)
    assert reply.status_code == 200, reply.text
    port = int(fast.url.rpartition(":")[2])

    proxies = haproxies(fast)
    assert proxies
    assert set.union(*(listening(pid) for pid in proxies)) == {("0100007F", port)}
    everywhere = {
        port
        for pid in descendants(fast.process.pid)
        for address, port in listening(pid)
        if address not in LOOPBACK
    }
    assert not everywhere & {port, *REPLICAS}

    fast.process.send_signal(signal.SIGKILL)
    fast.process.wait()
    deadline = time.monotonic() + ENDED_S_MAX
    while left := [pid for pid in proxies if Path(f"/proc/{pid}/exe").exists()]:
        assert time.monotonic() < deadline, f"HAProxy outlives its cluster: {left}"
        time.sleep(0.2)
    assert is_free(port)
    config = Path(next(iter(proxies.values())).split("\0")[3])
    shutil.rmtree(config.parents[1])  # what was killed removes nothing
