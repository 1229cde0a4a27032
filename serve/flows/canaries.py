"""Canaries of one ingress replica: a share of `POST /v1/embeddings` goes to another model, or is repeated on it.

What goes where, and when it ends, is decided in `serve.flows.trial`. Whatever the candidate does, a caller
gets what the stable model gives, no error of the candidate's own, and waits for no repetition.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from serve.canary import Arm, Trials
from serve.config import Canary
from serve.errors import DeadlineExceeded, Overloaded, QuotaExceeded, ServiceError
from serve.flows.comparisons import Compared, compared
from serve.flows.context import Context
from serve.flows.models import Served
from serve.flows.trial import Miss, Shadow, Tally, Trial
from serve.records import Caller, EmbedCall, EmbedReply, Input, TokenIds


log = logging.getLogger("headrace.canaries")

TELL_EVERY_S = 5.0
"""How often replicas tell each other where they stand; at once when one has stopped a canary."""

REPEATS, CHECKS = ("~canary", 0.01), ("~canary-check", 1.0)
"""Whose work that is in the fair queue, with the weight: no tenant has such a name, so nobody's account knows of it.
Repetitions get a hundredth of what a free tenant gets by default; checks are a few hundred tokens a minute, and
would else wait for all bulk work.
"""

WAIT_S_MAX = 30.0
"""How long a repetition may wait for others: what is found out later helps nobody."""

PROBES = (
    "x",
    "How do I reset my password?",
    "A headrace is the channel that holds water back and feeds it evenly to the turbines.",
    "Im Frühling führt der Fluss mehr Wasser als im Sommer.",
    "雨が降ると川の水が増える。",
    "SELECT name, price FROM parts WHERE stock < 5 ORDER BY price DESC;",
    "The meeting was moved to Thursday, 14:30, because the engineers were still at the dam. " * 12,
)
"""What both models must make the same vectors of: short, long, several languages, code."""

Ask = Callable[[Served, float | None], Awaitable[EmbedReply]]
"""Embeds a request's inputs by a model, until then on the context's clock."""


@dataclass(frozen=True, slots=True)
class Answer:
    """A reply, and the model that gave it; `arm` is None where a canary can answer nothing of the caller's."""

    reply: EmbedReply
    by: Served
    arm: Arm | None = None


@dataclass(frozen=True, slots=True)
class Question:
    """A request: its tokenised inputs, and their texts unless ids were sent."""

    caller: Caller
    request_id: str
    texts: Sequence[str] | None
    ids: Sequence[TokenIds]
    until: float | None


class Canaries:
    """Those of the settings, until `update` brings others; `run` repeats, checks and tells."""

    def __init__(self, context: Context, others: Trials, replica: str) -> None:
        self._context = context
        self._clock = context.clock
        self._others, self._replica = others, replica
        self._trials: dict[str, Trial] = {}
        self._said: set[str] = set()
        self._wake, self._tell_now = asyncio.Event(), asyncio.Event()
        self.tally = Tally()
        self.settings: tuple[Canary, ...] = ()
        self.update(context.settings.canaries)

    @property
    def stopped(self) -> Mapping[str, bool]:
        """Of every model that embeds, whether a canary of it has been stopped."""
        stopped = {key for key, trial in self._trials.items() if trial.state == "stopped"}
        embeds = (one.model.id for one in self._context.models if one.model.kind == "embedding")
        return {model: model in stopped for model in embeds}

    def update(self, canaries: Sequence[Canary]) -> None:
        """Go on with these instead, which `config.canaries.check` has passed: one that has not changed keeps
        its figures, and its stop.
        """
        models, now = self._context.models, self._clock()
        kept = {trial.key: trial for trial in self._trials.values()}
        self.settings = tuple(canaries)
        self._trials = {
            one.model: kept.get(one.key)
            or Trial(one, models.find(one.model), models.find(one.to), self.tally, now)
            for one in canaries
            if one.enabled
        }
        self._said &= {trial.key for trial in self._trials.values()}
        for trial in self._trials.values():
            self._look(trial)
        self._tell_now.set()
        self._wake.set()

    async def compared(self) -> Sequence[Compared]:
        """Every canary of the settings over all replicas. Raises LedgerUnavailable."""
        if not self.settings:
            return []
        told = await self._others.canary_reports()
        return [compared(one, told) for one in self.settings]

    # --- requests -------------------------------------------------------------------------

    async def answer(self, served: Served, question: Question, ask: Ask) -> Answer:
        """Let the model answer that is to. Raises what `ask` raises for the stable one."""
        trial = self._trials.get(served.model.id)
        course = trial.course(question.caller, question.ids) if trial is not None else None
        if trial is None or course is None:
            return Answer(await ask(served, question.until), served)
        tried: EmbedReply | Miss | None = None
        if course == "candidate":
            tried = await self._tried(trial, question.until, ask)
            if isinstance(tried, EmbedReply):
                return Answer(tried, trial.candidate, "candidate")
        began = self._clock()
        reply = await ask(served, question.until)
        trial.answered("stable", reply, self._clock() - began)
        if isinstance(tried, Miss) and not reply.failures:  # else neither of them can
            trial.fell_back(tried)
            self._look(trial)
        if course == "shadow" and not reply.failures:
            shadow = Shadow(question.request_id, question.texts, question.ids, reply)
            trial.offer(shadow, self._context.settings.ingress.slice_tokens)
            self._wake.set()
        return Answer(reply, served, "stable" if trial.canary.share else None)

    async def _tried(self, trial: Trial, until: float | None, ask: Ask) -> EmbedReply | Miss | None:
        """The candidate's answer, or why there is none; None: it has been stopped meanwhile."""
        began, patience_s = self._clock(), trial.canary.patience_s
        if until is not None:
            patience_s = min(patience_s, (until - began) / 2)
        hurried = patience_s < trial.canary.patience_s
        try:
            async with asyncio.timeout(patience_s):
                reply = await ask(trial.candidate, began + patience_s)
        except (TimeoutError, DeadlineExceeded):
            return Miss(DeadlineExceeded.code, hurried)
        except ServiceError as error:
            return Miss(error.code)
        except Exception as error:  # a named rim: the stable model would not have failed so
            log.exception("%s failed in the place of %s", trial.canary.to, trial.canary.model)
            return Miss(type(error).__name__)
        if reply.failures:
            return Miss(reply.failures[0][1].code)
        if trial.state == "stopped":  # its vectors may be others
            return None
        trial.answered("candidate", reply, self._clock() - began)
        return reply

    def _look(self, trial: Trial) -> None:
        """Say so, and tell the others, once it has stopped."""
        if trial.state == "stopped" and trial.key not in self._said:
            self._said.add(trial.key)
            log.warning("the canary of %s has stopped: %s", trial.canary.model, trial.reason)
            self._tell_now.set()

    # --- in the background ----------------------------------------------------------------

    async def run(self) -> None:
        """Repeat what is to be repeated, check vectors and tell the others, until cancelled."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._tell())
            while True:
                for trial in self._trials.values():
                    if trial.due(self._clock()):
                        group.create_task(self._check(trial))
                    while (shadow := trial.begin()) is not None:
                        group.create_task(self._repeat(trial, shadow))
                await self._wake.wait()
                self._wake.clear()

    async def _repeat(self, trial: Trial, shadow: Shadow) -> None:
        try:
            ids = shadow.ids
            if not trial.reads_ids:
                loop = asyncio.get_running_loop()
                encode = partial(trial.candidate.tokenizer.encode, shadow.texts or ())
                ids = await loop.run_in_executor(self._context.threads, encode)
            if any(len(row) > trial.candidate.tokens_max for row in ids):
                trial.shadowed("skipped")
                return
            reply = await self._call(trial.candidate, shadow.request_id, ids, REPEATS)
            trial.compared(shadow, reply)
            self._look(trial)
        except (Overloaded, QuotaExceeded, DeadlineExceeded):
            trial.shadowed("dropped")
        except ServiceError as error:
            log.info("a request could not be repeated on %s: %s", trial.canary.to, error)
            trial.shadowed("failed")
        except Exception:  # a named rim: no ingress replica is replaced because of a comparison
            log.exception("a request could not be repeated on %s", trial.canary.to)
            trial.shadowed("failed")
        finally:
            trial.end()
            self._wake.set()

    async def _check(self, trial: Trial) -> None:
        both = trial.stable, trial.candidate
        tokens_max = min(one.tokens_max for one in both)
        tokenizer = trial.stable.tokenizer
        ids = [tokenizer.truncate(row, tokens_max) for row in tokenizer.encode(PROBES)]
        try:
            stable, candidate = [await self._call(one, "canary-check", ids, CHECKS) for one in both]
        except ServiceError as error:
            trial.unchecked(error.code, self._clock())
        except Exception as error:  # a named rim, as above
            log.exception("the vectors of %s could not be compared", trial.canary.to)
            trial.unchecked(type(error).__name__, self._clock())
        else:
            trial.checked(stable.vectors, candidate.vectors)
            self._look(trial)

    async def _call(
        self, by: Served, request_id: str, ids: Sequence[TokenIds], whose: tuple[str, float]
    ) -> EmbedReply:
        """Raises what the embedder raises, or an input's failure."""
        tenant, weight = whose
        call = EmbedCall(
            request_id=request_id,
            tenant=tenant,
            weight=weight,
            klass="bulk",
            model=by.model.id,
            inputs=tuple(Input(ids=row) for row in ids),
            tokens=tuple(len(row) for row in ids),
            deadline_s=WAIT_S_MAX,
        )
        reply = await by.embedder.embed(call)
        if reply.failures:
            raise reply.failures[0][1]
        return reply

    async def _tell(self) -> None:
        """Say where each canary stands, hear of stops; and let `run` look for what has become due."""
        told = False
        while True:
            self._tell_now.clear()
            if self._trials or told:
                await self._exchange()
                told = bool(self._trials)
            self._wake.set()
            try:
                async with asyncio.timeout(TELL_EVERY_S):
                    await self._tell_now.wait()
            except TimeoutError:
                continue

    async def _exchange(self) -> None:
        reports = [trial.report() for trial in self._trials.values()]
        try:
            stops = await self._others.report_canaries(self._replica, reports)
        except ServiceError as error:
            log.debug("canaries cannot be told: %s", error)
            return
        except Exception:  # a named rim, as above
            log.exception("canaries cannot be told")
            return
        for trial in self._trials.values():
            if trial.key in stops:
                trial.stop(stops[trial.key])
                self._look(trial)
