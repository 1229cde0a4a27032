"""Autoscaling policies: Serve's controller asks one for each deployment that is scaled, several times a
second, for the number of its replicas. `serve.flows.scaling` decides.

A policy must not block: the controller would stand still, for all of the cluster. Serve brings what the
replicas told; the Store's backlog is asked for beside, in a task, and so is the last decision handed to the
Ledger, where `/v1/admin/autoscaling` finds it. Whatever fails, the replicas stay as many as they are.
"""

import asyncio
import logging
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from ray.serve.config import AutoscalingConfig, AutoscalingContext, AutoscalingPolicy

from deployments.actors import LEDGER, UPSERTER
from deployments.named import Named
from serve.config import (
    Autoscaling,
    Ingress,
    IngressScaling,
    Pool,
    PoolScaling,
    Settings,
    Worker,
    WorkerScaling,
)
from serve.errors import IndexUnavailable, LedgerUnavailable, ServiceError
from serve.flows.scaling import (
    Load,
    Memory,
    Replica,
    Standing,
    decide,
    ingress_load,
    models_of,
    pool_load,
    worker_load,
)
from serve.scaling import Backlog, Decision


log = logging.getLogger("headrace.scaling")

TOLD_EVERY_S = 1.0
"""Replicas tell Serve's controller so often what waits in them."""

LOOK_BACK_S = 10.0
"""What they told is kept for so long: how busy a model was is seen over it."""

ASK_EVERY_S = 1.0
ASK_S_MAX = 2.0
"""The backlog is asked for so often, and an answer waited for so long."""


def replicas_of(
    one: Pool | Worker | Ingress, deployment: str, settings: Settings
) -> dict[str, Any]:
    """How many replicas a deployment gets, as options of Serve's `deployment`."""
    rule: Autoscaling | None = one.autoscaling
    if rule is None:
        return {"num_replicas": one.replicas}
    return {
        "autoscaling_config": AutoscalingConfig(
            min_replicas=rule.min,
            max_replicas=rule.max,
            metrics_interval_s=TOLD_EVERY_S,
            look_back_period_s=LOOK_BACK_S,
            aggregation_function="max",
            # Ours has pauses of its own, and can say why it waits.
            upscale_delay_s=0,
            downscale_delay_s=0,
            policy=AutoscalingPolicy(  # type: ignore[no-untyped-call]
                policy_function=f"{__name__}:Policy",
                policy_kwargs={"deployment": deployment, "settings": settings.model_dump_json()},
            ),
        )
    }


class Policy:
    """That of one deployment. Lives in Serve's controller until the deployment is changed."""

    def __init__(self, deployment: str, settings: str) -> None:
        """`settings` is the JSON of Settings, since Serve keeps a policy's arguments as JSON."""
        self._deployment = deployment
        self._settings = Settings.model_validate_json(settings)
        self._scaled = self._settings.deployments[deployment]
        if self._scaled.autoscaling is None:
            raise ValueError(f"{deployment} is not scaled")
        self._rule: Autoscaling = self._scaled.autoscaling
        self._upserter = Named(UPSERTER, self._settings, IndexUnavailable)
        self._ledger = Named(LEDGER, self._settings, LedgerUnavailable)
        self._backlog: tuple[float, Backlog] | None = None
        self._asking: asyncio.Task[None] | None = None
        self._asked_at = -ASK_EVERY_S
        self._pace: float | None = None
        self._memory = Memory()
        self._last: Decision | None = None

    def __call__(self, ctx: AutoscalingContext) -> tuple[int, dict[str, Any]]:
        """The number of replicas that there should be. What Serve remembers for a policy is not used."""
        try:
            return self._decide(ctx), {}
        except Exception:  # a named rim: the controller is no place to fail in
            log.exception("no decision for %s: it keeps its replicas", self._deployment)
            return ctx.target_num_replicas, {}

    def _decide(self, ctx: AutoscalingContext) -> int:
        now = time.monotonic()
        self._ask(now)
        load = self._load(ctx, self._backlog_now(now))
        step, self._memory = decide(self._rule, load, self._memory, now)
        self._last = Decision(
            self._deployment,
            step.wanted,
            load.standing.target,
            load.standing.running,
            step.reason,
            load.inputs,
            time.time(),
        )
        return step.wanted

    def _load(self, ctx: AutoscalingContext, backlog: Backlog | None) -> Load:
        standing = Standing(ctx.target_num_replicas, ctx.current_num_replicas)
        rule, one = self._rule, self._scaled
        if isinstance(rule, WorkerScaling) and isinstance(one, Worker):
            return worker_load(rule, standing, one.stages, backlog)
        if isinstance(rule, IngressScaling):
            return ingress_load(rule, standing, float(ctx.total_num_requests))
        if not (isinstance(rule, PoolScaling) and isinstance(one, Pool)):
            raise TypeError(type(one))
        load = pool_load(
            rule,
            standing,
            told_by(ctx),
            backlog,
            models=models_of(self._settings.pools, one.name),
            pace=self._pace,
        )
        self._pace = load.inputs["tokens_per_s"]
        return load

    def _backlog_now(self, now: float) -> Backlog | None:
        if self._backlog is None:
            return None
        at, backlog = self._backlog
        return replace(backlog, age_s=backlog.age_s + now - at)

    def _ask(self, now: float) -> None:
        """Begin to ask for what is not at hand, unless it is being asked for."""
        if now - self._asked_at < ASK_EVERY_S or not (self._asking is None or self._asking.done()):
            return
        self._asked_at = now
        self._asking = asyncio.get_running_loop().create_task(self._exchange())

    async def _exchange(self) -> None:
        """One that fails is only a figure that grows older."""
        try:
            if self._last is not None:
                await self._ledger.ask("report_decision", self._last, timeout_s=ASK_S_MAX)
        except ServiceError as error:
            log.debug("the decision for %s cannot be told: %s", self._deployment, error)
        if isinstance(self._rule, IngressScaling):
            return
        try:
            backlog = await self._upserter.ask("backlog", timeout_s=ASK_S_MAX)
        except ServiceError as error:
            log.debug("the backlog is not known: %s", error)
            return
        if backlog is not None:
            self._backlog = time.monotonic(), backlog


def told_by(ctx: AutoscalingContext) -> Sequence[Replica]:
    """What the embedder replicas told last; those that have told nothing yet are not there.

    Ages are by the clocks of both machines: keep them in step.
    """
    raw = ctx.raw_metrics or {}
    paces, works = raw.get("tokens_per_s", {}), raw.get("busy_s", {})
    now, told = time.time(), []
    for replica, queued in raw.get("queued_tokens", {}).items():
        pace, busy = paces.get(replica), works.get(replica)
        if not (queued and pace and busy):
            continue
        first, last = busy[0], busy[-1]
        passed = last.timestamp - first.timestamp
        share = (last.value - first.value) / passed if passed > 0 else 0.0
        age_s = max(now - queued[-1].timestamp, 0.0)
        told.append(Replica(queued[-1].value, pace[-1].value, min(max(share, 0.0), 1.0), age_s))
    return told
