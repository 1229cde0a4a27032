"""A batcher on frozen time, with engines that note what they see and a device to be held."""

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future

import numpy as np
import pytest

from serve.config import Admission, Batch, Model, Pool
from serve.embedding.fake import FakeEngine, Faults
from serve.embedding.holdings import Holdings
from serve.embedding.profiles import Profile
from serve.errors import ModelUnavailable, NotFound
from serve.flows.batching import Batcher
from serve.records import EmbedCall, EmbedReply, Input, InputKind, Vector


MODEL = Model(id="m", engine="fake", dimensions=16, tokens_max=512, fake_ms_per_token=1)
OTHER = Model(id="n", engine="fake", dimensions=8, tokens_max=512, fake_ms_per_token=10)


async def turns(count: int = 12) -> None:
    """Let everything happen that can happen without the device."""
    for _ in range(count):
        await asyncio.sleep(0)


def call(*inputs: Input, tenant="ann", **fields) -> EmbedCall:
    values = {
        "request_id": "r",
        "tenant": tenant,
        "weight": 1.0,
        "klass": "interactive",
        "model": "m",
        "inputs": inputs,
        "tokens": tuple(len(one.ids) for one in inputs),
        "deadline_s": 10.0,
    }
    return EmbedCall(**(values | fields))


class Device(Executor):
    """Stands in for the model's threads: runs at once, or on `step` while it is held."""

    def __init__(self) -> None:
        self.held = False
        self.waiting: list[tuple[Future, Callable, tuple]] = []

    def submit(self, function, /, *args, **kwargs):
        future: Future = Future()
        self.waiting.append((future, function, args))
        if not self.held:
            self._run()
        return future

    def _run(self) -> None:
        future, function, args = self.waiting.pop(0)
        try:
            future.set_result(function(*args))
        except Exception as error:  # noqa: BLE001  as an executor does
            future.set_exception(error)

    async def step(self) -> None:
        """Let one batch through, and everything that follows of it."""
        self._run()
        await turns()


class Spy:
    """An engine that notes what it is given; `fault` may raise or change the rows."""

    accepts: frozenset[InputKind] = frozenset({"ids"})
    row_tokens = 0

    def __init__(self, model: Model, clock, faults: Faults | None = None) -> None:
        self.dimensions = model.dimensions
        self._engine = FakeEngine(model, sleep=clock.advance, faults=faults)
        self.batches: list[list[list[int]]] = []
        self.fault: Callable[[Sequence[Input], Vector | None], Vector | None] | None = None

    def forward(self, batch: Sequence[Input]) -> Vector:
        self.batches.append([one.ids.tolist() for one in batch])
        vectors = self._engine.forward(batch)
        return vectors if self.fault is None else self.fault(batch, vectors)

    def close(self) -> None: ...

    @property
    def seen(self) -> list[int]:
        """The first token id of every input, in order."""
        return [row[0] for batch in self.batches for row in batch]

    @property
    def padded(self) -> list[int]:
        return [len(batch) * max(map(len, batch)) for batch in self.batches]


class Rig:
    """A batcher with two spied engines (`only`: which), on frozen time, a device and a loader that can be held.

    The pace is that of the engines: 1 ms a padded token (`m`) and 10 ms (`n`), and `overhead_s`
    for each batch. `pool` are settings of it, `loose` the models that are not pinned: those are not
    loaded yet. Each takes 100 bytes; `load_fault` may raise.
    """

    def __init__(
        self,
        clock,
        *,
        device: Executor | None = None,
        faults=None,
        overhead_s=0.0,
        pool=(),
        loose="",
        only="mn",
        **batch,
    ) -> None:
        self.slots = batch.pop("slots", 1)
        self.overhead_s = overhead_s
        models = [
            model.model_copy(
                update={"fake_ms_per_batch": overhead_s * 1e3, "pinned": model.id not in loose}
            )
            for model in (MODEL, OTHER)
            if model.id in only
        ]
        self.engines = {model.id: Spy(model, clock, faults) for model in models}
        self.spy = self.engines["m"]
        self.probed: list[str] = []
        self.log: list[tuple[str, str]] = []
        self.relieved = 0
        self.load_fault: Callable[[str], None] | None = None
        self.holdings = Holdings(Pool(models=models, **dict(pool)))
        for model in models:
            if model.pinned:
                self.holdings.loaded(model.id, 100, clock())
            else:
                self.holdings.expect(model.id, 100)
        self.loader = Device()
        self.device = device or Device()
        self.batcher = Batcher(
            self,
            list(self.engines),
            admission=Admission(),
            batch=Batch(**({"item_overhead_tokens": 0} | batch)),
            executor=self.device,
            clock=clock,
            loader=self.loader,
        )
        self.tasks: list[asyncio.Task] = []
        self.running = asyncio.create_task(self.batcher.run())

    def engine(self, model_id: str) -> Spy:
        if model_id not in self.engines:
            raise NotFound(f"no {model_id}", param="model")
        return self.engines[model_id]

    def profile(self, model_id: str) -> Profile | None:
        if not self.holdings.is_open(model_id) and ("load", model_id) not in self.log:
            return None
        token_s = {"m": 0.001, "n": 0.01}[model_id]
        return Profile(
            overhead_s=self.overhead_s,
            token_s=token_s,
            budget_tokens=10**7,
            bytes=100,
            engine="Spy",
            made_of={},
        )

    def load_one(self, model_id: str) -> Profile:
        if self.load_fault is not None:
            self.load_fault(model_id)
        self._known_good(model_id)
        self.log.append(("load", model_id))
        profile = self.profile(model_id)
        assert profile is not None
        return profile

    def unload(self, model_id: str) -> None:
        self.log.append(("unload", model_id))

    def relieve(self) -> None:
        self.relieved += 1

    def probe(self, model_id: str) -> None:
        self.probed.append(model_id)
        self._known_good(model_id)

    def _known_good(self, model_id: str) -> None:
        vectors = self.engines[model_id].forward([Input(ids=np.ones(3, np.int32))])
        if vectors.shape != (1, self.engines[model_id].dimensions) or np.isnan(vectors).any():
            raise ModelUnavailable("its vectors are not finite")

    async def ask(self, *inputs: Input, **fields) -> EmbedReply:
        return await self.batcher.submit(call(*inputs, **fields))

    async def start(self, *inputs: Input, **fields) -> asyncio.Task[EmbedReply]:
        """Ask, and let the call arrive."""
        task = asyncio.create_task(self.ask(*inputs, **fields))
        self.tasks.append(task)
        await turns()
        return task

    async def hold(self) -> None:
        """Keep the model busy with a batch of its own, so that what comes next has to wait."""
        self.device.held = True
        await self.start(Input(ids=np.array([9], np.int32)), tenant="occupant")
        assert len(self.device.waiting) == 1

    async def release(self) -> None:
        """Let the device work until every call is answered."""
        self.device.held = self.loader.held = False
        for device in (self.device, self.loader):
            while device.waiting:
                await device.step()
        async with asyncio.timeout(10):
            await asyncio.gather(*self.tasks, return_exceptions=True)

    async def leave(self, task: asyncio.Task) -> None:
        """The caller goes away."""
        task.cancel()
        await turns()

    def alone(self, one: Input) -> Vector:
        """What model `m` makes of an input that has the device to itself."""
        return FakeEngine(MODEL, sleep=lambda _: None).forward([one])[0]

    async def close(self) -> None:
        for task in (*self.tasks, self.running):
            task.cancel()
        await asyncio.gather(*self.tasks, self.running, return_exceptions=True)


@pytest.fixture
async def rig(clock):
    made: list[Rig] = []

    def make(**fields) -> Rig:
        made.append(Rig(clock, **fields))
        return made[-1]

    yield make
    for one in made:
        await one.close()
        assert one.batcher.queued_tokens == 0
        assert one.batcher.queued_items == 0
