"""`/v1/files`: what tenants upload for batches, and what batches write for them."""

import asyncio
import logging
from collections.abc import AsyncIterable, AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager

from serve import config
from serve.admission.quotas import Permit
from serve.content.blobs import LocalBlobs
from serve.errors import BadInput, NotFound, ServiceError, StoreUnavailable
from serve.flows.context import Context, new_op
from serve.flows.items import CHARS_PER_TOKEN
from serve.flows.sheet import input_blob
from serve.items import Accepted, FileRoom, Job, NewItem, Once, Order, StoredFile, new_id
from serve.job_ports import Files, Handover
from serve.records import Caller


FILENAME_CHARS_MAX = 255

EXPIRED = 100
"""Expired files removed at once."""

JOBS_ASKED = 500
"""Jobs of whose blobs the Store is asked at once."""

KEPT_S_MAX = 30 * 86_400.0
"""The most that `files.kept_s` may be: what was kept before it was lowered has its own time."""

ORPHAN_S = 2 * 86_400.0
"""Bytes without a file, or without a job, are nobody's after this: they were not on their way."""

log = logging.getLogger("headrace.files")


class FileFlow:
    """Files of the caller's tenant. An upload counts as a request at class `bulk`."""

    def __init__(self, context: Context, files: Files, blobs: LocalBlobs) -> None:
        self._rules = context.settings.files
        self._quotas = context.quotas
        self._wall = context.wall
        self._files = files
        self._blobs = blobs

    def charged(self, caller: Caller) -> AbstractAsyncContextManager[Permit]:
        """Around an upload, before its body is read. Raises QuotaExceeded."""
        return self._quotas.admitted(caller, "bulk", tokens=0, param="file")

    async def upload(
        self,
        caller: Caller,
        filename: str,
        pieces: AsyncIterable[bytes],
        *,
        expires_s: float | None = None,
    ) -> StoredFile:
        """Keep a file for batches, for `expires_s` or as long as we keep any.

        Raises TooLarge, BadInput (empty), QuotaExceeded (files or bytes of the tenant),
        StoreUnavailable.
        """
        now = self._wall()
        file_id = new_id("file", now).replace("_", "-")
        put = await self._blobs.put(file_id, pieces, bytes_max=self._rules.bytes_max)
        file = StoredFile(
            id=file_id,
            tenant=caller.tenant,
            purpose="batch",
            filename=_shown(filename),
            size=put.size,
            sha256=put.sha256,
            created_at=now,
            expires_at=now + min(expires_s or self._rules.kept_s, self._rules.kept_s),
        )
        room = FileRoom(self._rules.tenant_files_max, self._rules.tenant_bytes_max)
        try:
            if not put.size:
                raise BadInput("The file is empty.", param="file")
            return await self._files.create_file(new_op(), file, room)
        except ServiceError as error:
            if not isinstance(error, StoreUnavailable):  # else it may be kept all the same
                await self._blobs.delete(file_id)
            raise

    async def find(self, caller: Caller, file_id: str, *, param: str = "file_id") -> StoredFile:
        """Raises NotFound, also for another tenant's."""
        file = await self._files.find_file(caller.tenant, file_id)
        if file is None:
            raise NotFound(f"You have no file {file_id[:128]!r}.", param=param)
        return file

    async def list(
        self, caller: Caller, *, purpose: str | None, order: Order, after: str, limit: int
    ) -> Sequence[StoredFile]:
        """Up to `limit` files by age, those behind the id `after`."""
        return await self._files.list_files(caller.tenant, purpose, order, after, limit)

    def content(self, file: StoredFile, start: int, stop: int) -> AsyncIterator[bytes]:
        """A file's bytes from `start` to before `stop`. Raises NotFound before the first piece."""
        return self._blobs.stream(file.id, start, stop)

    async def hand_over(
        self, file: StoredFile, job: Job, once: Once | None, *, jobs: Handover
    ) -> Accepted:
        """Accept a job whose items stand in a file: a worker reads it, and checks every line first.

        The job has the file's bytes under a name of its own, so that the file may be deleted.
        What reading costs is told by its size. Raises what `Handover.submit_job` raises.
        """
        await self._blobs.copy(file.id, input_blob(job.id))
        cost = max(1.0, file.size / CHARS_PER_TOKEN)
        expand = NewItem("expand", "expand", "prepare", cost, {})
        try:
            accepted = await jobs.submit_job(new_op(), job, [expand], once)
        except ServiceError as error:
            if not isinstance(error, StoreUnavailable):  # else it may be accepted all the same
                await self._blobs.delete_all(job.id)
            raise
        if accepted.replayed:
            await self._blobs.delete_all(job.id)
        return accepted

    async def delete(self, caller: Caller, file_id: str) -> None:
        """Forget a file and its bytes; a batch that was made from it goes on. Raises NotFound."""
        if not await self._files.delete_file(new_op(), caller.tenant, file_id):
            raise NotFound(f"You have no file {file_id[:128]!r}.", param="file_id")
        await self._blobs.delete(file_id)


class Tidy:
    """Removes files whose time is over, and bytes that nobody knows of. Any worker may do so."""

    def __init__(
        self,
        files: Files,
        blobs: LocalBlobs,
        rules: config.Files,
        wall: Callable[[], float],
    ) -> None:
        """`wall` gives epoch seconds."""
        self._files = files
        self._blobs = blobs
        self._rules = rules
        self._wall = wall

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            try:
                await self.once()
            except ServiceError as error:
                log.warning("cannot remove expired files: %s", error)
            await asyncio.sleep(self._rules.tidy_s)

    async def once(self) -> None:
        """Bytes go first: a file without them is removed by the next round, if this one fails."""
        while gone := await self._files.expired_files(EXPIRED):
            for file in gone:
                await self._blobs.delete(file.id)
                await self._files.delete_file(new_op(), file.tenant, file.id)
        now = self._wall()
        count = await self._blobs.sweep(now - KEPT_S_MAX - ORPHAN_S, now - ORPHAN_S)
        count += await self._clear(now - ORPHAN_S)
        if count:
            log.info("removed %d blobs and folders that nobody needs any more", count)

    async def _clear(self, before: float) -> int:
        """Remove the blobs of jobs that need them no more; those of no job, if they are so old."""
        changed = await self._blobs.folders()
        ids, count = list(changed), 0
        for start in range(0, len(ids), JOBS_ASKED):
            some = ids[start : start + JOBS_ASKED]
            over = await self._files.jobs_over(some)
            for job_id in some:
                if over.get(job_id, changed[job_id] < before):
                    await self._blobs.delete_all(job_id)
                    count += 1
        return count


def _shown(filename: str) -> str:
    """As it is shown again: on one line, and not too long."""
    return "".join(char for char in filename if char.isprintable())[:FILENAME_CHARS_MAX] or "file"
