"""Opens the Store's SQLite file: the lock of its one owner, the marker of its existence, and an
engine whose transactions are explicit. The only place with SQLite's own SQL.

One connection at a time: SQLite 3.7.0 to 3.51.2 can corrupt a WAL when two connections reset it.
"""

import fcntl
import logging
import math
import os
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import quote

import orjson
import sqlalchemy as sa

from serve.errors import StoreUnavailable
from serve.jobs import schema


log = logging.getLogger(__name__)

LOCK_POLL_S = 0.05
IDENTITY_CHARS = 32

# FULL: a commit is on the disk before it is acknowledged, also when the power fails. It costs
# about 14 % of NORMAL's rate. The cache is 64 MiB.
PRAGMAS = ("synchronous=FULL", "busy_timeout=30000", "cache_size=-65536")


@contextmanager
def open_database(path: Path, lock_wait_s: float, now: float) -> Iterator[sa.Engine]:
    """Own the database at `path` while the context lasts; folder and file are made when new.

    Blocks up to `lock_wait_s` for the lock `<path>.lock`. The lock file keeps the identity of the
    database, so that a file that vanished or was exchanged is an error, not an empty start.

    Raises StoreUnavailable: lock held, file missing or exchanged, newer schema, not a database.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with _locked(path, lock_wait_s) as lock:
        known = _read_identity(lock)
        if not known:
            path.touch()
        elif not path.exists():
            raise StoreUnavailable(
                f"the database {path} is missing, but existed before: restore it, "
                f"or delete {_lock_path(path)} to start with an empty one"
            )
        engine = _engine(path)
        try:
            found = _prepare(engine, path, known, now)
            if not known:
                _write_identity(lock, found, path.parent)
            yield engine
        finally:
            engine.dispose()


def _lock_path(path: Path) -> Path:
    return path.with_name(path.name + ".lock")


@contextmanager
def _locked(path: Path, wait_s: float) -> Iterator[int]:
    """Hold the lock file; the kernel frees it when the process dies, however it dies."""
    lock = os.open(_lock_path(path), os.O_RDWR | os.O_CREAT, 0o600)
    pause = threading.Event()
    try:
        # Counted, not timed: a wall clock may jump, and flock itself knows no deadline.
        for _ in range(math.ceil(wait_s / LOCK_POLL_S) + 1):
            if _try_lock(lock):
                break
            pause.wait(LOCK_POLL_S)
        else:
            raise StoreUnavailable(
                f"another process still owns {path}: waited {wait_s:g} s for {_lock_path(path)}"
            )
        yield lock
    finally:
        os.close(lock)


def _try_lock(lock: int) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _read_identity(lock: int) -> str:
    """The identity kept in the lock file; empty when none was written to its end."""
    text = os.pread(lock, IDENTITY_CHARS, 0).decode("ascii", "replace")
    return text if len(text) == IDENTITY_CHARS else ""


def _write_identity(lock: int, identity: str, folder: Path) -> None:
    os.pwrite(lock, identity.encode("ascii"), 0)
    os.fsync(lock)
    entry = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(entry)  # the new names of both files, too
    finally:
        os.close(entry)


def _prepare(engine: sa.Engine, path: Path, known: str, now: float) -> str:
    """Check, make or upgrade the schema; returns the database's identity."""
    try:
        with engine.begin() as conn:
            found = schema.identity(conn)
            if known and found != known:
                raise StoreUnavailable(
                    f"{path} is not the database that {_lock_path(path)} belongs to: "
                    "restore the right file, or delete the lock file to accept this one"
                )
            if found is None:
                return schema.create(conn, now)
            had = schema.upgrade(conn)
    except sa.exc.DBAPIError as exc:
        raise StoreUnavailable(f"cannot open the database {path}: {exc.orig}") from exc
    if had < schema.VERSION:
        log.info("%s: schema %d brought to %d", path, had, schema.VERSION)
    return found


def _engine(path: Path) -> sa.Engine:
    # mode=rw: a reconnect must never make an empty file where the database has vanished.
    uri = f"file:{quote(str(path.absolute()))}?mode=rw"

    def connect() -> sqlite3.Connection:
        # isolation_level None: the driver starts no transactions of its own, which would
        # upgrade a read to a write half-way.
        connection = sqlite3.connect(uri, uri=True, isolation_level=None)
        try:
            _tune(connection)
        except BaseException:
            connection.close()
            raise
        return connection

    # orjson, which also reads what comes over the wire: 0.5 us a value instead of 5.
    engine = sa.create_engine(
        "sqlite://",
        creator=connect,
        poolclass=sa.pool.NullPool,
        json_serializer=lambda value: orjson.dumps(value).decode(),
        json_deserializer=orjson.loads,
    )

    @sa.event.listens_for(engine, "begin")
    def begin(conn: sa.Connection) -> None:
        conn.exec_driver_sql("BEGIN IMMEDIATE")

    return engine


def _tune(connection: sqlite3.Connection) -> None:
    for pragma in PRAGMAS:
        connection.execute(f"PRAGMA {pragma}")
    (mode,) = connection.execute("PRAGMA journal_mode=wal").fetchone()
    if mode != "wal":
        message = f"no write-ahead log on this file system (journal mode {mode})"
        raise sqlite3.OperationalError(message)
