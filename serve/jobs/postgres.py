"""Runs the Store's work on Postgres, for many nodes: each operation in a transaction of its own, on a
few connections; any number of processes side by side. The counterpart of `committer` on SQLite.

Who waits for something to be stored is woken by NOTIFY, from whatever process it was stored.
"""

import logging
import threading
import time
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
SCHEMA_LOCK, CHORES_LOCK = 7_164_261, 7_164_262
"""Keys of the advisory locks under which one process makes or upgrades the tables, or does chores."""

REACH = {
    "connect_timeout": 10,
    "tcp_user_timeout": 15_000,
    "keepalives_idle": 5,
    "keepalives_interval": 5,
    "keepalives_count": 3,
}
"""Of libpq, where the URL does not say otherwise: a server that fell silent is lost after 15 to 20 s."""

BOUNDS_MS = {
    "idle_in_transaction_session_timeout": 15_000,
    "lock_timeout": 20_000,
    "statement_timeout": 60_000,
}
"""Of each session, likewise. A process that freezes in a transaction loses it, and its locks, before
those who wait for them give up."""

UPGRADE_S = 3600
"""How long one statement of an upgrade may take, or wait for another process to upgrade."""

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
        self._turn = threading.Condition()
        self._closing = threading.Event()
        self._given_up = threading.Event()
        self.commits = 0
        address = sa.make_url(url).set(drivername="postgresql+psycopg")
        reach = {name: value for name, value in REACH.items() if name not in address.query}
        self._engine = sa.create_engine(
            address,
            connect_args={**reach, "options": _options(address)},
            pool_size=connections,
            max_overflow=1,
            pool_pre_ping=True,
            isolation_level="READ COMMITTED",
        )
        self._address = {**self._engine.dialect.create_connect_args(address)[1], **reach}
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
        with self._turn:
            if self._closing.is_set():
                raise StoreUnavailable("the store is closed", retry_after_s=1)
            if self._waiting >= self._queue_max:
                raise Overloaded("the store's queue is full", retry_after_s=1)
            self._waiting += 1
            future = self._threads.submit(self._run, work)
        future.add_done_callback(self._left)  # also of one that was cancelled before it ran
        return future

    def _left(self, _: Future[Any]) -> None:
        with self._turn:
            self._waiting -= 1
            self._turn.notify_all()

    def is_alone(self, conn: sa.Connection) -> bool:
        """Whether no other process does chores of the Store: none will until this transaction ends."""
        mine = sa.select(sa.func.pg_try_advisory_xact_lock(CHORES_LOCK))
        return bool(conn.execute(mine).scalar_one())

    def keep_up(self, conn: sa.Connection, now: float, _rows_max: int) -> int:
        """The Store's upkeep as a chore, of which nothing is left to do at once."""
        self._upkeep(conn, now)
        return 0

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
        """Finish what is queued and disconnect.

        Raises StoreUnavailable when it takes longer: what is queued by then is not done any more.
        """
        until = time.monotonic() + wait_s
        self._closing.set()
        self._rings.put("")
        with self._turn:
            in_time = self._turn.wait_for(lambda: not self._waiting, wait_s)
        self._given_up.set()
        self._threads.shutdown(wait=False)
        for thread in self._beside:
            thread.join(max(0.0, until - time.monotonic()))
            in_time = in_time and not thread.is_alive()
        if not in_time:
            raise StoreUnavailable(f"the store did not close within {wait_s:g} s")
        self._engine.dispose()

    def _prepare(self) -> None:
        with self._engine.begin() as conn:
            for name in ("statement_timeout", "lock_timeout"):
                conn.execute(sa.text(f"SET LOCAL {name} = '{UPGRADE_S}s'"))
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
        if self._given_up.is_set():
            raise StoreUnavailable("the store is closed", retry_after_s=1)
        try:
            return self._tried(work)
        except ServiceError:
            raise
        except Exception as error:
            if isinstance(error, sa.exc.DBAPIError) and _is_away(error):
                log.warning("the database is away: %s", error.orig)
                raise StoreUnavailable("the store is away", retry_after_s=1) from None
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
                with psycopg.connect(**self._address, autocommit=True) as conn:
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


def _options(address: sa.URL) -> str:
    """What a session begins with; of what is said twice the last counts."""
    given = address.query.get("options", ())
    bounds = [f"-c {name}={value}" for name, value in BOUNDS_MS.items()]
    return " ".join([*bounds, *([given] if isinstance(given, str) else given)])


def _is_away(error: sa.exc.DBAPIError) -> bool:
    """Whether the connection is lost, or somebody else held up the database for too long."""
    known = isinstance(error, sa.exc.OperationalError | sa.exc.InterfaceError)
    return known or error.connection_invalidated
