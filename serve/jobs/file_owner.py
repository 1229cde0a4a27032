"""The port of files over one `Committer`."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict

from serve.items import FileRoom, Order, StoredFile
from serve.job_ports import Files
from serve.jobs import files, handed
from serve.jobs.job_owner import JobOwner
from serve.jobs.operations import WHETHER, Codec


FILE: Codec[StoredFile] = Codec(asdict, lambda value: StoredFile(**value))


class FileOwner(JobOwner, Files):
    """Implements it for one process; a call is acknowledged after its commit."""

    async def create_file(
        self, op: str, file: StoredFile, room: FileRoom | None = None
    ) -> StoredFile:
        """See Files."""
        return await self._once(
            op, "create_file", FILE, lambda conn, now: files.create(conn, file, room, now)
        )

    async def find_file(self, tenant: str, file: str) -> StoredFile | None:
        """See Files."""
        return await self._do(lambda conn, now: files.find(conn, tenant, file, now))

    async def list_files(
        self, tenant: str, purpose: str | None, order: Order, after: str, limit: int
    ) -> Sequence[StoredFile]:
        """See Files."""
        return await self._do(
            lambda conn, now: files.listed(
                conn,
                tenant,
                purpose=purpose,
                order=order,
                after=after,
                limit=limit,
                now=now,
            )
        )

    async def delete_file(self, op: str, tenant: str, file: str) -> bool:
        """See Files."""
        return await self._once(
            op, "delete_file", WHETHER, lambda conn, _now: files.delete(conn, tenant, file)
        )

    async def expired_files(self, limit: int) -> Sequence[StoredFile]:
        """See Files."""
        return await self._do(lambda conn, now: files.expired(conn, limit, now))

    async def jobs_over(self, jobs: Sequence[str]) -> Mapping[str, bool]:
        """See Files."""
        return await self._do(lambda conn, now: handed.over(conn, jobs, now))
