"""Runs the Store's work on Postgres, for many nodes: each operation in a transaction of its own, on a
few connections; any number of processes side by side. The counterpart of `committer` on SQLite.

Who waits for something to be stored is woken by NOTIFY, from whatever process it was stored.
"""

import logging
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from queue import Empty, SimpleQueue
from typing import Any, TypeVar

import sqlalchemy as sa

from serve.errors import Internal, Overloaded, ServiceError, StoreUnavailable
from serve.jobs import schema
from serve.jobs.committer import Work


T = TypeVar("T")

REPEATED = frozenset({"40001", "40P01", "23505"})
"""Of SQLSTATE: what another transaction caused, and what a repeat cures: a lost race for a
serialisable order, a deadlock, a row that two made at first (it is there the second time)."""

TRIES = 8
SCHEMA_LOCK, UPKEEP_LOCK = 7_164_261, 7_164_262
"""Keys of the advisory locks under which one process makes or upgrades the tables, or tidies up."""

CHANNEL = "headrace"
NOTIFY_S = 0.01
"""Rings of so long a moment go out together: a notification is a transaction."""

LISTEN_S = 0.5
"""How often the listener looks whether it should end, and between two tries to connect."""

log = logging.getLogger(__name__)


class Postgres:
    """`submit` as `Committer` has it; a call is acknowledged after its commit."""

    def __init__(
        self,
        url: str,
        *,
        connections: int,
        queue_max: int,
        clock: Callable[[], float] | None,
        upkeep: Work[None],
    ) -> None:
        """Connects, makes or upgrades the tables. Blocks. `clock` None: the database's own.

        Raises StoreUnavailable when there is no database, or a newer program's.
        """
        self._queue_max = queue_max
        self._clock = clock
        self._upkeep = upkeep
        self._waiting = 0
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self.commits = 0
        address = sa.make_url(url).set(drivername="postgresql+psycopg")
        self._engine = sa.create_engine(
            address,
            pool_size=connections,
            max_overflow=1,
            pool_pre_ping=True,
            isolation_level="READ COMMITTED",
        )
        self._url = address.set(drivername="postgresql").render_as_string(hide_password=False)
        try:
            self._prepare()
        except sa.exc.DBAPIError as error:
            self._engine.dispose()
            raise StoreUnavailable(f"cannot open the database: {error.orig}") from error
        self._threads = ThreadPoolExecutor(connections, "store")
        self._rings: SimpleQueue[str] = SimpleQueue()
        notifier = threading.Thread(target=self._notify, name="notify", daemon=True)
        self._beside = [notifier]
        notifier.start()

    @property
    def healthy(self) -> bool:
        """False once it was closed; a lost connection is replaced by itself."""
        return not self._closing.is_set()

    def submit(self, work: Work[T]) -> Future[T]:
        """Queue work. Raises Overloaded when too much waits, StoreUnavailable after the end."""
        with self._lock:
            if self._closing.is_set():
                raise StoreUnavailable("the store is closed", retry_after_s=1)
            if self._waiting >= self._queue_max:
                raise Overloaded("the store's queue is full", retry_after_s=1)
            self._waiting += 1
            future = self._threads.submit(self._run, work)
        future.add_done_callback(self._left)  # also of one that was cancelled before it ran
        return future

    def _left(self, _: Future[Any]) -> None:
        with self._lock:
            self._waiting -= 1

    def keep_up(self, conn: sa.Connection, now: float) -> None:
        """The Store's upkeep as work, in one process at a time."""
        mine = sa.select(sa.func.pg_try_advisory_xact_lock(UPKEEP_LOCK))
        if conn.execute(mine).scalar_one():
            self._upkeep(conn, now)

    def listen(self, heard: Callable[[str], None]) -> None:
        """Call `heard` with each word that any process has rung, from a thread."""
        listener = threading.Thread(target=self._listen, args=(heard,), name="listen", daemon=True)
        self._beside.append(listener)
        listener.start()

    def ring(self, words: Iterable[str]) -> None:
        """Tell every process, this one too."""
        for word in words:
            self._rings.put(word)

    def close(self, wait_s: float) -> None:
        """Finish what is queued and disconnect. Raises StoreUnavailable when it takes longer."""
        self._closing.set()
        self._rings.put("")
        self._threads.shutdown(wait=True, cancel_futures=False)
        for thread in self._beside:
            thread.join(wait_s)
            if thread.is_alive():
                raise StoreUnavailable(f"the store did not close within {wait_s:g} s")
        self._engine.dispose()

    def _prepare(self) -> None:
        with self._engine.begin() as conn:
            conn.execute(sa.select(sa.func.pg_advisory_xact_lock(SCHEMA_LOCK)))
            if schema.identity(conn) is None:
                schema.create(conn, self._now(conn))
            else:
                schema.upgrade(conn)

    def _now(self, conn: sa.Connection) -> float:
        """One clock for all processes: only so can their times be compared."""
        if self._clock is not None:
            return self._clock()
        now = sa.select(sa.func.extract("epoch", sa.func.clock_timestamp()))
        return float(conn.execute(now).scalar_one())

    def _run(self, work: Work[T]) -> T:
        try:
            return self._tried(work)
        except ServiceError:
            raise
        except sa.exc.OperationalError as error:
            log.warning("the database is away: %s", error.orig)
            raise StoreUnavailable("the store is away", retry_after_s=1) from None
        except Exception as error:
            log.exception("a store operation failed")
            raise Internal("the store failed on this operation") from error

    def _tried(self, work: Work[T]) -> T:
        tries_left = TRIES
        while True:
            tries_left -= 1
            try:
                with self._engine.begin() as conn:
                    value = work(conn, self._now(conn))
            except sa.exc.DBAPIError as error:
                if not tries_left or getattr(error.orig, "sqlstate", None) not in REPEATED:
                    raise
            else:
                self.commits += 1
                return value

    def _listen(self, heard: Callable[[str], None]) -> None:
        import psycopg  # noqa: PLC0415  an optional dependency

        while not self._closing.is_set():
            try:
                with psycopg.connect(self._url, autocommit=True) as conn:
                    conn.execute(f"LISTEN {CHANNEL}")
                    while not self._closing.is_set():
                        for one in conn.notifies(timeout=LISTEN_S, stop_after=1):
                            for word in one.payload.split():
                                heard(word)
            except psycopg.Error as error:
                log.warning("cannot listen to the database: %s", error)
                self._closing.wait(LISTEN_S)

    def _notify(self) -> None:
        while not self._closing.is_set():
            words = {self._rings.get()}
            self._closing.wait(NOTIFY_S)
            while True:
                try:
                    words.add(self._rings.get_nowait())
                except Empty:
                    break
            if words == {""}:
                continue
            told = sa.select(sa.func.pg_notify(CHANNEL, " ".join(sorted(words - {""}))))
            try:
                with self._engine.begin() as conn:
                    conn.execute(told)
            except sa.exc.DBAPIError as error:
                log.warning("cannot notify: %s", error.orig)
