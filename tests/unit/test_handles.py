"""deployments.handles: which way a call takes to an embedder, and how often it is made."""

import asyncio
from types import SimpleNamespace

import numpy as np
import pytest
from ray.exceptions import ActorDiedError
from ray.serve.exceptions import DeploymentUnavailableError

from deployments import handles
from deployments.conduit import ConduitLost, ReplicaLeaves
from deployments.handles import PRESSURE_KEPT_S, EmbedderPort, UpserterPort
from serve.config import Settings
from serve.errors import DeadlineExceeded, IndexUnavailable, ModelUnavailable, Overloaded
from serve.pressure import Pressure
from serve.records import EmbedCall, EmbedReply, Input


REPLY = EmbedReply(np.ones((1, 3), np.float32))
IDS = Input(ids=np.arange(4, dtype=np.int32))


def call(one: Input = IDS, deadline_s: float = 60.0) -> EmbedCall:
    return EmbedCall("r", "ann", 1.0, "interactive", "m", (one,), (4,), deadline_s)


class Conduit:
    """Ends each call as it is told, in turn; an event is waited for."""

    def __init__(self, *ends) -> None:
        self.ends, self.calls = list(ends), 0

    async def embed(self, _call):
        self.calls += 1
        end = self.ends.pop(0)
        if isinstance(end, asyncio.Event):
            await end.wait()
        if isinstance(end, Exception):
            raise end
        return end


class Conduits:
    def __init__(self, *conduits) -> None:
        self.open, self.lost = list(conduits), []

    def best(self):
        return next(iter(self.open), None)

    def lose(self, conduit) -> None:
        self.open.remove(conduit)
        self.lost.append(conduit)


class Handle:
    """A deployment's handle: `embed.remote` ends as it is told, in turn."""

    def __init__(self, *ends) -> None:
        self.by_handle = Conduit(*ends)
        self.embed = SimpleNamespace(remote=self.by_handle.embed)


@pytest.fixture
def port(monkeypatch):
    context = SimpleNamespace(get_node_id=lambda: "here")
    monkeypatch.setattr(handles.ray, "get_runtime_context", lambda: context)

    def made(conduits: Conduits, *by_handle) -> tuple[EmbedderPort, Conduit]:
        handle = Handle(*by_handle)
        port = EmbedderPort(handle, tokens_per_s_min=1e6)
        port._conduits = conduits
        return port, handle.by_handle

    return made


async def test_a_call_takes_the_conduit(port):
    conduits = Conduits(Conduit(REPLY))
    one, by_handle = port(conduits)
    assert await one.embed(call()) is REPLY
    assert (by_handle.calls, conduits.lost) == (0, [])


@pytest.mark.parametrize("one", [IDS, Input(text="a text")], ids=lambda one: one.kind)
async def test_without_a_conduit_and_for_what_none_carries_there_is_the_handle(port, one):
    conduits = Conduits() if one is IDS else Conduits(Conduit())
    way, by_handle = port(conduits, REPLY)
    assert await way.embed(call(one)) is REPLY
    assert by_handle.calls == 1


async def test_a_call_whose_replica_dies_is_made_once_more(port):
    conduits = Conduits(Conduit(ConduitLost()), Conduit(REPLY))
    one, _ = port(conduits)
    assert await one.embed(call()) is REPLY
    assert [conduit.calls for conduit in conduits.lost] == [1]


@pytest.mark.parametrize("last", [ConduitLost(), ActorDiedError()])
async def test_and_not_twice(port, last):
    conduits = Conduits(Conduit(ConduitLost()))
    if isinstance(last, ConduitLost):
        conduits.open.append(Conduit(last))
    one, by_handle = port(conduits, last)
    with pytest.raises(ModelUnavailable):
        await one.embed(call())
    assert len(conduits.lost) + by_handle.calls == 2


async def test_replicas_that_leave_all_at_once_are_no_deaths(port):
    """As when a pool becomes smaller; what they have not begun, another may have."""
    conduits = Conduits(*(Conduit(ReplicaLeaves()) for _ in range(3)), Conduit(REPLY))
    one, _ = port(conduits)
    assert await one.embed(call()) is REPLY
    assert [conduit.calls for conduit in conduits.lost] == [1, 1, 1]


async def test_when_all_leave_the_handle_knows_who_comes(port):
    one, by_handle = port(Conduits(Conduit(ReplicaLeaves()), Conduit(ReplicaLeaves())), REPLY)
    assert await one.embed(call()) is REPLY
    assert by_handle.calls == 1


async def test_both_tries_together_are_bounded_by_the_deadline(port):
    conduits = Conduits(Conduit(ConduitLost()), Conduit(asyncio.Event()))
    one, _ = port(conduits)
    with pytest.raises(DeadlineExceeded):
        await one.embed(call(deadline_s=0.01))


async def test_a_call_for_which_no_replica_came_was_not_tried(port):
    """Items of jobs go back untried then, however long a node takes to come."""
    one, _ = port(Conduits())
    replicas = []

    async def told(**_):
        if not replicas:
            raise DeploymentUnavailableError("embedder-default")
        return replicas

    one._handle = SimpleNamespace(
        embed=SimpleNamespace(remote=lambda _: asyncio.ensure_future(asyncio.Event().wait())),
        broadcast=lambda _: SimpleNamespace(results_async=told),
    )
    with pytest.raises(ModelUnavailable):
        await one._addresses()
    with pytest.raises(Overloaded):
        await one.embed(call(deadline_s=0.01))
    replicas.append(None)
    assert await one._addresses() == [None]
    with pytest.raises(DeadlineExceeded):
        await one.embed(call(deadline_s=0.01))


async def test_the_writer_is_asked_for_its_pressure_once_for_many_items(clock, monkeypatch):
    answers, asked = [Pressure(1.0), IndexUnavailable("Away."), Pressure(2.0)], []

    async def ask(method, **_):
        asked.append(method)
        answer = answers[len(asked) - 1]
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(handles, "time", SimpleNamespace(monotonic=clock))
    port = UpserterPort(Settings())
    port._named = SimpleNamespace(ask=ask)
    clock.advance(1)
    assert await asyncio.gather(*(port.pressure() for _ in range(9))) == [Pressure(1.0)] * 9
    clock.advance(PRESSURE_KEPT_S)
    for _ in range(3):  # nor is one that is away asked by each
        with pytest.raises(IndexUnavailable):
            await port.pressure()
    clock.advance(PRESSURE_KEPT_S)
    assert await port.pressure() == Pressure(2.0)
    assert asked == ["pressure"] * 3
