"""The servers that a benchmark may set the service beside, by name.

plain: the plainest server of the same model (`bench.plain`). ceiling: the service in one process,
without Ray (`bench.ceiling`). handles: the service with Ray's handles in place of conduits.
infinity, infinity-bfloat16, infinity-onnx: Infinity with its default engine, with the same in bfloat16,
and with ONNX Runtime (`bench.infinity`), from the virtual environments that options tell.
"""

import argparse
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from bench import infinity, servers
from bench.infinity import Engine, infinity_recipe
from bench.servers import Recipe
from deployments.places import PROFILES
from serve.config.embedding import PRECISIONS


ENGINES: Mapping[str, tuple[str, Engine, str]] = {
    "infinity": ("infinity", "torch", "auto"),
    "infinity-bfloat16": ("infinity", "torch", "bfloat16"),
    "infinity-onnx": ("infinity-onnx", "optimum", "auto"),
}
"""Whose virtual environment a peer takes, its engine, and the numbers it computes with."""
NAMES = ("plain", "ceiling", "handles", *ENGINES)


def add_options(parser: argparse.ArgumentParser) -> None:
    """`--profile` and `--precision` of the service, and where Infinity is."""
    parser.add_argument("--profile", choices=list(PROFILES), default="default")
    parser.add_argument(
        "--precision",
        choices=sorted(PRECISIONS["onnx"]),
        default="auto",
        help="what the models of headrace, handles and ceiling multiply",
    )
    for name in {venv: None for venv, _, _ in ENGINES.values()}:
        parser.add_argument(
            f"--{name}", type=Path, metavar="VENV", help=f"virtual environment of --peer {name}"
        )


def check(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """End the program when a peer is named twice, or is Infinity and nobody has said where it is."""
    names: list[str] = options.peer
    if len(set(names)) < len(names):
        parser.error("each --peer once")
    for name in names:
        if name in ENGINES and place(name, options) is None:
            parser.error(f"--peer {name} needs --{ENGINES[name][0]} VENV")


def place(name: str, options: argparse.Namespace) -> Path | None:
    """The virtual environment of a peer that has one of its own."""
    venv = ENGINES[name][0] if name in ENGINES else name
    found: Path | None = vars(options).get(venv.replace("-", "_"))
    return found


def versions(options: argparse.Namespace) -> dict[str, dict[str, str]]:
    """Of what the peers run on that do not run on our own packages."""
    places = {name: place(name, options) for name in options.peer if name in ENGINES}
    return {name: infinity.versions(venv) for name, venv in places.items() if venv}


@contextmanager
def recipe(name: str, options: argparse.Namespace) -> Iterator[Recipe]:
    """How the service ("headrace") or a peer is started. Raises StartFailed."""
    precision = servers.in_precision(options.precision)
    if name == "headrace":
        made = servers.headrace_recipe(options.profile, precision)
    elif name == "handles":
        change = servers.both(precision, servers.without_conduits)
        made = servers.headrace_recipe(options.profile, change, name)
    elif name == "plain":
        made = servers.plain_recipe(name)
    elif name == "ceiling":
        made = servers.ceiling_recipe(name, precision)
    else:
        _, engine, numbers = ENGINES[name]
        made = infinity_recipe(name, place(name, options) or Path(), engine, numbers)
    with made as found:
        yield found
