"""Starts the servers under test, over one deploy file: the repository's, without its quotas.

Its deadlines are far off, too. A server is a subprocess on a free port of 127.0.0.1 with a data
folder of its own; it ends with its context, and its log is shown when it does not start. A `Recipe`
says how one is started; `bench.peers` knows them by name.
"""

import asyncio
import http.client
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
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from bench.load import Target
from bench.report import ROOT
from deployments.places import DeployFile
from serve.admission.keys import new_key
from serve.config import Precision, Settings
from serve.jobs.owner import StoreOwner


GRAPHS = ROOT / "data" / "graphs"
"""Where `make serve` keeps graphs, too: only the first start of all makes one."""
READY = "/health/ready"
"""The route of our servers that answers 200 when they are ready."""
OK = 200
LOG, LOG_LINES = "server.log", 20
"""The log's name, and how much of its end is shown when a server does not start."""
START_S_MAX = 300.0
STOP_S_MAX = 60.0
DEADLINE_S = 60
"""A busy machine must slow a load down, not turn it into refusals."""
FAKE: dict[str, Any] = {"id": "fake", "engine": "fake", "dimensions": 384, "tokens_max": 8192}


Change = Callable[[dict[str, Any]], None]
"""Of the settings in a deploy file, in place."""


def as_they_are(_args: dict[str, Any]) -> None:
    """Settings that nothing is changed of."""


def with_fake_model(args: dict[str, Any]) -> None:
    """The simulated device instead of the model."""
    args["pools"][0]["models"] = [FAKE]


def without_conduits(args: dict[str, Any]) -> None:
    """Calls take Ray's handles."""
    args["pools"][0]["conduits"] = "off"


def in_precision(word: Precision) -> Change:
    """What the service's models are to multiply."""

    def change(args: dict[str, Any]) -> None:
        for pool in args["pools"]:
            for model in pool["models"]:
                model["precision"] = word

    return change


def both(*changes: Change) -> Change:
    """One after the other."""

    def change(args: dict[str, Any]) -> None:
        for one in changes:
            one(args)

    return change


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
    def make(cls, folder: Path, change: Change) -> "Site":
        """Both servers of a comparison get one from the same `config.yaml`, with `change` of its args."""
        raw = yaml.safe_load((ROOT / "config.yaml").read_text(encoding="utf-8"))
        args = raw["applications"][0]["args"]
        args["admission"]["tiers"]["enterprise"] = {"weight": 16}  # no limits
        args["limits"] = {"interactive_deadline_s": DEADLINE_S}
        args["cache"] = {"scope": "none"}  # loads repeat their texts
        args["pools"][0]["graphs"] = str(GRAPHS)
        change(args)
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


@dataclass(frozen=True, slots=True)
class Recipe:
    """How a server is started, and how it is reached then; its log lies in `folder`."""

    target: Target
    command: Sequence[str]
    folder: Path
    ready: str
    """The URL that answers 200 when it is ready."""
    environment: Mapping[str, str] = field(default_factory=dict)
    cwd: Path = ROOT


@contextmanager
def plain_recipe(name: str, *, fake: bool = False) -> Iterator[Recipe]:
    """The plainest server of the same model: `bench.plain`."""
    with _site(with_fake_model if fake else as_they_are) as site:
        words = [sys.executable, "-m", "bench.plain", "--config", str(site.config)]
        yield _recipe(name, site, words)


@contextmanager
def ceiling_recipe(name: str, change: Change = as_they_are) -> Iterator[Recipe]:
    """Our own service without Ray, in one process: `bench.ceiling`."""
    with _site(change) as site:
        words = [sys.executable, "-m", "bench.ceiling", "--config", str(site.config)]
        yield _recipe(name, site, [*words, "--data-dir", str(site.folder)])


@contextmanager
def headrace_recipe(
    profile: str, change: Change = as_they_are, name: str = "headrace"
) -> Iterator[Recipe]:
    """The service as `headrace serve` starts it, with Ray's files in a folder of its own."""
    with _site(change) as site:
        program = Path(sys.executable).with_name("headrace")
        words = [str(program), "serve", "--config", str(site.config), "--no-demo-keys"]
        words += ["--data-dir", str(site.folder), "--profile", profile]
        yield _recipe(name, site, [*words, "--ray-temp-dir", str(site.folder / "ray")])


def _recipe(name: str, site: Site, words: Sequence[str]) -> Recipe:
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    target = Target(name, url, site.model, site.key)
    return Recipe(target, [*words, "--port", str(port)], site.folder, f"{url}{READY}")


@contextmanager
def headrace(profile: str, change: Change = as_they_are) -> Iterator[Target]:
    """The whole service, ready."""
    with headrace_recipe(profile, change) as recipe, started(recipe) as target:
        yield target


@contextmanager
def ceiling(change: Change = as_they_are) -> Iterator[Target]:
    """The service without Ray, in one process, ready."""
    with ceiling_recipe("ceiling", change) as recipe, started(recipe) as target:
        yield target


@contextmanager
def started(recipe: Recipe) -> Iterator[Target]:
    """A server, ready; its target knows the process."""
    with launched(recipe) as process:
        _wait_ready(process, recipe)
        yield replace(recipe.target, pid=process.pid)


@contextmanager
def _site(change: Change) -> Iterator[Site]:
    # Ray's sockets lie below it, and a socket's path has at most 107 bytes.
    with tempfile.TemporaryDirectory(prefix="hr-", ignore_cleanup_errors=True) as folder:
        yield Site.make(Path(folder), change)


@contextmanager
def running(command: Sequence[str], folder: Path, url: str) -> Iterator[subprocess.Popen[bytes]]:
    """One of our servers by its command, ready; its log lies in `folder`."""
    recipe = Recipe(Target("server", url, ""), command, folder, f"{url}{READY}")
    with launched(recipe) as process:
        _wait_ready(process, recipe)
        yield process


@contextmanager
def launched(recipe: Recipe) -> Iterator[subprocess.Popen[bytes]]:
    """A server that begins to start; it ends with the context."""
    environment = {"RAY_AUTH_MODE": "disabled", "HF_HUB_OFFLINE": "1", **os.environ}
    with (recipe.folder / LOG).open("wb") as log:
        process = subprocess.Popen(
            recipe.command,
            cwd=recipe.cwd,
            env={**environment, **recipe.environment},
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    try:
        yield process
    finally:
        _stop(process)


def _wait_ready(process: subprocess.Popen[bytes], recipe: Recipe) -> None:
    def answered() -> bool:
        answer = ask(recipe.ready)
        return answer is not None and answer.status == OK

    wait(process, recipe, answered, every_s=0.1)


def wait(
    process: subprocess.Popen[bytes], recipe: Recipe, done: Callable[[], bool], *, every_s: float
) -> None:
    """Look until `done`. Raises StartFailed when the process ends or takes too long."""
    until = time.monotonic() + START_S_MAX
    while process.poll() is None and time.monotonic() < until:
        if done():
            return
        time.sleep(every_s)
    log = (recipe.folder / LOG).read_text(encoding="utf-8", errors="replace").splitlines()
    raise StartFailed("\n".join([f"{recipe.target.name} did not become ready:", *log[-LOG_LINES:]]))


@dataclass(frozen=True, slots=True)
class Health:
    """What a server answered when it was asked how it is."""

    status: int
    body: bytes


def ask(url: str, timeout_s: float = 5) -> Health | None:
    """What a server answers; None when there is no answer."""
    try:
        with urllib.request.urlopen(url, timeout=timeout_s) as answer:  # noqa: S310  our own server
            return Health(answer.status, answer.read())
    except urllib.error.HTTPError as error:
        with error:
            return Health(error.code, error.read())
    except (OSError, http.client.HTTPException):
        return None


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
