"""`headrace backup`: a copy of what is durable, while the service runs."""

from datetime import UTC, datetime
from pathlib import Path

import click

from deployments.cli_options import CONFIG, FOLDER
from deployments.places import DeployFile


@click.command()
@click.argument("target", type=click.Path(path_type=Path))
@CONFIG
@FOLDER
def backup(target: Path, config: Path, data_dir: str | None) -> None:
    """Copy Store, index, files and key into the new folder TARGET, all as of one moment, on the machine that has
    them. The service may go on meanwhile. To restore, start it with a copy of TARGET as its data folder.
    """
    from deployments.backup import backup as copied  # noqa: PLC0415  SQL and ciphers take 0.3 s

    file = DeployFile.read(config)
    made = copied(file.settings.under(file.data_dir(data_dir)), target.resolve())
    at = datetime.fromtimestamp(made.at, UTC).isoformat(timespec="milliseconds")
    click.echo(f"{target}: as of {at}.")
    if made.records is None:
        click.echo("The index is elsewhere and not in it.")
    else:
        click.echo(f"{made.records:,} records were read back.")
