"""Every Store there is, for the contracts of its ports. Add an opener to run them over another."""

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from bench.postgres_server import careless, emptied
from serve.config import Store
from serve.jobs.owner import StoreOwner


KEYS_MAX = 5


@asynccontextmanager
async def owner(folder: Path, clock: Callable[[], float]) -> AsyncIterator[Any]:
    opened = StoreOwner(folder / "store.db", Store(keys_max=KEYS_MAX), clock)
    try:
        await opened.tick()  # the first one spares whom it does not know
        yield opened
    finally:
        opened.close()


@asynccontextmanager
async def postgres_owner(_: Path, clock: Callable[[], float]) -> AsyncIterator[Any]:
    careless()
    with emptied() as url:
        opened = StoreOwner(url, Store(keys_max=KEYS_MAX), clock)
        try:
            yield opened
        finally:
            opened.close()


Opener = Callable[[Path, Callable[[], float]], AbstractAsyncContextManager[Any]]
OPENERS: dict[str, Opener] = {"owner": owner, "postgres": postgres_owner}


@pytest.fixture(
    params=[
        pytest.param(name, marks=pytest.mark.postgres if name == "postgres" else ())
        for name in OPENERS
    ]
)
async def store(
    request: pytest.FixtureRequest, tmp_path: Path, clock: Callable[[], float]
) -> AsyncIterator[Any]:
    """Its time is the test's `clock`; a tenant may have five live keys."""
    async with OPENERS[request.param](tmp_path, clock) as opened:
        yield opened
