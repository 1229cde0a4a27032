"""Connections to the Postgres of the pgvector index, and what its errors mean to the buffer.

A pool of our own, not `psycopg_pool`: that one connects in the background, again and again, so who
waits is told of a timeout after half a minute, and never that the password is wrong. Here who needs
a connection makes it, and meets the error.
"""

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any, TypeAlias, TypeVar

import psycopg
from pgvector.psycopg import register_vector_async
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from serve.index.errors import (
    BatchTooLarge,
    IndexFault,
    IndexOffline,
    IndexRetryable,
    RecordsRejected,
)


T = TypeVar("T")
Connection: TypeAlias = psycopg.AsyncConnection[tuple[Any, ...]]

VERSION_MIN = (0, 8)
"""Of the extension: the first with iterative scans, without which filters starve HNSW."""

EXTENSION_LOCK = 7_164_263
"""Key of the advisory lock under which one process makes what all share; the Store has two before."""

RETRY_AFTER_S = 1.0

REACH: dict[str, str | int] = {
    "application_name": "headrace",
    "connect_timeout": 10,
    "tcp_user_timeout": 15_000,
    "keepalives_idle": 5,
    "keepalives_interval": 5,
    "keepalives_count": 3,
}
"""Of libpq, where the URL does not say otherwise: a server that fell silent is lost after 15 to 20 s."""

SESSION = {"idle_in_transaction_session_timeout": 15_000, "lock_timeout": 10_000, "jit": "off"}
"""Of each session, likewise. Compiling a scan takes longer than most scans."""

TRANSIENT = ("08", "40", "53", "55", "57")
"""Classes of SQLSTATE that a repeat may cure: connection, lost race, resources, lock, shutdown."""

LASTING = ("53100", "57P04")
"""Of these classes, what a repeat does not cure: a full disk, a database that was dropped."""

SILENT = "25P03"
"""Not transient by its class: the server ended a session that held a transaction and did nothing."""

UNDEFINED_TABLE = "42P01"

REFUSED = ("authentication failed", "no pg_hba.conf entry", "does not exist", "permission denied")
FULL = ("too many", "connection slots")
"""Words of a failed connection, for which libpq gives no SQLSTATE."""


class Connections:
    """At most `size` connections, made when needed, kept when idle; each runs one work at a time.

    Sessions are autocommit. Statements are never prepared: a general plan does not know the limit of
    a query, takes it for a tenth of the table, and scans instead of using HNSW.
    """

    def __init__(self, url: str, *, size: int, statement_s_max: float) -> None:
        """Connects to nothing yet. Raises psycopg.ProgrammingError unless `url` is one of Postgres."""
        given = conninfo_to_dict(url)
        session = {**SESSION, "statement_timeout": int(statement_s_max * 1000)}
        # Of what is said twice the last counts: the URL goes before us.
        options = [f"-c {name}={value}" for name, value in session.items()]
        options.append(str(given.get("options") or ""))
        reach = {name: value for name, value in REACH.items() if name not in given}
        self._conninfo = make_conninfo(url, **reach, options=" ".join(options))
        self._size = size
        self._wait_s = statement_s_max
        self._places = asyncio.Semaphore(size)
        self._idle: list[Connection] = []

    async def run(self, work: Callable[[Connection], Awaitable[T]]) -> T:
        """Do `work` on a connection; once more when it was lost, so it must be safe to repeat.

        Raises psycopg.Error (TooManyConnections when all are busy for too long), IndexOffline.
        """
        try:
            async with asyncio.timeout(self._wait_s):
                await self._places.acquire()
        except TimeoutError:
            message = f"all {self._size} connections are busy"
            raise psycopg.errors.TooManyConnections(message) from None
        try:
            return await self._run(work)
        finally:
            self._places.release()

    async def _run(self, work: Callable[[Connection], Awaitable[T]]) -> T:
        while self._idle:
            connection = self._idle.pop()
            try:
                return await self._used(connection, work)
            except (psycopg.OperationalError, psycopg.InterfaceError):
                if not connection.closed:
                    raise
                await self.close()  # the others were lost with it
        return await self._used(await self.connect(), work)

    async def _used(self, connection: Connection, work: Callable[[Connection], Awaitable[T]]) -> T:
        try:
            return await work(connection)
        finally:
            status = connection.info.transaction_status
            if status == psycopg.pq.TransactionStatus.IDLE:
                self._idle.append(connection)
            else:  # lost, or given up in the middle
                await connection.close()

    async def connect(self) -> Connection:
        """A connection of the caller's own, ready for vectors. Raises psycopg.Error, IndexOffline."""
        connection = await psycopg.AsyncConnection.connect(
            self._conninfo, autocommit=True, prepare_threshold=None
        )
        try:
            await _prepare(connection)
        except BaseException:
            await connection.close()
            raise
        return connection

    async def close(self) -> None:
        """Close what is idle."""
        while self._idle:
            with suppress(psycopg.Error):
                await self._idle.pop().close()


async def _prepare(connection: Connection) -> None:
    version = await _version(connection)
    if version is None:
        async with connection.transaction():
            await connection.execute("SELECT pg_advisory_xact_lock(%s)", (EXTENSION_LOCK,))
            await connection.execute("CREATE EXTENSION IF NOT EXISTS vector")
        version = await _version(connection)
    if version is None or tuple(map(int, version.split(".")[:2])) < VERSION_MIN:
        wanted = ".".join(map(str, VERSION_MIN))
        raise IndexOffline(f"the extension vector is {version}, {wanted} or later is needed")
    await register_vector_async(connection)


async def _version(connection: Connection) -> str | None:
    found = await connection.execute("SELECT extversion FROM pg_extension WHERE extname = 'vector'")
    row = await found.fetchone()
    return None if row is None else str(row[0])


def fault(error: psycopg.Error) -> IndexFault:
    """What a failed write means, by the class of its SQLSTATE.

    Whatever does not speak of the rows or of the moment takes the index offline: a key that expired,
    a right that was taken away, a disk that is full must not bury records.
    """
    state, message = error.sqlstate, str(error)
    if state is None:
        return _unnumbered(error, message)
    if state[:2] in ("22", "23"):
        return RecordsRejected(message)
    if state[:2] == "54":
        return BatchTooLarge(message)
    passing = state[:2] in TRANSIENT and state not in LASTING
    if passing or state in (SILENT, UNDEFINED_TABLE):
        return IndexRetryable(message, retry_after_s=RETRY_AFTER_S)
    return IndexOffline(message)


def _unnumbered(error: psycopg.Error, message: str) -> IndexFault:
    """Of psycopg itself, or of a connection that was not made."""
    if isinstance(error, psycopg.DataError):
        return RecordsRejected(message)
    full = any(words in message for words in FULL)
    refused = any(words in message for words in REFUSED)
    failed = error.pgconn
    # The server's words may be of any language; that it asked for a password is a fact.
    asked = failed is not None and bool(failed.used_password or failed.needs_password)
    if (refused or asked) and not full:
        return IndexOffline(message)
    return IndexRetryable(message, retry_after_s=RETRY_AFTER_S)
