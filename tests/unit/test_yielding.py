"""A process that yields does so with all its threads, and with those that come later."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from deployments.yielding import NICE, THREADS, yield_cores


PROGRAM = """
import json, os, threading
from deployments.yielding import yield_cores

def own():
    return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())

def early():
    told.wait()
    found.append(own())

def late():
    found.append(own())

found, told = [], threading.Event()
first = threading.Thread(target=early)
first.start()
yield_cores()
yield_cores()
told.set()
first.join()
second = threading.Thread(target=late)
second.start()
second.join()
print(json.dumps([own(), *found]))
"""


@pytest.mark.skipif(not THREADS.is_dir(), reason="priorities of threads are Linux's")
def test_all_threads_yield_and_those_that_they_start() -> None:
    said = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True
    )
    assert json.loads(said.stdout) == [NICE] * 3


def test_a_thread_that_has_ended_and_a_system_without_any_are_no_failure(tmp_path: Path) -> None:
    yield_cores(tmp_path / "absent")
    (tmp_path / "4194399").touch()  # beyond the greatest number that Linux gives
    yield_cores(tmp_path)
