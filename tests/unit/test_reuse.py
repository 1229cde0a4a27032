"""serve.flows.reuse, through `EmbedFlow.run`: an embedder whose calls end when a test says so."""

import asyncio
from types import SimpleNamespace

import numpy as np
import pytest

from serve.config import Cache, Ingress, Model, Pool, Settings
from serve.embedding.fake import FakeEngine
from serve.embedding.row_cache import ENTRY_BYTES
from serve.errors import (
    BadInput,
    DeadlineExceeded,
    Internal,
    ModelUnavailable,
    Overloaded,
    PoisonInput,
    QuotaExceeded,
)
from serve.flows.embed import EmbedFlow, Work
from serve.records import Caller, EmbedReply, Input


MODEL = Model(id="plain", engine="fake", dimensions=16, tokens_max=64)
ENGINE = FakeEngine(MODEL)


def ids(number: int) -> np.ndarray:
    return np.array([256, number, 257], np.int32)


def vectors(*numbers: int) -> np.ndarray:
    return ENGINE.forward([Input(ids=ids(number)) for number in numbers])


class Held:
    """An embedder that answers a call when it is told to."""

    def __init__(self) -> None:
        self.calls, self.answers = [], []

    async def embed(self, call) -> EmbedReply:
        self.calls.append(call)
        self.answers.append(asyncio.get_running_loop().create_future())
        return await self.answers[-1]

    @property
    def asked(self) -> list[list[int]]:
        """The second token id of every input, by call."""
        return [[int(one.ids[1]) for one in call.inputs] for call in self.calls]

    async def answer(self, at: int, **failed) -> None:
        """End a call; `failed` are failures by `_number` of the input."""
        call = self.calls[at]
        failures = [
            (place, failed[f"_{one.ids[1]}"])
            for place, one in enumerate(call.inputs)
            if f"_{one.ids[1]}" in failed
        ]
        rows = ENGINE.forward(call.inputs)
        self.answers[at].set_result(EmbedReply(rows, tuple(failures), 5.0, 7.0))
        await turns()

    async def fail(self, at: int, error: Exception) -> None:
        self.answers[at].set_exception(error)
        await turns()


async def turns() -> None:
    for _ in range(12):
        await asyncio.sleep(0)


class Rig:
    def __init__(self, clock, *, kept: int = 1000, slice_tokens: int = 16_384, **cache) -> None:
        settings = Settings(
            pools=(Pool(models=(MODEL,)),),
            cache=Cache(**cache),
            ingress=Ingress(slice_tokens=slice_tokens, slices_in_flight_max=2),
        )
        context = SimpleNamespace(
            settings=settings, models=None, quotas=None, threads=None, clock=clock
        )
        self.flow = EmbedFlow(context, kept_bytes_max=kept * (64 + ENTRY_BYTES))
        self.embedder = Held()
        self.tasks = []
        self.reuse = self.flow.reuse

    def served(self, model: Model = MODEL, revision: str = "r"):
        return SimpleNamespace(model=model, revision=revision, embedder=self.embedder)

    async def ask(self, *numbers, tenant="ann", klass="interactive", served=None, **work):
        """Start a request, and let it come as far as it can."""
        who = Caller(tenant, "free", 1.0, "k")
        wanted = Work(who, f"r{len(self.tasks)}", klass, **{"deadline_s": 10.0, **work})
        rows = [ids(number) for number in numbers]
        task = asyncio.create_task(self.flow.run(wanted, served or self.served(), rows))
        self.tasks.append(task)
        await turns()
        return task


@pytest.fixture
async def make(clock):
    rigs = []

    def made(**changes) -> Rig:
        rigs.append(Rig(clock, **changes))
        return rigs[-1]

    yield made
    for rig in rigs:
        for task in rig.tasks:
            task.cancel()
        await asyncio.gather(*rig.tasks, return_exceptions=True)
        assert rig.reuse is None or rig.reuse._flights == {}


@pytest.fixture
def rig(make) -> Rig:
    return make()


def counts(rig):
    tally = rig.reuse.tally
    return tally.hits, tally.misses, tally.shared


# --- within a request ------------------------------------------------------------------------


async def test_equal_inputs_of_a_request_are_one_row(rig):
    task = await rig.ask(*[1] * 64)
    assert rig.embedder.asked == [[1]]
    assert rig.embedder.calls[0].tokens == (3,)
    await rig.embedder.answer(0)
    reply = task.result()
    assert np.array_equal(reply.vectors, vectors(*[1] * 64))
    assert (reply.cached, reply.queue_ms, reply.infer_ms) == (0, 5.0, 7.0)
    assert counts(rig) == (0, 64, 63)


async def test_order_holds_whatever_is_equal_kept_or_new(rig):
    first = await rig.ask(3, 1)
    await rig.embedder.answer(0)
    task = await rig.ask(2, 1, 4, 2, 3, 1)
    assert rig.embedder.asked[1] == [2, 4]
    await rig.embedder.answer(1)
    assert np.array_equal(first.result().vectors, vectors(3, 1))
    assert np.array_equal(task.result().vectors, vectors(2, 1, 4, 2, 3, 1))
    assert task.result().cached == 3


async def test_a_reply_for_distinct_inputs_is_passed_on_as_it_is(rig):
    task = await rig.ask(1, 2)
    reply = EmbedReply(vectors(1, 2), (), 1.0, 2.0)
    rig.embedder.answers[0].set_result(reply)
    assert await task is reply


async def test_failures_name_every_place_of_the_input(rig):
    task = await rig.ask(1, 2, 1, 3)
    poison = PoisonInput("The model failed on this input.")
    await rig.embedder.answer(0, _1=poison, _3=poison)
    assert [at for at, _ in task.result().failures] == [0, 2, 3]
    assert np.array_equal(task.result().vectors[1], vectors(2)[0])


async def test_no_inputs_are_no_call(rig):
    task = await rig.ask()
    assert task.result().vectors.shape == (0, 16)
    assert rig.embedder.calls == []


async def test_what_is_left_is_cut_into_slices(make):
    rig = make(slice_tokens=256)
    kept = await rig.ask(*range(10))
    await rig.embedder.answer(0)
    await kept
    numbers = [*range(200), *range(100)]
    task = await rig.ask(*numbers)
    for at in (1, 2, 3):
        await rig.embedder.answer(at)
    assert [len(call.inputs) for call in rig.embedder.calls] == [10, 85, 85, 20]
    assert np.array_equal(task.result().vectors, vectors(*numbers))
    assert task.result().cached == 20


# --- kept ------------------------------------------------------------------------------------


async def test_what_was_computed_is_not_computed_again(rig):
    await rig.ask(1)
    await rig.embedder.answer(0)
    for klass in ("interactive", "bulk"):
        again = await rig.ask(1, klass=klass)
        assert np.array_equal(again.result().vectors, vectors(1))
        assert again.result().cached == 1
    assert rig.embedder.asked == [[1]]
    assert counts(rig) == (2, 1, 0)


async def test_another_tenant_model_or_revision_is_another_vector(rig):
    other = MODEL.model_copy(update={"id": "other"})
    asks = [
        {},
        {"tenant": "bob"},
        {"served": rig.served(other)},
        {"served": rig.served(revision="s")},
    ]
    for number, ask in enumerate(asks):
        await rig.ask(1, **ask)
        assert len(rig.embedder.calls) == number + 1
        await rig.embedder.answer(number)


async def test_tenants_may_share_what_is_kept_but_never_wait_at_anothers_pace(make):
    rig = make(scope="shared")
    mine, theirs = await rig.ask(1), await rig.ask(1, tenant="bob")
    assert rig.embedder.asked == [[1], [1]]
    await rig.embedder.answer(0)
    assert mine.done()
    assert not theirs.done()
    later = await rig.ask(1, tenant="eve")
    assert later.result().cached == 1


async def test_nothing_is_shared_where_the_settings_say_so(make):
    rig = make(scope="none")
    await rig.ask(1, 1)
    await rig.ask(1)
    assert rig.embedder.asked == [[1, 1], [1]]


async def test_without_memory_work_under_way_is_shared_all_the_same(make):
    rig = make(kept=0)
    first, second = await rig.ask(1), await rig.ask(1)
    await rig.embedder.answer(0)
    assert np.array_equal(first.result().vectors, second.result().vectors)
    await rig.ask(1)
    assert rig.embedder.asked == [[1], [1]]


async def test_a_failure_is_not_kept(rig):
    first = await rig.ask(1, 2)
    await rig.embedder.answer(0, _1=PoisonInput("Bad."))
    assert first.result().failures
    await rig.ask(1, 2)
    assert rig.embedder.asked == [[1, 2], [1]]


async def test_a_deadline_that_has_passed_does_not_matter_where_nothing_is_computed(rig, clock):
    await rig.ask(1)
    await rig.embedder.answer(0)
    late = {"until": clock() - 1}
    assert (await rig.ask(1, **late)).result().cached == 1
    with pytest.raises(DeadlineExceeded):
        await (await rig.ask(2, **late))


# --- under way -------------------------------------------------------------------------------


async def test_who_asks_for_the_same_meanwhile_waits_for_it(rig, clock):
    first, second = await rig.ask(1, 2), await rig.ask(2, 3)
    assert rig.embedder.asked == [[1, 2], [3]]
    await rig.embedder.answer(1)
    assert not second.done()
    clock.advance(1.5)
    await rig.embedder.answer(0)
    assert np.array_equal(second.result().vectors, vectors(2, 3))
    assert np.array_equal(first.result().vectors, vectors(1, 2))
    assert (second.result().queue_ms, second.result().infer_ms) == (1500, 7)
    assert second.result().cached == 0
    assert counts(rig) == (0, 4, 1)


async def test_two_who_need_each_others_do_not_wait_for_ever(rig):
    tasks = [await rig.ask(1, 2), await rig.ask(3, 2), await rig.ask(1, 3, 4)]
    for at in range(3):
        await rig.embedder.answer(at)
    assert rig.embedder.asked == [[1, 2], [3], [4]]
    assert np.array_equal(tasks[2].result().vectors, vectors(1, 3, 4))


@pytest.mark.parametrize(
    "other",
    [{"klass": "bulk"}, {"priority": 1}, {"tenant": "bob"}],
    ids=lambda one: next(iter(one)),
)
async def test_nobody_waits_at_anothers_pace(rig, other):
    await rig.ask(1, **other)
    mine = await rig.ask(1)
    await rig.embedder.answer(1)
    assert np.array_equal(mine.result().vectors, vectors(1))


OWN = [
    DeadlineExceeded("Too late."),
    QuotaExceeded("Your queue is full."),
    Overloaded("Full."),
    Internal("A fault."),
    BadInput("This is too much work at once."),
    RuntimeError("what nobody expected"),
]


@pytest.mark.parametrize("error", OWN, ids=lambda one: type(one).__name__)
async def test_when_a_call_fails_one_of_those_who_waited_takes_over(rig, error):
    leader, *others = [await rig.ask(1, 2), await rig.ask(1), await rig.ask(1)]
    await rig.embedder.fail(0, error)
    with pytest.raises(type(error)):
        leader.result()
    assert rig.embedder.asked == [[1, 2], [1]]
    assert rig.embedder.calls[1].request_id == "r1"
    await rig.embedder.answer(1)
    for one in others:
        assert np.array_equal(one.result().vectors, vectors(1))


async def test_when_the_caller_leaves_others_take_over_one_after_the_other(rig):
    tasks = [await rig.ask(1) for _ in range(4)]
    for leaving in tasks[:3]:
        leaving.cancel()
        await turns()
    assert [call.request_id for call in rig.embedder.calls] == ["r0", "r1", "r2", "r3"]
    await rig.embedder.answer(3)
    assert np.array_equal(tasks[3].result().vectors, vectors(1))


async def test_one_who_waits_may_leave_alone(rig):
    leader, other, third = [await rig.ask(1) for _ in range(3)]
    other.cancel()
    await turns()
    assert other.cancelled()
    await rig.embedder.answer(0)
    assert np.array_equal(leader.result().vectors, third.result().vectors)
    assert len(rig.embedder.calls) == 1


async def test_who_takes_over_has_waited_already(rig, clock):
    await rig.ask(1)
    other = await rig.ask(1)
    clock.advance(4)
    await rig.embedder.fail(0, DeadlineExceeded("Too late."))
    assert [call.deadline_s for call in rig.embedder.calls] == [10, 6]
    await rig.embedder.answer(1)
    assert other.done()


async def test_who_takes_over_has_waited_in_the_queue_as_well(rig, clock):
    await rig.ask(1)
    await rig.ask(1, 2)
    rig.embedder.answers[1].set_result(EmbedReply(vectors(2), (), 5000.0, 7.0))
    await turns()
    clock.advance(4)
    await rig.embedder.fail(0, DeadlineExceeded("Too late."))
    assert rig.embedder.asked == [[1], [2], [1]]
    assert [call.deadline_s for call in rig.embedder.calls] == [10, 10, 1]


async def test_nobody_waits_longer_than_they_would_have(rig):
    leader, other = await rig.ask(1), await rig.ask(1, deadline_s=0.001)
    with pytest.raises(DeadlineExceeded):
        await other
    assert not leader.done()


async def test_a_poisonous_input_is_poisonous_for_all(rig):
    leader, other = await rig.ask(1, 2), await rig.ask(3, 2)
    poison = PoisonInput("The model failed on this input.")
    await rig.embedder.answer(0, _2=poison)
    await rig.embedder.answer(1)
    assert leader.result().failures == ((1, poison),)
    assert other.result().failures == ((1, poison),)
    assert np.array_equal(other.result().vectors[0], vectors(3)[0])
    assert len(rig.embedder.calls) == 2


async def test_an_input_that_failed_by_our_fault_is_asked_for_again(rig):
    leader, other = await rig.ask(1), await rig.ask(1)
    await rig.embedder.answer(0, _1=ModelUnavailable("Gone."))
    assert leader.result().failures
    await rig.embedder.answer(1)
    assert not other.result().failures
    assert np.array_equal(other.result().vectors, vectors(1))


async def test_a_model_that_is_away_is_away_for_all_who_wait(rig):
    """Else each of them would find that out after the other, some seconds each."""
    tasks = [await rig.ask(1) for _ in range(3)]
    await rig.embedder.fail(0, ModelUnavailable("The model's replica died twice."))
    for task in tasks:
        with pytest.raises(ModelUnavailable):
            task.result()
    assert len(rig.embedder.calls) == 1


async def test_the_slices_of_one_who_leaves_are_taken_over(make):
    rig = make(slice_tokens=256)
    leader, other = await rig.ask(*range(200)), await rig.ask(0, 100)
    leader.cancel()
    await turns()
    assert rig.embedder.asked[2:] == [[0, 100]]
    await rig.embedder.answer(2)
    assert np.array_equal(other.result().vectors, vectors(0, 100))
