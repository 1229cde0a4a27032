"""A canary over engines of one real model: those that make the same vectors may answer, int8 may not."""

import asyncio
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from serve.config import Cache, Canary, Model, Pool, Settings
from serve.embedding.files import revision
from serve.embedding.tokenizer import Tokenizer
from serve.flows.canaries import Canaries, Question
from serve.flows.embed import EmbedFlow
from serve.flows.models import Models, Served
from serve.flows.trial_reports import TrialReports
from serve.ports import Engine
from serve.records import Caller, EmbedCall, EmbedReply
from tests.contract.test_engine_contract import INT8, MINILMS, TEXTS


pytestmark = pytest.mark.timeout(400)  # the first run of all makes graphs

STABLE = Settings().pools[0].models[0]
ANN = Caller("ann", "free", 1.0, "k")


class Direct:
    """An embedder that asks its engine at once, without a queue."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    async def embed(self, call: EmbedCall) -> EmbedReply:
        return EmbedReply(self.engine.forward(call.inputs), (), 1.0, 1.0)

    async def ready(self) -> bool:
        return True


class Alone:
    """Implements `canary.Trials` for one replica."""

    def __init__(self, clock: Any) -> None:
        self.book = TrialReports(clock)

    async def report_canaries(self, replica: str, reports: Any) -> Any:
        return self.book.keep(replica, reports)

    async def canary_reports(self) -> Any:
        return self.book.all()


class Rig:
    """MiniLM in ONNX Runtime with a canary of it on another engine."""

    def __init__(self, name: str, clock: Any, threads: Any) -> None:
        candidate = STABLE.model_copy(update={"id": "new"})  # what it says of int8 is not true
        canary = Canary(model=STABLE.id, to="new", share=0.5, shadow=0.5, same_vectors=True)
        settings = Settings(
            pools=(Pool(models=(STABLE, candidate)),),
            cache=Cache(scope="none"),
            canaries=(canary,),
        )
        served = {
            STABLE.id: self._served(STABLE, MINILMS["onnx"](STABLE)),
            "new": self._served(candidate, MINILMS[name](INT8 if name == "onnx_int8" else STABLE)),
        }
        context = SimpleNamespace(
            settings=settings, models=Models(served), quotas=None, threads=threads, clock=clock
        )
        self.canaries = Canaries(context, Alone(clock), "a")
        self.flow = EmbedFlow(context, canaries=self.canaries)
        self.served = served[STABLE.id]
        self.task = asyncio.create_task(self.canaries.run())

    def _served(self, model: Model, engine: Engine) -> Served:
        return Served(
            model, Tokenizer.open(model), revision(model), Direct(engine), model.tokens_max
        )

    async def ask(self, text: str) -> Any:
        async def ask(by: Served, _until: float | None) -> EmbedReply:
            return await by.embedder.embed(self.flow._call(work, by, ids, 10.0))

        work = SimpleNamespace(
            caller=ANN, request_id="r", klass="interactive", until=None, priority=0
        )
        ids = self.served.tokenizer.encode([text])
        ids = [self.served.tokenizer.truncate(row, self.served.tokens_max) for row in ids]
        return await self.canaries.answer(self.served, Question(ANN, "r", [text], ids, None), ask)


@pytest.fixture
async def make(clock: Any) -> AsyncIterator[Any]:
    with ThreadPoolExecutor(1) as threads:
        rigs = []

        async def made(name: str) -> Rig:
            rigs.append(Rig(name, clock, threads))
            for _ in range(20):
                await asyncio.sleep(0)
            return rigs[-1]

        yield made
        for rig in rigs:
            rig.task.cancel()
            await asyncio.gather(rig.task, return_exceptions=True)


@pytest.mark.parametrize("name", ["sentence_transformers", "onnx_bfloat16"])
async def test_another_engine_of_the_same_weights_may_answer(make: Any, name: str) -> None:
    rig = await make(name)
    [trial] = rig.canaries._trials.values()
    assert (trial.state, trial.reason) == ("running", "")
    answers = [await rig.ask(text) for text in TEXTS]
    for _ in range(50):
        await asyncio.sleep(0)
    arms = [answer.arm for answer in answers]
    assert set(arms) == {"stable", "candidate"}
    assert trial.state == "running"
    assert trial.figures.shadows == {"compared": arms.count("stable")}
    assert trial.figures.distances.high < 1e-3
    for text, answer in zip(TEXTS, answers, strict=True):
        ids = rig.served.tokenizer.truncate(rig.served.tokenizer.encode([text])[0], 256)
        exact = rig.served.embedder.engine.forward([SimpleNamespace(ids=ids, kind="ids")])[0]
        assert float(np.dot(exact, answer.reply.vectors[0])) > 0.999


async def test_int8_is_found_out_before_it_answers_anything(make: Any) -> None:
    rig = await make("onnx_int8")
    [trial] = rig.canaries._trials.values()
    assert trial.state == "stopped"
    assert trial.reason.startswith("The cosine of a text of the check is 0.9")
    assert {(await rig.ask(text)).arm for text in TEXTS} == {None}
