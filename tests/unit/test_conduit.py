"""deployments.conduit and outlet: calls over a real connection, and what becomes of them when it ends."""

import asyncio
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from deployments import conduit as conduit_module
from deployments import frames as frames_module
from deployments import outlet as outlet_module
from deployments.conduit import Conduit, ConduitLost, Conduits, ReplicaLeaves
from deployments.frames import Frame, Word, pack_call
from deployments.outlet import Address, Outlet
from serve.errors import Internal, ModelUnavailable, Overloaded, QuotaExceeded
from serve.records import EmbedCall, EmbedReply, Input


NODE = "here"


def call(tenant: str = "ann", tokens: int = 4) -> EmbedCall:
    ids = np.arange(tokens, dtype=np.int32)
    return EmbedCall("r", tenant, 1.0, "interactive", "m", (Input(ids=ids),), (tokens,), 10.0)


async def until(holds: Callable[[], bool]) -> None:
    while not holds():  # noqa: ASYNC110  it is a socket that is waited for
        await asyncio.sleep(0.001)


class Model:
    """Answers each call with its ids, once `go` is set; notes who came and who was dropped."""

    def __init__(self) -> None:
        self.go = asyncio.Event()
        self.go.set()
        self.calls: list[EmbedCall] = []
        self.dropped: list[str] = []
        self.error: Exception | None = None
        self.width = 4

    async def embed(self, call: EmbedCall) -> EmbedReply:
        self.calls.append(call)
        try:
            await self.go.wait()
        except asyncio.CancelledError:
            self.dropped.append(call.tenant)
            raise
        if self.error is not None:
            raise self.error
        row = np.zeros(self.width, np.float32)
        row[: len(call.inputs[0].ids)] = call.inputs[0].ids
        return EmbedReply(row[None], infer_ms=7.0)

    async def until(self, count: int) -> None:
        await until(lambda: len(self.calls) >= count)


@pytest.fixture
async def model():
    return Model()


@pytest.fixture
async def outlet(model):
    outlet = Outlet(model.embed, calls_max=2)
    yield outlet
    await outlet.close(0.01)


@pytest.fixture
async def address(outlet) -> Address:
    return await outlet.open(NODE)


@pytest.fixture
async def pipe(address):
    pipe = await Conduit.connect(address)
    yield pipe
    pipe.close()


async def test_a_call_comes_back_with_its_vectors(pipe, model):
    reply = await pipe.embed(call())
    assert reply.vectors.tolist() == [[0, 1, 2, 3]]
    assert reply.infer_ms == 7.0
    assert (model.calls[0].tenant, pipe.load, pipe.idle) == ("ann", 0, True)


async def test_calls_overtake_each_other(pipe, model):
    model.go.clear()
    slow = asyncio.create_task(pipe.embed(call("slow")))
    await model.until(1)
    assert pipe.load == 4
    model.go = asyncio.Event()
    model.go.set()
    assert (await pipe.embed(call("quick"))).infer_ms == 7.0
    assert not slow.done()
    slow.cancel()


@pytest.mark.parametrize("error", [QuotaExceeded("full", retry_after_s=2), ModelUnavailable("no")])
async def test_what_the_model_raises_is_raised_here(pipe, model, error):
    model.error = error
    with pytest.raises(type(error)) as found:
        await pipe.embed(call())
    assert vars(found.value) == vars(error)


async def test_a_fault_over_there_is_internal_and_logged_there(pipe, model, caplog):
    model.error = KeyError("secret")
    with pytest.raises(Internal) as found:
        await pipe.embed(call())
    assert "secret" not in found.value.message
    assert "secret" in caplog.text


async def test_a_reply_that_no_frame_holds_is_a_fault_and_no_other_call_is_lost(
    pipe, model, monkeypatch
):
    monkeypatch.setattr(frames_module, "BODY_BYTES_MAX", 300)
    model.width = 100
    with pytest.raises(Internal):
        await pipe.embed(call())
    model.width = 4
    assert (await pipe.embed(call())).infer_ms == 7.0


async def test_a_call_that_cannot_be_packed_leaves_no_load_behind(pipe):
    with pytest.raises(TypeError):
        await pipe.embed(replace(call(), request_id="\ud800"))
    assert (pipe.load, pipe.idle) == (0, True)


async def test_a_caller_that_leaves_is_dropped_by_its_number(pipe, model):
    model.go.clear()
    leaver = asyncio.create_task(pipe.embed(call("leaver")))
    stayer = asyncio.create_task(pipe.embed(call("stayer")))
    await model.until(2)
    leaver.cancel()
    await until(lambda: bool(model.dropped))
    model.go.set()
    await stayer
    assert model.dropped == ["leaver"]


async def test_more_calls_than_the_bound_are_refused(pipe, model):
    model.go.clear()
    tasks = [asyncio.create_task(pipe.embed(call())) for _ in range(2)]
    await model.until(2)
    with pytest.raises(Overloaded):
        await pipe.embed(call())
    model.go.set()
    await asyncio.gather(*tasks)


async def test_with_a_connection_go_the_calls_of_its_process(pipe, model):
    model.go.clear()
    lost = asyncio.create_task(pipe.embed(call()))
    await model.until(1)
    pipe.close()
    with pytest.raises(ConduitLost):
        await lost
    await until(lambda: bool(model.dropped))
    with pytest.raises(ConduitLost):
        await pipe.embed(call())


async def test_a_replica_that_leaves_ends_what_it_has_and_sends_the_rest_away(pipe, model, outlet):
    model.go.clear()
    held = asyncio.create_task(pipe.embed(call("held")))
    await model.until(1)
    leaving = asyncio.create_task(outlet.close(10))
    await asyncio.sleep(0)
    with pytest.raises(ReplicaLeaves):
        await pipe.embed(call("late"))
    model.go.set()
    assert (await held).infer_ms == 7.0
    await leaving
    assert [one.tenant for one in model.calls] == ["held"]


async def test_a_replica_that_leaves_waits_until_its_last_answer_is_on_its_way(
    address, outlet, model
):
    model.width = 4 * 2**20  # 16 MiB, far more than the kernel takes for somebody who does not read
    reader, writer = await asyncio.open_connection(address.host, address.port, limit=2**16)
    hello = Frame(0, Word.HELLO, address.token.encode()).packed()
    writer.write(hello + Frame(1, Word.CALL, pack_call(call())).packed())
    await model.until(1)
    leaving = asyncio.create_task(outlet.close(10))
    await until(lambda: not outlet._tasks)
    await asyncio.sleep(0)
    assert not leaving.done()
    assert len(await reader.read(-1)) > model.width * 4
    await leaving
    writer.close()


async def test_a_replica_does_not_wait_for_ever_for_who_does_not_read(
    address, outlet, model, monkeypatch
):
    monkeypatch.setattr(outlet_module, "FLUSH_S_MAX", 0.01)
    model.width = 4 * 2**20
    _, writer = await asyncio.open_connection(address.host, address.port, limit=2**16)
    hello = Frame(0, Word.HELLO, address.token.encode()).packed()
    writer.write(hello + Frame(1, Word.CALL, pack_call(call())).packed())
    await model.until(1)
    await outlet.close(10)
    writer.transport.abort()


async def heard(address: Address, data: bytes) -> bytes:
    reader, writer = await asyncio.open_connection(address.host, address.port)
    writer.write(data)
    found = await reader.read()
    writer.close()
    return found


@pytest.mark.parametrize(
    "data",
    [
        Frame(0, Word.HELLO, b"guess").packed() + Frame(1, Word.CALL, pack_call(call())).packed(),
        Frame(1, Word.CALL, pack_call(call())).packed(),
        b"GET / HTTP/1.1\r\n\r\n",
        (10**6).to_bytes(4, "little") + bytes(9),
    ],
)
async def test_who_does_not_know_the_secret_is_cut_off(address, model, data):
    assert await heard(address, data) == b""
    assert model.calls == []


@pytest.mark.parametrize("frame", [Frame(1, Word.CALL, b"x"), Frame(1, Word.REPLY)])
async def test_who_talks_nonsense_is_cut_off(address, model, frame):
    hello = Frame(0, Word.HELLO, address.token.encode()).packed()
    assert await heard(address, hello + frame.packed()) == b""
    assert model.calls == []


async def test_who_says_nothing_is_cut_off(address, monkeypatch):
    monkeypatch.setattr(outlet_module, "HELLO_S_MAX", 0.01)
    assert await heard(address, b"") == b""


async def test_of_many_who_say_nothing_the_first_are_cut_off_and_friends_come_in(
    address, pipe, monkeypatch
):
    monkeypatch.setattr(outlet_module, "STRANGERS_MAX", 2)
    silent = [await asyncio.open_connection(address.host, address.port) for _ in range(5)]
    friend = await Conduit.connect(address)
    for reader, _ in silent[:3]:
        assert await reader.read() == b""
    assert (await friend.embed(call())).infer_ms == 7.0
    assert (await pipe.embed(call())).infer_ms == 7.0
    assert not silent[-1][0].at_eof()
    friend.close()
    for _, writer in silent:
        writer.transport.abort()


async def test_who_answers_nonsense_is_left_although_it_does_not_read():
    over, ended = asyncio.Event(), asyncio.Event()

    async def nonsense(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readexactly(2**16)  # the call has begun to arrive; nothing more is read
        writer.write(bytes(99))
        await over.wait()
        writer.transport.abort()
        ended.set()

    async with await asyncio.start_server(nonsense, "127.0.0.1", limit=2**10) as server:
        port = server.sockets[0].getsockname()[1]
        pipe = await Conduit.connect(Address(NODE, "127.0.0.1", port, "secret"))
        with pytest.raises(ConduitLost):
            await pipe.embed(call(tokens=2**23))
        over.set()
        await ended.wait()
    assert pipe.lost


def test_an_address_does_not_tell_its_secret_to_a_log():
    assert "hush" not in repr(Address(NODE, "127.0.0.1", 1, "hush"))


class Town:
    """Replicas that `Conduits` looks for."""

    def __init__(self) -> None:
        self.addresses: list[Address | None] = []
        self.error: Exception | None = None
        self.looks = 0

    async def find(self):
        self.looks += 1
        if self.error is not None:
            raise self.error
        return self.addresses


@pytest.fixture
async def town(monkeypatch):
    monkeypatch.setattr(conduit_module, "LOOK_EVERY_S", 0.01)
    monkeypatch.setattr(conduit_module, "LOOK_AGAIN_S", 0.001)
    return Town()


@pytest.fixture
async def conduits(town):
    conduits = Conduits(town.find, NODE)
    task = asyncio.create_task(conduits.run())
    yield conduits
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def looked(town: Town, times: int = 2) -> None:
    enough = town.looks + times
    await until(lambda: town.looks >= enough)


async def test_replicas_are_found_and_the_one_with_least_to_do_is_chosen(town, conduits, model):
    outlets = [Outlet(model.embed, calls_max=8) for _ in range(2)]
    town.addresses = [await one.open(NODE) for one in outlets]
    await looked(town)
    model.go.clear()
    first = conduits.best()
    busy = asyncio.create_task(first.embed(call()))
    await model.until(1)
    assert conduits.best() is not first
    model.go.set()
    await busy
    for one in outlets:
        await one.close(0)


async def test_of_equals_the_one_is_chosen_that_was_not_chosen_for_longest(town, conduits, model):
    outlets = [Outlet(model.embed, calls_max=8) for _ in range(3)]
    town.addresses = [await one.open(NODE) for one in outlets]
    await looked(town)
    ports = [conduits.best().address.port for _ in range(6)]
    assert ports == [one.port for one in town.addresses] * 2
    for one in outlets:
        await one.close(0)


async def test_one_that_does_not_answer_does_not_keep_others_from_being_found(
    town, conduits, address, model, monkeypatch
):
    town.addresses = [address]
    await looked(town)
    connect, dead = Conduit.connect, replace(address, port=1)
    never = asyncio.Event()

    async def connected(one: Address) -> Conduit:
        if one == dead:
            await never.wait()
        return await connect(one)

    monkeypatch.setattr(Conduit, "connect", connected)
    outlet = Outlet(model.embed, calls_max=8)
    another = await outlet.open(NODE)
    town.addresses = [dead, address, another]
    await until(lambda: conduits.best().address == another)
    await outlet.close(0)


async def test_one_that_can_be_asked_but_not_connected_to_means_the_handle_for_all(
    town, conduits, address, model
):
    outlet = Outlet(model.embed, calls_max=8)
    walled = await outlet.open(NODE)
    await outlet.close(0)
    town.addresses = [address]
    await looked(town)
    before = conduits.best()
    town.addresses = [address, walled]
    await looked(town)
    assert conduits.best() is None
    town.addresses = [address]
    await looked(town)
    assert conduits.best() is before


async def test_a_replica_that_does_not_read_is_sent_no_more_until_it_does(
    town, conduits, monkeypatch
):
    monkeypatch.setattr(conduit_module, "UNREAD_BYTES_MAX", 2**20)
    reads, ended = asyncio.Event(), asyncio.Event()

    async def deaf(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reads.wait()
        await reader.read()
        writer.transport.abort()
        ended.set()

    async with await asyncio.start_server(deaf, "127.0.0.1", limit=2**10) as server:
        port = server.sockets[0].getsockname()[1]
        town.addresses = [Address(NODE, "127.0.0.1", port, "secret")]
        await until(lambda: conduits.best() is not None)
        pipe, one = conduits.best(), call(tokens=2**16)
        for _ in range(100):  # 25 MiB of callers who all leave; the kernel takes some 10
            if conduits.best() is None:
                break
            caller = asyncio.create_task(pipe.embed(one))
            await asyncio.sleep(0)
            caller.cancel()
            await asyncio.gather(caller, return_exceptions=True)
        assert conduits.best() is None
        assert pipe.idle
        assert pipe._transport.get_write_buffer_size() < 2**20 + 2**19
        reads.set()
        await until(lambda: conduits.best() is pipe)
        pipe.close()
        await ended.wait()


async def test_a_search_that_fails_in_an_unknown_way_is_made_again(town, conduits, address, caplog):
    town.error = RuntimeError("Router is not initialized")
    await looked(town)
    assert "Router is not initialized" in caplog.text
    town.error, town.addresses = None, [address]
    await until(lambda: conduits.best() is not None)


async def test_one_that_cannot_be_reached_from_here_means_the_handle_for_all(
    town, conduits, address
):
    town.addresses = [address]
    await looked(town)
    assert conduits.best() is not None
    for other in (None, replace(address, node="there")):
        town.addresses = [address, other]
        await looked(town)
        assert conduits.best() is None
    town.addresses = [address, replace(address, node="there", host="localhost")]
    await looked(town)
    assert conduits.best() is not None


async def test_replicas_that_cannot_be_asked_for_stay_in_use(town, conduits, address):
    town.addresses = [address]
    await looked(town)
    before = conduits.best()
    town.error = ModelUnavailable("the controller is away")
    await looked(town)
    assert conduits.best() is before


async def test_a_replica_that_is_gone_is_let_go_once_it_has_answered(
    town, conduits, address, model
):
    town.addresses = [address]
    await looked(town)
    pipe = conduits.best()
    model.go.clear()
    held = asyncio.create_task(pipe.embed(call()))
    await model.until(1)
    town.addresses = []
    await looked(town, 3)
    assert conduits.best() is None
    assert not pipe.lost
    model.go.set()
    await held
    await looked(town, 3)
    assert pipe.lost


async def test_a_lost_connection_is_made_again(town, conduits, address):
    town.addresses = [address]
    await looked(town)
    first = conduits.best()
    first.close()
    await until(lambda: conduits.best() not in (None, first))
    assert not conduits.best().lost


async def test_one_that_refuses_is_not_asked_again_before_it_is_found_again(
    town, conduits, address
):
    town.addresses = [address]
    await looked(town)
    first = conduits.best()
    conduits.lose(first)
    assert conduits.best() is None


async def test_who_loses_an_old_connection_does_not_lose_the_new_one(town, conduits, address):
    town.addresses = [address]
    await looked(town)
    first = conduits.best()
    first.close()
    await until(lambda: conduits.best() not in (None, first))
    conduits.lose(first)
    assert conduits.best() not in (None, first)


async def test_a_port_where_nobody_listens_is_left_alone(town, conduits, address, outlet, caplog):
    await outlet.close(0)
    town.addresses = [address]
    await looked(town)
    assert conduits.best() is None
    assert str(address.port) in caplog.text
