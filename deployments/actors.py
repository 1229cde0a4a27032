"""The named actors: where they stand, how they start, hand over and leave.

Only `start` makes them; everyone else looks them up (`deployments.handles`). A name contains the
version and a hash of the settings, because Ray never loads a new class into a living detached
actor: a new deployment starts a new one and asks the old one to leave.
"""

import asyncio
import contextlib
import hashlib
import importlib.metadata
import logging
import os
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

import ray
import ray.actor
import ray.exceptions
import ray.util

from serve.config import Settings
from serve.errors import Fenced


log = logging.getLogger("headrace.actors")

NAMESPACE = "headrace"
STORE = "store"
UPSERTER = "upserter"
LEDGER = "ledger"
INGRESS_DEPLOYMENT = "ingress"

INGRESS_REPLICA = re.compile(rf"SERVE_REPLICA::[^#]*#{INGRESS_DEPLOYMENT}#")
"""How Ray Serve names the actors of our ingress's replicas."""

CALLS_MAX = 1000
"""Calls an actor works on at once; its own queues have their bounds in the settings."""

START_S_MAX = 120.0
"""Imports and the first open of the index took up to 20 s on two busy cores."""

LOOK_EVERY_S = 2.0
"""How often an actor looks after itself and its application."""

ASK_S_MAX = 10.0
"""Longest wait for Serve's controller: an actor looks after itself while that hangs, too."""

RESTART_S = 1.0
"""Before the end of an actor that could not start again: Ray restarts it at once."""

_asking = ThreadPoolExecutor(1, "application")
"""A question that hangs with the controller keeps this one thread, and none that others wait for."""


def name_of(role: str, settings: Settings) -> str:
    """`store-0.1.0-1a2b3c4d`: one name per role, version and settings."""
    version = importlib.metadata.version("headrace")
    digest = hashlib.sha256(settings.model_dump_json().encode()).hexdigest()[:8]
    return f"{role}-{version}-{digest}"


def living(role: str) -> list[str]:
    """Names of this role's actors. Blocks on the cluster's directory."""
    named: list[dict[str, str]] = ray.util.list_named_actors(all_namespaces=True)
    return [
        one["name"]
        for one in named
        if one["namespace"] == NAMESPACE and one["name"].startswith(f"{role}-")
    ]


def start(actors: Mapping[str, Any], settings: Settings) -> None:
    """Make each role's actor unless it lives already; blocks until all of them answer.

    Older ones leave first, in reverse order, because the Upserter drains into the Store. The new
    ones start side by side: each costs seconds of imports. Raises what a constructor raises.
    """
    for role in reversed(list(actors)):
        for other in living(role):
            if other != name_of(role, settings):
                retire(other, settings.actors.drain_s + LOOK_EVERY_S)
    seq = int(time.time() * 1e3)
    handles = [
        actor.options(
            name=name_of(role, settings),
            namespace=NAMESPACE,
            lifetime="detached",
            get_if_exists=True,
            max_restarts=-1,
            max_task_retries=-1,
            max_concurrency=CALLS_MAX,
            num_cpus=0,
        ).remote(settings, seq)
        for role, actor in actors.items()
    ]
    waits = [handle.ready.remote() for handle in handles]
    ray.get(waits, timeout=settings.store.lock_wait_s + START_S_MAX)


def retire(name: str, timeout_s: float) -> None:
    """Ask an actor to finish and leave; one that does not is fenced out by its successor.

    A Ledger has no fence, and two would hand out everything twice: it is ended in any case.
    """
    try:
        leaving: Any = ray.get_actor(name, NAMESPACE).retire.options(max_task_retries=0)
        ray.get(leaving.remote(), timeout=timeout_s)
    except (ValueError, ray.exceptions.ActorDiedError):
        log.info("%s has left", name)
    except ray.exceptions.RayError as error:
        log.warning("%s may not have left: %s", name, type(error).__name__)
    if name.startswith(f"{LEDGER}-"):
        with contextlib.suppress(ValueError):  # it has left
            ray.kill(ray.get_actor(name, NAMESPACE), no_restart=True)


def leave() -> None:
    """End the actor that calls this for good, although `max_restarts` is -1."""
    ray.actor.exit_actor()  # type: ignore[no-untyped-call]


def ingress_lives() -> bool:
    """Whether there is a replica of our ingress. Blocks on the cluster's directory."""
    named: list[dict[str, str]] = ray.util.list_named_actors(all_namespaces=True)
    return any(INGRESS_REPLICA.match(one["name"]) for one in named)


def application_lives() -> bool:
    """Whether some application of this cluster has our ingress, replicas or not. Blocks."""
    # Here: no actor needs it otherwise, and it is 0.7 s of a core and 50 MB for each of them.
    import ray.serve  # noqa: PLC0415

    applications = ray.serve.status().applications.values()
    return any(INGRESS_DEPLOYMENT in application.deployments for application in applications)


async def _lives(*, ask: bool = True) -> bool | None:
    """Whether the application lives; None: nobody can say.

    While a replica of its ingress is seen Serve's controller is not asked, nor with `ask` false.
    """
    if await _answer(ingress_lives):
        return True
    return await _answer(application_lives) if ask else None


async def _answer(question: Callable[[], bool]) -> bool | None:
    asked = asyncio.get_running_loop().run_in_executor(_asking, question)
    try:
        return await asyncio.wait_for(asked, ASK_S_MAX)
    except Exception as error:  # noqa: BLE001  a named rim: the controller may be restarting
        log.warning("cannot ask for the application: %r", error)
        return None


@contextlib.asynccontextmanager
async def starting(role: str, settings: Settings) -> AsyncIterator[None]:
    """Around the work of a constructor. To Ray one that raises is final, also after a restart: an
    actor that was restarted ends its process instead, and is restarted again.

    Raised all the same: Fenced; anything at a first start, so that a deployment fails where it is
    seen; anything when nobody needs the actor any more.
    """
    try:
        yield
    except Fenced:
        raise
    except Exception:
        if not await _needed_again(role, settings):
            raise
        log.exception("the %s could not start again; restarting", role)
        await asyncio.sleep(RESTART_S)
        os._exit(1)


async def _needed_again(role: str, settings: Settings) -> bool:
    """Whether this actor was restarted, has no successor, and its application lives, for all we know.

    An actor that must leave cannot be told so while it starts.
    """
    if not await asyncio.to_thread(_restarted):
        return False
    others = set(await asyncio.to_thread(living, role)) - {name_of(role, settings)}
    return not others and await _lives() is not False


def _restarted() -> bool:
    """Whether Ray has restarted the actor that calls this. Blocks on the cluster's directory."""
    return bool(ray.get_runtime_context().was_current_actor_reconstructed)


def ended(task: asyncio.Task[None]) -> bool:
    """Whether a task that is to run for ever has ended; the log says of what."""
    if task.done() and not task.cancelled():
        log.error("the actor's task has ended", exc_info=task.exception())
    return task.done()


State = Literal["works", "failed", "replaced", "leaving"]


async def watch(
    state: Callable[[], State], retire: Callable[[], Awaitable[None]], *, grace_s: float
) -> None:
    """End this actor when its work has failed (Ray restarts it), when a later deployment has
    replaced it, or when its application is gone for longer than the grace, which must be longer
    than a redeploy. Nobody awaits this task. It raises only what `leave` does, which is how Ray's
    actors leave.
    """
    seen = time.monotonic() + START_S_MAX  # the application comes after the slowest of the actors
    while True:
        await asyncio.sleep(LOOK_EVERY_S)
        lives = await _lives(ask=time.monotonic() > seen)
        if lives:
            seen = time.monotonic()
        now = state()  # after every wait: one that has begun to leave must not be restarted
        if now == "leaving":
            return
        if now == "failed":
            log.error("the actor's work has failed; restarting")
            os._exit(1)
        if now == "replaced":
            log.warning("a later deployment took over; leaving")
            await retire()
        elif lives is False and time.monotonic() - seen > grace_s:
            log.warning("the application is gone; leaving")
            await retire()
