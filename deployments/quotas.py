"""The limits as one process of the service enforces them, over the ledger that is configured."""

import os
import time

from deployments.handles import LedgerPort
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
    )


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
