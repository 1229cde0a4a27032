"""The Store on SQLite: the ports over one `Committer`, the only process that opens the file."""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import sqlalchemy as sa

from serve.config import Store
from serve.jobs import catalog, fence, generations, operations, tenants
from serve.jobs.committer import Committer, Work
from serve.jobs.operations import FOUND, MADE, NOTHING, VERSIONS, Codec
from serve.jobs.sqlite import open_database
from serve.ports import Collections, Documents, Fence, Keys
from serve.records import Collection, DocumentVersion, DocumentWrite, Key


T = TypeVar("T")

PURGE_ROWS = 10_000
"""Documents forgotten in one transaction, about 15 ms: others wait behind it."""

CLOSE_WAIT_S = 30.0


class StoreOwner(Keys, Collections, Documents, Fence):
    """Implements the Store's ports for one process; every call is acknowledged after its commit.

    Calls raise Overloaded when `settings.queue_max` wait, StoreUnavailable when the commit failed
    or the owner has ended. A repeat of a mutating call with the same `op` returns the first
    result for `settings.operations_kept_s`; an `op` of another method is a Conflict.
    """

    def __init__(self, path: Path, settings: Store, clock: Callable[[], float]) -> None:
        """Opens the database, made when new. `clock` gives epoch seconds.

        Blocks up to `settings.lock_wait_s` for a predecessor: call it off the event loop.
        Raises StoreUnavailable as `serve.jobs.sqlite.open_database` does.
        """
        self._kept_s = settings.operations_kept_s
        self._forget_max = 2 * settings.commit_ops_max  # more than a group can add
        self._forget_at = 0.0
        self._committer = Committer(
            lambda: open_database(path, settings.lock_wait_s, clock()),
            ops_max=settings.commit_ops_max,
            queue_max=settings.queue_max,
            clock=clock,
            upkeep=self._forget,
        )

    @property
    def healthy(self) -> bool:
        """False once the owner has failed or was closed; it does not recover."""
        return self._committer.healthy

    @property
    def commits(self) -> int:
        """Transactions committed since the start."""
        return self._committer.commits

    def close(self, wait_s: float = CLOSE_WAIT_S) -> None:
        """Finish what is queued, close the file, release the lock.

        Raises StoreUnavailable when that takes longer than `wait_s`.
        """
        self._committer.close(wait_s)

    async def find_key(self, key_id: str) -> Key | None:
        """The live key of that id, with its tenant's tier."""
        return await self._do(lambda conn, _now: tenants.find_key(conn, key_id))

    async def create_key(self, op: str, key: Key) -> None:
        """Keep a key and set its tenant's tier. Raises Conflict when the id is taken."""
        await self._once(
            op, "create_key", NOTHING, lambda conn, now: tenants.create_key(conn, key, now)
        )

    async def list_keys(self) -> Sequence[Key]:
        """Every live key."""
        return await self._do(lambda conn, _now: tenants.list_keys(conn))

    async def create_collection(self, op: str, collection: Collection) -> Collection:
        """Keep a collection. Raises Conflict when the name is taken."""
        return await self._once(
            op, "create_collection", MADE, lambda conn, _now: catalog.create(conn, collection)
        )

    async def find_collection(self, tenant: str, name: str) -> Collection | None:
        """The live collection of that name."""
        return await self._do(lambda conn, _now: catalog.find(conn, tenant, name))

    async def list_collections(self, tenant: str) -> Sequence[Collection]:
        """All live collections of a tenant, by name."""
        return await self._do(lambda conn, _now: catalog.listed(conn, tenant))

    async def delete_collection(self, op: str, tenant: str, name: str) -> Collection | None:
        """Mark it deleted; returns what it was."""
        return await self._once(
            op,
            "delete_collection",
            FOUND,
            lambda conn, now: catalog.delete(conn, tenant, name, now),
        )

    async def purge_collection(self, uuid: str) -> None:
        """Forget a deleted collection and its documents, in several short transactions.

        Raises Conflict when it is live. An interrupted purge is finished by repeating it.
        """
        while not await self._do(lambda conn, _now: catalog.purge(conn, uuid, PURGE_ROWS)):
            pass

    async def deleted_collections(self) -> Sequence[Collection]:
        """Deleted but not yet purged."""
        return await self._do(lambda conn, _now: catalog.deleted(conn))

    async def begin_documents(
        self, op: str, collection: str, writes: Sequence[DocumentWrite]
    ) -> Sequence[DocumentVersion]:
        """Accept a write of each document. Raises NotFound, BadInput (a document twice)."""
        return await self._once(
            op,
            "begin_documents",
            VERSIONS,
            lambda conn, now: generations.begin(conn, collection, writes, now),
        )

    async def settle_documents(
        self, collection: str, versions: Sequence[tuple[str, int, int]]
    ) -> None:
        """(document, generation, chunks) landed; older generations change nothing."""
        await self._do(lambda conn, now: generations.settle(conn, collection, versions, now))

    async def delete_documents(
        self, op: str, collection: str, documents: Sequence[str]
    ) -> Sequence[DocumentVersion]:
        """Accept a delete of each document. Raises NotFound, BadInput (a document twice)."""
        return await self._once(
            op,
            "delete_documents",
            VERSIONS,
            lambda conn, now: generations.delete(conn, collection, documents, now),
        )

    async def take_epoch(self, name: str, deploy_seq: int) -> int:
        """Become the writer `name`. Raises Fenced when a later deployment took it."""
        return await self._do(lambda conn, _now: fence.take_epoch(conn, name, deploy_seq))

    async def superseded(
        self, name: str, epoch: int, ns: str, versions: Mapping[str, int]
    ) -> frozenset[str]:
        """Documents with a newer generation, all if the collection is gone. Raises Fenced."""
        return await self._do(lambda conn, _now: fence.superseded(conn, name, epoch, ns, versions))

    async def _do(self, work: Work[T]) -> T:
        return await asyncio.wrap_future(self._committer.submit(work))

    async def _once(self, op: str, method: str, codec: Codec[T], work: Work[T]) -> T:
        def kept(conn: sa.Connection, now: float) -> T:
            return operations.once(conn, op, codec, lambda: work(conn, now), method=method, now=now)

        return await self._do(kept)

    def _forget(self, conn: sa.Connection, now: float) -> None:
        """Purge old operations once in a sixtieth of their life, and on while there are more."""
        if now >= self._forget_at:
            gone = operations.purge(conn, now - self._kept_s, self._forget_max)
            self._forget_at = now if gone == self._forget_max else now + self._kept_s / 60
