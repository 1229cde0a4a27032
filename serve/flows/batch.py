"""`/v1/batches`: a batch is a job of kind `embeddings` whose items are the lines of a file.

This is the accepting half; `serve.flows.batch_work` reads the file and does the rest.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from serve import tracing
from serve.errors import BadInput, NotFound
from serve.flows.collections import CollectionFlow
from serve.flows.context import Context, new_op
from serve.flows.files import FileFlow
from serve.items import Accepted, Job, Once, new_id
from serve.job_ports import Jobs
from serve.records import Caller


WINDOW_S = 86_400.0
"""`24h`, the only completion window there is."""


@dataclass(frozen=True, slots=True)
class BatchRequest:
    """What a caller hands over. `output_kept_s`: how long the files it writes are kept."""

    input_file: str
    collection: str | None = None
    output_kept_s: float | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)


class BatchFlow:
    """Batches of the caller's tenant. `create` counts as a request at class `bulk`."""

    def __init__(
        self,
        context: Context,
        collections: CollectionFlow,
        jobs: Jobs,
        files: FileFlow,
    ) -> None:
        self._quotas = context.quotas
        self._wall = context.wall
        self._kept_s = context.settings.files.kept_s
        self._collections = collections
        self._jobs = jobs
        self._files = files

    async def create(
        self, caller: Caller, request: BatchRequest, once: Once | None = None
    ) -> Accepted:
        """Accept a batch, once for each idempotency key; its file is checked by a worker.

        Raises NotFound (file, collection), BadInput, QuotaExceeded, Mismatch,
        StoreUnavailable.
        """
        async with self._quotas.admitted(caller, "bulk", tokens=0, param="input_file_id"):
            if once is not None and (job := await self._jobs.first_job(caller.tenant, once)):
                return Accepted(job, replayed=True)
            file = await self._files.find(caller, request.input_file, param="input_file_id")
            if file.purpose != "batch":
                raise BadInput("The file's purpose must be 'batch'.", param="input_file_id")
            job = await self._job(caller, request)
            return await self._files.hand_over(file, job, once, jobs=self._jobs)

    async def _job(self, caller: Caller, request: BatchRequest) -> Job:
        now = self._wall()
        collection = ""
        if request.collection is not None:
            found = await self._collections.find(caller, request.collection)
            self._collections.servable(found)
            collection = found.uuid
        kept_s = min(request.output_kept_s or self._kept_s, self._kept_s)
        return Job(
            id=new_id("job", now),
            tenant=caller.tenant,
            key=caller.key,
            kind="embeddings",
            klass="bulk",
            weight=caller.weight,
            created_at=now,
            collection=collection,
            spec={
                "output_kept_s": kept_s,
                "collection": request.collection,
                **tracing.kept(),
            },
            metadata=request.metadata,
            files={"input": request.input_file},
            expires_at=now + WINDOW_S,
        )

    async def find(self, caller: Caller, job_id: str) -> Job:
        """Raises NotFound, also for another tenant's, and for a job that is no batch."""
        view = await self._jobs.find_job(caller.tenant, job_id)
        if view is None or view.job.kind != "embeddings":
            raise NotFound("You have no such batch.", param="batch_id", code="batch_not_found")
        return view.job

    async def list(self, caller: Caller, after: str, limit: int) -> Sequence[Job]:
        """Up to `limit` batches, newest first, those that are older than the job `after`."""
        return await self._jobs.list_jobs(caller.tenant, "embeddings", (), after, limit)

    async def cancel(self, caller: Caller, job_id: str) -> Job:
        """End a batch; what is done stays, and comes as its output. Raises NotFound, Conflict."""
        await self.find(caller, job_id)
        return await self._jobs.change_job(new_op(), caller.tenant, job_id, "cancel")
