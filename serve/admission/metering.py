"""What each key used, as events that a billing or analytics pipeline reads: CloudEvents, added up over some
seconds by key, class, operation, model and outcome. `usage` counts the same for the Store.

An event's id names its interval and its row, so one that is written again, by us or on its way, is known
again. Form: https://github.com/cloudevents/spec/blob/v1.0.2/cloudevents/formats/json-format.md
"""

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Literal, NamedTuple
from urllib.parse import quote

import orjson

from serve.records import Klass


OPERATION: ContextVar[str] = ContextVar("operation", default="other")
"""What is charged here: an operation of our OpenAPI, or `job_KIND` of what a worker does for a job."""

TYPE = "io.headrace.usage"

ROWS_MAX = 10_000
"""Rows of one interval; it ends early when it has so many."""

INTERVALS_MAX = 8
"""Ended intervals that wait to be written, as `SESSIONS_MAX` of days; beyond it the oldest is lost."""

Outcome = Literal["charged", "refused", "refunded"]
"""`refused` by a limit; `refunded`: not answered, by our fault or since the client left."""

Sink = Callable[[Sequence[bytes]], None]
"""Writes events, one JSON object each. May block. Raises OSError; then they are written again."""

log = logging.getLogger("headrace.usage")


class Row(NamedTuple):
    """What is added up. `month` is the one whose usage it is, as `2026-11`; `model` is empty where none was
    used or it was not known yet.
    """

    month: str
    tenant: str
    key: str
    klass: Klass
    operation: str
    model: str
    outcome: Outcome


@dataclass(slots=True)
class Interval:
    """Requests and tokens by row, between two moments of one day in UTC."""

    number: int
    began: float
    ended: float
    rows: dict[Row, list[int]] = field(default_factory=dict)


class UsageEvents:
    """What one process counts. `name` is its own for ever. Pure."""

    def __init__(self, name: str, *, rows_max: int = ROWS_MAX) -> None:
        self._name = name
        self._source = f"/headrace/{quote(name)}"
        self._rows_max = rows_max
        self._number = 0
        self._open: Interval | None = None
        self._ended: deque[Interval] = deque(maxlen=INTERVALS_MAX)

    def count(self, row: Row, *, requests: int, tokens: int, now: float) -> None:
        """Add to a row; `now` is in seconds since the epoch."""
        interval = self._open
        if interval is None:
            self._number += 1
            interval = self._open = Interval(self._number, now, now)
        counts = interval.rows.setdefault(row, [0, 0])
        counts[0] += requests
        counts[1] += tokens
        interval.ended = now
        if len(interval.rows) >= self._rows_max:
            self.end()

    def end(self) -> None:
        """What comes now belongs to another interval."""
        if self._open is not None:
            self._ended.append(self._open)
            self._open = None

    def due(self) -> Interval | None:
        """The oldest interval that has not been written. While none waits, the open one ends here: where writing
        fails, intervals grow longer, not more.
        """
        if not self._ended:
            self.end()
        return self._ended[0] if self._ended else None

    def done(self, interval: Interval) -> None:
        """It was written."""
        if self._ended and self._ended[0] is interval:
            self._ended.popleft()

    def written(self, interval: Interval) -> list[bytes]:
        """Its events, one a row; the same each time."""
        return [
            orjson.dumps(self._event(interval, number, row, *counts))
            for number, (row, counts) in enumerate(interval.rows.items())
        ]

    def _event(
        self, interval: Interval, number: int, row: Row, requests: int, tokens: int
    ) -> dict[str, object]:
        data = row._asdict() | {"requests": requests, "tokens": tokens}
        data["class"] = data.pop("klass")
        return {
            "specversion": "1.0",
            "type": TYPE,
            "source": self._source,
            "id": f"{self._name}/{interval.number}/{number}",
            "subject": row.tenant,
            "time": _rfc3339(interval.began),
            "datacontenttype": "application/json",
            "data": data | {"until": _rfc3339(interval.ended)},
        }


class Meter:
    """Counts, and hands what was counted to a sink, in a thread."""

    def __init__(self, events: UsageEvents, sink: Sink) -> None:
        self._events = events
        self._sink = sink
        self.count = events.count
        self.turn = events.end

    async def write(self) -> None:
        """All that was counted by now. What the sink does not take waits for the next time."""
        left = INTERVALS_MAX + 1  # requests go on meanwhile
        while left and (interval := self._events.due()) is not None:
            lines = self._events.written(interval)
            try:
                await asyncio.to_thread(self._sink, lines)
            except OSError as error:
                log.warning("usage events are written later: %s", error)
                return
            self._events.done(interval)
            left -= 1


def _rfc3339(at: float) -> str:
    return datetime.fromtimestamp(at, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
