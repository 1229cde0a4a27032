"""Tenants that load a running service over HTTP, each with a key of its own: light ones that ask
now and then, a flood, a bulk job. Closed loops stop at the end; what the light ones still wait for
then counts with its age.
"""

import asyncio
import itertools
import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from time import monotonic
from typing import Literal, Self, get_args

from bench import texts
from bench.load import Answer, Connection, Target


Policy = Literal["fair", "fifo", "serve_batch", "strict", "formula"]
POLICIES: tuple[Policy, ...] = get_args(Policy)
"""See `bench.cluster`."""
TIERS: Mapping[str, float] = {"free": 1.0, "premium": 4.0, "enterprise": 16.0}
LIGHT_RATE = 2.0
"""Requests a second of a light tenant, each a single short text."""
FLOOD_TEXTS = 32
"""Texts of one request of a flood, half of them passages of 100 to 256 tokens."""
FLOOD_CONNECTIONS = 8
"""Closed loops of the flooding tenant: 256 texts always wait, some seconds of two cores' work."""
SHARE_CONNECTIONS = 3
"""The same where a tenant of each tier floods: with more the free one's wait is beyond any deadline."""
BULK_CONNECTIONS = 6
BULK_DOCUMENTS = 4
"""24 passages beside the flood's 256 texts: first in first out gives the job about a tenth of the model
then, as the fair queue does. A job's documents cost on their way to the index, beside the model; with
fewer of them, first in first out would be compared at a cheaper mix of work.
"""
ASKED = (4, 8, 16, 32)
"""Texts a request of four tenants of one tier, each with `ASKED_TEXTS` waiting at all times: in more
and smaller requests the HTTP path is the bottleneck, and nothing waits for the model.
"""
ASKED_TEXTS = 96
DRAIN_S_MAX = 15.0
OK, ACCEPTED, WRITTEN, REFUSED, SHED = 200, 202, 207, 429, 503
SHED_PAUSE_S = 0.2
"""A client whose wait would be too long, as predicted, comes again after this."""


class Unexpected(Exception):
    """A service that answers with anything but vectors or a refusal measures nothing."""


@dataclass(frozen=True, slots=True)
class Town:
    """Where the service is, which model to ask for, and every tenant's key."""

    url: str
    model: str
    keys: Mapping[str, str]

    def target(self, tenant: str, path: str = "/v1/embeddings") -> Target:
        """How a tenant reaches a route."""
        return Target(tenant, f"{self.url}{path}", self.model, self.keys[tenant])


@dataclass(slots=True)
class Waits:
    """What light requests of one tier met, in milliseconds: whole, and in the embedder's queue."""

    call_ms: list[float] = field(default_factory=list)
    queue_ms: list[float] = field(default_factory=list)
    unanswered: int = 0


LightWaits = Mapping[str, Waits]


def embedding(town: Town, inputs: Sequence[str]) -> bytes:
    """A request body."""
    asked = {"model": town.model, "input": list(inputs), "encoding_format": "base64"}
    return json.dumps(asked).encode()


class Pressure:
    """Closed loops that run while the context lasts."""

    def __init__(self) -> None:
        self._connections: list[Connection] = []
        self._tasks: list[asyncio.Task[None]] = []
        self.answers: dict[int, int] = {}

    async def __aenter__(self) -> Self:
        """Nothing runs yet."""
        return self

    async def __aexit__(self, *_: object) -> None:
        """Leave in the middle of what is under way, as a client that dies does."""
        for task in self._tasks:
            task.cancel()
        outcomes = await asyncio.gather(*self._tasks, return_exceptions=True)
        for one in self._connections:
            one.close()
        for outcome in outcomes:
            if isinstance(outcome, Exception):
                raise outcome

    def start(self, target: Target, bodies: Sequence[bytes], connections: int) -> None:
        """So many loops over these bodies."""
        turns = itertools.cycle(bodies)
        for _ in range(connections):
            connection = Connection(target)
            self._connections.append(connection)
            self._tasks.append(asyncio.create_task(self._loop(connection, turns)))

    async def _loop(self, connection: Connection, bodies: "itertools.cycle[bytes]") -> None:
        while True:
            answer = await connection.send(next(bodies))
            if answer.status not in (OK, ACCEPTED, WRITTEN, REFUSED, SHED):
                raise Unexpected(f"{answer.status}: {answer.body[:300]!r}")
            self.answers[answer.status] = self.answers.get(answer.status, 0) + 1
            if answer.status == SHED:
                await asyncio.sleep(SHED_PAUSE_S)


def flood(
    pressure: Pressure, town: Town, tenant: str, connections: int = FLOOD_CONNECTIONS
) -> None:
    """Requests of 32 mixed texts without end."""
    pool = texts.mixed(16 * FLOOD_TEXTS)
    groups = [pool[at : at + FLOOD_TEXTS] for at in range(0, len(pool), FLOOD_TEXTS)]
    bodies = [embedding(town, group) for group in groups]
    pressure.start(town.target(tenant), bodies, connections)


def bulk(pressure: Pressure, town: Town, tenant: str, collection: str) -> None:
    """A job that writes documents without end."""
    passages, bodies = texts.passages(4 * BULK_CONNECTIONS * BULK_DOCUMENTS), []
    # Each document is another one in every second round: what is unchanged would be skipped.
    for pool in (passages, passages[::-1]):
        for at in range(0, len(pool), BULK_DOCUMENTS):
            documents = [
                {"id": f"d{at + n}", "text": text}
                for n, text in enumerate(pool[at : at + BULK_DOCUMENTS])
            ]
            bodies.append(json.dumps({"documents": documents}).encode())
    path = f"/v1/collections/{collection}/documents"
    # Each loop writes documents of its own: two writes of one would supersede each other.
    for part in range(BULK_CONNECTIONS):
        pressure.start(town.target(tenant, path), bodies[part::BULK_CONNECTIONS], 1)


def ask(pressure: Pressure, town: Town, tenant: str, inputs: int) -> None:
    """Requests of so many mixed texts, `ASKED_TEXTS` waiting."""
    pool = texts.mixed(ASKED_TEXTS)
    bodies = [embedding(town, pool[at : at + inputs]) for at in range(0, ASKED_TEXTS, inputs)]
    pressure.start(town.target(tenant), bodies, ASKED_TEXTS // inputs)


async def light(town: Town, seed: str, seconds: float) -> LightWaits:
    """A light tenant of each tier, at random moments, whatever became of its requests before."""
    waits = {tier: Waits() for tier in TIERS}
    await asyncio.gather(
        *(
            _light(town, tier, random.Random(f"{seed} {tier}"), waits[tier], seconds)
            for tier in TIERS
        )
    )
    return waits


async def _light(town: Town, tier: str, rng: random.Random, waits: Waits, seconds: float) -> None:
    target, until = town.target(f"light-{tier}"), monotonic() + seconds
    idle: list[Connection] = []
    under_way: dict[asyncio.Task[None], float] = {}
    bodies = [embedding(town, [text]) for text in texts.shorts(64)]

    async def one() -> None:
        began = monotonic()
        connection = idle.pop() if idle else Connection(target)
        answer = await connection.send(rng.choice(bodies))
        if answer.status != OK:
            raise Unexpected(f"{answer.status}: {answer.body[:300]!r}")
        waits.call_ms.append((monotonic() - began) * 1e3)
        waits.queue_ms.append(float(answer.header("x-queue-time")))
        idle.append(connection)

    at = monotonic()
    while (at := at + rng.expovariate(LIGHT_RATE)) < until:
        await asyncio.sleep(max(at - monotonic(), 0))
        under_way[asyncio.create_task(one())] = monotonic()
    await asyncio.sleep(max(until - monotonic(), 0))
    if under_way:
        done, late = await asyncio.wait(under_way, timeout=DRAIN_S_MAX)
        ages = [(monotonic() - under_way[task]) * 1e3 for task in late]
        waits.unanswered += len(late)
        waits.call_ms += ages
        waits.queue_ms += ages
        for task in late:
            task.cancel()
        for task in done:
            task.result()
    for connection in idle:
        connection.close()


async def settle(town: Town, tenant: str) -> None:
    """Return once what earlier loads left behind is gone: three quick answers in a row."""
    quick, until = 0, monotonic() + 60
    connection, body = Connection(town.target(tenant)), embedding(town, ["still?"])
    while quick < 3:
        if monotonic() > until:
            raise Unexpected(f"{town.model} is still busy after a minute")
        answer: Answer = await connection.send(body)
        quick = (
            quick + 1 if answer.status == OK and float(answer.header("x-queue-time")) < 50 else 0
        )
        await asyncio.sleep(0.05)
    connection.close()
