"""Copies what is durable under `data_dir` while the service runs: all of it as of one moment.

At that moment the Store gets a reader, and index and files get a second name for each of their files, which
takes milliseconds: both are made of files that never change. All of that is copied then, and the copied index
is brought to the moment, since of what it was given later the Store's copy knows nothing.
"""

import asyncio
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from deployments.places import PlaceError
from deployments.vaults import KEY_FILE
from serve.config import Settings
from serve.content.blobs import PARTIAL
from serve.index.lance_backup import HINT, VERSIONS, Torn, rewind
from serve.jobs.snapshot import copy, snapshot


TRIES = 5
"""How often a table is linked again that was compacted meanwhile."""


@dataclass(frozen=True, slots=True)
class Backup:
    """What was copied: the moment, in epoch seconds; records of the index, None where it is no folder here."""

    at: float
    records: int | None


def backup(settings: Settings, target: Path) -> Backup:
    """Into a new folder, which can be taken for a `data_dir`. `settings.data_dir` is absolute.

    What is there under the name of the target was copied whole. Raises PlaceError, StoreUnavailable.
    """
    if settings.store.url_env:
        raise PlaceError("the Store is on Postgres: pg_dump copies it")
    source = Path(settings.data_dir)
    here = settings.index.backend == "lancedb" and not settings.index.remote
    for name in (settings.store.path, settings.files.folder, *([settings.index.uri] * here)):
        if Path(name).is_absolute():
            raise PlaceError(f"{name} is not under data_dir: take a snapshot of the volumes")
    if target.exists():
        raise PlaceError(f"{target} is there already")
    try:
        with _whole(target) as partial:
            return _copied(settings, source, partial, index=here)
    except OSError as error:
        raise PlaceError(f"{error.filename or target}: {error.strerror}") from error
    except Torn as error:
        raise PlaceError(f"the index changed too fast, try again: {error}") from error


@contextmanager
def _whole(target: Path) -> Iterator[Path]:
    """A folder that gets this name when it is complete, or else goes."""
    partial = target.with_name(f"{target.name}.partial")
    partial.mkdir(parents=True)
    try:
        yield partial
        _sync(partial)
        partial.rename(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _copied(settings: Settings, source: Path, target: Path, *, index: bool) -> Backup:
    with ExitStack() as stack:
        conn = stack.enter_context(snapshot(source / settings.store.path))
        at = time.time()
        names = [settings.files.folder, *([settings.index.uri] * index)]
        linked = {name: stack.enter_context(_linked(source / name)) for name in names}
        store = target / settings.store.path
        store.parent.mkdir(parents=True, exist_ok=True)
        copy(conn, store)
        for name, folder in linked.items():
            shutil.copytree(folder, target / name)
    if (key := source / KEY_FILE).exists():
        shutil.copy2(key, target / KEY_FILE)
    records = asyncio.run(rewind(target / settings.index.uri, at)) if index else None
    return Backup(at, records)


@contextmanager
def _linked(folder: Path) -> Iterator[Path]:
    """Its files under a second name, beside it."""
    links = folder.with_name(f".{folder.name}.backup")
    if links.exists():
        raise PlaceError(f"{links}: another backup runs; if none does, remove it")
    links.mkdir(parents=True)
    try:
        for part in sorted(folder.iterdir()) if folder.exists() else ():
            if part.name != PARTIAL:
                _link(part, links / part.name)
        yield links
    finally:
        shutil.rmtree(links)


def _link(source: Path, links: Path) -> None:
    """Manifests first: what they name was there before them. Raises Torn."""
    if source.is_file():
        with suppress(FileNotFoundError):  # a file that was just deleted
            links.hardlink_to(source)
        return
    for _ in range(TRIES):
        try:
            if (source / VERSIONS).exists():
                shutil.copytree(
                    source / VERSIONS, links / VERSIONS, copy_function=os.link, ignore=_ignored
                )
            shutil.copytree(
                source, links, copy_function=_link_once, dirs_exist_ok=True, ignore=_ignored
            )
        except (shutil.Error, FileNotFoundError):  # it was compacted, or dropped
            shutil.rmtree(links, ignore_errors=True)
            if not source.exists():
                return
        else:
            return
    raise Torn(source.name)


def _ignored(_folder: str, names: list[str]) -> set[str]:
    return {HINT} & set(names)


def _link_once(source: str, links: str) -> None:
    """Of a manifest that came after the first look, nothing is linked."""
    if Path(source).parent.name != VERSIONS:
        Path(links).hardlink_to(source)


def _sync(folder: Path) -> None:
    """All of it is on the disk."""
    for path in (*folder.rglob("*"), folder):
        number = os.open(path, os.O_RDONLY)
        try:
            os.fsync(number)
        finally:
            os.close(number)
