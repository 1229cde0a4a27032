"""deployments.actors: how a named actor starts again, looks after itself, and leaves."""

import asyncio
import threading
from types import SimpleNamespace
from typing import Any

import pytest
import ray.exceptions
from ray.serve._private.common import DeploymentID, ReplicaID

from deployments import actors, upserter
from deployments import store as store_module
from deployments.actors import STORE, UPSERTER, State, name_of, starting, watch
from deployments.store import StoreActor
from deployments.upserter import UpserterActor
from serve.config import Settings
from serve.errors import Fenced, IndexUnavailable, Internal, Overloaded, StoreUnavailable
from serve.index.errors import IndexOffline
from serve.records import Collection


class Exited(BaseException):
    """Stands in for the end of the process."""


@pytest.fixture(autouse=True)
def asked(monkeypatch):
    """What an actor asks Ray: here it was restarted, is alone, and its application lives."""

    def end(code: int) -> None:
        raise Exited(code)

    answers = SimpleNamespace(
        restarted=True, living=[], ingress=lambda: False, application=lambda: True
    )
    monkeypatch.setattr(actors.os, "_exit", end)
    monkeypatch.setattr(actors, "_restarted", lambda: answers.restarted)
    monkeypatch.setattr(actors, "living", lambda _role: answers.living)
    monkeypatch.setattr(actors, "ingress_lives", lambda: answers.ingress())  # noqa: PLW0108  tests change it
    monkeypatch.setattr(actors, "application_lives", lambda: answers.application())  # noqa: PLW0108  tests change it
    for name in ("RESTART_S", "LOOK_EVERY_S", "START_S_MAX"):
        monkeypatch.setattr(actors, name, 0)
    return answers


async def start(error: Exception) -> None:
    async with starting(STORE, Settings()):
        raise error


async def test_an_actor_that_cannot_start_again_is_restarted_once_more(asked, caplog):
    asked.living = [name_of(STORE, Settings())]
    with pytest.raises(Exited):
        await start(OSError("no space left"))
    assert "no space left" in caplog.text


async def test_an_application_that_cannot_be_asked_for_counts_as_living(asked):
    asked.application = lambda: 1 / 0
    with pytest.raises(Exited):
        await start(OSError())


async def test_a_first_start_that_fails_is_seen(asked):
    asked.restarted = False
    with pytest.raises(OSError, match="no space left"):
        await start(OSError("no space left"))


async def test_an_actor_that_is_fenced_out_does_not_start_again():
    with pytest.raises(Fenced):
        await start(Fenced())


async def test_an_actor_that_has_a_successor_does_not_start_again(asked):
    asked.living = [name_of(STORE, Settings()), "store-9.9.9-ffffffff"]
    with pytest.raises(StoreUnavailable):
        await start(StoreUnavailable("another process still owns it"))


async def test_an_actor_whose_application_is_gone_does_not_start_again(asked):
    asked.application = lambda: False
    with pytest.raises(StoreUnavailable):
        await start(StoreUnavailable())


class Looked:
    """A watched actor, whose state a test sets."""

    def __init__(self, state: State = "works") -> None:
        self.state: State = state
        self.retired = 0

    async def retire(self) -> None:
        self.retired += 1
        self.state = "leaving"

    async def watch(self, grace_s: float = 60) -> None:
        async with asyncio.timeout(20):
            await watch(lambda: self.state, self.retire, grace_s=grace_s)


async def test_failed_work_restarts_the_actor():
    with pytest.raises(Exited):
        await Looked("failed").watch()


@pytest.mark.parametrize("state", ["failed", "replaced"])
async def test_an_actor_that_begins_to_leave_between_two_looks_is_left_alone(state):
    actor = Looked(state)
    watching = asyncio.create_task(actor.watch())
    await asyncio.sleep(0)  # it sleeps
    actor.state = "leaving"
    await watching
    assert actor.retired == 0


async def test_an_actor_that_begins_to_leave_while_the_controller_thinks_is_left_alone(asked):
    actor = Looked()

    def gone() -> bool:
        actor.state = "leaving"
        return False

    asked.application = gone
    await actor.watch(grace_s=-1)
    assert actor.retired == 0


async def test_a_replaced_actor_leaves():
    actor = Looked("replaced")
    await actor.watch()
    assert actor.retired == 1


async def test_an_actor_without_its_application_leaves_after_the_grace(asked):
    actor, looks = Looked(), []

    def lives() -> bool:
        looks.append(True)
        return len(looks) < 3

    asked.application = lives
    await actor.watch(grace_s=-1)
    assert actor.retired == 1
    assert len(looks) >= 3


async def test_the_controller_is_not_asked_while_a_replica_of_the_ingress_is_seen(asked):
    actor, looks = Looked(), []

    def seen() -> bool:
        looks.append(True)
        actor.state = "leaving" if len(looks) > 3 else "works"
        return True

    asked.ingress, asked.application = seen, lambda: pytest.fail("asked")
    await actor.watch(grace_s=-1)
    assert actor.retired == 0


async def test_the_controller_is_not_asked_while_the_application_may_still_be_starting(
    asked, monkeypatch
):
    monkeypatch.setattr(actors, "START_S_MAX", 1e9)
    actor, looks = Looked(), []

    def unseen() -> bool:
        looks.append(True)
        actor.state = "leaving" if len(looks) > 3 else "works"
        return False

    asked.ingress, asked.application = unseen, lambda: pytest.fail("asked")
    await actor.watch(grace_s=-1)
    assert actor.retired == 0


@pytest.mark.parametrize(
    ("name", "lives"),
    [
        (ReplicaID("x1y2", DeploymentID("ingress", "headrace")).to_full_id_str(), True),
        ("SERVE_REPLICA::other name#ingress#x1y2", True),
        ("SERVE_REPLICA::headrace#ingress-2#x1y2", False),
        ("SERVE_REPLICA::headrace#embedder-default#x1y2", False),
        ("store-0.1.0-1a2b3c4d", False),
    ],
)
def test_a_replica_of_the_ingress_is_known_by_its_name(name, lives, monkeypatch):
    monkeypatch.undo()
    named = [{"name": "SERVE_CONTROLLER_ACTOR", "namespace": "serve"}, {"name": name}]
    monkeypatch.setattr(actors.ray.util, "list_named_actors", lambda **_: named)
    assert actors.ingress_lives() is lives


async def test_an_actor_looks_after_itself_while_the_controller_hangs(asked, monkeypatch):
    monkeypatch.setattr(actors, "ASK_S_MAX", 0.01)
    over, threads = threading.Event(), set()

    def hang() -> bool:
        threads.add(threading.current_thread())
        return over.wait()

    asked.application = hang
    actor, looks = Looked(), []

    def state() -> State:
        looks.append(actor.state)
        return "failed" if len(looks) > 3 else "works"

    try:
        with pytest.raises(Exited):
            async with asyncio.timeout(20):
                await watch(state, actor.retire, grace_s=-1)
        assert len(threads) == 1
    finally:
        over.set()
    assert actor.retired == 0


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ray.exceptions.ActorDiedError(), "has left"),
        (ValueError("no such name"), "has left"),
        (ray.exceptions.GetTimeoutError("too late"), "may not have left: GetTimeoutError"),
        (ray.exceptions.ActorUnavailableError("restarting", None), "may not have left"),
    ],
)
def test_only_an_actor_that_is_gone_is_said_to_have_left(error, said, monkeypatch, caplog):
    def fail(*_args: Any, **_more: Any) -> None:
        raise error

    monkeypatch.setattr(actors.ray, "get_actor", fail)
    caplog.set_level("INFO", "headrace.actors")
    actors.retire("store-1", 1)
    assert f"store-1 {said}" in caplog.text


class Made:
    """An actor's class: it tells when an instance is made."""

    def __init__(self, role: str, events: list[str]) -> None:
        self.role, self.events = role, events
        self.ready = SimpleNamespace(remote=lambda: None)

    def options(self, **_options: Any) -> "Made":
        return self

    def remote(self, *_args: Any) -> "Made":
        self.events.append(f"{self.role} made")
        return self


def test_all_old_actors_have_left_before_a_new_one_is_made(monkeypatch):
    events: list[str] = []
    monkeypatch.setattr(actors, "living", lambda role: [f"{role}-old"])
    monkeypatch.setattr(
        actors, "retire", lambda name, _timeout_s: events.append(f"{name} has left")
    )
    monkeypatch.setattr(actors.ray, "get", lambda *_args, **_more: None)
    actors.start({role: Made(role, events) for role in (STORE, UPSERTER)}, Settings())
    assert events == ["upserter-old has left", "store-old has left", "store made", "upserter made"]


def bare(actor: Any) -> Any:
    """An instance of an actor's class outside of Ray, before its constructor."""
    return object.__new__(actor.__ray_metadata__.modified_class)


async def unwatched(*_args: Any, **_more: Any) -> None: ...


# The Store's actor


@pytest.fixture
async def store_actor(tmp_path, monkeypatch):
    monkeypatch.setattr(store_module, "watch", unwatched)
    actor = bare(StoreActor)
    await actor.__init__(Settings(data_dir=str(tmp_path)), 1)
    yield actor
    actor._ticking.cancel()
    await asyncio.to_thread(actor._owner.close)


async def test_a_store_that_does_not_tick_any_more_has_failed(store_actor, monkeypatch, caplog):
    assert store_actor._state() == "works"
    store_actor._ticking.cancel()

    async def broken() -> None:
        raise RuntimeError("a fault of the tick")

    store_actor._ticking = asyncio.create_task(broken())
    await asyncio.wait([store_actor._ticking])
    assert store_actor._state() == "failed"
    assert "a fault of the tick" in caplog.text
    store_actor._leaving = True
    assert store_actor._state() == "leaving"


async def test_a_store_whose_disk_fails_at_a_restart_is_restarted_once_more(tmp_path, asked):
    (tmp_path / "file").touch()
    settings = Settings(data_dir=str(tmp_path / "file"))
    with pytest.raises(Exited):
        await bare(StoreActor).__init__(settings, 1)
    asked.restarted = False
    with pytest.raises(OSError, match="file"):
        await bare(StoreActor).__init__(settings, 1)


# The Upserter's


class Fence:
    """A Store that takes an epoch when all `refusals` are used up."""

    def __init__(self, *refusals: Exception) -> None:
        self.refusals = list(refusals)
        self.gone: list[Collection] = []

    async def take_epoch(self, _name: str, _seq: int) -> int:
        if self.refusals:
            raise self.refusals.pop(0)
        return 7

    async def deleted_collections(self) -> list[Collection]:
        return self.gone

    async def purge_collection(self, _uuid: str) -> None:
        raise Internal("no purge")


class Offline:
    """An index that is away."""

    def __init__(self, *_args: Any) -> None: ...

    async def open(self) -> None:
        raise IndexUnavailable("no index")

    async def drop(self, _ns: str) -> None:
        raise IndexOffline("no drop")


def no_database(_settings: Settings) -> Any:
    raise StoreUnavailable("no database")


GONE = Collection("c1", "ann", "notes", "m", "r", 8, 0.0)


@pytest.mark.parametrize(
    ("broken", "said"),
    [
        ({"open_store": no_database}, "no database"),
        ({"open_store": lambda _: Fence(Internal("no epoch"))}, "no epoch"),
        ({"make_index": Offline}, "no drop"),
        ({"make_index": lambda *_: SimpleNamespace(drop=unwatched, open=unwatched)}, "no purge"),
    ],
)
async def test_an_upserter_that_cannot_start_again_is_restarted_once_more(
    broken, said, tmp_path, monkeypatch, caplog
):
    store = Fence()
    store.gone = [GONE]
    for name, fake in ({"open_store": lambda _: store} | broken).items():
        monkeypatch.setattr(upserter, name, fake)
    with pytest.raises(Exited):
        await bare(UpserterActor).__init__(Settings(data_dir=str(tmp_path)), 1)
    assert said in caplog.text


async def test_an_upserter_that_a_later_deployment_replaced_is_not_restarted(tmp_path, monkeypatch):
    monkeypatch.setattr(upserter, "open_store", lambda _: Fence(Fenced("later")))
    with pytest.raises(Fenced):
        await bare(UpserterActor).__init__(Settings(data_dir=str(tmp_path)), 1)


async def test_an_upserter_waits_for_its_store_and_lets_others_work(monkeypatch):
    monkeypatch.setattr(upserter, "AWAY_S", 0)
    store, turns = Fence(*[StoreUnavailable(), Overloaded()] * 5), []

    async def other() -> None:
        while True:
            turns.append(len(store.refusals))
            await asyncio.sleep(0)

    beside = asyncio.create_task(other())
    assert await upserter._take_epoch(store, 1, Settings()) == 7
    beside.cancel()
    assert turns == list(range(9, -1, -1))


async def test_an_upserter_waits_for_its_store_no_longer_than_a_start_may_take(monkeypatch):
    monkeypatch.setattr(upserter, "AWAY_S", 0)
    monkeypatch.setattr(upserter, "START_S_MAX", -1e9)
    with pytest.raises(StoreUnavailable):
        await upserter._take_epoch(Fence(StoreUnavailable()), 1, Settings())
