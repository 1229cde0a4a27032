"""An index whose searches lag behind its writes, as far as a test says."""

from collections.abc import Sequence
from dataclasses import replace

from serve.config import Index
from serve.errors import IndexUnavailable
from serve.index.memory import MemoryIndex
from serve.ports import Landed
from serve.records import Record


class LaggingIndex(MemoryIndex):
    """Upserts have tokens and are found once `show` was called; deletes have none, and are at once.

    Attributes that tests set: `says` (false: it does not say how far searches see), `away`.
    """

    def __init__(self, settings: Index) -> None:
        super().__init__(settings)
        self.caps = replace(self.caps, consistency="token")
        self.says = True
        self.away = False
        self.asked: list[str] = []
        self._committed = self._shown = 0
        self._hidden: list[tuple[str, Sequence[Record]]] = []

    async def upsert(self, ns: str, records: Sequence[Record]) -> Landed:
        self._hidden.append((ns, records))
        self._committed += 1
        return Landed(token=str(self._committed))

    async def show(self) -> None:
        """Searches see all that was written."""
        hidden, self._hidden = self._hidden, []
        for ns, records in hidden:
            await super().upsert(ns, records)
        self._shown = self._committed

    async def reached(self, ns: str, token: str, /) -> bool | None:
        self.asked.append(token)
        if self.away:
            raise IndexUnavailable("The index is away.")
        return self._shown >= int(token) if self.says else None
