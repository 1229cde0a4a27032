"""`DELETE /v1/admin/tenants/{tenant}/data`: all that is kept of a tenant goes, and a report says what.

Collections are hidden first; then go webhooks, records, jobs and files. Each step finds what an
interrupted one has left, so that whoever was cut off begins again. What the tenant does meanwhile is not
waited for: with its keys revoked it does nothing more, and a repeat takes what its last requests left.

The tenant itself stays, with its tier, limits, usage (which bills are made of) and the audit log.
"""

import asyncio
import logging
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from typing import Literal, Protocol

from serve.content.blobs import LocalBlobs
from serve.errors import DeadlineExceeded, NotFound
from serve.flows.context import new_op
from serve.job_ports import Erasure, Files, Jobs
from serve.ports import Collections, IndexAdmin, Keys, Tenants, Upserter
from serve.records import Key


PAGE = 100
"""Keys or files read from the Store at once."""

JOBS_PAGE = 10
"""Jobs erased together: to stop one that is under way takes up to 100 ms, and others wait behind it."""

AGAIN_S = 0.05
"""Before the Store is asked again for rows that somebody had locked."""

log = logging.getLogger("headrace.erasure")


class Kept(Keys, Tenants, Collections, Jobs, Files, Erasure, Protocol):
    """All that the Store keeps of tenants."""


@dataclass(frozen=True, slots=True)
class Report:
    """What was removed. `documents` are those that were not deleted before."""

    keys: int = 0
    collections: int = 0
    documents: int = 0
    records: int = 0
    jobs: int = 0
    items: int = 0
    files: int = 0
    file_bytes: int = 0
    webhooks: int = 0


class EraseFlow:
    """Removes all data of a tenant. Who may call it is decided by whoever calls it."""

    def __init__(
        self,
        store: Kept,
        *,
        upserter: Upserter,
        index: IndexAdmin,
        blobs: LocalBlobs,
        wait_s: float,
    ) -> None:
        """One call ends after `wait_s`, done or not."""
        self._store = store
        self._upserter = upserter
        self._index = index
        self._blobs = blobs
        self._wait_s = wait_s

    async def erase(self, by: str, tenant: str, keys: Literal["keep", "revoke"]) -> Report:
        """Remove what there is now; what `by` does stands in the audit log, begun and done.

        Raises NotFound, Conflict (the last admin key is one of the tenant's), and, with some of it
        done, IndexUnavailable, StoreUnavailable, DeadlineExceeded: repeat it.
        """
        if await self._store.find_tenant(tenant) is None:
            raise NotFound(f"There is no tenant {tenant[:64]!r}.", param="tenant")
        await self._store.note_erasure(new_op(), tenant, by, {"keys": keys, "state": "begun"})
        try:
            async with asyncio.timeout(self._wait_s) as limit:
                report = await self._erased(by, tenant, keys)
        except TimeoutError:
            if not limit.expired():  # somebody else's, from inside
                raise
            raise DeadlineExceeded("There is more to remove: repeat it.", retry_after_s=1) from None
        detail = {"keys": keys, "state": "done", "removed": asdict(report)}
        await self._store.note_erasure(new_op(), tenant, by, detail)
        log.info("erased the data of tenant %s: %s", tenant, report)
        return report

    async def _erased(self, by: str, tenant: str, keys: Literal["keep", "revoke"]) -> Report:
        report = Report(keys=await self._revoked(by, tenant) if keys == "revoke" else 0)
        await self._hide_collections(tenant)
        for step in (
            self._without_rest,  # before the jobs, of whose ends webhooks would be told
            self._without_collections,
            self._without_jobs,
            self._without_files,
        ):
            report = await step(tenant, report)
        return report

    async def _revoked(self, by: str, tenant: str) -> int:
        """Admin keys first: where the last one may not go, no other key has gone."""
        live: list[Key] = []
        while page := await self._store.list_keys(tenant, live[-1].id if live else "", PAGE):
            live += page
        for key in sorted(live, key=lambda key: key.role != "admin"):
            with suppress(NotFound):  # somebody else was quicker
                await self._store.revoke_key(new_op(), key.id, by)
        return len(live)

    async def _hide_collections(self, tenant: str) -> None:
        """From here on nobody finds them, and nothing more lands in them."""
        for one in await self._store.list_collections(tenant):
            await self._store.delete_collection(new_op(), tenant, one.name)

    async def _without_rest(self, tenant: str, report: Report) -> Report:
        webhooks, more = 0, True
        while more:
            gone = await self._store.erase_rest(tenant)
            webhooks, more = webhooks + gone.webhooks, gone.more
        return replace(report, webhooks=webhooks)

    async def _without_collections(self, tenant: str, report: Report) -> Report:
        """Drop what is hidden, also by an earlier call, or by the tenant while the index was away."""
        for one in await self._store.deleted_collections():
            if one.tenant != tenant:
                continue
            records = (await self._index.stats(one.uuid)).records
            await self._upserter.drop(one.uuid)
            documents = await self._store.purge_collection(one.uuid)
            report = replace(
                report,
                collections=report.collections + 1,
                records=report.records + records,
                documents=report.documents + documents,
            )
        return report

    async def _without_jobs(self, tenant: str, report: Report) -> Report:
        """From the newest on, with the bytes that their work needs, which go first."""
        after = ""
        while page := await self._store.list_jobs(tenant, None, (), after, JOBS_PAGE):
            ids = [job.id for job in page]
            for job_id in ids:
                await self._blobs.delete_all(job_id)
            jobs, items = await self._jobs_erased(tenant, ids)
            report = replace(report, jobs=report.jobs + jobs, items=report.items + items)
            after = ids[-1]
        return report

    async def _jobs_erased(self, tenant: str, ids: Sequence[str]) -> tuple[int, int]:
        items = 0
        while (gone := await self._store.erase_jobs(tenant, ids)).more:
            items += gone.items
            if not gone.items:  # they were stopped, or somebody has locked the rest
                await asyncio.sleep(AGAIN_S)
        return gone.jobs, items + gone.items

    async def _without_files(self, tenant: str, report: Report) -> Report:
        """From the newest on. Bytes go first: whoever is cut off between finds the file again."""
        after = ""
        while page := await self._store.list_files(tenant, None, "desc", after, PAGE):
            for file in page:
                await self._blobs.delete(file.id)
                gone = await self._store.delete_file(new_op(), tenant, file.id)
                size = report.file_bytes + gone * file.size
                report = replace(report, files=report.files + gone, file_bytes=size)
            after = page[-1].id
        return report
