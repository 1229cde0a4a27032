"""Loads and unloads models beside the batches, one at a time, as `Holdings` decides.

`serve.flows.batching` parks calls meanwhile and acts on what is told here. A load runs in a thread of
its own, so that other models go on; it shares the processor with them.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Executor
from dataclasses import dataclass, replace

from serve.embedding.holdings import Step
from serve.errors import ModelUnavailable
from serve.flows.recovery import Engines, called


log = logging.getLogger("headrace.loading")


@dataclass(frozen=True, slots=True)
class Done:
    """A step that has ended; `error` is for the callers of its model, when it failed.

    `broken` are models that were found not to work either.
    """

    step: Step
    error: ModelUnavailable | None = None
    broken: tuple[str, ...] = ()


class Loads:
    """`executor` runs one of them at a time; None is the event loop's own."""

    def __init__(
        self, engines: Engines, *, executor: Executor | None, clock: Callable[[], float]
    ) -> None:
        self._engines = engines
        self._executor = executor
        self._clock = clock
        self._wake = asyncio.Event()

    def look(self) -> None:
        """Something has changed that may make a step possible."""
        self._wake.set()

    async def run(self) -> AsyncIterator[Done]:
        """Take every step that is to be taken, for ever; tell each when it has ended."""
        holdings = self._engines.holdings
        while True:
            self._wake.clear()
            step = holdings.step(self._clock())
            if step is not None:
                done = await self._take(step)
                if done.error is not None:
                    done = replace(done, broken=await self._broken(step.model))
                yield done
                continue
            now = self._clock()
            due = holdings.due(now)
            try:
                async with asyncio.timeout(None if due is None else due - now):
                    await self._wake.wait()
            except TimeoutError:
                pass

    async def _take(self, step: Step) -> Done:
        model, holdings, began = step.model, self._engines.holdings, self._clock()
        loop = asyncio.get_running_loop()
        try:
            if step.word == "unload":
                await loop.run_in_executor(self._executor, called, self._engines.unload, model)
                holdings.unloaded(model)
            elif step.word == "load":
                load = self._engines.load_one
                profile = await loop.run_in_executor(self._executor, called, load, model)
                holdings.loaded(model, profile.bytes, self._clock())
            else:
                log.error("model %s needs more memory than its pool may hold", model)
                return self._failed(step)
        except Exception:  # a named rim: a runtime may raise anything
            log.exception("the %s of model %s failed", step.word, model)
            return self._failed(step)
        log.info("the %s of model %s took %.1f s", step.word, model, self._clock() - began)
        return Done(step)

    async def _broken(self, beside: str) -> tuple[str, ...]:
        """Of the others, those that fail on a known good input: a lost device takes all with it, also
        those that have nothing to do.
        """
        loop, found = asyncio.get_running_loop(), []
        for model in self._engines.holdings.suspects(beside):
            try:
                await loop.run_in_executor(self._executor, called, self._engines.probe, model)
            except Exception:  # a named rim: a runtime may raise anything
                log.exception("model %s fails on its warm-up input", model)
                found.append(model)
        return tuple(found)

    def _failed(self, step: Step) -> Done:
        """The words of a runtime stay in the log: they may name paths."""
        holdings, now = self._engines.holdings, self._clock()
        if step.word == "unload":  # what it held may be lost; it is not served any more
            holdings.unloaded(step.model)
            return Done(step)
        holdings.failed(step.model, now)
        told = f"The model {step.model} cannot be loaded now."
        if step.word == "refuse":
            told = f"The model {step.model} needs more memory than its pool may hold."
        wait_s = holdings.retry_s(step.model, now)
        return Done(step, ModelUnavailable(told, retry_after_s=wait_s))
