"""Reading files of jobs: several in one claim."""

import asyncio
import json
import random
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest

from serve.config import Model, Pool, Settings
from serve.flows.batch_work import ExpandWork
from serve.flows.bulk import FILES_AT_ONCE
from serve.flows.models import Models
from serve.items import Claim, Item, Job
from serve.jobs.faults import Retries


PLAIN = Model(id="plain", engine="fake", dimensions=16, tokens_max=64)
LINE = json.dumps(
    {
        "custom_id": "a",
        "method": "POST",
        "url": "/v1/embeddings",
        "body": {"model": "plain", "input": "text"},
    }
).encode()


class Files:
    """Both ports: files that come when the gate opens, and the items that were added."""

    def __init__(self):
        self.gate, self.reading, self.added = asyncio.Event(), [], []
        self.broken = {}

    async def stream(self, name):
        self.reading.append(name)
        await self.gate.wait()
        if name in self.broken:
            raise self.broken[name]
        yield LINE

    async def add_items(self, item, _lease, _start, items):
        self.added.append((item, [one.name for one in items]))
        return True


@pytest.fixture
def files():
    return Files()


@pytest.fixture
def expand(files):
    settings = Settings(pools=(Pool(models=(PLAIN,)),))
    models = Models.open(settings, {"default": None})
    retries = Retries(60, 2, 600, random.Random(1))  # noqa: S311 - not a secret
    with ThreadPoolExecutor(1) as threads:
        context = SimpleNamespace(settings=settings, models=models, threads=threads)
        yield ExpandWork(context, files, files, retries).expand


def claim(count):
    jobs = {
        f"j{n}": Job(f"j{n}", "acme", "k", "embeddings", "bulk", 1.0, 0.0) for n in range(count)
    }
    items = [
        Item(n, 1, job, -1, "expand", "expand", "prepare", 1.0, 0, {}) for n, job in enumerate(jobs)
    ]
    return items, Claim(tuple(items), jobs)


async def test_files_are_read_a_few_at_once_and_fail_by_themselves(files, expand):
    files.broken = {"j0/input": KeyError("a fault of ours")}
    work = asyncio.ensure_future(expand(*claim(4)))
    for _ in range(20):
        await asyncio.sleep(0)
    assert files.reading == [f"j{n}/input" for n in range(FILES_AT_ONCE)]
    files.gate.set()
    settlements = await work
    assert {one.item: one.word for one in settlements} == {
        0: "retry",
        **dict.fromkeys((1, 2, 3), "done"),
    }
    assert sorted(files.added) == [(n, ["a"]) for n in (1, 2, 3)]
