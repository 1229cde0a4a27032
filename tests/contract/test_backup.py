"""`headrace backup` while writes go on: the copy starts, and has all that was acknowledged before."""

import asyncio
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from click.testing import CliRunner

from deployments import backup as module
from deployments.backup import backup
from deployments.cli import main
from deployments.places import PlaceError
from serve.config import Index as IndexSettings
from serve.config import Settings, Store
from serve.content.blobs import LocalBlobs
from serve.errors import StoreUnavailable
from serve.index.lance_backup import Torn, rewind
from serve.index.lancedb import LanceIndex
from serve.jobs.owner import StoreOwner
from serve.records import CollectionSpec
from tests.contract.busy import UUID, Busy, check_restored, record


HASTY = IndexSettings(compact_commits=5, keep_versions_s=20)
"""Compacts all the time. Old versions must outlive the way from the Store's moment to the index's links,
which takes seconds here on a busy machine.
"""


def settings(folder: Path) -> Settings:
    return Settings(index=HASTY).under(folder)


def opened(folder: Path) -> tuple[StoreOwner, LanceIndex]:
    store = StoreOwner(folder / "store.db", Store(), time.time)
    return store, LanceIndex(str(folder / "index"), HASTY)


def blobs_of(folder: Path) -> LocalBlobs:
    return LocalBlobs(folder / settings(folder).files.folder)


async def lines():
    yield b"lines"


@contextmanager
def later(linked, busy: Busy) -> Iterator[Path]:
    """More is written between the moment of the Store and that at which the index is linked."""
    busy.go_on(10)
    with linked as links:
        yield links


async def test_what_was_acknowledged_before_is_there_and_writes_go_on(tmp_path, monkeypatch):
    data, kept = tmp_path / "data", tmp_path / "kept"
    busy = Busy(*opened(data))
    real = module._linked
    monkeypatch.setattr(module, "_linked", lambda folder: later(real(folder), busy))
    await blobs_of(data).put("job/in", lines())
    writing = await busy.begin()
    await asyncio.to_thread(busy.go_on, 20)
    vectors, documents = dict(busy.vectors), list(busy.documents)
    made = await asyncio.to_thread(backup, settings(data), kept)
    await asyncio.to_thread(busy.go_on, 5)
    await busy.end(writing)
    assert not list(data.glob(".*.backup"))
    assert made.records is not None
    assert made.records >= len(vectors)

    assert [part async for part in blobs_of(kept).stream("job/in")] == [b"lines"]
    store, index = opened(kept)
    await check_restored(store, index, vectors, documents)
    await index.aclose()
    store.close()


async def test_a_copy_that_lacks_a_file_is_not_taken_for_one(tmp_path):
    index = LanceIndex(str(tmp_path), HASTY)
    await index.ensure(CollectionSpec(UUID, 4))
    await index.upsert(UUID, [record("a", 1)])
    await index.aclose()
    for data in list((tmp_path / f"{UUID}.lance" / "data").iterdir()):
        data.unlink()
    with pytest.raises(Torn, match=UUID):
        await rewind(tmp_path, time.time())


async def test_a_table_that_is_younger_than_the_moment_goes(tmp_path):
    index = LanceIndex(str(tmp_path), HASTY)
    await index.ensure(CollectionSpec(UUID, 4))
    await index.aclose()
    assert await rewind(tmp_path, 0.0) == 0
    assert not list(tmp_path.glob("*.lance"))


async def test_a_table_whose_version_of_the_moment_is_gone_is_no_younger_one(tmp_path):
    forgetful = IndexSettings(compact_commits=2).model_copy(update={"keep_versions_s": 0.001})
    index = LanceIndex(str(tmp_path), forgetful)
    await index.ensure(CollectionSpec(UUID, 4))
    then = time.time()
    for number in range(4):
        await index.upsert(UUID, [record("a", number + 1)])
        await index.maintain()
    await index.aclose()
    with pytest.raises(Torn, match="removed before"):
        await rewind(tmp_path, then)


def test_what_cannot_be_copied_is_said(tmp_path):
    with pytest.raises(StoreUnavailable, match="cannot be read"):
        backup(settings(tmp_path / "nothing"), tmp_path / "kept")
    assert not (tmp_path / "kept").exists()
    on_postgres = Settings(store={"url_env": "HEADRACE_STORE_URL"}).under(tmp_path)
    with pytest.raises(PlaceError, match="pg_dump"):
        backup(on_postgres, tmp_path / "kept")
    elsewhere = Settings(index={"uri": "/elsewhere"}).under(tmp_path)
    with pytest.raises(PlaceError, match="snapshot of the volumes"):
        backup(elsewhere, tmp_path / "kept")


def test_the_command_makes_a_folder_once_and_no_two_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setenv("HEADRACE_DATA_DIR", str(tmp_path / "data"))
    StoreOwner(tmp_path / "data" / "store.db", Store(), time.time).close()

    def run(name: str):
        return CliRunner().invoke(main, ["backup", str(tmp_path / name)])

    first = run("kept")
    assert first.exit_code == 0, first.output
    assert "0 records were read back" in first.output
    again = run("kept")
    assert again.exit_code == 1
    assert "is there already" in again.output
    (tmp_path / "data" / ".index.backup").mkdir()
    left = run("other")
    assert left.exit_code == 1
    assert "another backup runs" in left.output
