"""The limits as one process of the service enforces them, over the ledger that is configured."""

import os
import time
import uuid

from deployments.handles import LedgerPort
from deployments.usage_sinks import open_sink
from serve.admission.metering import Meter, UsageEvents
from serve.admission.quotas import Quotas
from serve.config import Settings
from serve.ports import Ledger, Usage


def open_quotas(settings: Settings, usage: Usage, replica: str, replicas: int) -> Quotas:
    """For one replica of so many of its kind. Raises RuntimeError as `open_ledger` does.

    Ingress and workers hardly share a limit: the first charge requests and what is asked
    interactively, the others tokens of bulk work.
    """
    return Quotas(
        open_ledger(settings),
        usage,
        settings.ledger,
        replica=replica,
        replicas=replicas,
        owners_max=settings.admission.tenants_tracked_max,
        clock=time.monotonic,
        wall=time.time,
        meter=_open_meter(settings, replica),
    )


def _open_meter(settings: Settings, replica: str) -> Meter | None:
    name = f"{replica}/{uuid.uuid4().hex[:8]}"  # a replica's successor may have its name
    sink = open_sink(settings, name)
    return None if sink is None else Meter(UsageEvents(name), sink)


def open_ledger(settings: Settings) -> Ledger:
    """The Ledger actor, or the Redis that is configured in its place.

    Raises RuntimeError when the variable that `ledger.redis_url_env` names is not set.
    """
    name = settings.ledger.redis_url_env
    if not name:
        return LedgerPort(settings)
    url = os.environ.get(name)
    if not url:
        raise RuntimeError(f"ledger.redis_url_env: the environment variable {name} is not set")
    from serve.admission.redis import RedisLedger  # noqa: PLC0415  an optional dependency

    return RedisLedger(url, settings.ledger, wall=time.time)
