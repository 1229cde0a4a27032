"""Where usage events go: lines of JSON on stderr, or in files of a folder. `serve.admission.metering` makes them."""

import logging
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from serve.admission.metering import Sink
from serve.config import Settings, UsageEvents


LOGGER = "headrace.usage.events"
"""Whose lines are events and nothing else."""

SUFFIX = ".jsonl"
HOUR = "%Y-%m-%dT%H"
DAY_S = 86_400.0

log = logging.getLogger("headrace.usage")


def open_sink(settings: Settings, name: str) -> Sink | None:
    """What the settings ask for; None: nothing. `name` is this process's own for ever."""
    wanted = settings.usage_events
    if wanted.sink == "none":
        return None
    if wanted.sink == "stderr":
        return on_stderr()
    return UsageFolder(Path(settings.data_dir) / wanted.folder, wanted, name, time.time)


def on_stderr() -> Sink:
    """A line each, as it is, whatever the settings of the log say."""
    logger = logging.getLogger(LOGGER)
    logger.handlers = [logging.StreamHandler()]
    logger.setLevel(logging.INFO)
    logger.propagate = False

    def write(lines: Sequence[bytes]) -> None:
        for line in lines:
            logger.info("%s", line.decode())

    return write


class UsageFolder:
    """Appends to a file for each hour (UTC) and process: `2026-12-01T09-NAME.jsonl`.

    Each is opened and closed again, so whoever ships them may move or delete them at any time. Nothing
    waits for the disk: what a crash of the machine takes is up to its file system.
    """

    def __init__(
        self, folder: Path, rule: UsageEvents, name: str, wall: Callable[[], float]
    ) -> None:
        self._folder = folder
        self._rule = rule
        self._name = re.sub(r"[^A-Za-z0-9._]", "-", name)
        self._wall = wall
        self._path: Path | None = None
        self._torn = False

    def __call__(self, lines: Sequence[bytes]) -> None:
        """Append lines. Raises OSError; some may stand there then, and half a line."""
        now = self._wall()
        path = self._folder / f"{time.strftime(HOUR, time.gmtime(now))}-{self._name}{SUFFIX}"
        if path != self._path:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._tidy(now)
            self._path = path
        whole = b"".join(line + b"\n" for line in lines)
        try:
            with path.open("ab") as file:
                file.write(b"\n" + whole if self._torn else whole)
        except OSError:
            self._torn, self._path = True, None
            raise
        self._torn = False

    def _tidy(self, now: float) -> None:
        """Delete what is too old, then the oldest until the rest is small enough."""
        files = sorted(self._sizes())
        size = sum(each for _, each in files)
        oldest = time.strftime(HOUR, time.gmtime(now - self._rule.keep_days * DAY_S))
        for path, each in files:
            if path.name >= oldest and size <= self._rule.bytes_max:
                break
            if path.name >= oldest:
                log.error("%s is deleted: usage_events.bytes_max is reached", path)
            path.unlink(missing_ok=True)
            size -= each

    def _sizes(self) -> Iterator[tuple[Path, int]]:
        for path in self._folder.glob(f"*{SUFFIX}"):
            with suppress(FileNotFoundError):  # somebody else was quicker
                yield path, path.stat().st_size
