"""The wheel, the naming of our packages beside `ray.serve`, and what is pinned."""

import os
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[2]
HEAVY = (
    "ray",
    "torch",
    "onnxruntime",
    "pinecone",
    "qdrant_client",
    "sentence_transformers",
    "lancedb",
    "pyarrow",
)

LATE = ("sqlalchemy", "psycopg", *HEAVY[1:])
"""What processes import in their constructors, when they import it at all."""


def _python(code: str, cwd: Path, path: Path) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": str(path)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", folder],
        cwd=ROOT,
        capture_output=True,
        timeout=60,
        check=True,
    )
    (built,) = folder.glob("headrace-*.whl")
    return built


def test_the_wheel_holds_exactly_two_packages(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"serve", "deployments"}
    assert {"serve/py.typed", "serve/admission/exchange.lua"} <= set(names)
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_both_packages_import_from_the_wheel_and_serve_is_not_rays(wheel, tmp_path):
    code = (
        "import serve, deployments, ray.serve, sys\n"
        "assert serve is sys.modules['serve'] and serve is not ray.serve\n"
        "print(serve.__file__, deployments.__file__, sep='\\n')"
    )
    places = _python(code, tmp_path, wheel).splitlines()
    assert [place.startswith(str(wheel)) for place in places] == [True, True]


def test_the_api_is_light(tmp_path):
    """Routes can be tested and documented without a cluster, a model or an index."""
    code = f"import serve.api.app, sys; print([m for m in {HEAVY} if m in sys.modules])"
    assert _python(code, tmp_path, ROOT) == "[]"


@pytest.mark.parametrize(
    ("modules", "without"),
    [
        ("deployments.ledger, deployments.upserter, deployments.store", ("ray.serve", *LATE)),
        ("deployments.app", LATE),
        ("deployments.local", LATE),
    ],
)
def test_a_process_that_starts_imports_only_what_it_needs(modules, without, tmp_path):
    """Each of these costs a core half a second and more, in up to nine processes beside each other."""
    code = f"import {modules}, sys; print([m for m in {without} if m in sys.modules])"
    assert _python(code, tmp_path, ROOT) == "[]"


def test_constraints_pin_every_dependency():
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    assert [
        line for line in lines if not re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.]+", line)
    ] == []
    pinned = {re.sub(r"[._-]+", "-", line.split("==")[0]).lower() for line in lines}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = [name for group in project["optional-dependencies"].values() for name in group]
    named = (re.match(r"[A-Za-z0-9._-]+", text)[0] for text in project["dependencies"] + extras)
    assert {re.sub(r"[._-]+", "-", name).lower() for name in named} <= pinned
