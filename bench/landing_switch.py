"""For `bench.landing`: a switch to single writes while records wait in the buffer.

As a deployment does it that sets `buffer.flush_writes_max: 1`: the old writer takes no more, flushes what
it holds and ends; then the new one takes the epoch. Callers go on writing all the while.
"""

import asyncio
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack
from typing import Any

from bench.landing_indexes import lancedb, made, records
from bench.landing_writer import SENDER, WAIT_S, Watched, fence, told, writing
from serve.config import Buffer
from serve.index.writer import Writer
from serve.records import Record


GATHERING = Buffer(age_s_start=60, age_s_max=60)
"""What is offered while a flush is under way, and fills no other, waits longer than this part takes."""
SINGLE = Buffer(flush_writes_max=1)


async def switch(buffered: int, singles: int) -> dict[str, Any]:
    """`buffered` records wait; then half of the single writes are new versions of those, half are new."""
    async with lancedb() as index, AsyncExitStack() as stack:
        ns = await made(index)
        store = await stack.enter_async_context(fence(ns))
        before, after = Watched(index), Watched(index)
        bulk = await stack.enter_async_context(writing(before, GATHERING, fence=store))
        held_then: list[int] = []
        sizes: list[int] = []

        def note(some: Sequence[Record]) -> None:
            held_then.append(bulk.stats()["depth"])
            sizes.append(len(some))

        after.fault = note
        waiting = asyncio.create_task(_gathered(bulk, ns, buffered))
        while bulk.stats()["depth"] < buffered:  # noqa: ASYNC110  a buffer tells nobody
            await asyncio.sleep(0)
        half, depth = singles // 2, bulk.stats()["depth"]
        later = [one for number in range(half) for one in records(number, 1, 2)]
        later += records(buffered + 1, singles - half, 1) + records(0, 1, 3)
        successor: asyncio.Future[Writer] = asyncio.get_running_loop().create_future()
        calls = [asyncio.create_task(_insist(bulk, successor, ns, one)) for one in later]
        began = time.perf_counter()
        await bulk.drain(WAIT_S)
        drained_s = time.perf_counter() - began
        successor.set_result(
            await stack.enter_async_context(writing(after, SINGLE, fence=store, deployment=2))
        )
        words = [*await waiting, *await asyncio.gather(*calls)]
        single_s = time.perf_counter() - began - drained_s
        held = [record async for part in index.scan(ns) for record in part]
    last = {one.id: one.generation for one in [*records(0, buffered + 1), *later]}
    found = {record.id: record.generation for record in held}
    return {
        "buffered": depth,
        "drained_s": drained_s,
        "bulk_flushes": len(before.took_s),
        "held_at_first_single": held_then[0],
        "singles": len(sizes),
        "records_a_single": max(sizes),
        "singles_s": len(sizes) / single_s,
        "lost": len(last.keys() - found.keys()),
        "duplicates": len(held) - len(found),
        "not_the_last": sum(found.get(each, now) != now for each, now in last.items()),
        "not_landed": sum(word not in ("landed", "superseded") for word in words),
    }


async def _gathered(bulk: Writer, ns: str, buffered: int) -> Sequence[str]:
    """One record, whose flush the others wait behind."""
    first = asyncio.create_task(told(bulk, ns, records(0, 1)))
    while not bulk.stats()["in_flight"]:  # noqa: ASYNC110
        await asyncio.sleep(0)
    rest = await bulk.offer(SENDER, ns, records(1, buffered), WAIT_S)
    return [await first, *(one.word for one in rest)]


async def _insist(
    bulk: Writer, successor: "asyncio.Future[Writer]", ns: str, record: Record
) -> str:
    """As a worker does: what one writer refuses is offered to the next."""
    word = await told(bulk, ns, [record])
    if word not in ("refused", "released"):
        return word
    return await told(await successor, ns, [record])
