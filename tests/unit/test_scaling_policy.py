"""The policies as Serve's controller calls them: never blocked, never failing, and explained."""

import asyncio
import time
from types import SimpleNamespace

import pytest
from ray.serve.config import AutoscalingContext

from deployments.scaling import ASK_EVERY_S, Policy, replicas_of, told_by
from serve.config import (
    Ingress,
    IngressScaling,
    Model,
    Pool,
    PoolScaling,
    Settings,
    Worker,
    WorkerScaling,
)
from serve.errors import IndexUnavailable
from serve.flows.scaling import Replica, models_of
from serve.scaling import Backlog


POOL = "embedder-default"
FAKE = Model(id="fake", engine="fake", dimensions=8, tokens_max=64)
SETTINGS = Settings(
    pools=(Pool(models=(FAKE,), autoscaling=PoolScaling(min=0, max=8, drain_s=10, up_s=0)),),
    workers=(Worker(autoscaling=WorkerScaling(max=5, items_per_replica=10, up_s=0)),),
    ingress=Ingress(autoscaling=IngressScaling(max=4, requests_per_replica=10, up_s=0)),
)


def context(raw=None, *, target=1, running=1, requests=0.0):
    return AutoscalingContext(
        deployment_id=None,
        deployment_name="",
        app_name="",
        current_num_replicas=running,
        target_num_replicas=target,
        running_replicas=[],
        total_num_requests=requests,
        total_queued_requests=0.0,
        aggregated_metrics={},
        raw_metrics=raw,
        capacity_adjusted_min_replicas=0,
        capacity_adjusted_max_replicas=8,
        policy_state={},
        last_scale_up_time=None,
        last_scale_down_time=None,
        current_time=time.time(),
        config=None,
    )


def told(age_s=0.0, *, queued=0.0, pace=1000.0, busy=(0.0, 0.0)):
    """One replica's figures of the last ten seconds."""

    def series(*values):
        last = time.time() - age_s
        apart = 10.0 / max(len(values) - 1, 1)
        return [
            SimpleNamespace(timestamp=last - apart * (len(values) - 1 - n), value=value)
            for n, value in enumerate(values)
        ]

    return {
        "queued_tokens": {"r1": series(queued)},
        "tokens_per_s": {"r1": series(pace)},
        "busy_s": {"r1": series(*busy)},
        "running_requests": {"r1": series(3.0)},
    }


class Actor:
    """What a policy asks: a Ledger that listens, an Upserter that answers, fails or hangs."""

    def __init__(self, answer):
        self.answer, self.asked, self.heard = answer, 0, []

    async def ask(self, method, *args, timeout_s):
        if method == "report_decision":
            self.heard.append(args[0])
            return None
        self.asked += 1
        if isinstance(self.answer, Exception):
            raise self.answer
        if self.answer == "hangs":
            await asyncio.Event().wait()
        return self.answer


def policy(deployment, answer):
    made, actor = Policy(deployment, SETTINGS.model_dump_json()), Actor(answer)
    made._upserter = made._ledger = actor
    return made, actor


async def turn(made):
    """A second passes, and what was asked is answered."""
    made._asked_at -= ASK_EVERY_S
    await asyncio.sleep(0)
    await asyncio.sleep(0)


async def test_a_pool_rises_by_what_waits_in_replicas_and_store_and_tells_why():
    made, actor = policy(POOL, Backlog({"fake": 20_000.0, "other": 1e9, "": 5000.0}))
    assert made(context(told(queued=4000.0))) == (1, {})  # the Store has not answered yet
    assert "Store's backlog is unknown" in made._last.reason
    await turn(made)
    assert made(context(told(queued=4000.0)))[0] == 3  # 29,000 tokens: 10,000 a replica
    await turn(made)
    assert actor.heard[-1].wanted == 3
    assert actor.heard[-1].inputs["backlog_tokens"] == 25_000
    assert "25,000 in the Store" in actor.heard[-1].reason


async def test_workers_rise_by_items_and_the_door_by_requests():
    made, _ = policy("worker-items", Backlog({}, {"prepare": 18, "embed": 12}))
    made(context())
    await turn(made)
    assert made(context())[0] == 3
    made, _ = policy("ingress", None)
    assert made(context(requests=31.0))[0] == 4


@pytest.mark.parametrize("answer", ["hangs", IndexUnavailable("Away.", retry_after_s=1)])
async def test_an_actor_that_is_away_blocks_nothing_and_costs_no_replica(answer):
    made, actor = policy(POOL, answer)
    for _ in range(5):
        assert made(context(told(), target=3, running=1))[0] == 3
        await turn(made)
    assert actor.asked == (1 if answer == "hangs" else 5)
    if made._asking is not None:
        made._asking.cancel()


async def test_a_backlog_grows_old():
    made, _ = policy(POOL, Backlog())
    made(context(told(), target=2))
    await turn(made)
    made(context(told(), target=2))
    assert "falls to 1" in made._last.reason
    at, backlog = made._backlog
    made._backlog = at - 16, backlog
    assert made(context(told(), target=2))[0] == 2
    assert made._last.reason.startswith("Holds 2")


async def test_a_policy_that_fails_keeps_the_replicas(caplog):
    made, _ = policy(POOL, None)

    def broken():
        raise RuntimeError("Serve has changed")

    assert made(context(broken, target=4)) == (4, {})
    assert "no decision for embedder-default" in caplog.text


def test_what_a_replica_told_is_read_with_its_age_and_how_busy_it_was():
    (one,) = told_by(context(told(3.0, queued=7.0, pace=50.0, busy=(2.0, 4.0, 6.0))))
    assert one == Replica(7.0, 50.0, pytest.approx(0.4), pytest.approx(3.0, abs=1.0))
    assert told_by(context({})) == []
    partly = told()
    partly["tokens_per_s"] = {}
    assert told_by(context(partly)) == []


def test_a_deployment_is_scaled_only_where_that_is_asked_for():
    (pool,) = SETTINGS.pools
    scaled = replicas_of(pool, POOL, SETTINGS)["autoscaling_config"]
    assert (scaled.min_replicas, scaled.max_replicas) == (0, 8)
    assert (scaled.upscale_delay_s, scaled.downscale_delay_s) == (0, 0)
    assert scaled.policy.get_policy() is Policy
    made = Policy(**scaled.policy.policy_kwargs)
    assert made._settings == SETTINGS
    fixed = pool.model_copy(update={"autoscaling": None, "replicas": 3})
    assert replicas_of(fixed, POOL, SETTINGS) == {"num_replicas": 3}
    with pytest.raises(ValueError, match="not scaled"):
        Policy(POOL, Settings(pools=(fixed,)).model_dump_json())


def test_jobs_that_name_no_model_count_for_the_first_pool_that_embeds():
    pools = [
        Pool(name="one", models=(FAKE,)),
        Pool(name="two", models=(FAKE.model_copy(update={"id": "b"}),)),
    ]
    assert models_of(pools, "one") == ("fake", "")
    assert models_of(pools, "two") == ("b",)
