"""The `headrace` command: start a local service and make keys; see also `cli_documents`.

Exit codes: 0 done, 1 something failed, 2 wrong usage, 3 the service cannot be reached.
"""

import json
import os
import shlex
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
from pydantic import TypeAdapter, ValidationError
from rich.console import Console
from rich.table import Table

from deployments.cli_documents import ingest, search
from deployments.client import Problem, Unreachable
from deployments.places import (
    DATA_DIR,
    PROFILES,
    Claim,
    DeployFile,
    NotRunning,
    PlaceError,
    check_port,
    find_cluster,
)
from deployments.sources import SourceError
from serve.config import Name, Settings
from serve.errors import ServiceError
from serve.records import Key


OPENED = (
    "HAProxy listens on all interfaces with its metrics (9101), its statistics (8404) and the "
    "replicas' ports (30000-31000): close them in a firewall, or use the default profile."
)

CONFIG = click.option(
    "--config",
    default="config.yaml",
    show_default=True,
    type=click.Path(path_type=Path),
    help="Deploy file.",
)
FOLDER = click.option(
    "--data-dir", envvar=DATA_DIR, help="Folder of everything durable; default: as in the file."
)
ADDRESS = click.option(
    "--address",
    envvar="RAY_ADDRESS",
    help="Ray address; default: the cluster over the data folder.",
)
AS_JSON = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


class Misused(click.ClickException):
    """A source that cannot be read."""

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
        except ServiceError as error:
            raise click.ClickException(f"{error.message} ({error.code})") from None


@click.group(cls=Commands)
@click.version_option(package_name="headrace")
def main() -> None:
    """Text into vectors, vectors into an index, fairly, for many tenants."""


main.add_command(ingest)
main.add_command(search)


@main.command()
@CONFIG
@FOLDER
@click.option("--profile", type=click.Choice(list(PROFILES)), default="default", show_default=True)
@click.option("--port", type=click.IntRange(1, 65535), help="HTTP port; default: as in the file.")
@click.option(
    "--ray-temp-dir", type=click.Path(path_type=Path), help="Ray's temporary folder (short!)."
)
@click.option("--demo-keys/--no-demo-keys", default=True, help="Make keys for an empty Store.")
@click.option("--timeout", default=180.0, show_default=True, help="Seconds until it must be ready.")
def serve(
    config: Path,
    data_dir: str | None,
    profile: str,
    *,
    port: int | None,
    ray_temp_dir: Path | None,
    demo_keys: bool,
    timeout: float,
) -> None:
    """Start the service on this machine, until Ctrl-C."""
    file = DeployFile.read(config).with_port(port)
    check_port(file.host, file.port)
    folder = file.data_dir(data_dir)
    with Claim.take(folder) as claim:
        began = time.monotonic()
        os.environ.update(PROFILES[profile])
        os.environ[DATA_DIR] = str(folder)
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        # Ray nices its workers to 15: whatever else runs here would starve the model.
        os.environ.setdefault("RAY_worker_niceness", "0")
        if profile == "fast":
            click.secho(f"Warning: {OPENED}", fg="yellow", err=True)
        from deployments import local  # noqa: PLC0415  Ray reads its environment on import

        console = Console(stderr=True)
        with (
            console.status("starting Ray") as status,
            local.running(file, claim, temp_dir=ray_temp_dir) as dashboard,
        ):
            local.wait_ready(file, timeout, lambda text: status.update(f"starting: {text}"))
            status.stop()
            click.echo(f"\nHeadrace is ready at {file.url} ({time.monotonic() - began:.0f} s).")
            wanted = [(f"demo-{tier}", tier) for tier in _demo_tiers(file.settings)]
            made = local.create_keys(file.settings, wanted, first_only=True) if demo_keys else []
            _welcome(file, folder, made)
            click.echo(f"\nRay's dashboard: {dashboard} {_token()}\nCtrl-C stops everything.")
            _until_interrupted()
            click.echo("Stopping ...")


def _demo_tiers(settings: Settings) -> list[str]:
    return [tier for tier in ("free", "premium", "enterprise") if tier in settings.admission.tiers]


def _welcome(file: DeployFile, folder: Path, made: Sequence[tuple[Key, str]]) -> None:
    """What to do next, ready to be pasted. Keys are printed here and never again."""
    headrace = "headrace" if shutil.which("headrace") else sys.argv[0]
    if not made:
        where = f"--config {shlex.quote(str(file.path))} --data-dir {shlex.quote(str(folder))}"
        click.echo(f"\nA key: {headrace} keys create --tenant NAME --tier TIER {where}")
        return
    click.echo("\nDemo keys, shown this once:")
    for key, text in made:
        click.echo(f"  {key.tier:<12}{text}")
    text = made[-1][1]
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


@main.group()
def keys() -> None:
    """Keys of the service that runs on this machine or cluster."""


@keys.command("create")
@click.option("--tenant", required=True, help="Who pays.")
@click.option("--tier", required=True, help="A tier of the deploy file; becomes the tenant's.")
@CONFIG
@FOLDER
@ADDRESS
@AS_JSON
def create_key(
    tenant: str,
    tier: str,
    config: Path,
    *,
    data_dir: str | None,
    address: str | None,
    as_json: bool,
) -> None:
    """Make a key and print it: it is shown this once."""
    file = DeployFile.read(config)
    _check_name(tenant)
    if tier not in file.settings.admission.tiers:
        known = ", ".join(file.settings.admission.tiers)
        raise click.UsageError(f"{tier!r} is no tier of {config}; it has {known}.")
    local, place = _cluster(file, address, data_dir)
    with local.connected(place):
        [(key, text)] = local.create_keys(file.settings, [(tenant, tier)])
    if as_json:
        click.echo(json.dumps({**_shown(key), "key": text}))
        return
    click.echo(text)
    click.echo(f"Key {key.id} of {tenant} ({tier}). It is not shown again.", err=True)


@keys.command("list")
@CONFIG
@FOLDER
@ADDRESS
@AS_JSON
def list_keys(config: Path, *, data_dir: str | None, address: str | None, as_json: bool) -> None:
    """Every key by tenant, without its secret."""
    file = DeployFile.read(config)
    local, place = _cluster(file, address, data_dir)
    with local.connected(place):
        found = local.list_keys(file.settings)
    if as_json:
        click.echo(json.dumps([_shown(key) for key in found]))
        return
    table = Table("id", "tenant", "tier", "created")
    for key in found:
        made = time.strftime("%Y-%m-%d %H:%M", time.localtime(key.created_at))
        table.add_row(key.id, key.tenant, key.tier, made)
    Console().print(table)


def _cluster(file: DeployFile, address: str | None, data_dir: str | None) -> tuple[Any, str]:
    """The module that speaks to Ray, and where the cluster is. Raises NotRunning.

    Ray turns its authentication on by itself only for clusters that it finds by itself.
    """
    if address is None:
        cluster = find_cluster(file.data_dir(data_dir))
        address = cluster.address
        if cluster.auth:
            os.environ.setdefault("RAY_AUTH_MODE", cluster.auth)
    from deployments import local  # noqa: PLC0415  Ray reads its environment on import

    return local, address


def _shown(key: Key) -> dict[str, Any]:
    return {
        "id": key.id,
        "tenant": key.tenant,
        "tier": key.tier,
        "created_at": key.created_at,
    }


def _check_name(tenant: str) -> None:
    try:
        TypeAdapter(Name).validate_python(tenant)
    except ValidationError as error:
        raise click.UsageError(f"--tenant: {error.errors()[0]['msg']}") from None
