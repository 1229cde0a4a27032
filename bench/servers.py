"""Starts the servers under test, over one deploy file: the repository's, without its quotas.

Its deadlines are far off, too. A server is a subprocess on a free port of 127.0.0.1 with a data
folder of its own; it ends with its context, and its log is shown when it does not start.
"""

import asyncio
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from bench.load import Target
from bench.report import ROOT
from deployments.places import DeployFile
from serve.admission.keys import new_key
from serve.config import Settings
from serve.jobs.owner import StoreOwner


GRAPHS = ROOT / "data" / "graphs"
"""Where `make serve` keeps graphs, too: only the first start of all makes one."""
START_S_MAX = 300.0
STOP_S_MAX = 60.0
DEADLINE_S = 60
"""A busy machine must slow a load down, not turn it into refusals."""
FAKE: dict[str, Any] = {"id": "fake", "engine": "fake", "dimensions": 384, "tokens_max": 8192}


class StartFailed(Exception):
    """A server did not become ready; the message ends with its log."""


@dataclass(frozen=True, slots=True)
class Site:
    """A folder with a deploy file, and a Store that knows one key."""

    folder: Path
    config: Path
    model: str
    key: str

    @classmethod
    def make(cls, folder: Path, *, fake: bool) -> "Site":
        """Both servers of a comparison get one from the same `config.yaml`."""
        raw = yaml.safe_load((ROOT / "config.yaml").read_text(encoding="utf-8"))
        args = raw["applications"][0]["args"]
        args["admission"]["tiers"]["enterprise"] = {"weight": 16}  # no limits
        args["limits"] = {"interactive_deadline_s": DEADLINE_S}
        args["cache"] = {"scope": "none"}  # loads repeat their texts
        args["pools"][0]["graphs"] = str(GRAPHS)
        if fake:
            args["pools"][0]["models"] = [FAKE]
        config = folder / "config.yaml"
        config.write_text(yaml.safe_dump(raw, sort_keys=False), encoding="utf-8")
        settings = DeployFile.read(config).settings
        return cls(folder, config, next(iter(settings.models)), _keep_key(settings, folder))


def _keep_key(settings: Settings, folder: Path) -> str:
    """Before the server opens the Store, so that it needs no door for it."""
    key, text = new_key("bench", "enterprise", time.time())
    owner = StoreOwner(folder / settings.store.path, settings.store, time.time)
    try:
        asyncio.run(owner.create_key(uuid.uuid4().hex, key))
    finally:
        owner.close()
    return text


@contextmanager
def ceiling(name: str, *, fake: bool = False) -> Iterator[Target]:
    """Our own service without Ray, in one process: `bench.ceiling`."""
    with _site(fake=fake) as site:
        port = free_port()
        command = [sys.executable, "-m", "bench.ceiling", "--config", str(site.config)]
        url = f"http://127.0.0.1:{port}"
        command += ["--data-dir", str(site.folder), "--port", str(port)]
        with running(command, site.folder, url):
            yield Target(name, url, site.model, site.key)


@contextmanager
def headrace(profile: str) -> Iterator[Target]:
    """The service as `headrace serve` starts it, with Ray's files in a folder of its own."""
    with _site(fake=False) as site:
        port = free_port()
        program = Path(sys.executable).with_name("headrace")
        command = [str(program), "serve", "--config", str(site.config), "--no-demo-keys"]
        command += ["--data-dir", str(site.folder), "--port", str(port), "--profile", profile]
        url = f"http://127.0.0.1:{port}"
        with running([*command, "--ray-temp-dir", str(site.folder / "ray")], site.folder, url):
            yield Target("headrace", url, site.model, site.key)


@contextmanager
def _site(*, fake: bool) -> Iterator[Site]:
    # Ray's sockets lie below it, and a socket's path has at most 107 bytes.
    with tempfile.TemporaryDirectory(prefix="hr-", ignore_cleanup_errors=True) as folder:
        yield Site.make(Path(folder), fake=fake)


@contextmanager
def running(command: Sequence[str], folder: Path, url: str) -> Iterator[subprocess.Popen[bytes]]:
    """A server, ready; its log lies in `folder`."""
    environment = {"RAY_AUTH_MODE": "disabled", "HF_HUB_OFFLINE": "1", **os.environ}
    path = folder / "server.log"
    with path.open("wb") as log:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT
        )
    try:
        _wait_ready(process, f"{url}/health/ready", path)
        yield process
    finally:
        _stop(process)


def _wait_ready(process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    until = time.monotonic() + START_S_MAX
    while process.poll() is None and time.monotonic() < until:
        try:
            with urllib.request.urlopen(url, timeout=5):  # noqa: S310  our own server
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.1)
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    raise StartFailed("\n".join(["the server did not become ready:", *lines[-20:]]))


def _stop(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
    try:
        process.wait(STOP_S_MAX)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def free_port() -> int:
    """A port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
