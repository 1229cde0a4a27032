"""A file of JSON lines, checked as it comes, a piece at a time: whatever its lines are. No I/O."""

from abc import ABC, abstractmethod
from typing import Any

from serve.config import Settings
from serve.errors import ServiceError


FAULTS_MAX = 50
"""Faults of a file that are told: they travel with the job. Reading ends there."""


def input_blob(job_id: str) -> str:
    """The blob of a job's file as it was when the job was made: the file may go meanwhile."""
    return f"{job_id}/input"


class Sheet(ABC):
    """Cuts a file into lines and notes what is wrong with them.

    `feed` and `close` are slow: for a thread. Of `faults` each is `{code, message, param, line}`.
    """

    def __init__(self, settings: Settings) -> None:
        self.faults: list[dict[str, Any]] = []
        self._settings = settings
        self._rest = b""
        self._start = 0
        self._line = 0
        self._whole = True

    @property
    @abstractmethod
    def count(self) -> int:
        """Lines that are right."""

    @abstractmethod
    def _enter(self, raw: bytes, start: int) -> None:
        """Take in one line, which begins at byte `start`. Raises ServiceError."""

    @property
    def stopped(self) -> bool:
        """Whether there is no use in reading on."""
        return not self._whole or len(self.faults) >= FAULTS_MAX

    def feed(self, piece: bytes) -> None:
        """The next bytes of the file."""
        *lines, self._rest = (self._rest + piece).split(b"\n")
        for raw in lines:
            self._check(raw, len(raw) + 1)
            if self.stopped:
                return
        if len(self._rest) > self._settings.limits.body_bytes_max:
            self._line += 1
            self._stop("line_too_long", "The line is longer than a request may be.")

    def close(self) -> None:
        """That was the last piece."""
        if self.stopped:
            return
        if self._rest:
            self._check(self._rest, len(self._rest))
        if not self.count and not self.faults:
            self._fault(None, "empty_file", "The file has no requests.")

    def _check(self, raw: bytes, length: int) -> None:
        start = self._start
        self._start += length
        self._line += 1
        if not raw.strip():
            return
        try:
            self._enter(raw, start)
        except ServiceError as error:
            self._fault(self._line, error.code, error.message, error.param)

    def _stop(self, code: str, message: str) -> None:
        """Note a fault after which the rest is not looked at."""
        self._whole = False
        self._fault(self._line, code, message)

    def _fault(self, line: int | None, code: str, message: str, param: str | None = None) -> None:
        self.faults.append({"code": code, "message": message, "param": param, "line": line})
