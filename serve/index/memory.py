"""The exact twin: a numpy matrix in this process, for tests. Oracle of the contract suite; other
processes do not see it.

A namespace that does not exist reads as empty, as in every backend: whether a collection exists
is the Store's answer.
"""

from collections.abc import AsyncIterator, Sequence

import numpy as np

from serve.capabilities import Capabilities
from serve.config import Index as IndexSettings
from serve.errors import BadInput
from serve.index.checks import check_namespace, check_query, newest, refuse
from serve.index.errors import IndexRetryable
from serve.index.filters import matches
from serve.index.full_text import bm25, words
from serve.ports import IndexStats, Landed
from serve.records import CollectionSpec, Filter, Hit, Record, Tombstone, Vector, stack


class MemoryIndex:
    """Implements `serve.ports.Index`. Every call is atomic: none of them yields."""

    def __init__(self, settings: IndexSettings) -> None:
        self.caps = Capabilities(
            max_items=settings.max_items,
            max_bytes=settings.max_bytes,
            max_dim=settings.max_dim,
            max_top_k=10_000,
            consistency="strong",
            single_writer=False,
            full_text=True,
        )
        self._spaces: dict[str, _Space] = {}

    async def open(self) -> None:
        """Nothing to connect to."""

    async def upsert(self, ns: str, records: Sequence[Record]) -> Landed:
        """Insert or replace by id. Raises IndexRetryable when the namespace is missing."""
        check_namespace(ns)
        space = self._spaces.get(ns)
        if space is None:
            raise IndexRetryable(f"namespace {ns} does not exist")
        rejected = refuse(records, space.dimensions)
        refused = {record_id for record_id, _ in rejected}
        for record in newest([record for record in records if record.id not in refused]):
            held = space.records.get(record.id)
            if held is None or held.generation <= record.generation:
                space.put(record)
        return Landed(rejected=rejected)

    async def delete(self, ns: str, tombstones: Sequence[Tombstone]) -> Landed:
        """Remove what has at most the tombstone's generation; nothing there is no error."""
        check_namespace(ns)
        space = self._spaces.get(ns)
        if space is not None:
            for tombstone in tombstones:
                held = space.records.get(tombstone.id)
                if held is not None and held.generation <= tombstone.generation:
                    space.remove(tombstone.id)
        return Landed()

    async def query(
        self, ns: str, vector: Vector, top_k: int, where: Filter | None = None
    ) -> Sequence[Hit]:
        """Exact cosine over the records that match; ties by id. Raises BadInput (vector)."""
        check_namespace(ns)
        space = self._spaces.get(ns)
        if space is None:
            return ()
        check_query(vector, space.dimensions)
        scores = space.unit_rows() @ (vector / np.linalg.norm(vector))
        scored = zip(space.records.values(), scores.tolist(), strict=True)
        hits = [Hit(record, score) for record, score in scored if matches(where, record.metadata)]
        hits.sort(key=lambda hit: (-hit.score, hit.record.id))
        return hits[: min(top_k, self.caps.max_top_k)]

    async def match(
        self, ns: str, text: str, top_k: int, where: Filter | None = None, /
    ) -> Sequence[Hit]:
        """Exact BM25 over all records; ties by id."""
        check_namespace(ns)
        space = self._spaces.get(ns)
        held = list(space.records.values()) if space is not None else []
        scores = bm25([words(record.text) for record in held], words(text))
        hits = [
            Hit(record, score)
            for record, score in zip(held, scores, strict=True)
            if score > 0 and matches(where, record.metadata)
        ]
        hits.sort(key=lambda hit: (-hit.score, hit.record.id))
        return hits[: min(top_k, self.caps.max_top_k)]

    async def fetch(self, ns: str, ids: Sequence[str]) -> Sequence[Record]:
        """The records that exist among `ids`."""
        check_namespace(ns)
        space = self._spaces.get(ns)
        held = space.records if space is not None else {}
        return [held[record_id] for record_id in dict.fromkeys(ids) if record_id in held]

    async def scan(self, ns: str, where: Filter | None = None) -> AsyncIterator[Sequence[Record]]:
        """All at once, as they are now: it holds them anyway."""
        check_namespace(ns)
        space = self._spaces.get(ns)
        held = list(space.records.values()) if space is not None else []
        yield [record for record in held if matches(where, record.metadata)]

    async def reached(self, ns: str, _token: str, /) -> bool | None:
        """A write that returned is seen."""
        check_namespace(ns)
        return True

    async def ensure(self, spec: CollectionSpec) -> None:
        """Make the namespace. Raises BadInput when it has too many dimensions."""
        check_namespace(spec.ns)
        if spec.dimensions > self.caps.max_dim:
            raise BadInput(f"At most {self.caps.max_dim} dimensions.", param="dimensions")
        self._spaces.setdefault(spec.ns, _Space(spec.dimensions))

    async def drop(self, ns: str) -> None:
        """Remove the namespace."""
        check_namespace(ns)
        self._spaces.pop(ns, None)

    async def stats(self, ns: str) -> IndexStats:
        """Count what is there."""
        check_namespace(ns)
        space = self._spaces.get(ns)
        return IndexStats(records=0 if space is None else len(space.records))

    async def maintain(self) -> None:
        """Nothing to do."""

    async def aclose(self) -> None:
        """Forget everything."""
        self._spaces.clear()


class _Space:
    """Records by id, and their unit vectors as one matrix that is rebuilt after a write."""

    def __init__(self, dimensions: int) -> None:
        self.dimensions = dimensions
        self.records: dict[str, Record] = {}
        self._rows: Vector | None = None

    def put(self, record: Record) -> None:
        self.records[record.id] = record
        self._rows = None

    def remove(self, record_id: str) -> None:
        del self.records[record_id]
        self._rows = None

    def unit_rows(self) -> Vector:
        if self._rows is None:
            rows = stack([record.vector for record in self.records.values()], self.dimensions)
            self._rows = rows / np.linalg.norm(rows, axis=1, keepdims=True)
        return self._rows
