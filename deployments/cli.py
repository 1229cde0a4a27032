"""The `headrace` command: starts a local service; see also `cli_documents`, `cli_operators`.

Exit codes: 0 done, 1 something failed, 2 wrong usage, 3 the service cannot be reached.
"""

import asyncio
import json
import os
import shlex
import shutil
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console

from deployments.cli_backup import backup
from deployments.cli_documents import ingest, search
from deployments.cli_operators import audit, keys, tenants
from deployments.cli_operators import demo_keys as make_demo_keys
from deployments.cli_options import CONFIG, FOLDER, ray_options
from deployments.client import Problem, Unreachable
from deployments.places import (
    DATA_DIR,
    PROFILES,
    Claim,
    DeployFile,
    NotRunning,
    PlaceError,
    RayOptions,
    check_port,
    profiled,
)
from deployments.sources import SourceError
from serve.config import Settings
from serve.embedding.graphs import Graphs
from serve.errors import BadInput, ServiceError


if TYPE_CHECKING:  # it brings the whole library
    from serve.flows.operators import MadeKey


class Misused(click.ClickException):
    """A source that cannot be read, or a value that the service does not take."""

    exit_code = 2


class Away(click.ClickException):
    """Nothing answers."""

    exit_code = 3


class Commands(click.Group):
    """Turns every failure we know into one line; what we do not know keeps its traceback."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run a command."""
        try:
            return super().invoke(ctx)
        except SourceError as error:
            raise Misused(str(error)) from None
        except (Unreachable, NotRunning) as error:
            raise Away(str(error)) from None
        except (Problem, PlaceError) as error:
            raise click.ClickException(str(error)) from None
        except BadInput as error:
            raise Misused(f"{error.message} ({error.code})") from None
        except ServiceError as error:
            raise click.ClickException(f"{error.message} ({error.code})") from None


@click.group(cls=Commands)
@click.version_option(package_name="headrace")
def main() -> None:
    """Text into vectors, vectors into an index, fairly, for many tenants."""


for command in (ingest, search, keys, tenants, audit, backup):
    main.add_command(command)


@main.command()
@CONFIG
@FOLDER
@click.option("--profile", type=click.Choice(list(PROFILES)), default="default", show_default=True)
@click.option("--port", type=click.IntRange(1, 65535), help="HTTP port; default: as in the file.")
@ray_options
@click.option("--demo-keys/--no-demo-keys", default=True, help="Make keys for an empty Store.")
@click.option("--timeout", default=300.0, show_default=True, help="Seconds until it must be ready.")
def serve(
    config: Path,
    data_dir: str | None,
    profile: str,
    *,
    port: int | None,
    ray: RayOptions,
    demo_keys: bool,
    timeout: float,
) -> None:
    """Start the service on this machine, until Ctrl-C."""
    file = DeployFile.read(config).with_port(port)
    check_port(file.host, file.port)
    folder = file.data_dir(data_dir)
    with Claim.take(folder) as claim, profiled(profile):
        began = time.monotonic()
        os.environ[DATA_DIR] = str(folder)
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        # Ray nices its workers to 15: whatever else runs here would starve the model.
        os.environ.setdefault("RAY_worker_niceness", "0")
        _announce_graphs(file.settings.under(folder))
        from deployments import local  # noqa: PLC0415  Ray reads its environment on import

        console = Console(stderr=True)
        with (
            console.status("starting Ray") as status,
            local.running(file, claim, ray) as dashboard,
        ):
            local.wait_ready(file, timeout, lambda text: status.update(f"starting: {text}"))
            status.stop()
            click.echo(f"\nHeadrace is ready at {file.url} ({time.monotonic() - began:.0f} s).")
            made: Mapping[str, MadeKey] = {}
            if demo_keys:
                tiers = _demo_tiers(file.settings)
                made = asyncio.run(make_demo_keys(local.operators(file.settings), tiers))
            _welcome(file, folder, made)
            if ray.dashboard:
                click.echo(f"\nRay's dashboard: {dashboard} {_token()}")
            click.echo("\nCtrl-C stops everything.")
            _until_interrupted()
            click.echo("Stopping ...")


@main.command()
@CONFIG
def check(config: Path) -> None:
    """Say whether a deploy file is right, live settings (`user_config`) included."""
    DeployFile.read(config)
    click.echo(f"{config} is right.")


def _demo_tiers(settings: Settings) -> list[str]:
    tiers = list(settings.admission.tiers)
    return [tier for tier in ("free", "premium", "enterprise") if tier in tiers] or tiers[:1]


def _announce_graphs(settings: Settings) -> None:
    """The embedders make what is missing while they start."""
    for pool in settings.pools:
        folder = Path(pool.graphs)
        for model in pool.models:
            missing = model.engine == "onnx" and Graphs(folder).find(model) is None
            if missing and model.pinned:  # the graphs of others are made at their first call
                click.echo(
                    f"Making an ONNX graph of {model.id}, once: this start takes up to a minute "
                    f"longer. It is kept in {folder}.",
                    err=True,
                )


def _welcome(file: DeployFile, folder: Path, made: "Mapping[str, MadeKey]") -> None:
    """What to do next, ready to be pasted. Keys are printed here and never again."""
    headrace = "headrace" if shutil.which("headrace") else sys.argv[0]
    if not made:
        where = f"--config {shlex.quote(str(file.path))} --data-dir {shlex.quote(str(folder))}"
        click.echo(f"\nA key: {headrace} keys create --tenant NAME --tier TIER {where}")
        return
    click.echo("\nDemo keys, shown this once:")
    for label, one in made.items():
        click.echo(f"  {label:<12}{one.secret}")
    text = [one.secret for one in made.values() if one.key.role == "user"][-1]
    body = json.dumps({"model": next(iter(file.settings.models)), "input": "Hello, world"})
    click.echo(
        "\nTry:\n"
        f"  curl -sS {file.url}/v1/embeddings -H 'Authorization: Bearer {text}' "
        f"-H 'Content-Type: application/json' -d {shlex.quote(body)}\n\n"
        f"  export HEADRACE_KEY={text}\n"
        f"  {headrace} ingest python:topics --collection python --url {file.url}\n"
        f"  {headrace} search 'how do I catch an error' --collection python --url {file.url}"
    )


def _token() -> str:
    """Where the dashboard's token is. Ray sets the mode when it starts."""
    if os.environ.get("RAY_AUTH_MODE") != "token":
        return "(no token asked)"
    if "RAY_AUTH_TOKEN" in os.environ:
        return "(its token is $RAY_AUTH_TOKEN)"
    place = os.environ.get("RAY_AUTH_TOKEN_PATH", Path.home() / ".ray" / "auth_token")
    return f"(its token is in {place})"


def _until_interrupted() -> None:
    try:
        while True:
            time.sleep(3600)
    except KeyboardInterrupt:
        return
