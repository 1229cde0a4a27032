"""Calls that wait for their model, and what they count for."""

import asyncio

import numpy as np

from serve.flows.parking import Parked
from serve.flows.pending import Pending
from serve.records import EmbedCall, Input


def waiting(tenant: str, model: str, inputs: int) -> Pending:
    call = EmbedCall(
        request_id="r",
        tenant=tenant,
        weight=1.0,
        klass="interactive",
        model=model,
        inputs=(Input(ids=np.ones(3, np.int32)),) * inputs,
        tokens=(3,) * inputs,
        deadline_s=10,
    )
    future = asyncio.get_running_loop().create_future()
    return Pending(call, future, arrived=0, expires=10, left=inputs, unbegun=inputs)


async def test_what_waits_is_counted_by_tenant_and_found_by_model() -> None:
    parked = Parked()
    first, second, third = waiting("ann", "a", 2), waiting("ann", "b", 1), waiting("bob", "a", 4)
    for pending, cost in ((first, 7.0), (second, 3.0), (third, 12.0)):
        parked.add(pending, cost)
    assert (parked.cost, parked.items, parked.models) == (22, 7, ["a", "b"])
    assert (parked.waits("a"), parked.waits("c")) == (True, False)
    assert (parked.backlog("ann"), parked.backlog("eve")) == ((10, 3), (0, 0))
    assert list(parked.of("a")) == [first, third]
    assert parked.remove(first)
    assert not parked.remove(first)
    assert (parked.backlog("ann"), parked.items) == ((3, 1), 5)
    parked.remove(second)
    parked.remove(third)
    assert (parked.cost, parked.items, parked.models) == (0, 0, [])
    assert parked._tenants == {}
