"""Exports: how far ahead of its reader one reads, and when it ends."""

import asyncio
from types import SimpleNamespace

import numpy as np
import pytest

from serve.config import Ingress, Jobs, Settings
from serve.errors import DeadlineExceeded, IndexUnavailable, Overloaded, QuotaExceeded
from serve.flows import exports
from serve.flows.exports import ExportFlow
from serve.flows.streams import Exports
from serve.records import Collection, Record


COLLECTION = Collection("0" * 32, "acme", "books", "plain", "r", 2, 0.0)
SOON = 3600.0
ROW = np.ones(2, np.float32)


def records(*numbers: int) -> list[Record]:
    return [Record(f"{n:032x}", f"d{n}", 1, 0, ROW) for n in numbers]


class Index:
    """Yields the parts that it was given, or raises; notes how many were read, and its end."""

    def __init__(self, *parts: list[Record] | Exception) -> None:
        self.parts = parts
        self.read = 0
        self.left = False

    async def scan(self, _ns, _where=None):
        try:
            for part in self.parts:
                self.read += 1
                if isinstance(part, Exception):
                    raise part
                yield part
        finally:
            self.left = True


def flow(index: Index) -> ExportFlow:
    context = SimpleNamespace(quotas=None, settings=Settings())
    return ExportFlow(context, None, index)


def soon() -> float:
    return asyncio.get_running_loop().time() + SOON


async def test_a_part_is_read_when_the_one_before_was_taken(monkeypatch):
    monkeypatch.setattr(exports, "SLICE_BYTES", 2 * exports._size(records(1)[0]))
    index = Index(records(1, 2, 3), [], records(4))
    some = flow(index).records(COLLECTION, soon())
    seen = []
    async for part in some:
        seen.append([record.document for record in part])
        assert index.read == (1 if len(seen) < 3 else 3)
    assert seen == [["d1", "d2"], ["d3"], ["d4"]]


async def test_the_index_is_left_when_the_reader_goes():
    index = Index(records(1), records(2))
    some = flow(index).records(COLLECTION, soon())
    await anext(some)
    assert not index.left
    await some.aclose()
    assert index.left


async def test_an_export_ends_in_time():
    index = Index(records(1), records(2))
    some = flow(index).records(COLLECTION, 0.0)
    with pytest.raises(DeadlineExceeded):
        await anext(some)
    assert index.left


async def test_a_fault_of_the_index_is_passed_on():
    some = flow(Index(records(1), IndexUnavailable("Away."))).records(COLLECTION, soon())
    await anext(some)
    with pytest.raises(IndexUnavailable):
        await anext(some)


async def test_places_are_few():
    ingress = Ingress(exports_max=2, tenant_exports_max=1)
    places = Exports(Settings(ingress=ingress, jobs=Jobs(stream_s=120)))
    with places.open("acme"), places.open("other"):
        with pytest.raises(QuotaExceeded) as refused, places.open("acme"):
            pytest.fail("one too many")
        assert refused.value.code == "exports"
        with pytest.raises(Overloaded), places.open("third"):
            pytest.fail("one too many")
    with places.open("third"):
        pass
