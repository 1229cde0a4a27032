"""Whether the index has room for more, asked before anything is embedded or kept for it.

Its writer knows. Where that is away, whoever brings work goes on and waits there, as it would anyway;
only the workers' claims stop.
"""

from serve.errors import IndexUnavailable, Overloaded, ServiceError
from serve.items import Stage
from serve.ports import Upserter
from serve.pressure import Pressure


LANDING: Stage = "embed"
"""The stage whose items land."""

AWAY_S = 1.0


async def away_s(upserter: Upserter) -> float:
    """Seconds for which nothing that lands should be claimed; 0: go on."""
    try:
        return (await upserter.pressure()).wait_s
    except ServiceError:
        return AWAY_S


async def check(upserter: Upserter, tenant: str) -> None:
    """Raises IndexUnavailable while the index is paused, Overloaded while too much waits for it."""
    pressure = await _pressure(upserter)
    if pressure.paused:
        raise IndexUnavailable("The index cannot be written.", retry_after_s=pressure.wait_s)
    _refuse(pressure, tenant)


async def hold(upserter: Upserter, tenant: str) -> None:
    """The same for items of a job: always Overloaded, which counts as no try of theirs."""
    _refuse(await _pressure(upserter), tenant)


async def _pressure(upserter: Upserter) -> Pressure:
    try:
        return await upserter.pressure()
    except ServiceError:
        return Pressure()


def _refuse(pressure: Pressure, tenant: str) -> None:
    wait_s = max(pressure.wait_s, pressure.tenants.get(tenant, 0.0))
    if wait_s > 0:
        raise Overloaded("Too much waits for the index already.", retry_after_s=wait_s)
