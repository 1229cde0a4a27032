"""Counts what every key used, for the Store. Pure."""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

from serve.records import Klass, UsageRow


ROWS_MAX = 10_000
"""Rows of one session; it ends early when it has so many."""

SESSIONS_MAX = 8
"""Ended sessions that wait for the Store: a week of days. Beyond it the oldest is lost."""

REPORT_ROWS_MAX = 1000
"""Rows of one report."""


@dataclass(slots=True)
class _Session:
    """Counts since it began, by month, tenant, key and class.

    `changed` are not yet reported, those that changed last at the end: whoever is counted all the
    time must not keep others from being reported.
    """

    name: str
    rows: dict[tuple[str, str, str, Klass], list[int]]
    changed: dict[tuple[str, str, str, Klass], None]


@dataclass(frozen=True, slots=True)
class Report:
    """Some rows of a session, cumulative since it began."""

    session: str
    rows: tuple[UsageRow, ...]


class UsageCount:
    """What one replica counted. `name` is its own for ever; `day` is like `2026-11-22`, in UTC.

    A session never spans two days, and its counts only rise.
    """

    def __init__(self, name: str, day: str, *, rows_max: int = ROWS_MAX) -> None:
        self._name = name
        self._rows_max = rows_max
        self._day = day
        self._number = 0
        self._ended: deque[_Session] = deque(maxlen=SESSIONS_MAX)
        self._session = self._begin()

    def turn(self, day: str) -> None:
        """A new day begins."""
        self._day = day
        self._end()

    def count(
        self, tenant: str, key: str, klass: Klass, *, requests: int, tokens: int, refused: int
    ) -> None:
        """Add to the counts of a key's class in this month."""
        place = self._day[:7], tenant, key, klass
        row = self._session.rows.get(place)
        if row is None:
            if len(self._session.rows) >= self._rows_max:
                self._end()
            row = self._session.rows[place] = [0, 0, 0]
        row[0] += requests
        row[1] += tokens
        row[2] += refused
        self._session.changed.pop(place, None)
        self._session.changed[place] = None

    def due(self) -> Iterator[Report]:
        """What the Store has not heard by now, in parts, the oldest session first."""
        while self._ended and not self._ended[0].changed:
            self._ended.popleft()
        waiting = [(each, list(each.changed)) for each in (*self._ended, self._session)]
        for session, places in waiting:
            for start in range(0, len(places), REPORT_ROWS_MAX):
                part = places[start : start + REPORT_ROWS_MAX]
                rows = tuple(UsageRow(*place, *session.rows[place]) for place in part)
                yield Report(session.name, rows)

    def done(self, report: Report) -> None:
        """The Store has kept it."""
        for session in (*self._ended, self._session):
            if session.name != report.session:
                continue
            for row in report.rows:
                place = row.month, row.tenant, row.key, row.klass
                if session.rows[place] == [row.requests, row.tokens, row.refused]:
                    session.changed.pop(place, None)

    def _end(self) -> None:
        self._ended.append(self._session)
        self._session = self._begin()

    def _begin(self) -> _Session:
        self._number += 1
        return _Session(f"{self._name}/{self._day}/{self._number}", {}, {})
