"""The Store's port of files over its actor."""

from collections.abc import Mapping, Sequence
from typing import cast

from deployments.store_calls import StoreCalls
from serve.items import FileRoom, Order, StoredFile
from serve.job_ports import Files


class FilePort(StoreCalls, Files):
    """Implements it by the actor's one method `call`. Each call also raises StoreUnavailable."""

    async def create_file(
        self, op: str, file: StoredFile, room: FileRoom | None = None
    ) -> StoredFile:
        """See Files."""
        return cast("StoredFile", await self._call("create_file", op, file, room))

    async def find_file(self, tenant: str, file: str) -> StoredFile | None:
        """See Files."""
        return cast("StoredFile | None", await self._call("find_file", tenant, file))

    async def list_files(
        self, tenant: str, purpose: str | None, order: Order, after: str, limit: int
    ) -> Sequence[StoredFile]:
        """See Files."""
        found = await self._call("list_files", tenant, purpose, order, after, limit)
        return cast("Sequence[StoredFile]", found)

    async def delete_file(self, op: str, tenant: str, file: str) -> bool:
        """See Files."""
        return cast("bool", await self._call("delete_file", op, tenant, file))

    async def expired_files(self, limit: int) -> Sequence[StoredFile]:
        """See Files."""
        return cast("Sequence[StoredFile]", await self._call("expired_files", limit))

    async def jobs_over(self, jobs: Sequence[str]) -> Mapping[str, bool]:
        """See Files."""
        return cast("Mapping[str, bool]", await self._call("jobs_over", jobs))
