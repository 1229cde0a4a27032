"""For `bench.landing`: documents through the whole service over HTTP, until a search finds them."""

import asyncio
import random
import time
from collections import Counter
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any

import httpx

from bench import texts
from bench.landing_figures import Memory
from bench.load import Target
from bench.report import percentile


WATCHED_MAX = 50
"""Documents that one search looks for: a filter has 64 conditions at most."""
LOOK_PAUSE_S = 0.01
POST_S = 120.0
SUMMED = ("documents", "lost", "duplicates", "probes_missing")
LOST_S = 300.0
"""What is not found after this is lost."""


@dataclass(frozen=True, slots=True)
class Load:
    """A trickle of single documents, then a burst in requests of many."""

    trickle: int = 300
    pace_s: float = 5.0
    unmeasured: int = 5
    burst: int = 25_000
    bursts: int = 3
    request: int = 500
    connections: int = 4
    probes: int = 250


class Watch:
    """Searches for documents by their numbers, again and again, until each was found.

    A `patient` one passes over answers that say that the service is not there.
    """

    def __init__(
        self, client: httpx.AsyncClient, name: str, dimensions: int, *, patient: bool
    ) -> None:
        self._client = client
        self._path = f"/v1/collections/{name}/search"
        self._vector = [1.0] + [0.0] * (dimensions - 1)
        self._patient = patient
        self._waiting: dict[int, float] = {}
        self._woken = asyncio.Event()
        self._done = asyncio.Event()
        self.lags_s: dict[int, float] = {}

    def expect(self, number: int, since: float) -> None:
        """It was accepted then."""
        self._waiting[number] = since
        self._done.clear()
        self._woken.set()

    async def run(self) -> None:
        """Look until cancelled, for those that wait longest first and for all of them in turn."""
        while True:
            while not self._waiting:
                self._woken.clear()
                await self._woken.wait()
            waiting = list(self._waiting)
            for start in range(0, len(waiting), WATCHED_MAX):
                await self._look(waiting[start : start + WATCHED_MAX])
            await asyncio.sleep(LOOK_PAUSE_S)

    async def _look(self, numbers: Sequence[int]) -> None:
        try:
            found = await self.search(numbers, len(numbers))
        except httpx.HTTPError:
            if not self._patient:
                raise
            return
        now = time.perf_counter()
        for number in found:
            since = self._waiting.pop(number, None)
            if since is not None:
                self.lags_s[number] = max(now - since, 0.0)
        if not self._waiting:
            self._done.set()

    async def search(self, numbers: Sequence[int], most: int) -> Sequence[int]:
        """Which of these a search finds now; a number comes once for each hit."""
        asked = {
            "vector": self._vector,
            "top_k": most,
            "filter": {"number": {"$in": list(numbers)}},
        }
        answer = await self._client.post(self._path, json=asked)
        answer.raise_for_status()
        return [hit["metadata"]["number"] for hit in answer.json()["data"]]

    async def count(self, numbers: Sequence[int]) -> dict[str, int]:
        """Of documents of one chunk: how many no search finds, and how many it finds twice."""
        missing = twice = 0
        for start in range(0, len(numbers), WATCHED_MAX):
            part = numbers[start : start + WATCHED_MAX]
            hits = Counter(await self.search(part, 2 * len(part)))
            missing += len(set(part) - hits.keys())
            twice += sum(times > 1 for times in hits.values())
        return {"missing": missing, "twice": twice}

    async def emptied(self) -> int:
        """Wait until all were found; how many were not, in the end."""
        with suppress(TimeoutError):
            async with asyncio.timeout(LOST_S):
                await self._done.wait()
        return len(self._waiting)


@asynccontextmanager
async def watching(
    target: Target, name: str, *, patient: bool = False
) -> AsyncIterator[tuple[httpx.AsyncClient, Watch]]:
    """A new collection, and who looks into it. Raises what a search of an impatient one met."""
    base = target.url.rsplit("/v1/", 1)[0]
    headers = {"authorization": f"Bearer {target.key}"}
    async with httpx.AsyncClient(base_url=base, headers=headers, timeout=POST_S) as client:
        made = await client.post("/v1/collections", json={"name": name, "model": target.model})
        made.raise_for_status()
        stats = (await client.get(f"/v1/collections/{name}/stats")).json()
        watch = Watch(client, name, stats["dimensions"], patient=patient)
        async with asyncio.TaskGroup() as group:
            running = group.create_task(watch.run())
            yield client, watch
            running.cancel()


async def accepted(client: httpx.AsyncClient, name: str, numbered: Mapping[int, str]) -> float:
    """Hand documents over; when they had been accepted. Raises httpx.HTTPError."""
    documents = [
        {"id": f"d{number}", "text": text, "metadata": {"number": number}}
        for number, text in numbered.items()
    ]
    path = f"/v1/collections/{name}/documents"
    answer = await client.post(
        path, params={"wait": "accepted"}, json={"documents": documents}, timeout=POST_S
    )
    answer.raise_for_status()
    return time.perf_counter()


async def trickle(target: Target, load: Load) -> dict[str, Any]:
    """Single documents at a steady pace; milliseconds from each acceptance until it was found."""
    count = load.trickle + load.unmeasured
    texts_of = texts.shorts(count)
    async with watching(target, "trickle") as (client, watch):

        async def one(number: int) -> None:
            watch.expect(number, await accepted(client, "trickle", {number: texts_of[number]}))

        async with asyncio.TaskGroup() as group:
            for number in range(count):
                group.create_task(one(number))
                await asyncio.sleep(1 / load.pace_s)
        lost = await watch.emptied()
        lags = [lag for number, lag in watch.lags_s.items() if number >= load.unmeasured]
    return {"documents": load.trickle, "pace_s": load.pace_s, "lag_ms": lags_ms(lags), "lost": lost}


async def burst(target: Target, load: Load) -> dict[str, Any]:
    """One after the other, each into a collection of its own: what is held at most must not grow with them."""
    memory = Memory(target)
    measuring = asyncio.create_task(memory.run())
    found, marks = [], []
    for number in range(load.bursts):
        found.append(await _burst(target, load, f"burst-{number}"))
        marks.append(memory.looks)
    measuring.cancel()
    return {
        "bursts": found,
        "lag_ms": lags_ms([lag for one in found for lag in one.pop("lags_s")]),
        **{word: sum(one[word] for one in found) for word in SUMMED},
        **memory.shown(marks),
    }


async def _burst(target: Target, load: Load, name: str) -> dict[str, Any]:
    """As many as the service takes; some of them are watched, all of them counted in the end."""
    texts_of = texts.shorts(load.burst)
    probes = set(random.Random(7).sample(range(load.burst), min(load.probes, load.burst)))
    starts = list(reversed(range(0, load.burst, load.request)))
    async with watching(target, name) as (client, watch):
        began = time.perf_counter()

        async def hand_over() -> None:
            while starts:
                start = starts.pop()
                part = range(start, min(start + load.request, load.burst))
                since = await accepted(client, name, {n: texts_of[n] for n in part})
                for number in sorted(probes.intersection(part)):
                    watch.expect(number, since)

        async with asyncio.TaskGroup() as group:
            for _ in range(load.connections):
                group.create_task(hand_over())
        accepted_s = time.perf_counter() - began
        missing = await watch.emptied()
        records = await _records(client, name, load.burst)
        total_s = time.perf_counter() - began
        found = await watch.count(range(load.burst))
        stats = (await client.get("/v1/stats")).json()
    return {
        "documents": load.burst,
        "accepted_s": accepted_s,
        "total_s": total_s,
        "lags_s": list(watch.lags_s.values()),
        "lost": found["missing"],
        "duplicates": found["twice"],
        "records": records,
        "probes_missing": missing,
        "failed_items": stats["failed"],
    }


async def _records(client: httpx.AsyncClient, name: str, wanted: int) -> int:
    """What the index holds, once it is all or nothing more comes."""
    until = time.perf_counter() + LOST_S
    while True:
        found = int((await client.get(f"/v1/collections/{name}/stats")).json()["records"])
        if found >= wanted or time.perf_counter() > until:
            return found
        await asyncio.sleep(0.2)


def lags_ms(seconds: Sequence[float]) -> dict[str, float]:
    """Of those that were found."""
    return {f"p{part * 100:.0f}": percentile(seconds, part) * 1e3 for part in (0.5, 0.95, 0.99)} | {
        "max": max(seconds) * 1e3
    }
