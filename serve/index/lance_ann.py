"""The ANN index of LanceDB's tables: which table wants one, its build, and searches through it.

A table starts without, and a search compares every vector. Past `ann_rows_min` rows the writer
builds IVF_SQ: a search reads the nearest partitions in eight bits a dimension, and compares
`refine` times as many candidates as it was asked for by their whole vectors. So scores are exact,
and what can be missed is a candidate. IVF_HNSW_SQ, with a graph in each partition, found no more and
no sooner at 50,000 rows, and took forty times as long to build (ADR 26).

Rows that were written since are scanned in each search, until compaction adds them to the index as
another part of it. It merges neither parts nor the fragments of different parts: past `PARTS_MAX` the
index is built anew, as one.
"""

import asyncio
from collections.abc import Awaitable, Callable
from logging import getLogger
from typing import TYPE_CHECKING

import numpy as np

from serve.config.index import Lance
from serve.index.rows import COLUMNS
from serve.records import Vector


if TYPE_CHECKING:
    import lancedb
    import pyarrow as pa

log = getLogger("headrace.index")

Opener = Callable[[str], Awaitable["lancedb.AsyncTable | None"]]
"""Gives a handle of the build's own, which holds up nobody else; None: there is no such table."""

FAILURES = (RuntimeError, OSError, ValueError)
"""What Lance raises, and a time-out."""

NAME = "ann"

PARTS_MAX = 16
"""Each is searched, and makes a search slower; half a second of building for 50,000 rows."""

LOOKS = 8
"""A table is looked at again after a part of `ann_rows_min` rows."""

TICKS_MIN, TICKS_MAX = 64, 2**14
"""Flushes between a build that failed and the next try, twice as many each time."""


class Builds:
    """Builds the index of one table at a time, in a task beside reads and writes."""

    def __init__(self, settings: Lance) -> None:
        self._settings = settings
        self._grown: dict[str, int] = {}
        self._waits: dict[str, tuple[int, int]] = {}
        self._task: asyncio.Task[None] | None = None
        self._ns = ""

    @property
    def under_way(self) -> str:
        """The namespace that is being indexed: it must not be compacted meanwhile; or nothing."""
        return self._ns

    def grew(self, ns: str, rows: int) -> None:
        """So many rows were written, new or not."""
        # The first time as if it were full: what earlier processes left counts, too.
        self._grown[ns] = self._grown.get(ns, self._settings.ann_rows_min) + rows

    def compacted(self, ns: str) -> None:
        """Its index, if any, has one more part: look at it."""
        self._grown[ns] = self._settings.ann_rows_min

    async def forget(self, ns: str) -> None:
        """It is to be dropped: stop its build, which could commit afterwards."""
        self._grown.pop(ns, None)
        self._waits.pop(ns, None)
        if self._ns == ns:
            await self.stop()

    async def stop(self) -> None:
        """End the build that is under way, if any."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait({self._task})
            self._ns = ""  # a task that was cancelled before its first step never came to say so

    async def tick(self, open_table: Opener) -> None:
        """Look at tables that have grown, and begin a build unless one is under way.

        A failure is not an error: the table is looked at again after a pause.
        """
        if self._task is not None:
            if not self._task.done():
                return
            task, self._task = self._task, None
            if not task.cancelled():
                task.result()  # a fault of ours: the writer logs it
        for ns in self._due():
            self._grown[ns] = 0
            try:
                begun = await self._begin(ns, open_table)
            except FAILURES as error:
                self._put_off(ns, error)
            else:
                if begun:
                    return

    def _due(self) -> list[str]:
        if self._settings.exact:
            return []
        enough = max(1, self._settings.ann_rows_min // LOOKS)
        self._waits = {ns: (max(0, left - 1), wait) for ns, (left, wait) in self._waits.items()}
        free = (0, 0)
        return [
            ns
            for ns, rows in self._grown.items()
            if rows >= enough and not self._waits.get(ns, free)[0]
        ]

    async def _begin(self, ns: str, open_table: Opener) -> bool:
        table = await open_table(ns)
        if table is None:
            return False
        rows, held = await table.count_rows(), await parts(table)
        wanted = rows >= self._settings.ann_rows_min and not 1 <= held <= PARTS_MAX
        if wanted:
            self._ns = ns
            self._task = asyncio.create_task(self._build(ns, table, rows))
        else:
            table.close()  # type: ignore[no-untyped-call]
        return wanted

    async def _build(self, ns: str, table: "lancedb.AsyncTable", rows: int) -> None:
        from lancedb.index import IvfSq  # noqa: PLC0415

        config = IvfSq(distance_type="cosine", target_partition_size=self._settings.partition_rows)
        log.info("building the ANN index of %s over %d records", ns, rows)
        try:
            async with asyncio.timeout(self._settings.build_s_max):
                # Its annotation forgot this kind, its check did not.
                await table.create_index("vector", config=config, name=NAME)  # type: ignore[arg-type]
        except FAILURES as error:
            self._put_off(ns, error)
        else:
            self._waits.pop(ns, None)
            log.info("the ANN index of %s is there", ns)
        finally:
            self._ns = ""
            table.close()  # type: ignore[no-untyped-call]

    def _put_off(self, ns: str, error: Exception) -> None:
        _, wait = self._waits.get(ns, (0, TICKS_MIN))
        self._waits[ns] = (wait, min(2 * wait, TICKS_MAX))
        self._grown[ns] = self._settings.ann_rows_min
        log.warning("the ANN index of %s is put off: %s: %s", ns, type(error).__name__, error)


async def parts(table: "lancedb.AsyncTable") -> int:
    """Of which its ANN index consists; 0: it has none."""
    return sum(
        index.num_segments or 1 for index in await table.list_indices() if index.name == NAME
    )


async def nearest(
    table: "lancedb.AsyncTable", vector: Vector, top_k: int, where: str | None, settings: Lance
) -> "pa.Table":
    """The columns of records and `_distance`, of up to `top_k` rows that satisfy `where`.

    Under a filter every partition is read, because the nearest that satisfy it may be in any. Never
    fewer than there are: when the index gives too few, every row is compared.
    """
    search = table.query().nearest_to(np.asarray(vector, np.float32))
    search = search.distance_type("cosine").limit(top_k).select([*COLUMNS, "_distance"])
    if where is not None:
        search = search.where(where)  # before vectors are compared, with an index as without
    if not settings.exact:
        search = search.refine_factor(settings.refine).nprobes(settings.probes)
        if where is not None:
            search = search.maximum_nprobes(0)  # all
        found = await search.to_arrow()
        if found.num_rows == top_k or not await parts(table):
            return found
    return await search.bypass_vector_index().to_arrow()
