"""What every benchmark program shares: statistics over rounds, where it ran, and how it ends.

The statistics are pure. A program prints a table for people and then `finish`es with one line of
JSON, the same that `--out` keeps as a file.
"""

import argparse
import importlib.metadata
import json
import math
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any


ROOT = Path(__file__).parents[1]
PACKAGES = (
    "headrace",
    "ray",
    "torch",
    "sentence-transformers",
    "onnxruntime",
    "numpy",
    "fastapi",
)
DIGITS = 4
"""Significant digits in results: more would be noise."""
LOAD_BEFORE = os.getloadavg()[0]
"""Processes that wanted a core in the minute before this program began: others' load."""


def percentile(values: Sequence[float], part: float) -> float:
    """The nearest-rank percentile, which is always one of the values.

    Raises ValueError when there are none, or `part` is outside 0..1.
    """
    if not values or not 0 <= part <= 1:
        raise ValueError(f"percentile {part} of {len(values)} values")
    return sorted(values)[max(math.ceil(part * len(values)) - 1, 0)]


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, least and greatest of the rounds. Raises ValueError when there are none."""
    if not values:
        raise ValueError("no rounds")
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def ratios(ours: Sequence[float], theirs: Sequence[float]) -> dict[str, float]:
    """The spread of ours / theirs, round by round: neighbours in time share the machine's mood.

    Raises ValueError when the rounds differ in number.
    """
    return spread([a / b for a, b in zip(ours, theirs, strict=True)])


def jain(values: Sequence[float]) -> float:
    """Jain's fairness index: 1 when all get the same, 1/n when one gets everything.

    Raises ValueError when nobody got anything.
    """
    squares = sum(value * value for value in values)
    if not squares:
        raise ValueError("nobody was served")
    return sum(values) ** 2 / (len(values) * squares)


def rounded(value: Any) -> Any:
    """The same tree with every float cut to `DIGITS` significant digits.

    Raises ValueError for a number that is not finite: JSON has no word for it.
    """
    if isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError(f"{value} in a result")
        return float(f"{value:.{DIGITS}g}")
    if isinstance(value, Mapping):
        return {key: rounded(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(one) for one in value]
    return value


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Columns wide enough for their longest cell; the first to the left, figures to the right."""
    cells = [list(header), *([_cell(one) for one in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip()
        for row in cells
    ]
    return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:]])


def _cell(value: object) -> str:
    if isinstance(value, dict):  # a spread
        return f"{value['median']:.3g} ({value['min']:.3g}-{value['max']:.3g})"
    return f"{value:.{DIGITS}g}" if isinstance(value, float) else str(value)


def arguments(text: str) -> argparse.ArgumentParser:
    """The options that every program has; `text` is its module's docstring."""
    parser = argparse.ArgumentParser(
        description=text, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--smoke", action="store_true", help="under 30 s: does it still run?")
    parser.add_argument("--out", type=Path, metavar="FILE", help="also write the JSON here")
    return parser


def finish(program: str, profile: str, result: Mapping[str, Any], out: Path | None) -> None:
    """Print the result with its circumstances as one line of JSON, and keep it in `out`."""
    whole = rounded({"program": program, "profile": profile, **result, **circumstances()})
    if out is not None:
        out.write_text(json.dumps(whole, indent=2) + "\n", encoding="utf-8")
    sys.stderr.flush()
    print(json.dumps(whole), flush=True)


def circumstances() -> dict[str, Any]:
    """Commit, date, machine and versions. `load_after` counts the benchmark itself."""
    return {
        "commit": _commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": {
            "cores": len(os.sched_getaffinity(0)),
            "cpu": _cpu(),
            "memory_gib": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30,
            "python": platform.python_version(),
            "load_before": LOAD_BEFORE,
            "load_after": os.getloadavg()[0],
        },
        "versions": {name: _version(name) for name in PACKAGES},
    }


def _commit() -> str:
    """The commit, with a plus when files differ from it."""
    try:
        head = _git("rev-parse", "HEAD")
        changed = _git("status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head[:12] + ("+" if changed else "")


def _git(*words: str) -> str:
    done = subprocess.run(["git", *words], cwd=ROOT, check=True, capture_output=True, text=True)
    return done.stdout.strip()


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "absent"
