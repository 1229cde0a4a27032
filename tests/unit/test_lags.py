"""How long writes took, as the writer remembers it, and receipts that are their own memory."""

from dataclasses import replace

import numpy as np
import pytest

from serve.config import Index as IndexSettings
from serve.flows.raw_receipts import RawReceipt, parse
from serve.freshness import UNPROVED, Lag, Spread, latest
from serve.index import lags as module
from serve.index.lags import Lags, TimedWriter
from serve.index.memory import MemoryIndex
from serve.index.probes import Probes
from serve.pressure import Pressure, Sender
from serve.records import CollectionSpec, Outcome, Record, Tombstone


NS, OTHER, THIRD = (str(n) * 32 for n in range(3))


class Expected(Probes):
    """Keeps who waits, for the test to tell."""

    def __init__(self) -> None:
        super().__init__(MemoryIndex(IndexSettings()), 1)
        self.told = {}

    def expect(self, ns, token, told) -> bool:
        self.told[ns, token] = told
        return token != UNPROVED


@pytest.fixture
def probes() -> Expected:
    return Expected()


@pytest.fixture
def lags(probes, clock) -> Lags:
    return Lags(probes, clock)


def records(*accepted: float) -> list[Record]:
    vector = np.ones(2, np.float32)
    return [
        replace(Record(str(n), "d", 1, 0, vector), accepted_at=at) for n, at in enumerate(accepted)
    ]


def landed(count: int, token: int | None = None) -> list[Outcome]:
    return [Outcome("landed", token=token)] * count


def test_where_a_write_is_seen_at_once_both_are_the_same(lags, clock):
    at = clock()
    clock.advance(4)
    lags.landed(NS, records(at, at), landed(2))
    assert lags.of([NS]) == Lag(1, Spread(4, 4), Spread(4, 4))
    assert lags.take() == [("indexed", 4), ("searchable", 4)]
    assert lags.take() == []


def test_where_it_lags_behind_it_is_searchable_when_the_index_says_so(lags, probes, clock):
    at = clock()
    clock.advance(1)
    lags.landed(NS, records(at, at), [*landed(1, 7), *landed(1, 9)])
    assert lags.of([NS]) == Lag(1, Spread(1, 1), None)
    clock.advance(2)
    (told,) = probes.told.values()
    assert list(probes.told) == [(NS, 9)]
    told(True)
    assert lags.of([NS]) == Lag(1, Spread(1, 1), Spread(3, 3))
    lags.landed(OTHER, records(at), landed(1, 5))
    probes.told[OTHER, 5](False)  # nobody will ever say
    assert lags.of([OTHER]).searchable is None


def test_what_did_not_land_or_was_not_accepted_before_is_left_out(lags, clock):
    at = clock()
    words = [Outcome("superseded"), Outcome("rejected"), Outcome("released"), Outcome("landed")]
    lags.landed(NS, records(at, at, at, 0.0), words)
    assert lags.of([NS]) == Lag()
    clock.advance(-5)
    lags.landed(NS, [Tombstone("x", "d", 1, at)], landed(1))  # a clock that is behind the Store's
    assert lags.of([NS]).indexed == Spread(0, 0)


def test_the_last_landings_of_several_namespaces_are_told_together(lags, clock, monkeypatch):
    at = clock()
    for _ in range(module.LANDINGS):
        lags.landed(NS, records(at), landed(1))
    clock.advance(1)
    for n in range(100):
        lags.landed(NS, records(at - n), landed(1))
    assert lags.of([NS]) == Lag(module.LANDINGS, Spread(0, 90), Spread(0, 90))
    assert lags.of([OTHER]) == Lag()
    lags.landed(OTHER, records(at), landed(1))
    assert lags.of([NS, OTHER, THIRD]).landings == module.LANDINGS + 1
    monkeypatch.setattr(module, "NAMESPACES_MAX", 2)
    lags.landed(NS, records(at), landed(1))
    lags.landed(THIRD, records(at), landed(1))
    assert [lags.of([ns]).landings > 0 for ns in (NS, OTHER, THIRD)] == [True, False, True]


async def test_the_writer_is_timed_and_otherwise_as_it_is(lags, clock):
    calls = []

    class Spy:
        async def offer(self, sender, ns, writes, deadline_s):
            calls.append(("offer", sender.tenant, ns, deadline_s))
            return landed(len(writes))

        async def pressure(self):
            return Pressure(3.0)

        async def ensure(self, spec):
            calls.append(("ensure", spec.ns))

        async def drop(self, ns):
            calls.append(("drop", ns))

    timed = TimedWriter(Spy(), lags)
    await timed.ensure(CollectionSpec(NS, 2))
    assert await timed.offer(Sender("acme", 4.0), NS, records(clock()), 5) == landed(1)
    assert await timed.pressure() == Pressure(3.0)
    assert (await timed.lag([NS])).landings == 1
    await timed.drop(NS)
    assert (await timed.lag([NS])).landings == 0
    assert calls == [("ensure", NS), ("offer", "acme", NS, 5), ("drop", NS)]


def test_the_highest_token_stands_for_all():
    assert latest([]) is None
    assert latest([None, None]) is None
    assert latest([None, 5, 7, None, 6]) == 7
    assert latest([5, UNPROVED, 7]) == UNPROVED


@pytest.mark.parametrize("token", [None, 0, 7, UNPROVED])
def test_a_raw_receipt_is_its_own_memory(token):
    receipt = RawReceipt("0a" * 16, 1_700_000_000_123, 10_000, 3, token)
    assert parse(receipt.id) == receipt
    assert receipt.id.isascii()
    assert len(receipt.id) == 54
