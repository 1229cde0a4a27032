"""What several commands of the command line share: options, and the way to a cluster."""

import functools
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from deployments.places import DATA_DIR, DeployFile, RayOptions, find_cluster


def json_object(text: str) -> dict[str, Any]:
    """The type of an option that is a JSON object."""
    try:
        found = json.loads(text)
    except ValueError as error:
        raise click.BadParameter(f"it is not JSON: {error}") from None
    if not isinstance(found, dict):
        raise click.BadParameter("it must be a JSON object")
    return found


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


def ray_options(command: Callable[..., None]) -> Callable[..., None]:
    """Gives a command the options of Ray, as its parameter `ray`."""

    @click.option(
        "--ray-temp-dir", type=click.Path(path_type=Path), help="Ray's temporary folder (short!)."
    )
    @click.option(
        "--dashboard/--no-dashboard",
        default=True,
        show_default=True,
        help="Ray's dashboard, and what comes with it: `ray list`, `serve deploy`, Prometheus' targets.",
    )
    @functools.wraps(command)
    def packed(*, ray_temp_dir: Path | None, dashboard: bool, **others: Any) -> None:
        command(ray=RayOptions(ray_temp_dir, dashboard), **others)

    return packed


def cluster(file: DeployFile, address: str | None, data_dir: str | None) -> tuple[Any, str]:
    """The module that speaks to Ray, and where the cluster is. Raises NotRunning.

    Ray turns its authentication on by itself only for clusters that it finds by itself.
    """
    if address is None:
        found = find_cluster(file.data_dir(data_dir))
        address = found.address
        if found.auth:
            os.environ.setdefault("RAY_AUTH_MODE", found.auth)
    from deployments import local  # noqa: PLC0415  Ray reads its environment on import

    return local, address
