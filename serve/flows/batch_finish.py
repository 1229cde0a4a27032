"""The last step of a batch: its output file from the segments, its error file from what failed.

The files are named after the moment at which the job came to this step. A repeat of the step finds
what an earlier try has kept and writes it no second time; after dead items were tried again there
are new files. So segments stay while a job has dead items, until `serve.flows.files.Tidy` goes by.
"""

from collections.abc import AsyncIterator, Sequence
from functools import partial

from serve.content.blobs import LocalBlobs
from serve.flows.batch_file import failed_line, refused_line, request_id
from serve.flows.bulk import FILES_AT_ONCE, Failed, one_by_one, work_part
from serve.flows.context import Context, new_op
from serve.items import Claim, Item, ItemState, ItemView, Job, Settlement, StoredFile
from serve.job_ports import Files, Jobs
from serve.jobs.faults import Retries, settled


PAGE = 1000
"""Items read from the Store at once, about 300 KB."""

GONE = {
    "batch_expired": "This request was not done before the batch expired.",
    "batch_cancelled": "This request was not done before the batch was cancelled.",
}
"""What the error file says of requests that nobody worked on."""


class FinishWork:
    """Handler of the task `finish`."""

    def __init__(
        self,
        context: Context,
        jobs: Jobs,
        files: Files,
        blobs: LocalBlobs,
        retries: Retries,
    ) -> None:
        self._kept_s = context.settings.files.kept_s
        self._wall = context.wall
        self._jobs = jobs
        self._files = files
        self._blobs = blobs
        self._failed: Failed = partial(settled, retries=retries)

    async def finish(self, items: Sequence[Item], claim: Claim) -> list[Settlement]:
        """Write the files that are not empty, keep them, remove the job's own blobs."""
        act = partial(self._finished, claim)
        return await one_by_one(items, act, self._failed, at_once=FILES_AT_ONCE)

    async def _finished(self, claim: Claim, item: Item) -> Settlement:
        """Raises NotFound (a segment), StoreUnavailable."""
        with work_part(claim, [item]):
            return await self._written(claim.jobs[item.job], item)

    async def _written(self, job: Job, item: Item) -> Settlement:
        files = {
            "output": await self._kept(job, "output", self._answers(job)),
            "error": await self._kept(job, "error", self._errors(job)),
        }
        if not job.dead or _stopped(job):
            await self._blobs.delete_all(job.id)
        return Settlement(item.id, item.lease, "done", result=files)

    async def _kept(self, job: Job, role: str, pieces: AsyncIterator[bytes]) -> str:
        """Write one file and keep it; empty when it has nothing. Raises StoreUnavailable."""
        name = job.id.removeprefix("job_")
        file_id = f"file-{int(job.times['finalizing'] * 1e3):012x}-{name}-{role}"
        if await self._files.find_file(job.tenant, file_id) is not None:
            return file_id
        put = await self._blobs.put(file_id, pieces)
        if put.size == 0:
            await self._blobs.delete(file_id)
            return ""
        now = self._wall()
        file = StoredFile(
            id=file_id,
            tenant=job.tenant,
            purpose="batch_output",
            filename=f"batch_{name}_{role}.jsonl",
            size=put.size,
            sha256=put.sha256,
            created_at=now,
            expires_at=now + job.spec.get("output_kept_s", self._kept_s),
        )
        await self._files.create_file(new_op(), file)
        return file_id

    async def _answers(self, job: Job) -> AsyncIterator[bytes]:
        """Lines of what is done, by number, from their segments."""
        async for segment, start, stop in self._runs(job):
            async for piece in self._blobs.stream(segment, start, stop):
                yield piece

    async def _runs(self, job: Job) -> AsyncIterator[tuple[str, int, int]]:
        """Where the lines stand; those that follow each other in a segment as one."""
        segment, start, stop = "", 0, 0
        async for view in self._items(job, ("done",)):
            place = view.result
            if (place["segment"], place["start"]) != (segment, stop):
                if stop > start:
                    yield segment, start, stop
                segment, start = place["segment"], place["start"]
            stop = place["start"] + place["length"]
        if stop > start:
            yield segment, start, stop

    async def _errors(self, job: Job) -> AsyncIterator[bytes]:
        """Lines of what failed or was not done, by number."""
        gone = "batch_expired" if "expiring" in job.times else "batch_cancelled"
        async for view in self._items(job, ("dead", "cancelled")):
            yield _error_line(view, gone)

    async def _items(self, job: Job, states: Sequence[ItemState]) -> AsyncIterator[ItemView]:
        after = -1
        while page := await self._jobs.list_items(job.tenant, job.id, states, after, PAGE):
            for view in page:
                yield view
            after = page[-1].seq


def _stopped(job: Job) -> bool:
    """Whether its dead items cannot be tried again."""
    return any(why in job.times for why in ("expiring", "cancelling", "stopping"))


def _error_line(view: ItemView, gone: str) -> bytes:
    """A request that was refused has a response; one that was not answered has an error."""
    name = request_id(view.job, view.seq)
    if view.state == "cancelled":
        return failed_line(name, view.name, gone, GONE[gone])
    if "status" not in view.result:
        return failed_line(name, view.name, view.error_code, view.error_text)
    error = {
        "message": view.error_text,
        "type": "invalid_request_error",
        "param": view.result["param"],
        "code": view.error_code,
    }
    return refused_line(name, view.name, view.result["status"], error)
