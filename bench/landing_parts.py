"""For `bench.landing`: the parts that run in this process, over an index and the service's own writer."""

import asyncio
import time
from collections.abc import Awaitable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from itertools import count, cycle
from typing import Any

from bench.landing_indexes import OPENERS, lancedb, lancedbs, made, records
from bench.landing_writer import (
    SENDER,
    WAIT_S,
    Fault,
    Watched,
    fence,
    poisoned,
    throttled,
    told,
    writing,
)
from bench.report import percentile, spread
from serve.config import Buffer
from serve.config import Index as IndexSettings
from serve.index.errors import IndexOffline
from serve.index.writer import Writer
from serve.ports import Index
from serve.records import Record


UNCOMPACTED = 10_000
"""Commits before LanceDB would be compacted: never, in a program as short as this."""
REST_S = 1.0
"""After this a table rests, and so often the writer looks: by default ten and five seconds."""
UNDER_WAY_S = 0.005
"""After this a flush has asked the fence, and has not been committed."""


@dataclass(frozen=True, slots=True)
class Size:
    """How much of everything in this process. `sizes` are records of one upsert, the least first."""

    sizes: Sequence[int] = (1, 50, 1000)
    singles: int = 60
    bulk: int = 4000
    burst: int = 25_000
    offer: int = 500
    down_s: float = 60.0
    offers_s: float = 20.0
    pause_s: float = Buffer().pause_s
    buffered: int = 500
    storm_s: float = 30.0
    poison: int = 1000
    rows: int = 2000
    writes: int = 300
    takeover: int = 50
    queries: int = 20


# --- bulk -------------------------------------------------------------------------------------


async def bulk(name: str, size: Size) -> dict[int, float]:
    """Records a second by the size of an upsert, each in an empty namespace, maintained as it goes."""
    found: dict[int, float] = {}
    async with OPENERS[name]() as index:
        for each in size.sizes:
            ns = await made(index)
            most = size.singles if each == 1 else size.bulk
            batches = [records(at, each) for at in range(0, most, each)]
            began = time.perf_counter()
            for batch in batches:
                landed = await index.upsert(ns, batch)
                if landed.rejected:
                    raise RuntimeError(f"{name} refused {landed.rejected[:3]}")
                await index.maintain()
            found[each] = len(batches) * each / (time.perf_counter() - began)
            await index.drop(ns)
    return found


# --- flushes ----------------------------------------------------------------------------------


async def flushes(size: Size) -> dict[str, Any]:
    """A burst through the writer onto LanceDB."""
    async with lancedb() as inner:
        watched, ns = Watched(inner), await made(inner)
        began = time.perf_counter()
        async with writing(watched) as writer:
            words = await _offered(writer, ns, size)
            seconds = time.perf_counter() - began
        took, failed = watched.took_s, watched.failed
        held = (await inner.stats(ns)).records
    return {
        "records": size.burst,
        "records_s": size.burst / seconds,
        "flushes": len(took),
        "failed_share": failed / len(took),
        "flush_s": {"mean": sum(took) / len(took), "max": max(took)},
        "lost": size.burst - held,
        "not_landed": sum(word != "landed" for word in words),
    }


async def _offered(writer: Writer, ns: str, size: Size) -> Sequence[str]:
    """What became of the records, offered in parts at once."""
    parts = [records(at, size.offer) for at in range(0, size.burst, size.offer)]
    outcomes = await asyncio.gather(*(writer.offer(SENDER, ns, part, WAIT_S) for part in parts))
    return [one.word for part in outcomes for one in part]


# --- faults -----------------------------------------------------------------------------------


async def outage(size: Size) -> dict[str, Any]:
    """Single records all the while, and an index that is down for some time in the middle."""

    def down(_: Sequence[Record]) -> None:
        raise IndexOffline("down")

    return await _steady(down, size.down_s, size)


async def storm(size: Size) -> dict[str, Any]:
    """The same with an index that refuses two thirds of what it is asked as too much."""
    return await _steady(throttled(2 / 3, 0.2), size.storm_s, size)


async def _steady(fault: Fault, seconds: float, size: Size) -> dict[str, Any]:
    """Offers at a steady pace: a while before the fault, during it, and after it."""
    lags: list[tuple[float, float]] = []
    words: list[str] = []
    quiet_s = min(seconds, 5.0)
    async with lancedb() as inner:
        watched, ns, numbers = Watched(inner), await made(inner), count()
        buffer = Buffer(pause_s=size.pause_s)
        async with writing(watched, buffer) as writer, asyncio.TaskGroup() as group:

            async def one() -> None:
                began = time.perf_counter()
                (outcome,) = await writer.offer(SENDER, ns, records(next(numbers), 1), WAIT_S)
                words.append(outcome.word)
                lags.append((began, time.perf_counter() - began))

            async def pace(until: float) -> None:
                while time.perf_counter() < until:
                    group.create_task(one())
                    await asyncio.sleep(1 / size.offers_s)

            await pace(time.perf_counter() + quiet_s)
            watched.fault = fault
            began = time.perf_counter()
            await pace(began + seconds)
            watched.fault, ended = None, time.perf_counter()
            await pace(ended + 2 * quiet_s)
        held = (await inner.stats(ns)).records
    behind = max((at + lag for at, lag in lags if at < ended), default=ended)
    return {
        "seconds": seconds,
        "records": len(words),
        "lost": len(words) - held,
        "not_landed": sum(word != "landed" for word in words),
        "failed_flushes": watched.failed,
        "recovered_s": max(behind - ended, 0.0),
        "before_p95_ms": _p95_ms([lag for at, lag in lags if at < began]),
        "during_p95_ms": _p95_ms([lag for at, lag in lags if began <= at < ended]),
        "after_p95_ms": _p95_ms([lag for at, lag in lags if at >= max(behind, ended)]),
    }


def _p95_ms(seconds: Sequence[float]) -> float | None:
    return percentile(seconds, 0.95) * 1e3 if seconds else None


async def poison(size: Size) -> dict[str, Any]:
    """One record in a hundred that the index refuses, together with all that is in its batch."""
    some = records(0, size.poison)
    bad = frozenset(record.id for record in some[50::100])
    async with lancedb() as inner:
        watched, ns = Watched(inner), await made(inner)
        watched.fault = poisoned(bad)
        async with writing(watched) as writer:
            parts = [some[at : at + 100] for at in range(0, len(some), 100)]
            outcomes = await asyncio.gather(
                *(writer.offer(SENDER, ns, part, WAIT_S) for part in parts)
            )
        words = [one.word for part in outcomes for one in part]
        held = (await inner.stats(ns)).records
    rejected = frozenset(
        record.id for record, word in zip(some, words, strict=True) if word == "rejected"
    )
    return {
        "records": len(some),
        "poison": len(bad),
        "rejected": len(rejected),
        "others_rejected": len(rejected - bad),
        "lost": len(some) - len(bad) - held,
        "upserts": len(watched.took_s),
    }


# --- rot --------------------------------------------------------------------------------------


async def rot(size: Size, *, compacted: bool) -> dict[str, Any]:
    """Single-row writes; what an upsert and a query take before, at once afterwards, and when the table has
    rested for a moment.

    Now and then a second writer is forced to start: it takes the epoch while the first one's flush is
    under way, and is given the same row at once, as if its caller had heard nothing.
    """
    commits = {} if compacted else {"compact_commits": UNCOMPACTED}
    rest_s = REST_S if compacted else 3600.0
    settings = IndexSettings.model_validate({"compact_rest_s": rest_s, **commits})
    async with lancedbs(2, settings) as (index, second), AsyncExitStack() as stack:
        ns, successors = await made(index), cycle((second, index))
        store = await stack.enter_async_context(fence(ns))
        for at in range(0, size.rows, 1000):
            await index.upsert(ns, records(at, min(1000, size.rows - at)))
        fresh = count(size.rows)
        before = await _timed(index, ns, fresh, size.queries)
        took_ms: list[float] = []
        buffer = Buffer(upkeep_s=rest_s)
        writer = await stack.enter_async_context(writing(index, buffer, fence=store, deployment=0))
        for number in range(1, size.writes + 1):
            row = records(next(fresh), 1)
            began, first = time.perf_counter(), asyncio.create_task(told(writer, ns, row))
            if number % size.takeover == 0:
                await asyncio.sleep(UNDER_WAY_S)
                successor = writing(next(successors), buffer, fence=store, deployment=number)
                writer = await stack.enter_async_context(successor)
                if await told(writer, ns, row) != "landed":
                    raise RuntimeError("the second writer did not take over")
            await first
            took_ms.append((time.perf_counter() - began) * 1e3)
        at_once = await _timed(index, ns, fresh, size.queries)
        await asyncio.sleep(3 * REST_S)
        after = await _timed(index, ns, fresh, size.queries)
        ids = [record.id async for part in index.scan(ns) for record in part]
    rows = size.rows + size.writes + 3 * size.queries
    third = size.writes // 3
    writes_ms = [spread(some)["median"] for some in (took_ms[:third], took_ms[-third:])]
    return {
        "writes": size.writes,
        "takeovers": size.writes // size.takeover,
        "duplicates": len(ids) - len(set(ids)),
        "lost": rows - len(set(ids)),
        "upsert_ms": {"before": before[0], "at_once": at_once[0], "after": after[0]},
        "query_ms": {"before": before[1], "at_once": at_once[1], "after": after[1]},
        "write_ms": {"first_third": writes_ms[0], "last_third": writes_ms[1]},
        "write_ratio": writes_ms[1] / writes_ms[0],
        "upsert_ratio": after[0] / before[0],
        "query_ratio": after[1] / before[1],
        "query_ratio_at_once": at_once[1] / before[1],
    }


async def _timed(index: Index, ns: str, fresh: "count[int]", queries: int) -> tuple[float, float]:
    """Median milliseconds of a single upsert and of a query."""
    rows = [records(next(fresh), 1) for _ in range(queries)]
    upserts = [await _took_ms(index.upsert(ns, row)) for row in rows]
    wanted = [one.vector for one in records(10**9, queries)]
    looks = [await _took_ms(index.query(ns, row, 10)) for row in wanted]
    return spread(upserts)["median"], spread(looks)["median"]


async def _took_ms(call: Awaitable[Any]) -> float:
    began = time.perf_counter()
    await call
    return (time.perf_counter() - began) * 1e3
