"""Which Store this process talks to: its actor, or a Postgres of which it is one user among many."""

import asyncio
import logging
import os
from typing import TYPE_CHECKING, TypeAlias

from deployments.store_port import StorePort
from serve.config import Settings
from serve.errors import ServiceError


if TYPE_CHECKING:
    from deployments.postgres import PostgresStore
    from serve.jobs.owner import StoreOwner

log = logging.getLogger("headrace.store")

Store: TypeAlias = "StorePort | PostgresStore"


def on_postgres(settings: Settings) -> bool:
    """Whether the Store is a database of its own; else this cluster's actor owns the file."""
    return bool(settings.store.url_env)


def open_store(settings: Settings) -> Store:
    """Connect; blocks for a database.

    Raises RuntimeError when the variable that `store.url_env` names is not set, StoreUnavailable.
    """
    if not on_postgres(settings):
        return StorePort(settings)
    name = settings.store.url_env
    url = os.environ.get(name)
    if not url:
        raise RuntimeError(f"store.url_env: the environment variable {name} is not set")
    from deployments.postgres import PostgresStore  # noqa: PLC0415  SQL, which few processes need

    return PostgresStore.connect(url, settings)


async def tick(store: "StoreOwner", every_s: float) -> None:
    """Let a Store look for what is due; one that cannot commit now is asked again."""
    while True:
        await asyncio.sleep(every_s)
        try:
            await store.tick()
        except ServiceError as error:
            log.warning("the Store's tick failed: %s", error)


async def close_store(store: Store) -> None:
    """Disconnect, where there is something to disconnect."""
    if not isinstance(store, StorePort):
        await asyncio.to_thread(store.close)
