"""How long does a start take until the first request can be served, and what does an idle server hold?

    python -m bench.start                                   # headrace serve, beside plain
    python -m bench.start --peer plain --peer infinity --infinity VENV
    python -m bench.start --smoke                           # two plain servers, no Ray

Servers start one after the other, each alone and over an empty data folder, for some rounds; their
programs and models are in the page cache. Time runs from the command to the first 200 of the route
that says a server is ready. Then it is left alone, and what it holds and uses is counted, process by
process. All is seen from outside: answers over HTTP, files, `/proc`.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench import peers, processes, servers
from bench.processes import Process
from bench.report import arguments, finish, spread, table
from bench.servers import Health, Recipe


SETTLE_S = 5.0
"""Between ready and the count: warm-ups that go on, and first rounds of timers."""
LOOK_EVERY_S = 0.05
ASK_S_MAX = 1.0
"""Ray's proxy keeps a request until there is a replica for it."""
HTTP_OK = 200
SAID = b"Headrace is ready"
"""What `headrace serve` prints in the end."""


@dataclass(frozen=True, slots=True)
class Look:
    """What can be seen of a server that starts, at one moment."""

    health: Health | None
    files: Mapping[str, bytes]
    """The log, and `cluster.json`, which `headrace serve` writes when Ray is up; empty if absent."""


MARKS: Mapping[str, Callable[[Look], bool]] = {
    "ray": lambda look: bool(look.files["cluster.json"]),
    "http": lambda look: look.health is not None,
    "ingress": lambda look: look.health is not None and look.health.body.startswith(b'{"status'),
    "ready": lambda look: look.health is not None and look.health.status == HTTP_OK,
    "said": lambda look: SAID in look.files[servers.LOG],
}
"""Phases of a start, and how the end of each is known: Ray is up; something listens; an ingress
replica answers; every part works; the command says so.
"""
OWN = tuple(MARKS)
OTHERS = ("http", "ready")


@dataclass(frozen=True, slots=True)
class Group:
    """All processes of one role, together; `began_s` is when the first of them came up."""

    count: int
    rss_mb: float
    pss_mb: float
    began_s: float


@dataclass(slots=True)
class Start:
    """One start: seconds to the end of each phase, and what the idle server held and used."""

    marks_s: dict[str, float] = field(default_factory=dict)
    groups: Mapping[str, Group] = field(default_factory=dict)
    idle_cores: float = 0.0

    @property
    def rss_mb(self) -> float:
        """All processes; pages that they share are counted for each of them."""
        return sum(one.rss_mb for one in self.groups.values())

    @property
    def pss_mb(self) -> float:
        """All processes; what would be free without them."""
        return sum(one.pss_mb for one in self.groups.values())


def watch(recipe: Recipe, phases: Sequence[str], settle_s: float) -> Start:
    """Start a server, follow it, count, and end it. Raises StartFailed."""
    start = Start()
    began = time.monotonic()
    with servers.launched(recipe) as process:

        def done() -> bool:
            look = _look(recipe)
            for phase in phases:
                if phase not in start.marks_s and MARKS[phase](look):
                    start.marks_s[phase] = time.monotonic() - began
            return len(start.marks_s) == len(phases)

        servers.wait(process, recipe, done, every_s=LOOK_EVERY_S)
        time.sleep(settle_s)
        used_s, since = processes.cpu_s(process.pid), time.monotonic()
        start.groups = count(processes.tree(process.pid))
        time.sleep(settle_s)
        start.idle_cores = (processes.cpu_s(process.pid) - used_s) / (time.monotonic() - since)
    return start


def _look(recipe: Recipe) -> Look:
    files = {name: _read(recipe.folder / name) for name in ("cluster.json", servers.LOG)}
    return Look(servers.ask(recipe.ready, ASK_S_MAX), files)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return b""


def count(found: Sequence[Process], proc: Path = processes.PROC) -> dict[str, Group]:
    """A tree's processes by role, the root's is "server"; those that have just ended are left out.

    One without a role of its own has its parent's.
    """
    groups: dict[str, Group] = {}
    roles: dict[int, str] = {}
    for one in found:
        name = processes.role(one.pid, proc) or roles.get(one.parent, "server")
        roles[one.pid] = name
        held = processes.memory(one.pid, proc)
        if held is None:
            continue
        age_s = one.began_s - found[0].began_s
        so_far = groups.get(name, Group(0, 0.0, 0.0, age_s))
        groups[name] = Group(
            so_far.count + 1,
            so_far.rss_mb + held.rss_mb,
            so_far.pss_mb + held.pss_mb,
            min(so_far.began_s, age_s),
        )
    return groups


def describe(starts: Sequence[Start]) -> dict[str, Any]:
    """One server over its rounds; of the groups of processes the medians."""
    roles = dict.fromkeys(role for one in starts for role in one.groups)
    return {
        "ready_s": spread([one.marks_s["ready"] for one in starts]),
        "rss_mb": spread([one.rss_mb for one in starts]),
        "pss_mb": spread([one.pss_mb for one in starts]),
        "idle_cores": spread([one.idle_cores for one in starts]),
        "phases_s": {
            phase: spread([one.marks_s[phase] for one in starts]) for phase in starts[0].marks_s
        },
        "processes": {
            role: {
                key: statistics.median(
                    getattr(one.groups[role], key) for one in starts if role in one.groups
                )
                for key in ("count", "rss_mb", "pss_mb", "began_s")
            }
            for role in roles
        },
    }


def summary(taken: Mapping[str, Sequence[Start]]) -> dict[str, Any]:
    """The JSON's keys: the first server's own figures, then every server's."""
    every = {name: describe(starts) for name, starts in taken.items()}
    return {**next(iter(every.values())), "servers": every}


def shown(result: Mapping[str, Any]) -> str:
    """The result for people."""
    every: Mapping[str, Mapping[str, Any]] = result["servers"]
    whole = [
        [name, *(one[key] for key in ("ready_s", "rss_mb", "pss_mb", "idle_cores"))]
        for name, one in every.items()
    ]
    phases = [
        [name, phase, took]
        for name, one in every.items()
        for phase, took in one["phases_s"].items()
    ]
    parts = [
        [name, role, *(group[key] for key in ("count", "rss_mb", "pss_mb", "began_s"))]
        for name, one in every.items()
        for role, group in one["processes"].items()
    ]
    heads: tuple[tuple[str, ...], ...] = (
        ("server", "ready s", "RSS MiB", "PSS MiB", "cores, idle"),
        ("server", "phase", "ends after s"),
        ("server", "role", "processes", "RSS MiB", "PSS MiB", "since s"),
    )
    return "\n\n".join(map(table, heads, (whole, phases, parts)))


def measure(options: argparse.Namespace, *, rounds: int, settle_s: float) -> dict[str, Any]:
    """Every server once in each round, in the opposite order each second round."""
    names = list("ab") if options.smoke else ["headrace", *options.peer]
    taken: dict[str, list[Start]] = {name: [] for name in names}
    for number in range(rounds):
        for name in names[:: -1 if number % 2 else 1]:
            with _recipe(name, options) as recipe:
                one = watch(recipe, OWN if name == "headrace" else OTHERS, settle_s)
            taken[name].append(one)
            print(f"round {number + 1}: {name} {one.marks_s['ready']:.1f} s", file=sys.stderr)
    return summary(taken)


def _recipe(name: str, options: argparse.Namespace) -> AbstractContextManager[Recipe]:
    return servers.plain_recipe(name, fake=True) if options.smoke else peers.recipe(name, options)


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = arguments(__doc__)
    parser.add_argument(
        "--peer", action="append", choices=peers.NAMES, help="may be given again; default: plain"
    )
    peers.add_options(parser)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args(words)
    options.peer = options.peer or ["plain"]
    peers.check(parser, options)
    return options


def main(words: Sequence[str] | None = None) -> None:
    """Measure, show, and end with one line of JSON."""
    options = parse(words)
    rounds, settle_s = (1, 0.2) if options.smoke else (options.rounds, SETTLE_S)
    try:
        result = measure(options, rounds=rounds, settle_s=settle_s)
    except servers.StartFailed as error:
        sys.exit(f"start: {error}")
    print(shown(result))
    head = {"smoke": options.smoke, "rounds": rounds, "settle_s": settle_s}
    head["peer_versions"] = peers.versions(options)
    finish("start", options.profile, {**head, **result}, options.out)


if __name__ == "__main__":
    main()
