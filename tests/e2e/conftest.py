"""`headrace serve` as a user starts it: a subprocess, its own data folder, port and temp dir."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
GRAPHS = ROOT / "data" / "graphs"
START_S_MAX = 240


@dataclass
class Served:
    """A running service and the keys that it printed."""

    process: subprocess.Popen[str]
    url: str
    data_dir: Path
    keys: dict[str, str]
    output: str
    temp_dir: Path

    @property
    def key(self) -> str:
        return self.keys["enterprise"]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def start(data_dir: Path, *options: str) -> Served:
    """A service over a data folder; the graphs of models are shared, since one takes a minute."""
    graphs = data_dir / "graphs"
    if not graphs.is_symlink():
        data_dir.mkdir(exist_ok=True)
        GRAPHS.mkdir(parents=True, exist_ok=True)
        graphs.symlink_to(GRAPHS)
    temp_dir = Path(tempfile.mkdtemp(prefix="hr", dir="/tmp"))  # short: it holds unix sockets
    port = _free_port()
    log = data_dir.parent / "serve.log"
    with log.open("w") as output_file:
        process = subprocess.Popen(
            [
                BIN / "headrace",
                "serve",
                f"--data-dir={data_dir}",
                f"--port={port}",
                f"--ray-temp-dir={temp_dir}",
                f"--timeout={START_S_MAX}",
                *options,
            ],
            cwd=ROOT,
            stdout=output_file,
            stderr=subprocess.STDOUT,
            text=True,
            env=os.environ | {"RAY_AUTH_MODE": "disabled", "PYTHONUNBUFFERED": "1"},
            start_new_session=True,
        )
    output = ""
    deadline = time.monotonic() + START_S_MAX + 10
    while "Ctrl-C stops everything" not in output:
        output = log.read_text()
        assert process.poll() is None, f"it ended:\n{output}"
        assert time.monotonic() < deadline, f"it did not start:\n{output}"
        time.sleep(0.2)
    keys = dict(re.findall(r"^  (\w+) +(hr_\S+)$", output, re.MULTILINE))
    return Served(process, f"http://127.0.0.1:{port}", data_dir, keys, output, temp_dir)


def stop(served: Served) -> int:
    """As Ctrl-C does, to the one process that was started."""
    if served.process.poll() is None:
        served.process.send_signal(signal.SIGINT)
    try:
        return served.process.wait(60)
    finally:
        if served.process.poll() is None:
            os.killpg(served.process.pid, signal.SIGKILL)
        shutil.rmtree(served.temp_dir, ignore_errors=True)


def descendants(root: int) -> dict[int, str]:
    """Every living process below this one, with its command line."""
    children: dict[int, list[int]] = {}
    titles: dict[int, str] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            stat = (folder / "stat").read_text()
            titles[int(folder.name)] = (folder / "cmdline").read_bytes().decode(errors="replace")
        except OSError:
            continue
        children.setdefault(int(stat.rpartition(")")[2].split()[1]), []).append(int(folder.name))
    found: dict[int, str] = {}
    waiting = [root]
    while waiting:
        for pid in children.get(waiting.pop(), []):
            found[pid] = titles.get(pid, "")
            waiting.append(pid)
    return found


@pytest.fixture(scope="package")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    service = start(tmp_path_factory.mktemp("served") / "data")
    yield service
    stop(service)
