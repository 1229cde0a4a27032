"""The buffer between tenants: bytes by weight, however many collections a tenant has.

The guarantee: while two tenants both have a lane that could go, what they were given differs by at most
`c_f / w_f + c_g / w_g`, with c the largest flush of each and w its weight.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serve.capabilities import Capabilities
from serve.config import Buffer as BufferSettings
from serve.index.buffer import Buffer
from serve.index.errors import IndexRetryable
from serve.index.lanes import Batch
from serve.ports import Landed
from serve.pressure import Sender
from serve.records import Record


CAPS = Capabilities(
    max_items=4,
    max_bytes=4000,
    max_dim=8,
    max_top_k=10,
    consistency="strong",
    single_writer=True,
)
VECTOR = np.ones(2, np.float32)
FAR = 1e9


@dataclass
class Town:
    """Tenants whose every lane always has more than a flush waiting."""

    flushes: int
    senders: dict[str, Sender] = field(default_factory=dict)
    lanes: dict[str, Sender] = field(default_factory=dict)
    chars: dict[str, int] = field(default_factory=dict)
    flying: list[Batch] = field(default_factory=list)
    given: list[tuple[str, int, frozenset[str]]] = field(default_factory=list)
    now: float = 0.0
    made: int = 0

    def __post_init__(self) -> None:
        rng = random.Random(1)  # noqa: S311 - not a secret
        room = {"writes_max": 10**6, "tenant_writes_max": 10**6}
        self.buffer = Buffer(BufferSettings(flushes_max=self.flushes, **room), CAPS, rng)

    def settle(self, tenant: str, weight: float, lanes: int, chars: int) -> None:
        self.senders[tenant] = Sender(tenant, weight)
        self.chars[tenant] = chars
        for number in range(lanes):
            self.lanes[f"{tenant}{number}"] = self.senders[tenant]
        self.fill()

    def fill(self) -> None:
        for ns, sender in self.lanes.items():
            some = [self._record(self.chars[sender.tenant]) for _ in range(CAPS.max_items)]
            self.buffer.offer(sender, ns, some, self.now, FAR)

    def _record(self, chars: int) -> Record:
        self.made += 1
        return Record(f"r{self.made}", "d", 1, 0, VECTOR, "x" * chars)

    def send(self) -> None:
        """Note what is handed out, and who could have been."""
        for batch in self.buffer.due(self.now):
            busy = {other.ns for other in self.flying}
            could = frozenset(one.tenant for ns, one in self.lanes.items() if ns not in busy)
            self.given.append((self.lanes[batch.ns].tenant, batch.bytes, could))
            self.flying.append(batch)

    def land(self, which: int, *, well: bool) -> None:
        batch = self.flying.pop(which % len(self.flying))
        if well:
            self.buffer.ack(batch, Landed(), self.now)
        else:
            self.buffer.nack(batch, IndexRetryable(busy=False), self.now)
        self.buffer.finished()

    def run(self, steps: int, which: Callable[[], int], well: Callable[[], bool]) -> None:
        for _ in range(steps):
            self.send()
            self.land(which(), well=well())
            self.fill()
            self.now += 100.0  # beyond any pause before a retry

    def bytes_of(self, tenant: str) -> int:
        return sum(size for name, size, _ in self.given if name == tenant)

    def spread(self, one: str, other: str) -> float:
        """Most that two differ by in any period in which both could have been next throughout."""
        signs = {one: 1 / self.senders[one].weight, other: -1 / self.senders[other].weight}
        worst, periods = 0.0, [[0.0]]
        for name, size, could in self.given:
            if could.issuperset(signs):
                periods[-1].append(periods[-1][-1] + signs.get(name, 0.0) * size)
            else:
                periods.append([0.0])
        for running in periods:
            worst = max(worst, max(running) - min(running))
        return worst

    def bound(self, one: str, other: str) -> float:
        return sum(
            max((size for name, size, _ in self.given if name == each), default=0)
            / self.senders[each].weight
            for each in (one, other)
        )


weights = st.sampled_from([0.5, 1.0, 4.0, 16.0])
tenants = st.lists(
    st.tuples(weights, st.integers(1, 5), st.integers(0, 500)), min_size=2, max_size=4
)


@given(
    data=st.data(),
    wanted=tenants,
    flushes=st.integers(1, 4),
    chance=st.randoms(use_true_random=False),
    late=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_what_two_tenants_are_given_differs_by_a_flush_of_each(data, wanted, flushes, chance, late):
    town = Town(flushes)
    for number, one in enumerate(wanted):
        town.settle("abcd"[number], *one)
    if late:
        town.run(20, lambda: chance.randrange(9), lambda: chance.random() > 0.2)
        town.settle("z", data.draw(weights), data.draw(st.integers(1, 9)), 100)
    town.run(60, lambda: chance.randrange(9), lambda: chance.random() > 0.2)
    for one, other in combinations(town.senders, 2):
        assert town.spread(one, other) <= town.bound(one, other) * (1 + 1e-9)


@pytest.mark.parametrize("flushes", [1, 2])
@pytest.mark.parametrize("lanes", [2, 10])
def test_many_collections_are_given_no_more_than_one(flushes, lanes):
    town = Town(flushes)
    town.settle("many", 1.0, lanes, 300)
    town.settle("one", 1.0, 1, 300)
    town.run(100, lambda: 0, lambda: True)  # the flights end in their order
    assert abs(town.bytes_of("many") - town.bytes_of("one")) <= town.bound("many", "one")


def test_places_that_nobody_else_can_use_are_used():
    town = Town(4)
    town.settle("one", 16.0, 1, 300)
    town.settle("many", 1.0, 10, 300)
    town.send()
    assert sorted(town.lanes[batch.ns].tenant for batch in town.flying) == ["many"] * 3 + ["one"]


def test_paid_weights_are_shares_of_the_bytes():
    town = Town(1)
    for tenant, weight in (("free", 1.0), ("premium", 4.0), ("enterprise", 16.0)):
        town.settle(tenant, weight, 3, 100)
    town.run(420, lambda: 0, lambda: True)
    free = town.bytes_of("free")
    assert town.bytes_of("premium") / free == pytest.approx(4, rel=0.1)
    assert town.bytes_of("enterprise") / free == pytest.approx(16, rel=0.1)
