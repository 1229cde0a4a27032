"""Log lines as JSON, each with the ids of the request and of the trace that it belongs to."""

import logging
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Any

import orjson

from serve import tracing


REQUEST: ContextVar[str] = ContextVar("request", default="")
"""The id of the request that is worked on here, also in the tasks that it makes."""

LOGGERS = ("headrace", "serve")
"""Whose lines are ours; what Ray and other libraries say goes where it went."""


class JsonLines(logging.Formatter):
    """One object a line. Text of users, vectors and keys are not logged, so none are here."""

    def __init__(self, process: str) -> None:
        super().__init__()
        self._process = process

    def format(self, record: logging.LogRecord) -> str:
        """Fields that have no value are left out."""
        at = datetime.fromtimestamp(record.created, UTC)
        told: dict[str, Any] = {
            "time": at.isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "process": self._process,
            "message": record.getMessage(),
        }
        if request := REQUEST.get():
            told["request_id"] = request
        if here := tracing.carrier():
            _, told["trace_id"], told["span_id"], _ = here.split("-")
        if record.exc_info:
            told["error"] = self.formatException(record.exc_info)
        return orjson.dumps(told).decode()


def relevel(level: str) -> None:
    """Write our lines of this level and above from now on, where they are JSON."""
    for name in LOGGERS:
        logger = logging.getLogger(name)
        if any(isinstance(handler.formatter, JsonLines) for handler in logger.handlers):
            logger.setLevel(level)


def begin(process: str, level: str) -> None:
    """Write our lines of this level and above as JSON to stderr; a second call changes nothing else."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonLines(process))
    for name in LOGGERS:
        logger = logging.getLogger(name)
        logger.handlers = [handler]
        logger.setLevel(level)
        logger.propagate = False
