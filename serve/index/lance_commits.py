"""When a table of LanceDB is due to be compacted: by its commits, and by how long it has rested. Pure.

Each commit leaves a fragment, and a search opens all of them: 300 single-row writes made searches of 10,000
rows 5 times slower.
"""

from dataclasses import dataclass


FEW = 8
"""Commits that are worth a compaction in a table that rests: fewer cost a search next to nothing."""


@dataclass(frozen=True, slots=True)
class _Count:
    number: int
    at: float


class Commits:
    """Of each table since it was compacted: how many, and when the last one was."""

    def __init__(self, *, most: int, rest_s: float) -> None:
        self._most = most
        self._rest_s = rest_s
        self._counts: dict[str, _Count] = {}

    def __contains__(self, ns: str) -> bool:
        """Whether anything was counted of it."""
        return ns in self._counts

    def add(self, ns: str, now: float, number: int = 1) -> None:
        """So many more."""
        before = self._counts.get(ns)
        self._counts[ns] = _Count(number + (before.number if before else 0), now)

    def due(self, now: float) -> list[str]:
        """Tables with many commits, or with a few and none for `rest_s`."""
        return [ns for ns, one in self._counts.items() if one.number >= self._bound(one, now)]

    def compacted(self, ns: str, now: float) -> None:
        """Nothing is left of them."""
        self._counts[ns] = _Count(0, now)

    def put_off(self, ns: str, now: float) -> None:
        """Another process was at it: again after half as many."""
        self._counts[ns] = _Count(self._most // 2, now)

    def forget(self, ns: str) -> None:
        """The table is gone."""
        self._counts.pop(ns, None)

    def _bound(self, one: _Count, now: float) -> int:
        return min(FEW, self._most) if now - one.at >= self._rest_s else self._most
