"""What is kept and shared, against a model: the bytes bound holds, everybody gets the engine's own
vectors, nobody gets what another tenant paid for, and whoever leaves or fails leaves the others served.
"""

import asyncio
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from serve.config import Cache, Ingress, Model, Pool, Settings
from serve.embedding.fake import FakeEngine
from serve.embedding.row_cache import ENTRY_BYTES
from serve.errors import DeadlineExceeded, Overloaded, PoisonInput, QuotaExceeded
from serve.flows.embed import EmbedFlow, Work
from serve.records import Caller, EmbedCall, EmbedReply, Input


MODEL = Model(id="m", engine="fake", dimensions=8, tokens_max=64)
ENGINE = FakeEngine(MODEL)
ROW_BYTES = 8 * 4 + ENTRY_BYTES
POISON = 0
"""The input on which the model always fails."""

FAILURES = st.sampled_from([DeadlineExceeded, Overloaded, QuotaExceeded])
WHICH = st.integers(0, 1000)
NUMBERS = st.lists(st.integers(0, 7), min_size=1, max_size=6)


def ids(number: int) -> np.ndarray:
    return np.array([number, 9], np.int32)


def vector(number: int) -> np.ndarray:
    return ENGINE.forward([Input(ids=ids(number))])[0]


@dataclass(eq=False)
class Asked:
    """A request; `failed` is what its own call met."""

    tenant: str
    klass: str
    numbers: list[int]
    task: Any = None
    left: bool = False
    failed: type[Exception] | None = None


@dataclass(eq=False)
class Waiting:
    """A call that the embedder has not answered."""

    call: EmbedCall
    answer: Any
    numbers: list[int] = field(init=False)

    def __post_init__(self) -> None:
        self.numbers = [int(one.ids[0]) for one in self.call.inputs]


class ReuseMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.asked: list[Asked] = []
        self.waiting: list[Waiting] = []
        self.paid: set[tuple[str, int]] = set()

    @initialize(
        scope=st.sampled_from(["tenant", "shared", "none"]),
        kept=st.sampled_from([0, 1, 3, 100]),
        slice_tokens=st.sampled_from([2, 4, 1000]),
    )
    def start(self, scope: str, kept: int, slice_tokens: int) -> None:
        ingress = Ingress().model_copy(update={"slice_tokens": slice_tokens})
        rules = Settings(pools=(Pool(models=(MODEL,)),), cache=Cache(scope=scope))
        context = SimpleNamespace(
            settings=rules.model_copy(update={"ingress": ingress}),
            models=None,
            quotas=None,
            threads=None,
            clock=lambda: 0.0,
        )
        self.scope, self.bytes_max = scope, kept * ROW_BYTES
        self.flow = EmbedFlow(context, kept_bytes_max=self.bytes_max)
        self.served = SimpleNamespace(model=MODEL, revision="r", embedder=self)

    async def embed(self, call: EmbedCall) -> EmbedReply:
        """As `ports.Embedder`."""
        one = Waiting(call, self.loop.create_future())
        self.waiting.append(one)
        try:
            return await one.answer
        finally:
            self.waiting.remove(one)

    def turn(self) -> None:
        async def turns() -> None:
            for _ in range(30):
                await asyncio.sleep(0)

        self.loop.run_until_complete(turns())

    # --- rules ----------------------------------------------------------------------------

    # Which one is a number, never a draw from those there are: a task group cancels its tasks in no order,
    # so that a replay may have others.

    @rule(
        tenant=st.sampled_from(["ann", "bob"]),
        klass=st.sampled_from(["interactive", "interactive", "bulk"]),
        numbers=NUMBERS,
    )
    def ask(self, tenant: str, klass: str, numbers: list[int]) -> None:
        one = Asked(tenant, klass, numbers)
        work = Work(Caller(tenant, "free", 1.0, "k"), str(len(self.asked)), klass, 1000.0)
        rows = [ids(number) for number in numbers]
        one.task = self.loop.create_task(self.flow.run(work, self.served, rows))
        self.asked.append(one)
        self.turn()

    @rule(which=WHICH)
    def answer(self, which: int) -> None:
        if self.waiting:
            self._answer(self.waiting[which % len(self.waiting)])

    @rule(which=WHICH, kind=FAILURES)
    def fail(self, which: int, kind: type[Exception]) -> None:
        if self.waiting:
            one = self.waiting[which % len(self.waiting)]
            self.asked[int(one.call.request_id)].failed = kind
            one.answer.set_exception(kind("Not now."))
            self.turn()

    @rule(which=WHICH)
    def leave(self, which: int) -> None:
        open_ones = [one for one in self.asked if not one.task.done()]
        if open_ones:
            one = open_ones[which % len(open_ones)]
            one.left = True
            one.task.cancel()
            self.turn()

    def _answer(self, one: Waiting) -> None:
        self.paid |= {(one.call.tenant, number) for number in one.numbers}
        rows = ENGINE.forward(one.call.inputs)
        failures = tuple(
            (at, PoisonInput("Bad.")) for at, number in enumerate(one.numbers) if number == POISON
        )
        one.answer.set_result(EmbedReply(rows, failures))
        self.turn()

    # --- what must hold -------------------------------------------------------------------

    @invariant()
    def bytes_are_bounded(self) -> None:
        if self.flow.reuse is not None:
            cache = self.flow.reuse.cache
            assert cache.size_bytes == len(cache) * ROW_BYTES <= self.bytes_max

    @invariant()
    def nothing_is_computed_twice_at_the_same_time(self) -> None:
        if self.scope != "none":
            under_way = [
                (one.call.tenant, one.call.klass, number)
                for one in self.waiting
                for number in one.numbers
            ]
            assert len(set(under_way)) == len(under_way)

    @invariant()
    def everybody_gets_the_engines_vectors(self) -> None:
        for one in self.asked:
            if one.task.done():
                self._check(one)

    def _check(self, one: Asked) -> None:
        if one.task.cancelled():
            assert one.left
            return
        if (error := one.task.exception()) is not None:
            assert type(error) is one.failed  # its own call's, never another's
            return
        reply = one.task.result()
        bad = [at for at, number in enumerate(one.numbers) if number == POISON]
        assert [at for at, _ in reply.failures] == bad
        for number, row in zip(one.numbers, reply.vectors, strict=True):
            assert number == POISON or np.array_equal(row, vector(number))
            owners = {tenant for tenant, paid in self.paid if paid == number}
            assert one.tenant in owners or (self.scope == "shared" and owners)

    def teardown(self) -> None:
        for _ in range(1000):
            if not self.waiting:
                break
            self._answer(self.waiting[0])
        assert all(one.task.done() for one in self.asked)
        self.everybody_gets_the_engines_vectors()
        if self.flow.reuse is not None:
            assert self.flow.reuse._flights == {}
        self.loop.close()


TestReuse = ReuseMachine.TestCase
TestReuse.settings = settings(max_examples=80, stateful_step_count=30, deadline=None)
