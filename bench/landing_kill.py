"""For `bench.landing`: `kill -9` of the writer in mid-flush, and of the Store, while documents stream in.

A flush into LanceDB first writes files of data and then commits a version. The Upserter is stopped
(SIGSTOP) when its folder says that one is between the two; where that is seen to be so, it is killed as it
stands. The pause that follows ends when documents are found as soon as before.
"""

import asyncio
import os
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from bench import processes, texts
from bench.landing_service import LOST_S, Watch, accepted, lags_ms, watching
from bench.load import Target
from bench.report import percentile


NAME = "killed"
CAUGHT_S_MAX = 30.0
"""Without a flush in flight for so long it is killed in whatever it does."""
LOOK_S = 0.0005
AGAIN_S = 0.5
"""After this a client repeats what was refused."""
LATER = 429
"""The least status of an answer that says so."""
RECOVERED_S_MAX = 180.0
IN_A_ROW = 20
"""Documents whose lags must be those of before: their p95 is the last but one."""


@dataclass(frozen=True, slots=True)
class Kills:
    """Whom to kill, in this order; requests a second and documents in each, all the while."""

    victims: Sequence[str] = ("upserter", "upserter", "upserter", "store", "upserter", "upserter")
    pace_s: float = 8.0
    request: int = 5
    unmeasured_s: float = 5.0
    before_s: float = 20.0


@dataclass(slots=True)
class Stream:
    """Documents that are handed over until told to stop; the first of each request is watched."""

    client: httpx.AsyncClient
    watch: Watch
    kills: Kills
    since: dict[int, float] = field(default_factory=dict)
    """When the watched ones were accepted, in that order."""
    acknowledged: list[int] = field(default_factory=list)
    refused: int = 0
    stopped: bool = False

    async def run(self) -> None:
        """One request after the other, whether the one before has been answered or not."""
        number = 0
        async with asyncio.TaskGroup() as group:
            while not self.stopped:
                group.create_task(self._hand_over(range(number, number + self.kills.request)))
                number += self.kills.request
                await asyncio.sleep(1 / self.kills.pace_s)

    async def _hand_over(self, numbers: range) -> None:
        """As a client does: until it is accepted."""
        numbered = dict(zip(numbers, texts.shorts(len(numbers)), strict=True))
        while True:
            try:
                at = await accepted(self.client, NAME, numbered)
            except httpx.HTTPError as error:
                if isinstance(error, httpx.HTTPStatusError) and error.response.status_code < LATER:
                    raise
                self.refused += 1
                await asyncio.sleep(AGAIN_S)
                continue
            self.since[numbers[0]] = at
            self.acknowledged += numbers
            self.watch.expect(numbers[0], at)
            return

    def lags_s(self, since: float) -> list[tuple[float, float]]:
        """Of the watched ones that were accepted since then, until the first that was not found yet."""
        found = []
        for number, at in list(self.since.items()):
            if at < since:
                continue
            if number not in self.watch.lags_s:
                break
            found.append((at, self.watch.lags_s[number]))
        return found

    async def recovered(self, killed: float, level_s: float) -> float | None:
        """Seconds from a kill until so many in a row were found as soon as before; None: never."""
        while time.perf_counter() - killed < RECOVERED_S_MAX:
            since = settled(self.lags_s(killed), level_s)
            if since is not None:
                return since - killed
            await asyncio.sleep(0.1)
        return None


def settled(lags: Sequence[tuple[float, float]], level_s: float) -> float | None:
    """When the first of so many in a row was accepted whose p95 is at the level; `lags` are times and lags."""
    for start in range(len(lags) - IN_A_ROW + 1):
        row = lags[start : start + IN_A_ROW]
        if percentile([lag for _, lag in row], 0.95) <= level_s:
            return row[0][0]
    return None


async def kill(target: Target, tables: Path, kills: Kills) -> dict[str, Any]:
    """Kill one after the other, each when the one before is forgotten; then count what was acknowledged."""
    async with (
        watching(target, NAME, patient=True) as (client, watch),
        asyncio.TaskGroup() as group,
    ):
        stream = Stream(client, watch, kills)
        streaming = group.create_task(stream.run())
        await asyncio.sleep(kills.unmeasured_s)
        began = time.perf_counter()
        await asyncio.sleep(kills.before_s)
        before = [lag for _, lag in stream.lags_s(began)]
        level_s = percentile(before, 0.95)
        found = []
        for role in kills.victims:
            caught = await asyncio.to_thread(_kill, target, role, tables)
            killed = time.perf_counter()
            recovered_s = await stream.recovered(killed, level_s)
            lags = [lag for _, lag in stream.lags_s(killed)]
            worst_ms = max(lags, default=0.0) * 1e3
            found.append(
                {
                    "role": role,
                    "in_flush": caught,
                    "recovered_s": recovered_s,
                    "lag_max_ms": worst_ms,
                }
            )
        stream.stopped = True
        await streaming
        unfound = await watch.emptied()
        counted = await _counted(watch, stream)
    return {
        "kills": found,
        "killed_in_flush": sum(one["in_flush"] for one in found),
        "acknowledged": len(stream.acknowledged),
        "refused": stream.refused,
        "before_ms": lags_ms(before),
        "never_recovered": sum(one["recovered_s"] is None for one in found),
        "lost": counted["missing"],
        "duplicates": counted["twice"],
        "probes_missing": unfound,
    }


async def _counted(watch: Watch, stream: Stream) -> dict[str, int]:
    """What is acknowledged is found in the end; how much is not, when nothing more comes."""
    until = time.perf_counter() + LOST_S
    while True:
        found = await watch.count(sorted(stream.acknowledged))
        if not found["missing"] or time.perf_counter() > until:
            return found
        await asyncio.sleep(1)


def _kill(target: Target, role: str, tables: Path) -> bool:
    """`kill -9` of the process of a role; whether a flush of it had written and not committed."""
    pid = _process(target, role)
    caught = role == "upserter" and _stopped_in_flush(pid, tables)
    os.kill(pid, signal.SIGKILL)
    return caught


def _process(target: Target, role: str) -> int:
    """The process of a role, once there is one: Ray changes the names of its processes in place."""
    if target.pid is None:
        raise ValueError("a server that was not started here")
    until = time.monotonic() + RECOVERED_S_MAX
    while time.monotonic() < until:
        for one in processes.tree(target.pid):
            if processes.role(one.pid) == role:
                return one.pid
        time.sleep(0.05)
    raise RuntimeError(f"there is no {role}")


def _stopped_in_flush(pid: int, tables: Path) -> bool:
    """Stop a process when it has written data that no version names; False: it was not seen to."""
    until = time.monotonic() + CAUGHT_S_MAX
    while time.monotonic() < until:
        if uncommitted(tables):
            os.kill(pid, signal.SIGSTOP)
            _await_stop(pid)
            if uncommitted(tables):
                return True
            os.kill(pid, signal.SIGCONT)
        time.sleep(LOOK_S)
    return False


def _await_stop(pid: int) -> None:
    """Until each of its threads stands. Raises FileNotFoundError when it has ended."""
    tasks = Path("/proc", str(pid), "task")
    while any(_state(task) not in "TtZX" for task in tasks.iterdir()):
        time.sleep(LOOK_S)


def _state(task: Path) -> str:
    try:
        return (task / "stat").read_text().rpartition(")")[2].split()[0]
    except OSError:  # this thread has ended
        return "X"


def uncommitted(tables: Path) -> bool:
    """Whether some table's newest file of data is younger than its newest version."""
    return any(
        _newest(table / "data") > _newest(table / "_versions") for table in tables.glob("*.lance")
    )


def _newest(folder: Path) -> int:
    try:
        return max((one.stat().st_mtime_ns for one in os.scandir(folder)), default=0)
    except FileNotFoundError:  # it has no data yet, or a file was cleaned away meanwhile
        return 0
