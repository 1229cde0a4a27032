"""Where a LanceDB database is, a folder or an object store, and what its failures mean.

In an object store a commit is one put that must fail when its name is taken: so two writers cannot
overwrite each other, where the store honours `If-None-Match`. Readers look for new versions of a
table every `read_s` only, since each look is a request.
"""

import asyncio
import importlib
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING

from serve.config.index import Lance
from serve.errors import IndexUnavailable
from serve.index.errors import IndexOffline, IndexRetryable, RecordsRejected


if TYPE_CHECKING:
    import lancedb

RETRY_AFTER_S = 1.0
MISSING = ("Not found", "was not found")
OFFLINE = (
    "Unable to create",
    "No space left",
    "Permission denied",
    "Read-only file system",
    # of an object store: its own words, as it answers 403 and 404
    "AccessDenied",
    "InvalidAccessKeyId",
    "SignatureDoesNotMatch",
    "NoSuchBucket",
    "AuthenticationFailed",
    "ContainerNotFound",
)


class Place:
    """One database. Connects on first use; imports LanceDB then, in a thread.

    Attributes:
        lag_s: how long a reader may see an old version; 0: it looks at each read.
    """

    def __init__(self, uri: str, storage: Mapping[str, str], settings: Lance) -> None:
        self.lag_s = settings.read_s if "://" in uri else 0.0
        self._caches = settings.index_cache_bytes, settings.metadata_cache_bytes
        self._uri = uri
        self._storage = dict(storage)
        self._connection: lancedb.AsyncConnection | None = None
        self._connecting = asyncio.Lock()

    async def database(self) -> "lancedb.AsyncConnection":
        """The connection, made now if need be."""
        async with self._connecting:
            if self._connection is None:
                lancedb = await asyncio.to_thread(importlib.import_module, "lancedb")
                with not_of_records():
                    self._connection = await lancedb.connect_async(
                        self._uri,
                        read_consistency_interval=timedelta(seconds=self.lag_s),
                        storage_options=self._storage or None,
                        session=lancedb.Session(*self._caches),  # 6 and 1 GB by default
                    )
            return self._connection

    def close(self) -> None:
        """A later call would connect again."""
        if self._connection is not None:
            self._connection.close()  # type: ignore[no-untyped-call]
            self._connection = None


def says_missing(error: Exception) -> bool:
    """Whether a table, or a file of an old version of it, was not there."""
    return _says(error, MISSING) and not _says(error, OFFLINE)


def _says(error: Exception, words: Iterable[str]) -> bool:
    # Lance raises RuntimeError and ValueError for everything: only the text tells.
    return any(word in str(error) for word in words)


@contextmanager
def not_of_records() -> Iterator[None]:
    """Where no record is concerned a ValueError, as of a store that does not answer, is an OSError."""
    try:
        yield
    except ValueError as error:
        raise OSError(str(error)) from error


@asynccontextmanager
async def reading() -> AsyncIterator[None]:
    """Turns what Lance raises into IndexUnavailable."""
    try:
        yield
    except (RuntimeError, OSError) as error:
        raise IndexUnavailable("The index cannot be read.", retry_after_s=1) from error


def write_fault(error: Exception) -> IndexOffline | IndexRetryable | RecordsRejected:
    """What the buffer decides on, for what Lance raised."""
    if _says(error, OFFLINE):
        return IndexOffline(str(error))
    if isinstance(error, RuntimeError | OSError):
        return IndexRetryable(str(error), retry_after_s=RETRY_AFTER_S)
    return RecordsRejected(str(error))
