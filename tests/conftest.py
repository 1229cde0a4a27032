"""What every test can count on: a known environment, frozen time, seeded chance, no network."""

import os
import random
import shutil
from pathlib import Path

import pytest


# Before the first import of a test: Hugging Face and Ray read these when they are imported.
for _name in [name for name in os.environ if name.startswith("HEADRACE_")]:
    del os.environ[_name]
os.environ["RAY_AUTH_MODE"] = "disabled"  # Ray 2.60 starts with token authentication on
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ["HF_HUB_OFFLINE"] = "1"

# Half of a test's time went to waiting for a disk: what is written here need not survive the machine.
MEMORY, MEMORY_BYTES_MIN = Path("/dev/shm"), 2 * 2**30  # noqa: S108  pytest makes its own folder in it
if os.access(MEMORY, os.W_OK) and shutil.disk_usage(MEMORY).free > MEMORY_BYTES_MIN:
    os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", str(MEMORY))


class FrozenClock:
    """Time that passes only when a test says so."""

    def __init__(self, now: float = 1000.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock() -> FrozenClock:
    return FrozenClock()


@pytest.fixture
def rng() -> random.Random:
    return random.Random(20260101)  # noqa: S311 - not a secret


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Ray speaks over the machine's own address; the other tiers reach 127.0.0.1 only."""
    for item in items:
        if any(item.get_closest_marker(name) for name in ("ray", "nodes", "e2e", "chaos")):
            item.add_marker(pytest.mark.enable_socket)
