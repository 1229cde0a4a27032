"""`headrace keys`, `tenants` and `audit`: what operators do, on a cluster that runs.

They go straight to the Store, so they work before there is an admin key, and without the HTTP door.
"""

import asyncio
import functools
import getpass
import json
import os
import socket
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text

from deployments.cli_options import ADDRESS, AS_JSON, CONFIG, FOLDER, cluster, json_object
from deployments.places import DeployFile
from serve.records import Key


if TYPE_CHECKING:  # it brings the whole library
    from serve.flows.operators import MadeKey, OperatorFlow


DEMO_OPERATOR = "operator"
"""Tenant of the demo admin key."""

KEYS_PAGE = 1000
"""Keys asked for at a time, all that one answer may hold: about 300 KB."""

NUMBER_MAX = 2**63 - 1
"""The Store numbers the log in 64 bits."""

ID_CHARS = 16
WHOLE = ("id", "subject")
"""Columns with ids of keys."""

LIMITS = click.option(
    "--limits",
    type=json_object,
    help='JSON in the shape of a tier, in parts: \'{"interactive": {"requests_per_minute": 60}}\'.',
)
ROWS = click.option(
    "--limit", default=100, show_default=True, type=click.IntRange(1, 1000), help="Rows at most."
)


def _operating(command: Callable[..., None]) -> Callable[..., None]:
    """Options that say which cluster; the command is given an OperatorFlow that is connected."""

    @CONFIG
    @FOLDER
    @ADDRESS
    @functools.wraps(command)
    def run(*, config: Path, data_dir: str | None, address: str | None, **options: Any) -> None:
        file = DeployFile.read(config)
        local, place = cluster(file, address, data_dir)
        with local.connected(place):
            command(local.operators(file.settings), **options)

    return run


def operator() -> str:
    """Who types this, for the audit log."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a container's user has no name
        user = str(os.getuid())
    return f"cli:{user}@{socket.gethostname()}"


@click.group()
def keys() -> None:
    """Keys of the service that runs on this machine or cluster."""


@keys.command("create")
@click.option("--tenant", required=True, help="Who pays; made when it is new.")
@click.option(
    "--tier", help="A tier of the deploy file; becomes the tenant's. Needed by a new one."
)
@click.option("--admin", is_flag=True, help="The key may also use the admin API.")
@click.option("--name", default="", help="What the key is for, for people.")
@LIMITS
@AS_JSON
@_operating
def create_key(flow: "OperatorFlow", *, admin: bool, as_json: bool, **options: Any) -> None:
    """Make a key and print it: it is shown this once."""
    role = "admin" if admin else "user"
    made = asyncio.run(flow.create_key(operator(), role=role, **options))
    _print_made(made, as_json=as_json)


@keys.command("list")
@click.option("--tenant", help="Only this one's.")
@AS_JSON
@_operating
def list_keys(flow: "OperatorFlow", *, tenant: str | None, as_json: bool) -> None:
    """Every live key by tenant and age, without its secret."""
    found = asyncio.run(_all_keys(flow, tenant))
    if as_json:
        click.echo(json.dumps([_plain(key) for key in found]))
        return
    _print_table(
        ("id", "tenant", "tier", "role", "name", "created", "expires", "limits"),
        (
            (
                key.id,
                key.tenant,
                key.tier,
                key.role,
                key.name,
                _when(key.created_at),
                "" if key.expires_at is None else _when(key.expires_at),
                _compact(key.limits),
            )
            for key in found
        ),
    )


@keys.command("rotate")
@click.argument("key_id")
@click.option(
    "--overlap",
    "overlap_s",
    type=float,
    help="Seconds for which the old one stays live; default: admission.key_overlap_s.",
)
@AS_JSON
@_operating
def rotate_key(
    flow: "OperatorFlow", *, key_id: str, overlap_s: float | None, as_json: bool
) -> None:
    """Make a key's successor and print it: it is shown this once."""
    made = asyncio.run(flow.rotate_key(operator(), key_id, overlap_s))
    _print_made(made, as_json=as_json)


@keys.command("revoke")
@click.argument("key_id")
@AS_JSON
@_operating
def revoke_key(flow: "OperatorFlow", *, key_id: str, as_json: bool) -> None:
    """End a key at once."""
    asyncio.run(flow.revoke_key(operator(), key_id))
    click.echo(json.dumps({"id": key_id, "revoked": True}) if as_json else f"{key_id} is revoked.")


@keys.command("set")
@click.argument("key_id")
@click.option("--name", help="What the key is for, for people.")
@LIMITS
@AS_JSON
@_operating
def set_key(flow: "OperatorFlow", *, key_id: str, as_json: bool, **options: Any) -> None:
    """Set a key's name or limits, also of its successors; '{}' takes the limits away."""
    if options["name"] is None and options["limits"] is None:
        raise click.UsageError("Give --name or --limits.")
    key = asyncio.run(flow.change_key(operator(), key_id, **options))
    said = f"{key.id} ({key.name or 'no name'}): limits {_compact(key.limits) or 'of its tenant'}."
    click.echo(json.dumps(_plain(key)) if as_json else said)


@click.group()
def tenants() -> None:
    """Tenants of the service that runs on this machine or cluster."""


@tenants.command("list")
@click.option("--after", default="", help="Only names after this one.")
@ROWS
@AS_JSON
@_operating
def list_tenants(flow: "OperatorFlow", *, after: str, limit: int, as_json: bool) -> None:
    """Tenants by name, with their tier and what they have instead of its limits."""
    found = asyncio.run(flow.list_tenants(after, limit))
    if as_json:
        click.echo(json.dumps([asdict(one) for one in found]))
        return
    _print_table(
        ("tenant", "tier", "since", "limits"),
        ((one.tenant, one.tier, _when(one.created_at), _compact(one.limits)) for one in found),
    )


@tenants.command("set")
@click.argument("tenant")
@click.option("--tier", help="A tier of the deploy file.")
@LIMITS
@AS_JSON
@_operating
def set_tenant(flow: "OperatorFlow", *, tenant: str, as_json: bool, **options: Any) -> None:
    """Make a tenant, or set its tier or what it has instead of the tier's limits ('{}': nothing)."""
    if options["tier"] is None and options["limits"] is None:
        raise click.UsageError("Give --tier or --limits.")
    kept = asyncio.run(flow.set_tenant(operator(), tenant, **options))
    said = f"{kept.tenant}: tier {kept.tier}, limits {_compact(kept.limits) or 'of the tier'}."
    click.echo(json.dumps(asdict(kept)) if as_json else said)


@click.command()
@click.option("--tenant", help="Only this one's.")
@click.option(
    "--before",
    type=click.IntRange(0, NUMBER_MAX),
    help="Only entries with a lower number.",
)
@ROWS
@AS_JSON
@_operating
def audit(
    flow: "OperatorFlow", *, tenant: str | None, before: int | None, limit: int, as_json: bool
) -> None:
    """What operators changed, newest first."""
    found = asyncio.run(flow.audit(tenant, before, limit))
    if as_json:
        click.echo(json.dumps([asdict(one) for one in found]))
        return
    _print_table(
        ("number", "at", "by", "action", "tenant", "subject", "detail"),
        (
            (
                str(one.number),
                _when(one.at),
                one.by,
                one.action,
                one.tenant,
                one.subject,
                _compact(one.detail),
            )
            for one in found
        ),
    )


async def _all_keys(flow: "OperatorFlow", tenant: str | None) -> list[Key]:
    found: list[Key] = []
    while page := await flow.list_keys(tenant, found[-1].id if found else "", KEYS_PAGE):
        found += page
    return sorted(found, key=lambda key: (key.tenant, key.created_at, key.id))


async def demo_keys(flow: "OperatorFlow", tiers: list[str]) -> "dict[str, MadeKey]":
    """A key per tier and one of an operator, by their labels; none when the Store has a tenant.

    Tenants stay when all their keys were revoked: that must not bring open doors back.
    """
    if await flow.list_tenants("", 1):
        return {}
    by = operator()
    made = {tier: await flow.create_key(by, tenant=f"demo-{tier}", tier=tier) for tier in tiers}
    role, tier = "admin", tiers[0]
    return made | {role: await flow.create_key(by, tenant=DEMO_OPERATOR, tier=tier, role=role)}


def _print_made(made: "MadeKey", *, as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps({**_plain(made.key), "secret": made.secret}))
        return
    click.echo(made.secret)
    click.echo(f"Key {made.key.id} of {made.key.tenant}. It is not shown again.", err=True)


def _print_table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """As text: a name like `[red]` is no markup. Ids stay whole, to be copied."""
    table = Table()
    for name in columns:
        table.add_column(name, overflow="fold", min_width=ID_CHARS if name in WHOLE else None)
    for row in rows:
        table.add_row(*map(Text, row))
    Console().print(table)


def _plain(key: Key) -> dict[str, Any]:
    return {name: value for name, value in asdict(key).items() if name != "secret_sha256"}


def _compact(detail: Mapping[str, Any]) -> str:
    return json.dumps(detail, separators=(",", ":")) if detail else ""


def _when(at: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(at))
