"""What a local cluster is started from and where commands find it. Nothing here imports Ray."""

import fcntl
import json
import os
import socket
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Self

import yaml
from pydantic import ValidationError

from deployments import haproxy
from serve.config import Settings
from serve.config.live import fault, laid_over


DATA_DIR = "HEADRACE_DATA_DIR"
"""Environment variable that overrides `data_dir`, here and on the cluster (`deployments.app`)."""

PROFILES: Mapping[str, Mapping[str, str]] = {
    "default": {},
    "fast": {
        "RAY_SERVE_ENABLE_HA_PROXY": "1",
        "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
        # Ray keeps a leaving replica for 30 s, for load balancers; on one machine there is none.
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "1",
        # Ten times a second Serve's controller looks at everything, which takes a thirtieth of a core while
        # nothing happens. A replica that died is replaced 0.3 s later so.
        "RAY_SERVE_CONTROL_LOOP_INTERVAL_S": "0.4",
        # The throughput mode keeps a thousand lines of a replica's log in memory, warnings included;
        # there is none for each request (`enable_access_log: false`).
        "RAY_SERVE_REQUEST_PATH_LOG_BUFFER_SIZE": "1",
    },
}
"""Profile -> environment that Ray Serve reads when it is imported."""


class PlaceError(Exception):
    """A file, folder, port or cluster is not as it must be; the message is for a person."""


class NotRunning(PlaceError):
    """There is no cluster to talk to."""


class StartFailed(PlaceError):
    """The cluster or the application did not start."""


@contextmanager
def profiled(name: str) -> Iterator[None]:
    """Set the environment of a profile, before Ray is imported; what it needs on disk lies there until
    the end. Raises PlaceError when `fast` has no HAProxy that it can start.
    """
    os.environ.update(PROFILES[name])
    with ExitStack() as stack:
        if name == "fast":
            try:
                os.environ.update(stack.enter_context(haproxy.placed()))
            except (ImportError, OSError) as error:
                raise PlaceError(f"the profile fast cannot start HAProxy: {error}") from None
        yield


@dataclass(frozen=True, slots=True)
class DeployFile:
    """A Ray Serve deploy file with one application: ours."""

    path: Path
    raw: Mapping[str, Any]
    settings: Settings

    @classmethod
    def read(cls, path: Path) -> Self:
        """Load and check it. Raises PlaceError that names the first key at fault."""
        try:
            raw = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise PlaceError(f"{path} cannot be read: {' '.join(str(error).split())}") from None
        try:
            (application,) = raw["applications"]
            settings = Settings.model_validate(application.get("args") or {})
        except ValidationError as error:
            raise PlaceError(f"{path}: args.{fault(error)}") from None
        except (TypeError, KeyError, ValueError, AttributeError):
            raise PlaceError(f"{path} must hold exactly one application") from None
        _check_live(path, application, settings)
        http = raw.get("http_options") or {}
        if not isinstance(http, dict) or not isinstance(http.get("port", 8000), int):
            raise PlaceError(f"{path}: http_options.port must be a number")
        return cls(path, raw, settings)

    def with_port(self, port: int | None) -> "DeployFile":
        """The same file with another HTTP port."""
        if port is None:
            return self
        http = {**(self.raw.get("http_options") or {}), "port": port}
        return replace(self, raw={**self.raw, "http_options": http})

    @property
    def application(self) -> str:
        """Name of the application."""
        return str(self.raw["applications"][0].get("name", "default"))

    @property
    def host(self) -> str:
        """Address the service listens on."""
        return str((self.raw.get("http_options") or {}).get("host", "127.0.0.1"))

    @property
    def port(self) -> int:
        """Port the service listens on."""
        return int((self.raw.get("http_options") or {}).get("port", 8000))

    @property
    def url(self) -> str:
        """Where this machine reaches it."""
        host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(self.host, self.host)  # noqa: S104
        return f"http://{host}:{self.port}"

    def data_dir(self, chosen: str | None) -> Path:
        """The folder of everything durable: `chosen`, the environment's, or the file's own."""
        return Path(chosen or os.environ.get(DATA_DIR) or self.settings.data_dir).resolve()


def _check_live(path: Path, application: Mapping[str, Any], settings: Settings) -> None:
    """Raises PlaceError for a `user_config` that replicas would refuse."""
    for one in application.get("deployments") or ():
        try:
            laid_over(settings, one.get("user_config") or {})
        except ValueError as error:
            where = f"deployments[{one.get('name')}].user_config"
            raise PlaceError(f"{path}: {where}.{fault(error)}") from None


def check_port(host: str, port: int) -> None:
    """Raises PlaceError when the service could not listen there."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            reason = os.strerror(error.errno or 0).lower()
            raise PlaceError(f"{host}:{port}: {reason}; choose another with --port") from None


@dataclass(frozen=True, slots=True)
class RayOptions:
    """How Ray is started: in its own folder of files when `temp_dir` is None."""

    temp_dir: Path | None
    dashboard: bool


@dataclass(frozen=True, slots=True)
class Cluster:
    """A running local cluster: Ray's address, the process that holds it, the service's URL, and
    Ray's authentication mode, which a process must have in its environment to connect.
    """

    address: str
    pid: int
    url: str
    auth: str


class Claim:
    """The file `cluster.json` of a data folder, locked as long as its cluster runs.

    The lock, not the file, says that a cluster lives: the kernel drops it with the process.
    """

    def __init__(self, file: Any, path: Path) -> None:
        self._file = file
        self._path = path

    def announce(self, cluster: Cluster) -> None:
        """Tell other commands where the cluster is."""
        self._file.seek(0)
        self._file.truncate()
        json.dump(asdict(cluster), self._file)
        self._file.flush()

    @classmethod
    @contextmanager
    def take(cls, folder: Path) -> Iterator[Self]:
        """Hold the folder. Raises PlaceError when a cluster runs over it already."""
        path = folder / "cluster.json"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            file = path.open("a+", encoding="utf-8")
        except OSError as error:
            raise PlaceError(f"{folder} cannot be written: {error.strerror}") from None
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise PlaceError(f"another headrace runs over {folder}") from None
            file.truncate(0)
            try:
                yield cls(file, path)
            finally:
                path.unlink(missing_ok=True)


def find_cluster(folder: Path) -> Cluster:
    """The cluster that runs over a data folder. Raises NotRunning when there is none."""
    path = folder / "cluster.json"
    nothing = NotRunning(f"no headrace runs over {folder}; start one, or give --address")
    try:
        with path.open(encoding="utf-8") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:  # held: it lives
                return Cluster(**json.load(file))
    except FileNotFoundError:
        raise nothing from None
    except (ValueError, TypeError):
        raise NotRunning(f"the headrace over {folder} is still starting") from None
    raise nothing
