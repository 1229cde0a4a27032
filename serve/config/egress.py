"""Settings of what goes out: requests to URLs that tenants wrote."""

from typing import Annotated

from pydantic import Field

from serve.section import EnvName, Section


class Egress(Section):
    """Requests to URLs that tenants wrote: webhooks."""

    timeout_s: float = Field(
        15, gt=0, le=120, description="Longest exchange, from the lookup of the name to the end."
    )
    body_bytes_max: int = Field(
        4096, ge=0, le=2**20, description="Bytes of an answer's body that are read."
    )
    connections_max: int = Field(64, ge=1, le=10_000, description="Connections of one process.")
    ports: tuple[Annotated[int, Field(ge=1, le=65_535)], ...] = Field(
        (443, 8443), min_length=1, max_length=64, description="Ports that may be called."
    )
    insecure_allowed: tuple[Annotated[str, Field(pattern=r"^[^/@\s]+:[0-9]{1,5}$")], ...] = Field(
        (),
        max_length=64,
        description="`host:port` that may be called over plain http and at a private address: for "
        "tests, and for receivers of your own.",
    )


class Webhooks(Section):
    """URLs of tenants that are told of the ends of jobs. Deliveries are kept as long as jobs."""

    key_env: EnvName = Field(
        "",
        description="Name of the environment variable with the key that seals secrets in the Store "
        "(the base64 of 32 bytes; several, separated by commas: the first one seals, all open); "
        "empty: the file `webhooks.key` under `data_dir`, made once.",
    )
    tenant_webhooks_max: int = Field(20, ge=1, le=1000, description="Webhooks of one tenant.")
    overlap_s: float = Field(
        86_400,
        ge=0,
        le=30 * 86_400,
        description="How long a rotated secret signs beside its successor, unless told otherwise.",
    )
    sends_max: int = Field(
        32,
        ge=1,
        le=10_000,
        description="Deliveries that one worker replica sends at once; at most "
        "`egress.connections_max`.",
    )
    tenant_sends_max: int = Field(
        8,
        ge=1,
        le=10_000,
        description="Deliveries of one tenant that are sent at once, over all workers: one whose "
        "receiver hangs leaves room for the others.",
    )
