"""Autoscaling on a real cluster: what waits in the Store makes replicas, and they leave when it is done."""

import pytest
import ray.serve

from serve.config import Pool, PoolScaling, Worker, WorkerScaling


pytestmark = [pytest.mark.ray, pytest.mark.timeout(150)]

POOL = "embedder-default"


@pytest.fixture
def scaled(whole):
    """The service with a pool that sleeps, and workers that are scaled; what it was before comes back."""
    before = whole.settings
    (pool,) = before.pools
    slow = pool.models[0].model_copy(update={"fake_ms_per_token": 0.2})
    rule = PoolScaling(min=0, max=2, drain_s=2, up_s=0, down_s=1, idle_s=1)
    worker = Worker(autoscaling=WorkerScaling(max=2, items_per_replica=40, up_s=0, down_s=1))
    whole.deploy(
        before.model_copy(
            update={
                "pools": (Pool(**{**dict(pool), "models": (slow,), "autoscaling": rule}),),
                "workers": (worker,),
            }
        )
    )
    yield whole
    whole.delete()
    whole.settings = before


def decided(client, deployment):
    shown = client.get("/v1/admin/autoscaling").raise_for_status().json()["data"]
    return next(one for one in shown if one["deployment"] == deployment)


def running(deployment):
    found = ray.serve.status().applications["headrace"].deployments[deployment]
    return found.replica_states.get("RUNNING", 0)


def test_a_backlog_wakes_and_raises_a_pool_which_then_falls_asleep(scaled):
    """Order only: asleep, awake, more, done, fewer, asleep."""
    operator = scaled.key("operators", role="admin").secret
    with scaled.client(key=operator) as admin, scaled.client() as client:
        assert scaled.ready()  # also while it sleeps
        assert running(POOL) == 0
        assert decided(admin, "ingress")["fixed"]
        client.post("/v1/collections", json={"name": "scaled"}).raise_for_status()
        documents = [{"id": str(n), "text": f"{n} words " * 40} for n in range(250)]
        job = client.post(
            "/v1/jobs", json={"collection": "scaled", "items": documents}
        ).raise_for_status()
        where = f"/v1/jobs/{job.json()['id']}"
        scaled.until(lambda: decided(admin, POOL)["wanted"] == 2)
        scaled.until(lambda: running(POOL) == 2)
        scaled.until(lambda: decided(admin, "worker-items")["wanted"] == 2)
        scaled.until(lambda: client.get(where).json()["state"] == "completed", timeout_s=90)
        scaled.until(lambda: running("worker-items") == 1)
        scaled.until(lambda: decided(admin, POOL)["wanted"] == 0)
        scaled.until(lambda: running(POOL) == 0)
        last = decided(admin, POOL)
        assert last["inputs"]["backlog_tokens"] == 0
        assert scaled.ready()
        woken = client.post("/v1/embeddings", json={"model": "fake", "input": "good morning"})
        assert woken.status_code == 200
