"""How soon can what was written be found, how fast does it land, and what survives?

    python -m bench.landing                      # all parts, about fifteen minutes
    python -m bench.landing --only bulk,rot      # some of them
    python -m bench.landing --smoke              # under 30 s, without Ray and `kill`

`bulk`: upserts of 1, 50 and 1,000 records by turns, for each index that can run here. `flushes`: a burst
through the service's own writer onto LanceDB, in this process. `trickle` and `burst`: the whole service over
HTTP, with the fake engine and LanceDB. `kill`: the same, whose writer is killed in mid-flush, and its Store.
`faults`: the writer over an index that is down, that throttles, and that refuses one record in a hundred.
`switch`: from bulk to single writes while records wait. `rot`: 300 single-row writes, with compaction and
without it, while a second writer is forced to start six times.
"""

import asyncio
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bench import landing_parts as parts
from bench import landing_service as service
from bench import servers
from bench.landing_figures import flushes
from bench.landing_indexes import present
from bench.landing_kill import Kills, kill
from bench.landing_parts import Size
from bench.landing_service import Load
from bench.landing_switch import switch
from bench.load import Target
from bench.report import arguments, finish, ratios, spread, table
from serve.config import Index


PARTS = ("bulk", "flushes", "faults", "switch", "rot", "trickle", "burst", "kill")
ROTTEN = ("write_ratio", "upsert_ratio", "query_ratio")
INDEX = Index().uri
"""The folder of tables under the service's own."""
SMOKE = Size(
    sizes=(1, 50),
    singles=3,
    bulk=100,
    burst=2000,
    down_s=0.5,
    storm_s=0.5,
    pause_s=0.5,
    buffered=100,
    poison=200,
    rows=200,
    writes=6,
    takeover=3,
    queries=3,
)
SMOKE_LOAD = Load(trickle=15, burst=600, bursts=2, request=200, probes=20)
SMOKE_KILLS = Kills(victims=("upserter",), before_s=5)


def bulk(size: Size, rounds: int) -> dict[str, Any]:
    """Every index in every round, and the ratios of larger upserts to single ones round by round."""
    rates: dict[str, list[dict[int, float]]] = {name: [] for name in present()}
    for number in range(rounds):
        for name, found in rates.items():
            found.append(asyncio.run(parts.bulk(name, size)))
        _say(f"bulk: round {number + 1} done")
    return {
        name: {
            "records_s": {str(each): spread([one[each] for one in found]) for each in size.sizes},
            "ratio": {
                str(each): ratios([one[each] for one in found], [one[1] for one in found])
                for each in size.sizes[1:]
            },
        }
        for name, found in rates.items()
    }


def faults(size: Size) -> dict[str, Any]:
    """One after the other."""
    found = {}
    for part in (parts.outage, parts.storm, parts.poison):
        found[part.__name__] = asyncio.run(part(size))
        _say(f"faults: {part.__name__} done")
    return found


def rot(size: Size, rounds: int) -> dict[str, Any]:
    """With compaction and without, by turns."""
    ways: dict[str, list[dict[str, Any]]] = {"compacted": [], "uncompacted": []}
    for number in range(rounds):
        for name, found in ways.items():
            found.append(asyncio.run(parts.rot(size, compacted=name == "compacted")))
        _say(f"rot: round {number + 1} done")
    return {
        name: {
            "duplicates": sum(one["duplicates"] for one in found),
            "lost": sum(one["lost"] for one in found),
            **{word: spread([one[word] for one in found]) for word in ROTTEN},
            "rounds": found,
        }
        for name, found in ways.items()
    }


def served(target: Target, ray: Path | None, load: Load, only: Sequence[str]) -> dict[str, Any]:
    """The parts that go over HTTP; Ray's folder says what the writer counted."""
    found: dict[str, Any] = {}
    for name, part in (("trickle", service.trickle), ("burst", service.burst)):
        if name in only:
            found[name] = asyncio.run(part(target, load))
            _say(f"{name} done")
    if ray is not None:
        found["served_flushes"] = asyncio.run(flushes(ray))
    return found


def shown(result: dict[str, Any]) -> str:
    """The result for people."""
    rows: list[list[object]] = []
    for name, one in result.get("bulk", {}).items():
        rows += [[f"bulk {name}: {each} over 1", ratio] for each, ratio in one["ratio"].items()]
    for name in ("trickle", "burst"):
        if name in result:
            rows += [[f"{name}: lag {word} ms", ms] for word, ms in result[name]["lag_ms"].items()]
            rows.append([f"{name}: lost", result[name]["lost"]])
    rows += [
        [f"burst: {role} in the last one, MiB more", one["grew_in_the_last"]]
        for role, one in result.get("burst", {}).get("memory_mb", {}).items()
    ]
    if "served_flushes" in result:
        rows.append(["trickle, burst: failed share", result["served_flushes"]["failed_share"]])
    if "flushes" in result:
        one = result["flushes"]
        rows += [["flushes: failed share", one["failed_share"]], ["flushes: lost", one["lost"]]]
        rows.append(["flushes: mean s", one["flush_s"]["mean"]])
    for name, one in result.get("faults", {}).items():
        rows.append([f"{name}: lost", one["lost"]])
        rows += [
            [f"{name}: {word}", one[word]] for word in ("recovered_s", "rejected") if word in one
        ]
    for name, one in result.get("rot", {}).items():
        rows += [[f"rot {name}: {word}", one[word]] for word in ROTTEN]
        rows.append([f"rot {name}: duplicates", one["duplicates"]])
    if "switch" in result:
        words = ("buffered", "held_at_first_single", "records_a_single", "lost", "not_the_last")
        rows += [[f"switch: {word}", result["switch"][word]] for word in words]
    if "kill" in result:
        one = result["kill"]
        rows += [
            [f"kill {at + 1}, {each['role']}: recovered s", each["recovered_s"]]
            for at, each in enumerate(one["kills"])
        ]
        words = ("killed_in_flush", "acknowledged", "lost", "duplicates")
        rows += [[f"kill: {word}", one[word]] for word in words]
    return table(("what", "figure"), rows)


def top(result: dict[str, Any]) -> dict[str, Any]:
    """The figures that a reader looks for first."""
    found: dict[str, Any] = {}
    if "bulk" in result:
        found["bulk_ratio"] = {name: one["ratio"] for name, one in result["bulk"].items()}
    if "trickle" in result:
        lags = result["trickle"]["lag_ms"]
        found |= {"lag_p50_ms": lags["p50"], "lag_p95_ms": lags["p95"]}
    single = ("flushes", "switch", "trickle", "burst", "kill")
    counted = [result[name] for name in single if name in result]
    counted += [one for name in ("faults", "rot") for one in result.get(name, {}).values()]
    return found | {
        word: sum(one.get(word, 0) for one in counted) for word in ("lost", "duplicates")
    }


def killed(kills: Kills) -> dict[str, Any]:
    """The whole service, a new one, which dies in parts."""
    with _whole() as (target, folder):
        return asyncio.run(kill(target, folder / INDEX, kills))


@contextmanager
def _whole() -> Iterator[tuple[Target, Path]]:
    """The service with all its processes, and the folder that has its data and Ray's."""
    with (
        servers.headrace_recipe("default", servers.with_fake_model) as recipe,
        servers.started(recipe) as target,
    ):
        yield target, recipe.folder


@contextmanager
def _server(*, smoke: bool) -> Iterator[tuple[Target, Path | None]]:
    if smoke:
        with servers.ceiling(servers.with_fake_model) as target:
            yield target, None
    else:
        with _whole() as (target, folder):
            yield target, folder / "ray"


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main(words: Sequence[str] | None = None) -> None:
    """Measure, show, and end with one line of JSON."""
    parser = arguments(__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", help="parts, with commas between")
    options = parser.parse_args(words)
    every = [name for name in PARTS if not (options.smoke and name == "kill")]
    only = options.only.split(",") if options.only else every
    if unknown := set(only) - set(PARTS):
        parser.error(f"there is no part {min(unknown)!r}")
    size, load = (SMOKE, SMOKE_LOAD) if options.smoke else (Size(), Load())
    rounds = 1 if options.smoke else options.rounds
    result: dict[str, Any] = {}
    if "bulk" in only:
        result["bulk"] = bulk(size, rounds)
    if "flushes" in only:
        result["flushes"] = asyncio.run(parts.flushes(size))
    if "faults" in only:
        result["faults"] = faults(size)
    if "switch" in only:
        result["switch"] = asyncio.run(switch(size.buffered, size.singles))
    if "rot" in only:
        result["rot"] = rot(size, rounds)
    if {"trickle", "burst"} & set(only):
        with _server(smoke=options.smoke) as (target, ray):
            result |= served(target, ray, load, only)
    if "kill" in only:
        result["kill"] = killed(SMOKE_KILLS if options.smoke else Kills())
    print(shown(result))
    where = "in process" if options.smoke else "default"
    finish("landing", where, {"rounds": rounds, **top(result), **result}, options.out)


if __name__ == "__main__":
    main()
