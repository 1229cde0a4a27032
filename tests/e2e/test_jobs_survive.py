"""A bulk job while its processes are killed (`kill -9`) at random moments: nothing lost, nothing twice.

A short version by default; `CHAOS_KILLS=50 CHAOS_ITEMS=5000` makes it the long one.
"""

import os
import random
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.e2e.conftest import Served, descendants, start, stop


pytestmark = [pytest.mark.chaos, pytest.mark.timeout(7200)]

KILLS = int(os.environ.get("CHAOS_KILLS", "6"))
ITEMS = int(os.environ.get("CHAOS_ITEMS", "600"))
JOB_ITEMS = 500
ROLES = {
    "worker": "ServeReplica:headrace:worker-items",
    "store": "StoreActor",
    "upserter": "UpserterActor",
    "embedder": "ServeReplica:headrace:embedder-default",
    "ingress": "ServeReplica:headrace:ingress",
    "cluster": "",
}
"""What is killed, with the word in its process's title; the last one is everything."""

PAUSE_S = (0.5, 6.0)
QUIET_S_MAX = 300
"""Without any progress for so long, something is stuck."""


@dataclass
class Chaos:
    """A service that is killed in parts, and once more started when all of it was."""

    data_dir: Path
    served: Served
    rng: random.Random = field(default_factory=lambda: random.Random(4))  # noqa: S311  repeatable
    killed: dict[str, int] = field(default_factory=dict)

    def kill(self, role: str) -> bool:
        """`kill -9` of one role's processes; False when none lives just now."""
        below = descendants(self.served.process.pid)
        if role == "cluster":
            victims = [self.served.process.pid, *below]
        else:
            victims = [pid for pid, title in below.items() if ROLES[role] in title]
        for pid in victims:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        if victims:
            self.killed[role] = self.killed.get(role, 0) + 1
        if role == "cluster":
            self.served.process.wait(60)
            keys = self.served.keys
            self.served = start(self.data_dir)
            self.served.keys = keys
        return bool(victims)

    def call(self, method: str, path: str, body: Any = None) -> dict[str, Any]:
        """Ask until the service answers: what is killed comes back by itself."""
        headers = {"authorization": f"Bearer {self.served.key}"}
        until = time.monotonic() + QUIET_S_MAX
        while True:
            try:
                answer = httpx.request(
                    method, f"{self.served.url}{path}", json=body, headers=headers, timeout=30
                )
                if answer.status_code < 429:
                    assert answer.is_success, answer.text
                    found: dict[str, Any] = answer.json()
                    return found
            except httpx.TransportError:
                pass
            assert time.monotonic() < until, f"{method} {path} is not answered any more"
            time.sleep(0.5)


@pytest.fixture
def chaos(tmp_path: Path) -> Iterator[Chaos]:
    data_dir = tmp_path / "data"
    whole = Chaos(data_dir, start(data_dir))
    yield whole
    stop(whole.served)


def documents(start_at: int, count: int) -> list[dict[str, Any]]:
    """Short texts; each tenth is long enough for several chunks."""
    return [
        {
            "id": f"d{n}",
            "text": f"Document number {n} tells of river {n % 97}. " * (60 if n % 10 == 0 else 1),
        }
        for n in range(start_at, start_at + count)
    ]


def test_a_job_survives_the_kill_of_everything(chaos: Chaos, record_property: Any) -> None:
    chaos.call("POST", "/v1/collections", {"name": "chaos", "model": "all-MiniLM-L6-v2"})
    jobs = []
    for at in range(0, ITEMS, JOB_ITEMS):
        body = {
            "kind": "documents",
            "collection": "chaos",
            "items": documents(at, min(JOB_ITEMS, ITEMS - at)),
        }
        jobs.append(chaos.call("POST", "/v1/jobs", body)["id"])
    roles = list(ROLES)
    while (number := sum(chaos.killed.values())) < KILLS:
        if number % 2 == 0:  # over the whole job; every second one while the service recovers
            until_processed(chaos, jobs, number * ITEMS // KILLS)
        time.sleep(chaos.rng.uniform(*PAUSE_S))
        chaos.kill(
            roles[number] if number < len(roles) else chaos.rng.choice(roles[:-1] * 4 + roles)
        )
    seen = [chaos.call("GET", f"/v1/jobs/{job}") for job in jobs]
    record_property("killed", dict(chaos.killed))
    record_property("left_after_the_last_kill", ITEMS - sum(one["processed"] for one in seen))
    ended = [until_ended(chaos, job) for job in jobs]
    assert [one["state"] for one in ended] == ["completed"] * len(jobs)
    assert sum(one["succeeded"] for one in ended) == ITEMS
    chunks = sum(item["result"]["chunks"] for job in jobs for item in all_items(chaos, job))
    assert chunks > ITEMS  # some documents have several
    assert chaos.call("GET", "/v1/collections/chaos")["records"] == chunks


def until_processed(chaos: Chaos, jobs: list[str], count: int) -> None:
    """Wait for so many items to be done; they must go on."""
    seen, moved = -1, time.monotonic()
    while True:
        now = sum(chaos.call("GET", f"/v1/jobs/{job}")["processed"] for job in jobs)
        if now >= count:
            return
        if now != seen:
            seen, moved = now, time.monotonic()
        assert time.monotonic() - moved < QUIET_S_MAX, f"stuck at {now} of {count}"
        time.sleep(0.5)


def until_ended(chaos: Chaos, job: str) -> dict[str, Any]:
    """Follow a job; it must go on."""
    seen, moved = -1, time.monotonic()
    while True:
        now = chaos.call("GET", f"/v1/jobs/{job}")
        if now["is_complete"]:
            return now
        if now["processed"] != seen:
            seen, moved = now["processed"], time.monotonic()
        assert time.monotonic() - moved < QUIET_S_MAX, f"the job is stuck: {now}"
        time.sleep(0.5)


def all_items(chaos: Chaos, job: str) -> Iterator[dict[str, Any]]:
    """Every item of a job, page by page."""
    after = ""
    while page := chaos.call("GET", f"/v1/jobs/{job}/items?limit=500{after}")["data"]:
        yield from page
        after = f"&after={page[-1]['seq']}"
