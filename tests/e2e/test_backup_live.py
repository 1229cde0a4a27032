"""`headrace backup` of a running service, started again from the copy; and what its usage events say."""

import json
import os
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from tests.e2e.conftest import BIN, ROOT, Served, start, stop


pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]

FAKE = {"id": "fake", "engine": "fake", "dimensions": 16, "tokens_max": 256}
BOOKS = "/v1/collections/books"
CHUNK, DOCUMENTS_MAX = 50, 900  # a search gives a thousand at most


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """The deploy file, with a model that takes no time, and events in a folder."""
    raw = yaml.safe_load((ROOT / "config.yaml").read_text("utf-8"))
    args = raw["applications"][0]["args"]
    args["pools"] = [{"name": "default", "models": [FAKE]}]
    args["usage_events"] = {"sink": "folder"}
    path = tmp_path / "deploy.yaml"
    path.write_text(yaml.safe_dump(raw), encoding="utf-8")
    return path


@pytest.fixture
def started(tmp_path: Path, config: Path) -> Iterator[Callable[[str], Served]]:
    with ExitStack() as stack:

        def begin(name: str) -> Served:
            served = start(tmp_path / name, f"--config={config}", "--no-dashboard")
            stack.callback(stop, served)
            return served

        yield begin


def ask(served: Served, key: str, method: str, path: str, body: Any = None) -> Any:
    headers = {"authorization": f"Bearer {key}"}
    answer = httpx.request(method, served.url + path, json=body, headers=headers, timeout=120)
    assert answer.status_code < 300, answer.text
    return answer.json()


def write(served: Served, key: str, first: int, wait: str) -> None:
    some = [{"id": f"d{n}", "text": f"text {n}"} for n in range(first, first + CHUNK)]
    ask(served, key, "POST", f"{BOOKS}/documents?wait={wait}", {"documents": some})


def events(data_dir: Path) -> dict[str, dict[str, Any]]:
    """Data of each, by id."""
    paths = (data_dir / "usage").iterdir()
    lines = (line for path in paths for line in path.read_text("utf-8").splitlines())
    return {one["id"]: one["data"] for one in map(json.loads, lines)}


def test_it_starts_from_its_backup_and_its_events_are_its_usage(tmp_path, config, started):
    served = started("data")
    key = served.key
    ask(served, key, "POST", "/v1/collections", {"name": "books"})
    for first in range(0, 4 * CHUNK, CHUNK):
        write(served, key, first, "indexed")
    write(served, key, 4 * CHUNK, "accepted")  # lands before, while or after the copy is made
    ask(served, key, "POST", "/v1/embeddings", {"model": "fake", "input": ["one", "two"]})
    with subprocess.Popen(
        [BIN / "headrace", "backup", tmp_path / "kept", "--config", config],
        env=os.environ | {"HEADRACE_DATA_DIR": str(served.data_dir)},
        cwd=ROOT,
    ) as backup:
        for first in range(5 * CHUNK, DOCUMENTS_MAX, CHUNK):
            write(served, key, first, "indexed")
            if backup.poll() is not None:
                break
    assert backup.returncode == 0
    stop(served)  # in good order: nothing waits to be reported

    restored = started("kept")
    found = {hit["document"] for hit in search(restored, key)}
    before = {f"d{n}" for n in range(5 * CHUNK)}
    assert before <= found
    write(restored, key, 0, "indexed")  # as they were: nothing to do
    ask(restored, key, "POST", f"{BOOKS}/documents?wait=indexed", changed())
    assert {"d0", "late"} <= {hit["document"] for hit in search(restored, key)}

    stop(restored)

    sums: Counter[tuple[str, str]] = Counter()
    for one in events(served.data_dir).values():
        if one["outcome"] == "charged":
            sums[one["class"], "requests"] += one["requests"]
            sums[one["class"], "tokens"] += one["tokens"]
    again = started("data")  # the same folder once more: its Store has heard all of it
    for row in ask(again, key, "GET", "/v1/usage")["data"]:
        assert sums[row["class"], "requests"] == row["requests"]
        assert sums[row["class"], "tokens"] == row["tokens"]


def changed() -> dict[str, Any]:
    return {"documents": [{"id": "d0", "text": "changed"}, {"id": "late", "text": "new"}]}


def search(served: Served, key: str) -> list[dict[str, Any]]:
    return ask(served, key, "POST", f"{BOOKS}/search", {"text": "text 1", "top_k": 1000})["data"]
