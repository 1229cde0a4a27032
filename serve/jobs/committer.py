"""One thread that owns the database connection and commits waiting operations in groups: a commit
waits for the disk, so operations that arrive meanwhile share the next one.
"""

import logging
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, TypeVar

import sqlalchemy as sa

from serve.errors import Internal, Overloaded, ServiceError, StoreUnavailable


T = TypeVar("T")

Work = Callable[[sa.Connection, float], T]
"""Statements to run in the shared transaction, given the group's `now`."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Waiting:
    work: Work[Any]
    future: Future[Any]


@dataclass(frozen=True, slots=True)
class _Outcome:
    value: Any = None
    error: ServiceError | None = None

    def give(self, future: Future[Any]) -> None:
        if self.error is None:
            future.set_result(self.value)
        else:
            future.set_exception(self.error)


class Committer:
    """Runs submitted work on its own thread, up to `ops_max` at a time in one transaction.

    A future is resolved only after COMMIT. Work that raises is undone alone, by its savepoint;
    a group whose COMMIT fails is StoreUnavailable as a whole, and the connection is replaced.
    When the thread ends for whatever reason, everything pending is StoreUnavailable.
    """

    def __init__(
        self,
        opener: Callable[[], AbstractContextManager[sa.Engine]],
        *,
        ops_max: int,
        queue_max: int,
        clock: Callable[[], float],
        upkeep: Work[None],
    ) -> None:
        """Blocks until `opener` has opened the database; raises what it raises.

        `upkeep` runs in each group's transaction, after its operations.
        """
        self.commits = 0
        self._ops_max = ops_max
        self._queue_max = queue_max
        self._clock = clock
        self._upkeep = upkeep
        self._op_s = 0.0
        self._turn = threading.Condition()
        self._queue: deque[_Waiting] = deque()
        self._group: list[_Waiting] = []
        self._closing = False
        opened: Future[None] = Future()
        # Daemon: a process may die without closing; what was acknowledged is on the disk.
        self._thread = threading.Thread(
            target=self._run, args=(opener, opened), name="store", daemon=True
        )
        self._thread.start()
        opened.result()

    @property
    def healthy(self) -> bool:
        """False once the thread has ended or is about to."""
        return self._thread.is_alive() and not self._closing

    def submit(self, work: Work[T]) -> Future[T]:
        """Queue work. Raises Overloaded when the queue is full, StoreUnavailable after the end."""
        future: Future[T] = Future()
        with self._turn:
            if self._closing:
                raise StoreUnavailable("the store is closed", retry_after_s=1)
            if len(self._queue) >= self._queue_max:
                drained_s = max(0.1, len(self._queue) * self._op_s)
                raise Overloaded("the store's queue is full", retry_after_s=drained_s)
            self._queue.append(_Waiting(work, future))
            self._turn.notify()
        return future

    def close(self, wait_s: float) -> None:
        """Finish what is queued and end. Raises StoreUnavailable when `wait_s` is not enough."""
        with self._turn:
            self._closing = True
            self._turn.notify()
        self._thread.join(wait_s)
        if self._thread.is_alive():
            raise StoreUnavailable(f"the store did not close within {wait_s:g} s")

    def _run(
        self, opener: Callable[[], AbstractContextManager[sa.Engine]], opened: Future[None]
    ) -> None:
        try:
            with opener() as engine:
                opened.set_result(None)
                self._serve(engine)
        except Exception as exc:  # the thread's rim: `_end` tells everyone who waits
            if opened.done():
                log.critical("the store's thread has failed", exc_info=exc)
            else:
                opened.set_exception(exc)
        finally:
            self._end(opened)

    def _end(self, opened: Future[None]) -> None:
        """Answer everyone who still waits; from here on nobody can start to."""
        with self._turn:
            self._closing = True
            queued = [waiting.future for waiting in self._queue]
            self._queue.clear()
        pending: list[Future[Any]] = [opened, *(waiting.future for waiting in self._group)]
        pending = [future for future in pending if not future.done()]
        # A queued future may be cancelled at any moment, a running one cannot.
        pending += [future for future in queued if future.set_running_or_notify_cancel()]
        for future in pending:
            future.set_exception(StoreUnavailable("the store has failed", retry_after_s=1))

    def _serve(self, engine: sa.Engine) -> None:
        conn = engine.connect()
        try:
            while group := self._take():
                if not self._commit(conn, group):
                    # What state the connection is in is unknown. A new one has none; if it
                    # cannot be had, the thread ends and `healthy` says so.
                    conn.close()
                    conn = engine.connect()
        finally:
            conn.close()

    def _take(self) -> list[_Waiting]:
        """The next group, waiting for it; empty only at the end. Skips callers who left."""
        with self._turn:
            self._group = []
            while not self._group:
                self._turn.wait_for(lambda: self._queue or self._closing)
                if not self._queue:
                    break
                while self._queue and len(self._group) < self._ops_max:
                    waiting = self._queue.popleft()
                    if waiting.future.set_running_or_notify_cancel():
                        self._group.append(waiting)
            return self._group

    def _commit(self, conn: sa.Connection, group: list[_Waiting]) -> bool:
        """Run a group in one transaction and answer its callers. False when nothing was kept."""
        now = self._clock()
        outcomes = self._transact(conn, group, now)
        self._op_s = max(0.0, self._clock() - now) / len(group)
        for waiting, outcome in zip(group, outcomes or [_lost() for _ in group], strict=True):
            outcome.give(waiting.future)
        return outcomes is not None

    def _transact(
        self, conn: sa.Connection, group: list[_Waiting], now: float
    ) -> list[_Outcome] | None:
        try:
            with conn.begin():
                outcomes = [_apply(conn, waiting.work, now) for waiting in group]
                self._upkeep(conn, now)
        except sa.exc.SQLAlchemyError:
            log.exception("a group of %d store operations failed", len(group))
            return None
        self.commits += 1
        return outcomes


def _apply(conn: sa.Connection, work: Work[Any], now: float) -> _Outcome:
    """Run one operation in a savepoint. Raises SQLAlchemyError only if the group is lost.

    In plain SQL: SQLAlchemy compiles its own savepoints anew each time, a quarter of what a small
    operation costs.
    """
    conn.exec_driver_sql("SAVEPOINT operation")
    try:
        value = work(conn, now)
    except Exception as exc:  # noqa: BLE001 a rim: one operation's fault must not sink the others
        # Raises when the database has undone the whole transaction.
        conn.exec_driver_sql("ROLLBACK TO SAVEPOINT operation")
        conn.exec_driver_sql("RELEASE SAVEPOINT operation")
        return _Outcome(error=_translated(exc))
    conn.exec_driver_sql("RELEASE SAVEPOINT operation")
    return _Outcome(value)


def _translated(exc: Exception) -> ServiceError:
    if isinstance(exc, ServiceError):
        return exc
    log.error("a store operation failed", exc_info=exc)
    if isinstance(exc, sa.exc.OperationalError):
        return StoreUnavailable("the store could not do this now", retry_after_s=1)
    return Internal("the store failed on this operation")


def _lost() -> _Outcome:
    return _Outcome(error=StoreUnavailable("the store could not commit", retry_after_s=1))
