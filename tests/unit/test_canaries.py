"""serve.flows.canaries: whatever the candidate does, callers get what the stable model gives."""

import asyncio
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest

from serve.config import Cache, Canary, Ingress, Model, Pool, Settings
from serve.embedding.tokenizer import Tokenizer
from serve.errors import (
    DeadlineExceeded,
    Internal,
    LedgerUnavailable,
    ModelUnavailable,
    Overloaded,
    PoisonInput,
    QuotaExceeded,
)
from serve.flows.canaries import CHECKS, PROBES, REPEATS, Canaries
from serve.flows.embed import EmbedFlow, EmbedRequest, Work
from serve.flows.models import Models, Served
from serve.flows.trial_reports import TrialReports
from serve.records import Caller, EmbedReply


ANN = Caller("ann", "free", 4.0, "k")
OLD = Model(id="old", engine="fake", dimensions=4, tokens_max=64)
NEW = Model(id="new", engine="fake", dimensions=4, tokens_max=32)
STABLE, CANDIDATE = np.eye(4, dtype=np.float32)[:2]
"""Each model has one vector for all: so a reply says who gave it. They are not alike."""


class Scripted:
    """An embedder: what each model does, until a test says otherwise."""

    def __init__(self) -> None:
        self.calls = []
        self.rows = {"old": STABLE, "new": CANDIDATE}
        self.faults: dict[str, Exception] = {}
        self.held: dict[str, asyncio.Event] = {}

    async def embed(self, call) -> EmbedReply:
        self.calls.append(call)
        if call.model in self.held:
            await self.held[call.model].wait()
        if call.model in self.faults:
            raise self.faults[call.model]
        rows = np.tile(self.rows[call.model], (len(call.inputs), 1))
        return EmbedReply(rows, (), 1.0, 2.0)

    def asked(self, model: str, klass: str) -> int:
        """Calls of a model at a class; of texts of callers only."""
        return sum(
            (call.model, call.klass) == (model, klass) and call.request_id != "canary-check"
            for call in self.calls
        )


class Told:
    """Implements `canary.Trials` in this process."""

    def __init__(self, clock) -> None:
        self.book, self.fault, self.times = TrialReports(clock), None, 0

    async def report_canaries(self, replica, reports):
        self.times += 1
        if self.fault is not None:
            raise self.fault
        return self.book.keep(replica, reports)

    async def canary_reports(self):
        return self.book.all()


async def turns(count: int = 30) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


class Rig:
    """An ingress replica with canaries of `old`, whose figures others can see."""

    def __init__(self, clock, *canaries, threads, told=None, cache="none", replica="a"):
        pool = Pool(models=(OLD, NEW))
        self.settings = Settings(
            pools=(pool,),
            cache=Cache(scope=cache),
            ingress=Ingress(slice_tokens=256),
            canaries=canaries,
        )
        self.embedder, self.told = Scripted(), told or Told(clock)
        models = Models(
            {
                one.id: Served(
                    one, Tokenizer.open(one), f"r-{one.id}", self.embedder, one.tokens_max
                )
                for one in (OLD, NEW)
            }
        )
        context = SimpleNamespace(
            settings=self.settings, models=models, quotas=None, threads=threads, clock=clock
        )
        self.canaries = Canaries(context, self.told, replica)
        self.flow = EmbedFlow(context, kept_bytes_max=100_000, canaries=self.canaries)
        self.served = models.find("old")
        self.tasks = [asyncio.create_task(self.canaries.run())]

    @property
    def trial(self):
        return self.canaries._trials["old"]

    async def ask(self, text="a text", *, caller=ANN, until=None, ids=None):
        """As `EmbedFlow.embed` does once it has the token ids."""
        texts = None if ids is not None else [text]
        request = EmbedRequest("old", texts=texts, ids=ids)
        rows, _ = await self.flow.tokenise(self.served, request)
        work = Work(caller, "r", "interactive", 10.0, until)
        return await self.flow._answer(work, self.served, request, rows)

    async def close(self) -> None:
        for task in self.tasks:
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)


@pytest.fixture
async def make(clock):
    made = []
    with ThreadPoolExecutor(1) as threads:

        def rig(*fields, **options) -> Rig:
            canaries = [Canary(**{"model": "old", "to": "new", **one}) for one in fields]
            made.append(Rig(clock, *canaries, threads=threads, **options))
            return made[-1]

        yield rig
        for one in made:
            await one.close()


ANSWERS = {"share": 1.0, "same_vectors": True, "cosine_min": 0.0}
"""Whose candidate may answer, though its vectors are others: so that they can be told apart."""


@pytest.fixture
async def answering(make):
    rig = make(ANSWERS)
    await turns()
    assert rig.trial.state == "running"
    return rig


def gave(answer):
    """Which model's vectors these are, and which arm the answer says it was."""
    [row] = answer.reply.vectors
    model = {tuple(STABLE): "old", tuple(CANDIDATE): "new"}[tuple(row)]
    assert model == answer.by.model.id
    return model, answer.arm


# --- who answers -------------------------------------------------------------------------------


async def test_without_a_canary_nothing_is_said_of_one(make):
    for rig in (make(), make({"enabled": False}), make(ANSWERS | {"tenants": ["bob"]})):
        await turns()
        assert gave(await rig.ask()) == ("old", None)


async def test_the_candidate_answers_once_it_has_shown_its_vectors(make):
    rig = make(ANSWERS)
    assert gave(await rig.ask()) == ("old", "stable")
    await turns()
    checks = [call for call in rig.embedder.calls if call.request_id == "canary-check"]
    assert [(call.model, len(call.inputs)) for call in checks] == [
        ("old", len(PROBES)),
        ("new", len(PROBES)),
    ]
    assert max(checks[0].tokens) == NEW.tokens_max  # both can read them
    assert {(call.tenant, call.weight, call.klass) for call in checks} == {(*CHECKS, "bulk")}
    assert gave(await rig.ask()) == ("new", "candidate")


async def test_other_vectors_are_never_answered_with(make, caplog):
    rig = make({"share": 1.0, "same_vectors": True})
    await turns()
    assert gave(await rig.ask()) == ("old", None)
    assert rig.canaries.stopped == {"old": True, "new": False}
    assert (
        "the canary of old has stopped: The cosine of a text of the check is 0.0000" in caplog.text
    )


async def test_a_candidate_that_is_not_there_yet_is_asked_again(make, clock):
    rig = make(ANSWERS)
    rig.embedder.faults["new"] = ModelUnavailable("It is being loaded.")
    await turns()
    assert gave(await rig.ask()) == ("old", "stable")
    assert "model_unavailable" in rig.trial.reason
    rig.embedder.faults.clear()
    clock.advance(6)
    rig.canaries._wake.set()
    await turns()
    assert gave(await rig.ask()) == ("new", "candidate")


async def test_what_one_model_made_is_never_the_others_answer(make):
    rig = make({**ANSWERS, "tenants": ["ann"]}, cache="shared")
    bob = Caller("bob", "free", 1.0, "k")
    await turns()
    for _ in range(2):
        assert gave(await rig.ask()) == ("new", "candidate")
        assert gave(await rig.ask(caller=bob)) == ("old", None)
    assert (rig.embedder.asked("new", "interactive"), rig.embedder.asked("old", "interactive")) == (
        1,
        1,
    )
    assert (await rig.ask()).reply.cached == 1


# --- what the candidate does, and callers do not see ---------------------------------------------


@pytest.mark.parametrize(
    "fault",
    [
        ModelUnavailable("gone"),
        Overloaded("full"),
        QuotaExceeded("full"),
        DeadlineExceeded("late"),
        Internal("broken"),
        TimeoutError(),
        ValueError("a fault of ours"),
    ],
    ids=lambda fault: type(fault).__name__,
)
async def test_whatever_fails_the_stable_model_answers(answering, fault):
    answering.embedder.faults["new"] = fault
    assert gave(await answering.ask()) == ("old", "stable")
    figures = answering.trial.figures
    assert figures.fallbacks == 1
    assert {arm: one.requests for arm, one in figures.arms.items()} == {"stable": 1, "candidate": 0}


async def test_an_input_that_only_the_candidate_fails_on_is_answered(answering):
    poison = EmbedReply(np.zeros((1, 4), np.float32), ((0, PoisonInput("bad")),))

    async def embed(call):
        if call.model == "new":
            return poison
        return EmbedReply(STABLE[None])

    answering.embedder.embed = embed
    assert gave(await answering.ask()) == ("old", "stable")
    assert answering.trial.figures.fallbacks == 1


async def test_a_candidate_that_hangs_is_waited_for_as_long_as_was_said(make):
    rig = make(ANSWERS | {"patience_s": 0.01})
    await turns()
    rig.embedder.held["new"] = asyncio.Event()
    assert gave(await rig.ask()) == ("old", "stable")
    assert rig.trial.figures.fallbacks == 1


async def test_a_caller_in_a_hurry_leaves_half_of_its_time_to_the_stable_model(answering, clock):
    answering.embedder.held["new"] = asyncio.Event()
    answer = await answering.ask(until=clock() + 0.02)
    assert gave(answer) == ("old", "stable")
    new, old = answering.embedder.calls[-2:]
    assert (new.model, new.limit_s) == ("new", pytest.approx(0.01))
    assert (old.model, old.limit_s) == ("old", pytest.approx(0.02))
    assert not answering.trial._tries  # it says nothing of the candidate


async def test_when_both_fail_the_caller_hears_of_the_stable_one(answering):
    answering.embedder.faults = {"new": Overloaded("new"), "old": ModelUnavailable("old")}
    with pytest.raises(ModelUnavailable, match="old"):
        await answering.ask()
    assert answering.trial.figures.fallbacks == 0  # none was answered


async def test_a_candidate_that_keeps_failing_is_asked_no_more(answering):
    answering.embedder.faults["new"] = ModelUnavailable("gone")
    for number in range(30):
        assert gave(await answering.ask(f"text {number}"))[0] == "old"
    assert answering.embedder.asked("new", "interactive") == 20
    assert "20 of its last 20 requests fell back" in answering.trial.reason


async def test_an_answer_that_comes_after_the_stop_is_not_given(answering):
    answering.embedder.held["new"] = asyncio.Event()
    asked = asyncio.create_task(answering.ask())
    await turns()
    answering.trial.stop("its vectors are others")
    answering.embedder.held["new"].set()
    assert gave(await asked)[0] == "old"
    assert answering.trial.figures.fallbacks == 0


async def test_a_caller_who_leaves_takes_the_candidates_call_along(answering):
    answering.embedder.held["new"] = asyncio.Event()
    asked = asyncio.create_task(answering.ask())
    await turns()
    asked.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asked
    assert answering.embedder.asked("old", "interactive") == 0


# --- repetitions -------------------------------------------------------------------------------


async def test_a_repetition_is_nobodys_work_and_nobody_waits_for_it(make):
    rig = make({"shadow": 1.0})
    rig.embedder.held["new"] = asyncio.Event()
    assert gave(await rig.ask("a text")) == ("old", None)
    await turns()
    call = rig.embedder.calls[-1]
    assert (call.model, call.klass, call.priority) == ("new", "bulk", 0)
    assert (call.tenant, call.weight, call.tier) == (*REPEATS, "")
    assert np.array_equal(call.inputs[0].ids, rig.embedder.calls[0].inputs[0].ids)
    assert rig.trial.figures.shadows == {}
    rig.embedder.held["new"].set()
    await turns()
    assert rig.trial.figures.shadows == {"compared": 1}
    assert rig.trial.figures.distances.high == 1
    arms = rig.trial.figures.arms
    assert [one.infer.count for one in arms.values()] == [1, 1]
    assert arms["candidate"].requests == 0


async def test_what_comes_while_all_is_busy_is_answered_and_not_repeated(make):
    rig = make({"shadow": 1.0, "shadows_at_once": 1, "shadow_inputs_max": 2})
    rig.embedder.held["new"] = asyncio.Event()
    for number in range(5):
        await rig.ask(f"text {number}")
        await turns()
    assert rig.embedder.asked("new", "bulk") == 1
    assert rig.trial.figures.shadows == {"dropped": 2}
    rig.embedder.held["new"].set()
    await turns()
    assert rig.trial.figures.shadows == {"dropped": 2, "compared": 3}


@pytest.mark.parametrize(
    ("fault", "end"),
    [
        (Overloaded("full"), "dropped"),
        (QuotaExceeded("full"), "dropped"),
        (DeadlineExceeded("late"), "dropped"),
        (ModelUnavailable("gone"), "failed"),
        (ValueError("a fault of ours"), "failed"),
    ],
    ids=lambda one: type(one).__name__ if isinstance(one, Exception) else "",
)
async def test_a_repetition_that_fails_is_only_counted(make, fault, end):
    rig = make({"shadow": 1.0})
    rig.embedder.faults["new"] = fault
    for number in range(3):
        assert gave(await rig.ask(f"text {number}")) == ("old", None)
        await turns()
    assert rig.trial.figures.shadows == {end: 3}
    assert not rig.tasks[0].done()


async def test_what_is_longer_than_the_candidate_reads_is_skipped(make):
    rig = make({"shadow": 1.0})
    await rig.ask("x" * 40)
    await turns()
    assert rig.trial.figures.shadows == {"skipped": 1}
    assert rig.embedder.asked("new", "bulk") == 0


async def test_a_candidate_with_another_tokenizer_reads_the_text_again(make):
    rig = make({"shadow": 1.0})
    tokens = [np.array([1, 2, 3], np.int32)]
    rig.trial.reads_ids = False
    rig.trial.candidate = SimpleNamespace(
        model=NEW,
        tokens_max=32,
        embedder=rig.embedder,
        tokenizer=SimpleNamespace(encode=lambda texts: tokens * len(texts)),
    )
    await rig.ask("a text")
    await rig.ask(ids=[[7, 8]])
    for _ in range(200):  # through the thread that tokenises
        if rig.embedder.asked("new", "bulk"):
            break
        await asyncio.sleep(0.01)
    await turns()
    assert rig.embedder.calls[-1].inputs[0].ids.tolist() == [1, 2, 3]
    assert rig.trial.figures.shadows == {"compared": 1, "skipped": 1}


async def test_a_pair_that_differs_stops_it(make, caplog):
    rig = make({"shadow": 1.0, "same_vectors": True, "cosine_min": 0.9})
    await rig.ask()
    await turns()
    assert rig.trial.state == "stopped"
    assert "has stopped: The cosine of an input that was repeated" in caplog.text
    await rig.ask("another")
    await turns()
    assert rig.embedder.asked("new", "bulk") == 1


# --- between replicas, and other settings ----------------------------------------------------------


async def test_one_replicas_stop_is_every_replicas(make, clock):
    told = Told(clock)
    first, second = make(ANSWERS, told=told), make(ANSWERS, told=told, replica="b")
    await turns()
    first.trial.stop("too far apart")
    first.canaries._look(first.trial)
    await turns()
    second.canaries._tell_now.set()
    await turns()
    assert (second.trial.state, second.trial.reason) == ("stopped", "too far apart")
    third = make(ANSWERS, told=told, replica="c")
    await turns()
    assert third.trial.state == "stopped"
    [found] = await third.canaries.compared()
    assert (found.state, found.reason, found.replicas) == ("stopped", "too far apart", 3)


async def test_without_the_ledger_requests_go_on(answering):
    answering.told.fault = LedgerUnavailable("away")
    answering.canaries._tell_now.set()
    await turns()
    assert gave(await answering.ask()) == ("new", "candidate")
    assert not answering.tasks[0].done()


async def test_nothing_is_told_where_there_is_nothing_to_tell(make):
    rig = make()
    await turns()
    assert rig.told.times == 0
    assert await rig.canaries.compared() == []


async def test_other_settings_take_the_place_of_those_that_are(make):
    rig = make({"shadow": 1.0})
    await rig.ask()
    await turns()
    before, [same] = rig.trial, rig.canaries.settings
    rig.canaries.update((same,))
    assert rig.trial is before  # unchanged: its figures go on
    rig.canaries.update((Canary(model="old", to="new", **ANSWERS),))
    await turns()
    assert rig.trial.figures.shadows == {}
    assert gave(await rig.ask()) == ("new", "candidate")
    rig.canaries.update(())
    assert gave(await rig.ask("once more")) == ("old", None)
    await turns()
    assert rig.told.book.all().reports == ()  # the others are told that it is gone
    tally = rig.canaries.tally
    assert (tally.requests, tally.shadows) == (
        {("old", "stable"): 1, ("old", "candidate"): 1},
        {("old", "compared"): 1},
    )


async def test_a_stopped_one_begins_again_with_other_settings_only(make):
    rig = make({**ANSWERS, "cosine_min": 0.9})
    await turns()
    [stopped] = rig.canaries.settings
    assert rig.trial.state == "stopped"
    rig.canaries.update(())
    rig.canaries.update((stopped,))
    await turns()
    assert rig.trial.state == "stopped"
    rig.canaries.update((Canary(model="old", to="new", **ANSWERS),))
    await turns()
    assert rig.trial.state == "running"
