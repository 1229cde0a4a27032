"""House rules that no linter checks, as a ratchet: an exception that is no longer needed fails."""

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest


ROOT = Path(__file__).parents[2]
OURS = ("serve", "deployments", "bench")
BANNED = {"manager", "helper", "helpers", "util", "utils", "base", "abstract", "common"}
ROUTER_METHODS = {"get", "post", "put", "patch", "delete"}
MAY_START_RAY = {"deployments/local.py"}
Function = ast.FunctionDef | ast.AsyncFunctionDef

# rule: place -> reason. Shrinks only.
EXCEPTIONS: dict[str, dict[str, str]] = {}


@cache
def _parse(path: Path) -> ast.Module:
    return ast.parse(path.read_bytes())


def _trees(*folders: str) -> dict[str, ast.Module]:
    paths = (path for folder in folders for path in (ROOT / folder).rglob("*.py"))
    return {path.relative_to(ROOT).as_posix(): _parse(path) for path in sorted(paths)}


def _nodes(kind: type[ast.AST], *folders: str) -> Iterator[tuple[str, Any]]:
    for path, tree in _trees(*folders).items():
        yield from ((path, node) for node in ast.walk(tree) if isinstance(node, kind))


def _lines(node: Function) -> int:
    """Lines of signature and body; the docstring doesn't count."""
    first = node.body[0]
    doc = ast.get_docstring(node) is not None
    return node.end_lineno - node.lineno + 1 - doc * (first.end_lineno - first.lineno + 1)


def _functions() -> Iterator[tuple[str, Function]]:
    for kind in (ast.FunctionDef, ast.AsyncFunctionDef):
        yield from ((f"{path}:{node.name}", node) for path, node in _nodes(kind, *OURS))


def _is_route(place: str, node: Function) -> bool:
    calls = (item.func for item in node.decorator_list if isinstance(item, ast.Call))
    names = {call.attr for call in calls if isinstance(call, ast.Attribute)}
    return place.startswith("serve/api/") and bool(names & ROUTER_METHODS)


def long_modules() -> Iterator[str]:
    for path in _trees(*OURS, "tests"):
        limit = 600 if path.startswith("tests/") else 400
        if len((ROOT / path).read_text(encoding="utf-8").splitlines()) > limit:
            yield path


def long_functions() -> Iterator[str]:
    yield from (place for place, node in _functions() if _lines(node) > 50)


def long_route_handlers() -> Iterator[str]:
    for place, node in _functions():
        if _is_route(place, node) and _lines(node) > 20:
            yield place


def many_parameters() -> Iterator[str]:
    for place, node in _functions():
        every = (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)
        if len([item for item in every if item.arg not in ("self", "cls")]) > 7:
            yield place


def wide_protocols() -> Iterator[str]:
    for path, node in _nodes(ast.ClassDef, *OURS):
        is_protocol = any(isinstance(b, ast.Name) and b.id == "Protocol" for b in node.bases)
        if is_protocol and sum(isinstance(item, Function) for item in node.body) > 6:
            yield f"{path}:{node.name}"


def generic_names() -> Iterator[str]:
    for path in _trees(*OURS):
        if BANNED & set(re.split(r"[/_.]", path)):
            yield path
    for path, node in _nodes(ast.ClassDef, *OURS):
        if BANNED & {word.lower() for word in re.findall(r"[A-Z]+[a-z]*", node.name)}:
            yield f"{path}:{node.name}"


def ray_started_elsewhere() -> Iterator[str]:
    for path, node in _nodes(ast.Attribute, "serve", "deployments"):
        is_init = (
            node.attr == "init" and isinstance(node.value, ast.Name) and node.value.id == "ray"
        )
        if is_init and path not in MAY_START_RAY:
            yield path


def undocumented() -> Iterator[str]:
    for path, tree in _trees("serve").items():
        if ast.get_docstring(tree) is None:
            yield path
        for node in tree.body:
            public = isinstance(node, ast.ClassDef | Function) and not node.name.startswith("_")
            if public and ast.get_docstring(node) is None:
                yield f"{path}:{node.name}"


RULES = (
    long_modules,
    long_functions,
    long_route_handlers,
    many_parameters,
    wide_protocols,
    generic_names,
    ray_started_elsewhere,
    undocumented,
)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_house_rule(rule):
    found, excepted = set(rule()), set(EXCEPTIONS.get(rule.__name__, ()))
    assert not found - excepted, "split it, rename it, or add a named exception with its reason"
    assert not excepted - found, "these exceptions are no longer needed: remove them"


METHODS = "".join(f"    def m{i}(self): ...\n" for i in range(7))
PLANTED = {
    "long_modules": ("bench/long.py", "x = 1\n" * 401),
    "long_functions": ("deployments/a.py", "async def f():\n" + "    pass\n" * 50),
    "long_route_handlers": (
        "serve/api/a.py",
        "@router.post('/x')\nasync def f():\n" + "    pass\n" * 20,
    ),
    "many_parameters": ("serve/a.py", "def f(a, b, c, d, *, e, g, h, i): ...\n"),
    "wide_protocols": ("serve/ports.py", f"class P(Protocol):\n{METHODS}"),
    "generic_names": ("serve/a.py", "class JobManager: ...\n"),
    "ray_started_elsewhere": ("deployments/a.py", "ray.init()\n"),
    "undocumented": ("serve/a.py", "'A module.'\n\n\nclass Thing: ...\n"),
}


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_a_planted_breach_is_found(rule, tmp_path, monkeypatch):
    path, source = PLANTED[rule.__name__]
    (tmp_path / path).parent.mkdir(parents=True)
    (tmp_path / path).write_text(source, encoding="utf-8")
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    assert [place.split(":")[0] for place in rule()] == [path]


def test_exceptions_name_a_rule_and_give_a_reason():
    assert set(EXCEPTIONS) <= {rule.__name__ for rule in RULES}
    assert all(reason for places in EXCEPTIONS.values() for reason in places.values())


def test_tests_do_not_shadow_our_packages():
    """An `__init__.py` or a folder called `serve` under tests would be imported in place of ours."""
    folders = {path.name for path in (ROOT / "tests").rglob("*") if path.is_dir()}
    assert not folders & {"serve", "deployments"}
    assert not list((ROOT / "tests").rglob("__init__.py"))


def test_test_files_have_unique_names():
    names = sorted(path.name for path in (ROOT / "tests").rglob("test_*.py"))
    assert names == sorted(set(names))
