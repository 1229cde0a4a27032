"""A local Ray cluster that lives as long as this process. The only place that starts one.

Import it after the environment is set: Ray reads much of it on import.
"""

import logging
import math
import os
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from io import StringIO
from pathlib import Path
from types import FrameType

import ray
import ray.serve
import yaml
from ray.serve.schema import ApplicationStatus, ApplicationStatusOverview
from ray.serve.scripts import cli as serve_command

from deployments.actors import LEDGER, NAMESPACE, STORE, UPSERTER, living, retire
from deployments.client import ready
from deployments.places import (
    Claim,
    Cluster,
    DeployFile,
    NotRunning,
    RayOptions,
    StartFailed,
)
from deployments.stores import open_store
from serve.config import Settings
from serve.flows.operators import OperatorFlow


ASK_EVERY_S = 0.1
"""Between two questions to a service that is starting: a connection that is refused."""

LOOK_EVERY_S = 1.0
"""Between two looks at how far it is, each of which takes 20 ms of a core from what starts."""

BROKEN = frozenset({ApplicationStatus.DEPLOY_FAILED, ApplicationStatus.UNHEALTHY})


@contextmanager
def running(file: DeployFile, claim: Claim, options: RayOptions) -> Iterator[str]:
    """A cluster with the application submitted to it; everything is gone afterwards.

    Yields the URL of the dashboard, if there is one. SIGTERM arrives as KeyboardInterrupt. Raises StartFailed.
    """
    for number in (signal.SIGINT, signal.SIGTERM):  # a background job has SIGINT ignored
        signal.signal(number, _interrupt)
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    try:
        dashboard = _start(file, options)
        signal.signal(signal.SIGTERM, _interrupt)  # Ray has put its own in between
        address = ray.get_runtime_context().gcs_address
        auth = os.environ.get("RAY_AUTH_MODE", "")  # Ray has set it when nobody else had
        claim.announce(Cluster(address, os.getpid(), file.url, auth))
        _deploy(file)
        yield dashboard
    finally:
        _stop(file.settings)


def wait_ready(file: DeployFile, timeout_s: float, say: Callable[[str], None]) -> None:
    """Return once the service answers that it is ready. Raises StartFailed."""
    deadline = time.monotonic() + timeout_s
    look_at = 0.0
    while (now := time.monotonic()) < deadline:
        answers = ready(file.url)
        if answers or now >= look_at:
            look_at = now + LOOK_EVERY_S
            if _runs(file.application, say) and answers:
                return
        time.sleep(ASK_EVERY_S)
    raise StartFailed(f"the service was not ready after {timeout_s:.0f} s; see --timeout")


def _runs(name: str, say: Callable[[str], None]) -> bool:
    """Whether every deployment is healthy; says how far they are. Raises StartFailed."""
    application = ray.serve.status().applications.get(name)
    if application is None:
        return False
    if application.status in BROKEN:
        raise StartFailed(_why(application))
    parts = [f"{name} {one.status.value}" for name, one in application.deployments.items()]
    say(", ".join(parts) or application.status.value)
    return bool(application.status == ApplicationStatus.RUNNING)


def _why(application: ApplicationStatusOverview) -> str:
    """The application's status and message, and those of its deployments that are at fault."""
    lines = [f"the application is {application.status.value}: {application.message.strip()}"]
    for name, one in application.deployments.items():
        if one.status.value != "HEALTHY" and one.message:
            lines.append(f"{name} is {one.status.value}: {one.message.strip()}")
    return "\n".join(lines)


@contextmanager
def connected(address: str) -> Iterator[None]:
    """A connection to a cluster that runs. Raises NotRunning."""
    try:
        ray.init(address, namespace=NAMESPACE, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise NotRunning(f"no Ray cluster at {address}: {error}") from None
    try:
        yield
    finally:
        ray.shutdown()


def operators(settings: Settings) -> OperatorFlow:
    """Keys and tenants, over the connection that there is."""
    store = open_store(settings)
    return OperatorFlow(settings, store, store, time.time)


def _start(file: DeployFile, options: RayOptions) -> str:
    """Logical CPUs are book-keeping: twice the need, so that a redeploy finds room."""
    need = sum(pool.replicas_max * pool.cpus for pool in file.settings.pools)
    try:
        context = ray.init(
            address="local",
            num_cpus=2 * math.ceil(need),
            namespace=NAMESPACE,
            include_dashboard=options.dashboard,
            dashboard_host="127.0.0.1",
            log_to_driver=False,
            logging_level=logging.ERROR,
            _temp_dir=None if options.temp_dir is None else str(options.temp_dir.resolve()),
        )
    except (ConnectionError, RuntimeError, ValueError, OSError, TimeoutError) as error:
        raise StartFailed(f"Ray did not start: {error}") from None
    return f"http://{context.dashboard_url}"


def _deploy(file: DeployFile) -> None:
    """Through Serve's own command, as a user would: it leaves the cluster as it finds it."""
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(StringIO()):
        path = Path(folder) / file.path.name
        path.write_text(yaml.safe_dump(dict(file.raw), sort_keys=False), encoding="utf-8")
        root = Path(__file__).parent.parent
        arguments = ["run", "--non-blocking", "--app-dir", str(root), str(path)]
        try:
            serve_command.main(arguments, standalone_mode=False)
        except SystemExit:  # it has printed why
            raise StartFailed("Serve did not take the deploy file") from None


def _stop(settings: Settings) -> None:
    """Let requests end, the writer flush and the Store close its file; then end the cluster."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with redirect_stdout(StringIO()):  # Ray reports each actor that leaves as it was told to
        try:
            if ray.is_initialized():
                ray.serve.shutdown()  # type: ignore[no-untyped-call]
                for role in (UPSERTER, STORE, LEDGER):
                    for name in living(role):
                        retire(name, settings.actors.drain_s)
        finally:
            ray.shutdown()


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt
