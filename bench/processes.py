"""What the processes of a server use, as Linux counts it: CPU, memory, and who they are.

A server is one process that was started and all that came of it. `/proc` is read and nothing is
asked of the server, so that a look costs it nothing.
"""

import os
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median


PROC = Path("/proc")
TICKS = os.sysconf("SC_CLK_TCK")
MEBI = 2**20

ROLES: Sequence[tuple[str, str]] = (
    (r"ray::ServeReplica:[^:]*:ingress", "ingress"),
    (r"ray::ServeReplica:[^:]*:embedder", "embedder"),
    (r"ray::ServeReplica:[^:]*:worker", "worker"),
    (r"ray::ServeReplica", "other replica"),
    (r"ray::ProxyActor|haproxy", "Serve's proxy"),
    (r"ray::ServeController", "Serve's controller"),
    (r"ray::Store", "store"),
    (r"ray::Upserter", "upserter"),
    (r"ray::Ledger", "ledger"),
    (r"ray::(Dashboard|RuntimeEnv)Agent", "Ray: agents"),
    (r"ray::IDLE", "Ray: idle worker"),
    (r"ray::", "Ray: other"),
    (r"/gcs_server", "Ray: control store"),
    (r"/raylet ", "Ray: raylet"),
    (r"ray.dashboard", "Ray: dashboard"),
    (r"/(log_)?monitor\.py", "Ray: monitors"),
)
"""What a command line matches, and the role of such a process; the first that matches holds."""


@dataclass(frozen=True, slots=True)
class Process:
    """`cpu_s` is its own and that of its children that have ended; `began_s` counts from boot."""

    pid: int
    parent: int
    cpu_s: float
    began_s: float


@dataclass(frozen=True, slots=True)
class Memory:
    """Resident mebibytes, and the same with shared pages counted in part (PSS): these add up."""

    rss_mb: float
    pss_mb: float


def parse(stat: str) -> Process:
    """One line of `/proc/PID/stat`. Raises ValueError or IndexError when it is no such line."""
    # The name in brackets may hold anything, brackets and spaces too.
    pid, rest = stat.split(maxsplit=1)[0], stat.rpartition(")")[2].split()
    return Process(
        int(pid), int(rest[1]), sum(map(int, rest[11:15])) / TICKS, int(rest[19]) / TICKS
    )


def tree(root: int, proc: Path = PROC) -> list[Process]:
    """A process and all that descend from it, `root` first; empty when it has ended."""
    children: dict[int, list[Process]] = {}
    found: list[Process] = []
    for one in _every(proc):
        children.setdefault(one.parent, []).append(one)
        if one.pid == root:
            found.append(one)
    for one in found:  # it grows while it is walked
        found += children.get(one.pid, [])
    return found


def _every(proc: Path) -> Iterator[Process]:
    for stat in proc.glob("[0-9]*/stat"):
        try:
            yield parse(stat.read_text(errors="replace"))
        except OSError:  # it has just ended
            continue


def cpu_s(root: int, proc: Path = PROC) -> float:
    """CPU seconds of a server until now; what an ended process used has gone to its parent."""
    return sum(one.cpu_s for one in tree(root, proc))


def memory(pid: int, proc: Path = PROC) -> Memory | None:
    """What one process holds; None when it has ended."""
    try:
        rollup = (proc / str(pid) / "smaps_rollup").read_text()
    except OSError:
        return None
    found = {
        name: int(kib) for name, kib in re.findall(r"^(Rss|Pss): +(\d+) kB", rollup, re.MULTILINE)
    }
    if len(found) < 2:
        return None
    return Memory(found["Rss"] * 1024 / MEBI, found["Pss"] * 1024 / MEBI)


def role(pid: int, proc: Path = PROC) -> str | None:
    """What one of Ray's processes is for, by its command line; None for others."""
    try:
        words = (proc / str(pid) / "cmdline").read_bytes().replace(b"\0", b" ").decode()
    except OSError:
        return None
    found = (name for pattern, name in ROLES if re.search(pattern, words, re.IGNORECASE))
    return next(found, None)


@dataclass(frozen=True, slots=True)
class Clock:
    """CPU seconds until now: of the machine's cores, and of ours by role; `at` is monotonic."""

    at: float
    machine_s: float
    roles_s: Mapping[str, float]

    @classmethod
    def read(cls) -> "Clock":
        """Now. The first process is this program, which makes the load."""
        roles: dict[str, float] = {}
        for number, one in enumerate(tree(os.getpid())):
            name = "load program" if number == 0 else role(one.pid) or "other"
            roles[name] = roles.get(name, 0.0) + one.cpu_s
        return cls(time.monotonic(), _machine_s(), roles)

    def cores(self, before: "Clock") -> dict[str, float]:
        """Cores that were busy since then: the machine's, and by role."""
        passed = self.at - before.at
        found = {"machine": (self.machine_s - before.machine_s) / passed}
        for name, used_s in sorted(self.roles_s.items()):
            found[name] = max(used_s - before.roles_s.get(name, 0.0), 0.0) / passed
        return found


def _machine_s(proc: Path = PROC) -> float:
    """CPU seconds of all cores that were neither idle nor waiting for a disk."""
    words = (proc / "stat").read_text().split("\n", 1)[0].split()[1:9]
    user, nice, system, _idle, _wait, *rest = map(int, words)
    return (user + nice + system + sum(rest)) / TICKS


def median_cores(turns: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Of several measurements, role by role; one that did not appear in a turn counts as none."""
    roles = sorted({name for turn in turns for name in turn})
    return {name: median([turn.get(name, 0.0) for turn in turns]) for name in roles}
