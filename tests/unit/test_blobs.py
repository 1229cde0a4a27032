import asyncio
import hashlib
import os
import threading
from contextlib import aclosing

import pytest

from serve.content import blobs as module
from serve.content.blobs import PIECE_BYTES, LocalBlobs
from serve.errors import NotFound, StoreUnavailable, TooLarge


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "blobs"


@pytest.fixture
def blobs(folder):
    return LocalBlobs(folder)


async def pieces(*some):
    for piece in some:
        yield piece


def files(folder):
    return sorted(
        path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()
    )


async def whole(blobs, name, *span):
    return b"".join([piece async for piece in blobs.stream(name, *span)])


async def test_what_is_put_is_read_in_whole_and_in_part(blobs, folder):
    put = await blobs.put("file-1", pieces(b"head", b"", b"race"))
    assert (put.size, put.sha256) == (8, hashlib.sha256(b"headrace").hexdigest())
    assert await whole(blobs, "file-1") == b"headrace"
    assert await whole(blobs, "file-1", 2, 6) == b"adra"
    assert await blobs.read("file-1", [(4, 4), (0, 1), (6, 99)]) == [b"race", b"h", b"ce"]
    assert files(folder) == ["file-1"]


async def test_a_large_blob_is_streamed_in_pieces(blobs):
    data = os.urandom(2 * PIECE_BYTES + 5)
    await blobs.put(
        "large", pieces(*(data[at : at + 65_536] for at in range(0, len(data), 65_536)))
    )
    sizes = [len(piece) async for piece in blobs.stream("large")]
    assert sizes == [PIECE_BYTES, PIECE_BYTES, 5]
    assert await whole(blobs, "large") == data
    assert await whole(blobs, "large", 7, PIECE_BYTES + 9) == data[7 : PIECE_BYTES + 9]


async def test_nothing_is_hashed_on_the_event_loop(blobs, monkeypatch):
    real, threads = hashlib.sha256(), set()

    class Watched:
        def update(self, piece):
            threads.add(threading.current_thread())
            real.update(piece)

        def hexdigest(self):
            return real.hexdigest()

    monkeypatch.setattr(module.hashlib, "sha256", Watched)
    put = await blobs.put("large", pieces(b"x" * PIECE_BYTES, b"y"))
    monkeypatch.undo()
    assert put.sha256 == hashlib.sha256(b"x" * PIECE_BYTES + b"y").hexdigest()
    assert threads
    assert threading.current_thread() not in threads


async def test_a_blob_is_replaced_as_a_whole(blobs):
    await blobs.put("file-1", pieces(b"first"))

    async def second():
        yield b"2nd"
        assert await whole(blobs, "file-1") == b"first"

    await blobs.put("file-1", second())
    assert await whole(blobs, "file-1") == b"2nd"


async def test_too_much_leaves_nothing(blobs, folder):
    with pytest.raises(TooLarge):
        await blobs.put("file-1", pieces(b"1234", b"5"), bytes_max=4)
    assert (await blobs.put("file-2", pieces(b"1234"), bytes_max=4)).size == 4
    assert files(folder) == ["file-2"]


async def test_a_writer_that_fails_or_leaves_leaves_nothing(blobs, folder):
    async def broken():
        yield b"x" * PIECE_BYTES
        raise ConnectionError

    with pytest.raises(ConnectionError):
        await blobs.put("file-1", broken())
    begun = asyncio.Event()

    async def endless():
        while True:
            yield b"x" * PIECE_BYTES
            begun.set()
            await asyncio.Event().wait()

    writing = asyncio.create_task(blobs.put("file-1", endless()))
    await begun.wait()
    writing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await writing
    assert files(folder) == []


async def test_what_is_not_there_is_not_found(blobs):
    with pytest.raises(NotFound):
        await anext(blobs.stream("file-1"))
    with pytest.raises(NotFound):
        await blobs.read("file-1", [(0, 1)])
    with pytest.raises(NotFound):
        await blobs.copy("file-1", "job_1/input")
    await blobs.delete("file-1")
    await blobs.delete_all("job_1")


async def test_a_copy_outlives_its_original(blobs, folder):
    await blobs.put("file-1", pieces(b"kept"))
    await blobs.copy("file-1", "job_1/input")
    await blobs.copy("file-1", "job_1/input")
    await blobs.delete("file-1")
    assert await whole(blobs, "job_1/input") == b"kept"
    await blobs.put("job_1/ab", pieces(b"more"))
    await blobs.put("job_2/ab", pieces(b"other"))
    await blobs.delete_all("job_1")
    assert files(folder) == ["job_2/ab"]


async def test_what_is_deleted_while_it_is_read_is_not_found(blobs):
    await blobs.put("file-1", pieces(b"x" * (PIECE_BYTES + 1)))
    async with aclosing(blobs.stream("file-1")) as reading:
        await anext(reading)
        await blobs.delete("file-1")
        with pytest.raises(NotFound):
            await anext(reading)


@pytest.mark.parametrize(
    "name", ["", ".", "..", "../x", "/etc", "a/../b", "a/b/c", "a\n", "partial/x"]
)
async def test_no_other_path_is_a_name(blobs, name):
    with pytest.raises(ValueError, match="not the name"):
        await blobs.delete(name)


async def test_the_sweep_takes_what_is_old(blobs, folder):
    for name in ("old", "new", "job_1/a"):
        await blobs.put(name, pieces(b"x"))
    partial = folder / "partial"
    for path, at in (("old", 99), ("new", 100), ("job_1/a", 1), ("job_1", 1)):
        os.utime(folder / path, (at, at))
    for name, at in (("left", 199), ("begun", 200)):
        (partial / name).write_bytes(b"x")
        os.utime(partial / name, (at, at))
    assert await blobs.sweep(100, 200) == 1
    assert files(folder) == ["job_1/a", "new", "partial/begun"]
    assert await LocalBlobs(folder / "none").sweep(100, 200) == 0
    await blobs.put("more", pieces(b"x"))


async def test_a_folder_is_as_old_as_what_happened_there_last(blobs, folder):
    assert await blobs.folders() == {}
    for name in ("file-1", "job_1/a", "job_1/b", "job_2/a"):
        await blobs.put(name, pieces(b"x"))
    (folder / "lost+found").mkdir()
    os.utime(folder / "job_2" / "a", (50, 50))  # a copy of an old file
    for path, at in (("job_1", 199), ("job_2", 200)):
        os.utime(folder / path, (at, at))
    assert await blobs.folders() == {"job_1": 199, "job_2": 200}
    await blobs.delete("job_1/a")
    assert (await blobs.folders())["job_1"] > 200


async def test_a_full_disk_is_ours_to_mend(blobs, monkeypatch, caplog):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "_append", full)
    with pytest.raises(StoreUnavailable, match="No space left"):
        await blobs.put("file-1", pieces(b"x"))
    assert "disk failed" in caplog.text
