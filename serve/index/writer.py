"""The single writer of the index: an asyncio driver around `Buffer`, an index and the Store's fence.

One task runs `run()`; any number of callers wait in `offer()`. Before each flush the fence says
once which documents of the batch have been superseded: their records are skipped. Tombstones run
all the same: `generation <= g` makes them safe, and stale chunks must go.
"""

import asyncio
import random
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from logging import getLogger
from typing import Any

from serve import tracing
from serve.config import Buffer as BufferSettings
from serve.errors import Fenced, IndexUnavailable, ServiceError
from serve.index.buffer import RELEASED, Buffer
from serve.index.errors import (
    INDEX_FAULTS,
    BatchTooLarge,
    IndexOffline,
    IndexRetryable,
    RecordsRejected,
)
from serve.index.lanes import Batch
from serve.ports import Fence, Index, Landed
from serve.pressure import Pressure, Sender
from serve.records import CollectionSpec, Outcome, Record, Write


log = getLogger("headrace.index")


@dataclass(slots=True, eq=False)
class _Offer:
    """A caller who waits for the outcomes of one range of tickets."""

    first: int
    outcomes: list[Outcome | None]
    missing: int
    done: asyncio.Future[None] = field(repr=False)


class Writer:
    """Implements `serve.ports.Upserter` for the one process that holds the epoch."""

    def __init__(
        self,
        index: Index,
        fence: Fence,
        *,
        name: str,
        epoch: int,
        settings: BufferSettings,
        clock: Callable[[], float],
        rng: random.Random,
    ) -> None:
        self._index = index
        self._fence = fence
        self._name = name
        self._epoch = epoch
        self._settings = settings
        self._clock = clock
        self._buffer = Buffer(settings, index.caps, rng)
        self._offers: dict[int, _Offer] = {}
        self._flushes: dict[str, asyncio.Task[None]] = {}
        self._dropping: set[str] = set()
        self._wake = asyncio.Event()
        self._empty = asyncio.Event()
        self._ended = asyncio.Event()
        self._running = False
        self._accepting = True
        self._stopping = False
        self._fenced = False
        self._maintaining = False
        self._faults = 0

    @property
    def fenced(self) -> bool:
        """A newer writer holds the epoch: everything was given back, nothing is accepted."""
        return self._fenced

    async def offer(
        self, sender: Sender, ns: str, writes: Sequence[Write], deadline_s: float
    ) -> tuple[Outcome, ...]:
        """Land writes in bulk; one outcome per write, in order.

        Answers within `deadline_s` plus one flush deadline: what is in flight is waited for. A
        caller that is cancelled leaves its writes behind; they land, and nobody is told.

        Raises Overloaded or TooLarge (nothing was taken), IndexUnavailable when not accepting.
        """
        self._check_accepting()
        if ns in self._dropping:
            return (RELEASED,) * len(writes)
        now = self._clock()
        tickets = self._buffer.offer(sender, ns, writes, now, now + deadline_s)
        done = asyncio.get_running_loop().create_future()
        offer = _Offer(tickets.start, [None] * len(tickets), len(tickets), done)
        self._offers.update(dict.fromkeys(tickets, offer))
        self._deliver()
        self._wake.set()
        if tickets:
            await done
        return tuple(outcome for outcome in offer.outcomes if outcome is not None)

    async def pressure(self) -> Pressure:
        """See `serve.ports.Upserter`."""
        self._check_accepting()
        return self._buffer.pressure(self._clock())

    async def ensure(self, spec: CollectionSpec) -> None:
        """Make a namespace. Raises IndexUnavailable."""
        self._check_accepting()
        await self._administer(self._index.ensure(spec))

    async def drop(self, ns: str) -> None:
        """Release what waits for a namespace, let its flush end, and remove it.

        Raises IndexUnavailable; dropping again is safe.
        """
        self._check_accepting()
        self._dropping.add(ns)
        try:
            self._buffer.drop(ns)
            self._deliver()
            # A flush that commits after the drop would leave a table nobody knows of.
            flush = self._flushes.get(ns)
            if flush is not None:
                await asyncio.wait({flush})
            await self._administer(self._index.drop(ns))
        finally:
            self._dropping.discard(ns)

    async def run(self) -> None:
        """Flush until `drain` ends, the writer is fenced out, or the task is cancelled.

        Afterwards nobody waits: what has no outcome is released.
        """
        self._running = True
        try:
            async with asyncio.TaskGroup() as flushes:
                tasks = {flushes.create_task(self._keep_up())}
                while not self._stopping:
                    self._wake.clear()
                    for batch in self._buffer.due(self._clock()):
                        task = flushes.create_task(self._flush(batch))
                        self._flushes[batch.ns] = task
                        tasks.add(task)
                        task.add_done_callback(tasks.discard)
                    self._deliver()
                    await self._sleep()
                for task in tasks:
                    task.cancel()
        finally:
            self._release_all()
            self._ended.set()

    async def drain(self, deadline_s: float) -> None:
        """Refuse offers, flush what is there until the deadline, release the rest, end `run`."""
        self._accepting = False
        self._buffer.hurry()
        self._wake.set()
        self._deliver()
        try:
            async with asyncio.timeout(deadline_s):
                await self._empty.wait()
        except TimeoutError:
            log.warning("drain: %d writes are given back", self._buffer.depth)
        self._release_all()
        if self._running:
            await self._ended.wait()

    def stats(self) -> dict[str, Any]:
        """The buffer's gauges and counters, and `fenced`, `accepting`, `faults` (our own bugs)."""
        return {
            **self._buffer.stats(self._clock()),
            "fenced": self._fenced,
            "accepting": self._accepting,
            "faults": self._faults,
        }

    async def _sleep(self) -> None:
        now = self._clock()
        due = self._buffer.next_due(now)
        try:
            async with asyncio.timeout(None if due is None else due - now):
                await self._wake.wait()
        except TimeoutError:
            return

    async def _flush(self, batch: Batch) -> None:
        traces = (write.trace for write in batch.writes)
        try:
            with tracing.joint("headrace.flush", traces, writes=len(batch.writes)) as span:
                landed = await self._send(batch)
                span.note(landed=landed)
        finally:
            if self._flushes.get(batch.ns) is asyncio.current_task():
                del self._flushes[batch.ns]
            self._deliver()
            self._wake.set()
        if landed and self._accepting:
            await self._maintain()

    async def _send(self, batch: Batch) -> bool:
        """One attempt, and whether the index took it; it ends in an `ack` or a `nack`."""
        buffer = self._buffer
        try:
            async with asyncio.timeout(self._settings.flush_deadline_s):
                batch = await self._without_superseded(batch)
                landed = await self._write(batch)
        except Fenced:
            log.warning("epoch %d of %s is over: another writer took it", self._epoch, self._name)
            self._fenced = True
            self._release_all()
        except (IndexRetryable, RecordsRejected, BatchTooLarge, IndexOffline) as error:
            log.info("flush of %s: %s: %s", batch.ns, type(error).__name__, error)
            buffer.nack(batch, error, self._clock())
        except ServiceError as error:  # the fence: the Store is away or full
            wait_s = error.retry_after_s or 0.0
            away = IndexRetryable(retry_after_s=wait_s, busy=False)
            buffer.nack(batch, away, self._clock())
        except TimeoutError:
            buffer.nack(batch, IndexRetryable("flush deadline"), self._clock())
        except Exception:  # the upserter tick: a fault of ours must not lose the batch or the loop
            log.exception("flush of %s failed", batch.ns)
            self._faults += 1
            buffer.nack(batch, IndexRetryable("internal", busy=False), self._clock())
        else:
            buffer.ack(batch, landed, self._clock())
            return True
        return False

    async def _without_superseded(self, batch: Batch) -> Batch:
        newest: dict[str, int] = {}
        for write in batch.writes:
            newest[write.document] = max(write.generation, newest.get(write.document, 0))
        gone = await self._fence.superseded(self._name, self._epoch, batch.ns, newest)
        ids = [
            record.id
            for record in batch.records
            if record.document in gone or record.generation < newest[record.document]
        ]
        return self._buffer.supersede(batch, ids) if ids else batch

    async def _write(self, batch: Batch) -> Landed:
        if not batch.writes:
            return Landed()
        if isinstance(batch.writes[0], Record):
            return await self._index.upsert(batch.ns, batch.records)
        return await self._index.delete(batch.ns, batch.tombstones)

    async def _keep_up(self) -> None:
        """What rests is tidied up, too: no flush follows that would do it."""
        while True:
            await asyncio.sleep(self._settings.upkeep_s)
            await self._maintain()

    async def _maintain(self) -> None:
        """Compaction, when the index says that it is due; one at a time."""
        if self._maintaining:
            return
        self._maintaining = True
        try:
            await self._index.maintain()
        except INDEX_FAULTS as error:
            log.warning("maintenance: %s: %s", type(error).__name__, error)
        except Exception:  # the upserter tick, as above
            log.exception("maintenance failed")
            self._faults += 1
        finally:
            self._maintaining = False

    async def _administer(self, call: Awaitable[None]) -> None:
        try:
            async with asyncio.timeout(self._settings.flush_deadline_s):
                await call
        except (*INDEX_FAULTS, TimeoutError) as error:
            raise IndexUnavailable("The index is away.", retry_after_s=1) from error

    def _check_accepting(self) -> None:
        if not self._accepting:
            raise IndexUnavailable("This writer has stopped.", retry_after_s=1)

    def _release_all(self) -> None:
        self._accepting = False
        self._stopping = True
        self._buffer.release_all()
        self._deliver()
        self._wake.set()

    def _deliver(self) -> None:
        for ticket, outcome in self._buffer.finished():
            offer = self._offers.pop(ticket)
            offer.outcomes[ticket - offer.first] = outcome
            offer.missing -= 1
            if offer.missing == 0 and not offer.done.done():
                offer.done.set_result(None)
        if self._buffer.depth == 0 and not self._accepting:
            self._empty.set()
