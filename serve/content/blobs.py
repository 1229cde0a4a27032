"""Bytes that are too many for the Store: files of tenants, and parts of them on their way.

A blob has a name of ours, `PART` or `PART/PART`, never a path that a user wrote. It appears whole or
not at all, and is never changed, only replaced. Blocking work runs in threads.
"""

import asyncio
import hashlib
import logging
import os
import re
import shutil
import uuid
from collections.abc import AsyncIterable, AsyncIterator, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import ParamSpec, TypeVar

from serve.errors import NotFound, StoreUnavailable, TooLarge


P = ParamSpec("P")
T = TypeVar("T")

PIECE_BYTES = 2**20
"""Read or written at once: a trip to a thread costs about as much as writing 100 KB."""

PARTIAL = "partial"
"""Folder of what is being written; no blob has this name."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*(/[A-Za-z0-9][A-Za-z0-9_-]*)?")

log = logging.getLogger("headrace.blobs")


@dataclass(frozen=True, slots=True)
class Put:
    """What was written: its size, and its SHA-256 in hex."""

    size: int
    sha256: str


class LocalBlobs:
    """Blobs as files below one folder, which all processes of the service see.

    Calls raise NotFound where there is no such blob, StoreUnavailable when the disk fails or is full.
    """

    def __init__(self, folder: Path) -> None:
        """The folder is made with the first blob."""
        self._folder = folder

    async def put(
        self, name: str, pieces: AsyncIterable[bytes], *, bytes_max: int | None = None
    ) -> Put:
        """Write a blob, durably; one of this name is replaced. Raises TooLarge above `bytes_max`."""
        path, partial = self._path(name), self._folder / PARTIAL / uuid.uuid4().hex
        digest, size = hashlib.sha256(), 0
        await _in_thread(_begin, partial)
        try:
            async for part in _gathered(pieces):
                size += len(part)
                _check(size, bytes_max)
                await _in_thread(_append, partial, part, digest.update)
            await _in_thread(_finish, partial, path)
        except BaseException:
            with suppress(OSError):
                partial.unlink(missing_ok=True)
            raise
        return Put(size, digest.hexdigest())

    async def read(self, name: str, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        """Parts of a blob, each by its start and length; shorter where the blob ends."""
        return await _in_thread(_read, self._path(name), ranges)

    async def stream(
        self, name: str, start: int = 0, stop: int | None = None
    ) -> AsyncIterator[bytes]:
        """A blob's bytes from `start` to before `stop`, a piece at a time.

        Raises NotFound before the first piece, or in the midst of it when the blob is deleted
        meanwhile.
        """
        path = self._path(name)
        while stop is None or start < stop:
            most = PIECE_BYTES if stop is None else min(PIECE_BYTES, stop - start)
            # Opened for each piece: 20 us, and there is no file that a cancelled reader leaves open.
            [piece] = await _in_thread(_read, path, [(start, most)])
            if not piece:
                return
            start += len(piece)
            yield piece

    async def copy(self, name: str, to: str) -> None:
        """The same bytes under another name, too; a repeat changes nothing."""
        await _in_thread(_link, self._path(name), self._path(to))

    async def delete(self, name: str) -> None:
        """Remove a blob; no error when there is none."""
        await _in_thread(self._path(name).unlink, missing_ok=True)

    async def delete_all(self, part: str) -> None:
        """Remove every blob whose name begins with `part` and a slash."""
        await _in_thread(_remove, self._path(part))

    async def folders(self) -> dict[str, float]:
        """First parts of the names of two, with the epoch time of the last write or delete there."""
        return await _in_thread(_folders, self._folder)

    async def sweep(self, before: float, partial_before: float) -> int:
        """Remove blobs of one part that nobody has deleted; returns how many.

        Those that were written before that epoch time, and what was never written to its end.
        """
        return await _in_thread(_sweep, self._folder, before, partial_before)

    def _path(self, name: str) -> Path:
        if not _NAME.fullmatch(name) or name.partition("/")[0] == PARTIAL:
            message = f"not the name of a blob: {name!r}"
            raise ValueError(message)
        return self._folder / name


async def _in_thread(work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Raises NotFound, StoreUnavailable in place of the system's errors."""
    try:
        return await asyncio.to_thread(work, *args, **kwargs)
    except FileNotFoundError:
        raise NotFound("These bytes are not kept any more.") from None
    except OSError as error:
        log.exception("the blobs' disk failed")
        raise StoreUnavailable(f"The blobs' disk failed: {error.strerror}.") from None


def _check(size: int, bytes_max: int | None) -> None:
    if bytes_max is not None and size > bytes_max:
        raise TooLarge(f"The file exceeds {bytes_max} bytes.", param="file")


async def _gathered(pieces: AsyncIterable[bytes]) -> AsyncIterator[bytes]:
    """The same bytes in pieces of at least `PIECE_BYTES`, but for the last."""
    waiting: list[bytes] = []
    size = 0
    async for piece in pieces:
        waiting.append(piece)
        size += len(piece)
        if size >= PIECE_BYTES:
            yield b"".join(waiting)
            waiting, size = [], 0
    if size:
        yield b"".join(waiting)


def _begin(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch(exist_ok=False)


def _append(path: Path, piece: bytes, seen: Callable[[bytes], None]) -> None:
    """`seen` is given the piece here, off the event loop: to hash 1 MB takes milliseconds."""
    # Opened for each piece: whoever cancels a `put` must not close a file that a thread writes to.
    with path.open("r+b") as file:
        file.seek(0, os.SEEK_END)
        file.write(piece)
    seen(piece)


def _finish(partial: Path, path: Path) -> None:
    with partial.open("r+b") as file:
        os.fsync(file.fileno())
    path.parent.mkdir(parents=True, exist_ok=True)
    partial.replace(path)
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    """Make names in it survive a loss of power."""
    number = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def _read(path: Path, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
    with path.open("rb") as file:
        return [os.pread(file.fileno(), length, start) for start, length in ranges]


def _link(path: Path, to: Path) -> None:
    to.parent.mkdir(parents=True, exist_ok=True)
    with suppress(FileExistsError):
        to.hardlink_to(path)
    _sync_folder(to.parent)


def _remove(folder: Path) -> None:
    with suppress(FileNotFoundError):
        shutil.rmtree(folder)


def _folders(folder: Path) -> dict[str, float]:
    found: dict[str, float] = {}
    for path in folder.glob("*"):
        with suppress(FileNotFoundError):
            if path.is_dir() and path.name != PARTIAL and _NAME.fullmatch(path.name):
                found[path.name] = path.stat().st_mtime
    return found


def _sweep(folder: Path, before: float, partial_before: float) -> int:
    """Others may remove the same at the same time."""
    count = 0
    for pattern, then in (("*", before), (f"{PARTIAL}/*", partial_before)):
        for path in folder.glob(pattern):
            with suppress(FileNotFoundError):
                if path.is_file() and path.stat().st_mtime < then:
                    path.unlink()
                    count += pattern == "*"
    return count
