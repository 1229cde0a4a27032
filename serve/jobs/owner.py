"""The Store: its ports over SQLite, as the only process that opens the file, or over Postgres, as one
of many.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import sqlalchemy as sa

from serve.config import Admission, Jobs, Store
from serve.items import Erased
from serve.job_ports import Erasure
from serve.jobs import audit, catalog, erasure, fence, generations, keys, operations, tenants, usage
from serve.jobs.committer import Committer
from serve.jobs.file_owner import FileOwner
from serve.jobs.operations import FOUND, KEY, MADE, NOTHING, TENANT
from serve.jobs.postgres import Postgres
from serve.jobs.sqlite import open_database
from serve.jobs.upkeep import Chore
from serve.jobs.webhook_owner import WebhookOwner
from serve.ports import Collections, Fence, Keys, Tenants, Usage, Vectors
from serve.records import (
    AuditEntry,
    Collection,
    Key,
    Klass,
    Tenant,
    UsageRow,
)


T = TypeVar("T")

PURGE_ROWS = 10_000
"""Documents forgotten in one transaction, about 15 ms: others wait behind it."""

USAGE_ROWS = 250
"""Rows of usage written, or folded, in one transaction, about 15 ms: others wait behind it."""

HOUR_S = 3600.0
"""Between two looks for what is days or months old."""

CLOSE_WAIT_S = 30.0


class StoreOwner(
    FileOwner, WebhookOwner, Keys, Tenants, Usage, Collections, Vectors, Fence, Erasure
):
    """Implements the Store's ports for one process; every call is acknowledged after its commit.

    Calls raise Overloaded when `settings.queue_max` wait, StoreUnavailable when the commit failed
    or the owner has ended. A repeat of a mutating call with the same `op` returns the first
    result for `settings.operations_kept_s`; an `op` of another method is a Conflict.
    """

    def __init__(
        self,
        place: Path | str,
        settings: Store,
        clock: Callable[[], float] | None,
        *,
        collections_max: int | None = None,
        jobs: Jobs | None = None,
        shares: Mapping[Klass, float] | None = None,
    ) -> None:
        """Opens the database, made when new: a SQLite file, or Postgres by its URL.

        `clock` gives epoch seconds; None: Postgres' own, the same for all processes.

        `collections_max` bounds the live collections of a tenant; None: whoever asks bounds them.
        `jobs` and the classes' `shares` are the settings' defaults where not given.
        Blocks up to `settings.lock_wait_s` for a predecessor: call it off the event loop.
        Raises StoreUnavailable as `serve.jobs.sqlite.open_database` does, ValueError for a file
        without a clock.
        """
        self._keys_max = settings.keys_max
        self._collections_max = collections_max
        self._chores = _chores(settings)
        executor: Committer | Postgres
        if isinstance(place, str):
            executor = Postgres(
                place,
                connections=settings.connections,
                queue_max=settings.queue_max,
                clock=clock,
                upkeep=self._keep_up,
            )
        elif clock is None:
            message = "a file has no clock of its own"
            raise ValueError(message)
        else:
            executor = Committer(
                lambda: open_database(place, settings.lock_wait_s, clock()),
                ops_max=settings.commit_ops_max,
                queue_max=settings.queue_max,
                clock=clock,
                upkeep=self._keep_up,
            )
        super().__init__(executor, jobs or Jobs(), shares or Admission().shares)

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
        """The live key of that id, with its tenant's tier and limits."""
        return await self._do(lambda conn, now: keys.find_key(conn, key_id, now))

    async def create_key(self, op: str, key: Key, by: str = "") -> None:
        """Keep a key and set its tenant's tier.

        Raises Conflict when the id is taken or the tenant has `keys_max` live keys, NotFound when
        it has no tier and the tenant does not exist.
        """
        await self._once(
            op,
            "create_key",
            NOTHING,
            lambda conn, now: keys.create_key(conn, key, keys_max=self._keys_max, by=by, now=now),
        )

    async def list_keys(
        self, tenant: str | None = None, after: str = "", limit: int = 100
    ) -> Sequence[Key]:
        """Up to `limit` live keys, of one tenant or of all, by id: those after `after`."""
        return await self._do(lambda conn, now: keys.list_keys(conn, tenant, after, limit, now=now))

    async def rotate_key(
        self, op: str, key_id: str, successor: Key, overlap_s: float, by: str
    ) -> Key:
        """Keep a key's successor; the key itself expires. Raises NotFound, Conflict."""
        return await self._once(
            op,
            "rotate_key",
            KEY,
            lambda conn, now: keys.rotate_key(
                conn, key_id, successor, overlap_s=overlap_s, by=by, now=now
            ),
        )

    async def change_key(
        self, op: str, key_id: str, name: str | None, limits: Mapping[str, Any] | None, by: str
    ) -> Key:
        """Set name and limits of a key's family, where not None. Raises NotFound."""
        return await self._once(
            op,
            "change_key",
            KEY,
            lambda conn, now: keys.change_key(
                conn, key_id, name=name, limits=limits, by=by, now=now
            ),
        )

    async def revoke_key(self, op: str, key_id: str, by: str) -> None:
        """End a key at once. Raises NotFound, Conflict (the last admin key, but for the CLI)."""
        await self._once(
            op,
            "revoke_key",
            NOTHING,
            lambda conn, now: keys.revoke_key(conn, key_id, by=by, now=now),
        )

    async def find_tenant(self, tenant: str) -> Tenant | None:
        """One tenant."""
        return await self._do(lambda conn, _now: tenants.find_tenant(conn, tenant))

    async def list_tenants(self, after: str, limit: int) -> Sequence[Tenant]:
        """Tenants by name, those after `after`."""
        return await self._do(lambda conn, _now: tenants.list_tenants(conn, after, limit))

    async def set_tenant(
        self, op: str, tenant: str, tier: str | None, limits: Mapping[str, Any] | None, by: str
    ) -> Tenant:
        """Make a tenant, or set its tier and limits where not None. Raises NotFound."""
        return await self._once(
            op,
            "set_tenant",
            TENANT,
            lambda conn, now: tenants.set_tenant(
                conn, tenant, tier=tier, limits=limits, by=by, now=now
            ),
        )

    async def list_audit(
        self, tenant: str | None, before: int | None, limit: int
    ) -> Sequence[AuditEntry]:
        """Entries of one tenant or of all, newest first, those with a number below `before`."""
        return await self._do(lambda conn, _now: audit.listed(conn, tenant, before, limit))

    async def report_usage(self, session: str, rows: Sequence[UsageRow]) -> None:
        """Keep a session's counts so far, in several short transactions when they are many."""
        for start in range(0, len(rows), USAGE_ROWS):
            part = rows[start : start + USAGE_ROWS]
            await self._do(partial(_report, session, part))

    async def month_usage(self, tenant: str, month: str) -> Sequence[UsageRow]:
        """A tenant's usage of a month, by key family and class."""
        return await self._do(lambda conn, _now: usage.month(conn, tenant, month))

    async def create_collection(self, op: str, collection: Collection) -> Collection:
        """Keep a collection. Raises Conflict (name taken), QuotaExceeded (`collections_max`)."""
        return await self._once(
            op,
            "create_collection",
            MADE,
            lambda conn, _now: catalog.create(conn, collection, self._collections_max),
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

    async def purge_collection(self, uuid: str) -> int:
        """Forget a deleted collection and its documents, in several short transactions.

        Returns how many documents there were. Raises Conflict when it is live. An interrupted purge is
        finished by repeating it.
        """
        count, done = 0, False
        while not done:
            some, done = await self._do(lambda conn, _now: catalog.purge(conn, uuid, PURGE_ROWS))
            count += some
        return count

    async def deleted_collections(self) -> Sequence[Collection]:
        """Deleted but not yet purged."""
        return await self._do(lambda conn, _now: catalog.deleted(conn))

    async def grant_vectors(
        self, collection: str, names: Sequence[str], sent: Sequence[float | None]
    ) -> Sequence[int | None]:
        """A generation for each raw vector; 0: the name is a document's; None: it is older.

        Raises NotFound.
        """
        return await self._do(
            lambda conn, now: generations.begin_raw(conn, collection, names, sent, now)
        )

    async def take_epoch(self, name: str, deploy_seq: int) -> int:
        """Become the writer `name`. Raises Fenced when a later deployment took it."""
        return await self._do(lambda conn, _now: fence.take_epoch(conn, name, deploy_seq))

    async def superseded(
        self, name: str, epoch: int, ns: str, versions: Mapping[str, int]
    ) -> frozenset[str]:
        """Documents with a newer generation, all if the collection is gone. Raises Fenced."""
        return await self._do(lambda conn, _now: fence.superseded(conn, name, epoch, ns, versions))

    async def erase_jobs(self, tenant: str, jobs: Sequence[str]) -> Erased:
        """Stop these jobs, or forget some of what is theirs, in the end themselves."""
        return await self._do(lambda conn, now: erasure.erase_jobs(conn, tenant, jobs, now))

    async def erase_rest(self, tenant: str) -> Erased:
        """Forget webhooks and some of their deliveries, idempotency keys, efforts."""
        return await self._do(lambda conn, _now: erasure.erase_rest(conn, tenant))

    async def note_erasure(self, op: str, tenant: str, by: str, detail: Mapping[str, Any]) -> None:
        """An entry of the audit log."""
        await self._once(
            op,
            "note_erasure",
            NOTHING,
            lambda conn, now: erasure.note(conn, tenant, by, detail, now),
        )

    def _keep_up(self, conn: sa.Connection, now: float) -> None:
        for chore in self._chores:
            chore(conn, now)


def _report(session: str, rows: Sequence[UsageRow], conn: sa.Connection, now: float) -> None:
    usage.report(conn, session, rows, now)


def _chores(settings: Store) -> Sequence[Chore]:
    rows_max = 2 * settings.commit_ops_max  # more than a group can add
    return (
        Chore(
            lambda conn, now, most: operations.purge(conn, now - settings.operations_kept_s, most),
            every_s=settings.operations_kept_s / 60,
            rows_max=rows_max,
        ),
        Chore(
            lambda conn, now, most: audit.purge(conn, now - settings.audit_kept_s, most),
            every_s=HOUR_S,
            rows_max=rows_max,
        ),
        Chore(usage.fold, every_s=HOUR_S, rows_max=USAGE_ROWS),
        Chore(usage.purge, every_s=HOUR_S, rows_max=USAGE_ROWS),
    )
