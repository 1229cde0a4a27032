"""The Store's ports over its actor."""

from collections.abc import Mapping, Sequence
from typing import Any, cast

from deployments.file_port import FilePort
from deployments.job_port import JobPort
from deployments.webhook_port import WebhookPort
from serve.items import Erased
from serve.job_ports import Erasure
from serve.ports import Collections, Fence, Keys, Tenants, Usage, Vectors
from serve.records import (
    AuditEntry,
    Collection,
    Key,
    Tenant,
    UsageRow,
)


class StorePort(
    JobPort, FilePort, WebhookPort, Keys, Tenants, Usage, Collections, Vectors, Fence, Erasure
):
    """Implements them all, those of jobs, files and webhooks included. Each call also raises StoreUnavailable."""

    async def find_key(self, key_id: str) -> Key | None:
        """See Keys."""
        return cast("Key | None", await self._call("find_key", key_id))

    async def create_key(self, op: str, key: Key, by: str = "") -> None:
        """See Keys."""
        await self._call("create_key", op, key, by)

    async def list_keys(
        self, tenant: str | None = None, after: str = "", limit: int = 100
    ) -> Sequence[Key]:
        """See Keys."""
        return cast("Sequence[Key]", await self._call("list_keys", tenant, after, limit))

    async def rotate_key(
        self, op: str, key_id: str, successor: Key, overlap_s: float, by: str
    ) -> Key:
        """See Keys."""
        kept = await self._call("rotate_key", op, key_id, successor, overlap_s, by)
        return cast("Key", kept)

    async def change_key(
        self, op: str, key_id: str, name: str | None, limits: Mapping[str, Any] | None, by: str
    ) -> Key:
        """See Keys."""
        return cast("Key", await self._call("change_key", op, key_id, name, limits, by))

    async def revoke_key(self, op: str, key_id: str, by: str) -> None:
        """See Keys."""
        await self._call("revoke_key", op, key_id, by)

    async def find_tenant(self, tenant: str) -> Tenant | None:
        """See Tenants."""
        return cast("Tenant | None", await self._call("find_tenant", tenant))

    async def list_tenants(self, after: str, limit: int) -> Sequence[Tenant]:
        """See Tenants."""
        return cast("Sequence[Tenant]", await self._call("list_tenants", after, limit))

    async def set_tenant(
        self, op: str, tenant: str, tier: str | None, limits: Mapping[str, Any] | None, by: str
    ) -> Tenant:
        """See Tenants."""
        return cast("Tenant", await self._call("set_tenant", op, tenant, tier, limits, by))

    async def list_audit(
        self, tenant: str | None, before: int | None, limit: int
    ) -> Sequence[AuditEntry]:
        """See Tenants."""
        return cast("Sequence[AuditEntry]", await self._call("list_audit", tenant, before, limit))

    async def report_usage(self, session: str, rows: Sequence[UsageRow]) -> None:
        """See Usage."""
        await self._call("report_usage", session, rows)

    async def month_usage(self, tenant: str, month: str) -> Sequence[UsageRow]:
        """See Usage."""
        return cast("Sequence[UsageRow]", await self._call("month_usage", tenant, month))

    async def create_collection(self, op: str, collection: Collection) -> Collection:
        """See Collections."""
        return cast("Collection", await self._call("create_collection", op, collection))

    async def find_collection(self, tenant: str, name: str) -> Collection | None:
        """See Collections."""
        return cast("Collection | None", await self._call("find_collection", tenant, name))

    async def list_collections(self, tenant: str) -> Sequence[Collection]:
        """See Collections."""
        return cast("Sequence[Collection]", await self._call("list_collections", tenant))

    async def delete_collection(self, op: str, tenant: str, name: str) -> Collection | None:
        """See Collections."""
        return cast("Collection | None", await self._call("delete_collection", op, tenant, name))

    async def purge_collection(self, uuid: str) -> int:
        """See Collections."""
        return cast("int", await self._call("purge_collection", uuid))

    async def deleted_collections(self) -> Sequence[Collection]:
        """See Collections."""
        return cast("Sequence[Collection]", await self._call("deleted_collections"))

    async def grant_vectors(
        self, collection: str, names: Sequence[str], sent: Sequence[float | None]
    ) -> Sequence[int | None]:
        """See Vectors."""
        granted = await self._call("grant_vectors", collection, names, sent)
        return cast("Sequence[int | None]", granted)

    async def take_epoch(self, name: str, deploy_seq: int) -> int:
        """See Fence."""
        return cast("int", await self._call("take_epoch", name, deploy_seq))

    async def superseded(
        self, name: str, epoch: int, ns: str, versions: Mapping[str, int]
    ) -> frozenset[str]:
        """See Fence."""
        return cast("frozenset[str]", await self._call("superseded", name, epoch, ns, versions))

    async def erase_jobs(self, tenant: str, jobs: Sequence[str]) -> Erased:
        """See Erasure."""
        return cast("Erased", await self._call("erase_jobs", tenant, jobs))

    async def erase_rest(self, tenant: str) -> Erased:
        """See Erasure."""
        return cast("Erased", await self._call("erase_rest", tenant))

    async def note_erasure(self, op: str, tenant: str, by: str, detail: Mapping[str, Any]) -> None:
        """See Erasure."""
        await self._call("note_erasure", op, tenant, by, detail)
