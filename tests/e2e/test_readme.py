"""Every `bash` and `python` block of the README, run as it stands (only the port differs)."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest


pytestmark = [pytest.mark.e2e, pytest.mark.timeout(400)]

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```(bash|python)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
SERVE = re.findall(r"^```sh\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


def test_the_blocks_run(served):
    assert len(BLOCKS) >= 3
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environ = os.environ | {
        "HEADRACE_KEY": served.key,
        "HEADRACE_URL": served.url,
        "HEADRACE_DATA_DIR": str(served.data_dir),
        "PATH": path,
    }
    said = ""
    for language, text in BLOCKS:
        block = text.replace("http://127.0.0.1:8000", served.url)
        command = ["bash", "-euo", "pipefail", "-c", block]
        if language == "python":
            command = [sys.executable, "-c", block]
        done = subprocess.run(
            command, cwd=ROOT, env=environ, capture_output=True, text=True, timeout=180, check=False
        )
        assert done.returncode == 0, f"{block}\n{done.stdout}\n{done.stderr}"
        said += done.stdout
    assert '"document":"sluice"' in said  # the search of the quick start
    assert "hr_" in said  # the new key


def test_make_serve_is_what_the_other_tests_started():
    """`make serve` is `headrace serve` after the set-up: the rule itself is a dry run here."""
    assert SERVE == ["make serve\n"]
    plan = subprocess.run(
        ["make", "--dry-run", "serve"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert "headrace serve" in plan.stdout
