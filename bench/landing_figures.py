"""For `bench.landing`: what the service's processes hold meanwhile, and what its writer counted."""

import asyncio
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx

from bench import processes
from bench.load import Target
from serve.config import Buffer


LOOK_S = 1.0
TOLD_S = 20.0
"""The writer tells its counters every 5 s, and Ray every 10."""
PLACES = "prom_metrics_service_discovery.json"
"""Ray's file, in its folder, of where its figures are read."""
FLUSHES = re.compile(r"^ray_headrace_(flushes|flushes_retried)_total\{[^}]*\} (\S+)", re.MULTILINE)
ROLES = ("upserter", "store", "worker", "ingress")
"""Those that a burst of documents goes through; the server as a whole where it is one process."""


class Memory:
    """Looks now and then. It must begin before the load does."""

    def __init__(self, target: Target) -> None:
        self._target = target
        self._seen: dict[str, list[float]] = {}
        self.looks = 0

    async def run(self) -> None:
        """Look until cancelled."""
        while True:
            held: dict[str, float] = {}
            for pid, role in self._processes().items():
                found = processes.memory(pid)
                if found is not None:
                    held[role] = max(held.get(role, 0.0), found.rss_mb)
            for role, each in held.items():
                self._seen.setdefault(role, []).append(each)
            self.looks += 1
            await asyncio.sleep(LOOK_S)

    def _processes(self) -> dict[int, str]:
        every = [] if self._target.pid is None else processes.tree(self._target.pid)
        roles = {one.pid: processes.role(one.pid) for one in every}
        ours = {pid: role for pid, role in roles.items() if role in ROLES}
        return ours or {one.pid: "server" for one in every[:1]}

    def shown(self, marks: Sequence[int]) -> dict[str, Any]:
        """Resident mebibytes by role, of its largest process: before, at most until each of so many looks,
        and what the last stretch added to that. Beside it the buffer's bound.
        """
        found = {}
        for role, seen in self._seen.items():
            most = [max(seen[: max(mark, 1)]) for mark in marks]
            grew = most[-1] - most[-2] if len(most) > 1 else most[-1] - seen[0]
            found[role] = {"before": seen[0], "most": most, "grew_in_the_last": grew}
        return {"bound_mb": Buffer().bytes_max / processes.MEBI, "memory_mb": found}


async def flushes(ray_folder: Path) -> dict[str, float]:
    """All that the service's writer has sent so far, and the share that the index did not take."""
    await asyncio.sleep(TOLD_S)
    places = json.loads((ray_folder / PLACES).read_text(encoding="utf-8"))
    counted = {"flushes": 0.0, "flushes_retried": 0.0}
    async with httpx.AsyncClient(timeout=30) as client:
        for address in (address for place in places for address in place["targets"]):
            for name, value in FLUSHES.findall(
                (await client.get(f"http://{address}/metrics")).text
            ):
                counted[name] += float(value)
    sent = counted["flushes"] + counted["flushes_retried"]
    return {"sent": sent, "failed_share": counted["flushes_retried"] / max(sent, 1)}
