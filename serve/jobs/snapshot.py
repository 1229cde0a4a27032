"""The Store's SQLite file as of one moment, while its owner goes on.

The connection is for reading only: it takes no part in what can corrupt a write-ahead log
(`serve.jobs.sqlite`), and is not the owner. While it is open the log grows.
"""

import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from urllib.parse import quote

from serve.errors import StoreUnavailable


BUSY_S = 30.0


@contextmanager
def snapshot(path: Path) -> Iterator[sqlite3.Connection]:
    """What the file held when this was entered, whatever is committed meanwhile.

    Raises StoreUnavailable: no such file, or it cannot be read.
    """
    try:
        opened = sqlite3.connect(
            f"file:{quote(str(path.absolute()))}?mode=ro",
            uri=True,
            isolation_level=None,
            timeout=BUSY_S,
        )
        with closing(opened) as conn:
            conn.execute("BEGIN")
            conn.execute("SELECT version FROM store").fetchone()  # the moment: a BEGIN waits for it
            yield conn
    except sqlite3.Error as error:
        raise StoreUnavailable(f"{path} cannot be read: {error}") from error


def copy(conn: sqlite3.Connection, target: Path) -> None:
    """Write a snapshot into a new file, and check it. Raises StoreUnavailable."""
    with closing(sqlite3.connect(target)) as made:
        conn.backup(made)
        (found,) = made.execute("PRAGMA integrity_check").fetchone()
    if found != "ok":
        raise StoreUnavailable(f"the copy {target} is damaged: {found}")
