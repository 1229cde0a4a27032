"""`/v1/receipts` and `after` of a search: how far a write has come, for whoever holds its receipt.

A job's receipt is the job in another form, and is forgotten with it; a raw write's holds all that there is
to know (`raw_receipts`), and is good while its collection lives. So a receipt is of no process: what it
needs is in the Store, and how far searches see the index is asked anew.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from serve.errors import BadInput, Conflict, DeadlineExceeded, NotFound
from serve.flows.collections import CollectionFlow
from serve.flows.context import Context
from serve.flows.feed import Feed
from serve.flows.raw_receipts import RawReceipt, parse
from serve.freshness import Level
from serve.index.probes import Probes
from serve.items import ItemView, Job, JobView
from serve.job_ports import Jobs
from serve.records import Caller, Collection


FAILURES = 100
"""Failed documents that a receipt shows; the job's items have the others."""

JOB, OF_JOB = "job_", "rcpt_"


@dataclass(frozen=True, slots=True)
class Seen:
    """A receipt as it stands now. Times are epoch seconds; None: not yet, or nobody noted it.

    Attributes:
        job: its id; empty: a raw write has none.
        collection: the name of where it went.
        documents: how many were written or deleted, of which `failed` did not land.
        failures: of the first that failed, why; `more`: there are others.
    """

    id: str
    job: str
    collection: str
    level: Level
    documents: int
    failed: int
    accepted_at: float
    indexed_at: float | None = None
    searchable_at: float | None = None
    failures: Sequence[ItemView] = ()
    more: bool = False


class ReceiptFlow:
    """Receipts of the caller's tenant: another's are not found. Free, as looking at a job is."""

    def __init__(
        self,
        context: Context,
        collections: CollectionFlow,
        jobs: Jobs,
        feed: Feed,
        probes: Probes,
    ) -> None:
        self._clock = context.clock
        self._deadline_s = context.settings.limits.interactive_deadline_s
        self._collections = collections
        self._jobs = jobs
        self._feed = feed
        self._probes = probes

    async def find(self, caller: Caller, receipt: str) -> Seen:
        """One receipt. Raises NotFound, StoreUnavailable."""
        raw = parse(receipt)
        if raw is not None:
            return await self._raw(caller, receipt, raw)
        view = await self._view(caller, receipt, param="id")
        job = view.job
        failures: Sequence[ItemView] = ()
        if job.dead:
            failures = await self._jobs.list_items(
                caller.tenant, job.id, ("dead",), -1, FAILURES + 1
            )
        ended_at = job.times.get(job.state) if job.ended else None
        sees = job.ended and await self._probes.sees(job.collection, view.token)
        return Seen(
            receipt,
            job.id,
            job.spec.get("collection", ""),
            _level(ended=job.ended, sees=sees),
            documents=job.total,
            failed=job.dead + job.cancelled,
            accepted_at=job.created_at,
            indexed_at=ended_at,
            searchable_at=ended_at if view.token is None else None,
            failures=failures[:FAILURES],
            more=len(failures) > FAILURES,
        )

    async def wait(
        self, caller: Caller, collection: Collection, after: Sequence[str], until: float | None
    ) -> None:
        """Return when searches of the collection see these writes, whatever of them did not fail.

        Raises NotFound and BadInput (no receipt of this tenant, or of this collection),
        DeadlineExceeded (not in time), Conflict (the index does not say).
        """
        if until is None:
            until = self._clock() + self._deadline_s
        for receipt in dict.fromkeys(after):
            uuid, token = await self._landed(caller, receipt, until)
            if uuid != collection.uuid:
                raise BadInput(
                    f"The receipt {receipt[:128]!r} is of another collection.",
                    param="after",
                    code="other_collection",
                )
            sees = await self._probes.sees(uuid, token, until - self._clock())
            if sees is None:
                raise Conflict(
                    "The index does not say when searches see this write: search without `after`.",
                    param="after",
                    code="freshness_unknown",
                )
            if not sees:
                raise _not_yet()

    async def _landed(self, caller: Caller, receipt: str, until: float) -> tuple[str, int | None]:
        """The collection of a write and the token of what has landed, once all of it has ended."""
        raw = parse(receipt)
        if raw is not None:
            return raw.collection, raw.token
        view = await self._view(caller, receipt, param="after")
        if not view.job.ended:
            view = await self._ended(caller, view.job, receipt, until)
        return view.job.collection, view.token

    async def _ended(self, caller: Caller, job: Job, receipt: str, until: float) -> JobView:
        with self._feed.watch(job.id) as watch:
            view = await self._view(caller, receipt, param="after")  # it may have ended before
            if not view.job.ended:
                await watch.ended(until - self._clock())
                view = await self._view(caller, receipt, param="after")
        if not view.job.ended:
            raise _not_yet()
        return view

    async def _view(self, caller: Caller, receipt: str, *, param: str) -> JobView:
        """The job of a receipt, if it writes documents. Raises NotFound that names `param`."""
        view = None
        if receipt.startswith(OF_JOB):
            job_id = JOB + receipt.removeprefix(OF_JOB)
            view = await self._jobs.find_job(caller.tenant, job_id)
        if view is None or view.job.kind != "documents":
            raise _unknown(receipt, param)
        return view

    async def _raw(self, caller: Caller, receipt: str, raw: RawReceipt) -> Seen:
        name = await self._collections.name_of(caller, raw.collection)
        if name is None:
            raise _unknown(receipt, "id")
        sees = await self._probes.sees(raw.collection, raw.token)
        at = raw.indexed_ms / 1e3
        return Seen(
            receipt,
            "",
            name,
            _level(ended=True, sees=sees),
            documents=raw.documents,
            failed=raw.failed,
            accepted_at=at,
            indexed_at=at,
            searchable_at=at if raw.token is None else None,
        )


def _level(*, ended: bool, sees: bool | None) -> Level:
    if not ended:
        return "accepted"
    return "searchable" if sees else "indexed"


def _unknown(receipt: str, param: str) -> NotFound:
    return NotFound(f"You have no receipt {receipt[:128]!r}.", param=param)


def _not_yet() -> DeadlineExceeded:
    return DeadlineExceeded(
        "Searches do not see this write yet.",
        param="after",
        code="not_searchable_yet",
        retry_after_s=1,
    )
