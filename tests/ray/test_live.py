"""Live settings on a real cluster: they hold at once, in the same processes, and nothing that waits is lost."""

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
import ray.serve
from ray.serve.context import _get_global_client
from ray.serve.schema import ServeDeploySchema

from deployments.actors import LEDGER, STORE, UPSERTER, living


pytestmark = [pytest.mark.ray, pytest.mark.timeout(240)]

TEXT = "a word " * 40
PARTS = ("ingress", "embedder-default", "worker-items")
ROLES = (STORE, UPSERTER, LEDGER)


def deploy(whole, live: Mapping[str, Any] | None) -> None:
    """As `serve deploy` does with a file in which each deployment has this `user_config`, or none has."""
    told = {} if live is None else {"user_config": live}
    application = {
        "name": "headrace",
        "route_prefix": "/",
        "import_path": "deployments.app:build",
        "args": whole.settings.model_dump(mode="json"),
        "deployments": [{"name": part, **told} for part in PARTS],
    }
    file = ServeDeploySchema.model_validate({"applications": [application]})
    _get_global_client().deploy_apps(file)


def settled() -> bool:
    """Whether Serve has done what the file says."""
    application = ray.serve.status().applications["headrace"]
    states = {one.status.value for one in application.deployments.values()}
    return application.status.value == "RUNNING" and states == {"HEALTHY"}


@pytest.fixture
def filed(whole):
    """Deployed from a file, two replicas of the door, a slow model; what it was before comes back."""
    before = whole.settings
    (pool,) = before.pools
    model = pool.models[0].model_copy(update={"fake_ms_per_token": 0.5})
    pools = (pool.model_copy(update={"models": (model,)}),)
    whole.settings = before.model_copy(update={"pools": pools})
    old = whole.replicas("ingress").keys()
    deploy(whole, None)
    whole.until(lambda: not old & whole.replicas("ingress").keys(), timeout_s=90)
    whole.until(lambda: settled() and whole.ready(), timeout_s=90)
    yield whole
    whole.delete()
    whole.settings = before


def allowed(client: httpx.Client) -> set[str]:
    """The limit of requests a minute that eight requests in a row are told, over both replicas.

    Of a model that there is not: no work waits behind other work.
    """
    body = {"model": "none", "input": "x"}
    replies = [client.post("/v1/embeddings", json=body) for _ in range(8)]
    return {reply.headers["x-ratelimit-limit-requests"] for reply in replies}


def test_live_settings_change_under_load_in_the_same_processes(filed):
    processes = {part: filed.replicas(part) for part in PARTS}
    actors = {role: living(role) for role in ROLES}
    tier = filed.settings.admission.tiers["enterprise"]
    first = str(int(tier.interactive.requests_per_minute))
    quota = {"requests_per_minute": 7777, "concurrent_max": 64}
    tiers = {"enterprise": {"weight": 5, "interactive": quota}}
    live = {
        "admission": {"tiers": tiers},
        "pools": [{"name": "default", "batch": {"items_max": 2}}],
        "logs": {"level": "ERROR"},
    }
    wrong = {**live, "admission": {"tiers": {"enterprise": {"weight": 0}}}}

    with filed.client() as client, filed.client() as asking, ThreadPoolExecutor(1) as threads:
        assert allowed(client) == {first}
        client.post("/v1/collections", json={"name": "lively"}).raise_for_status()
        body = {"model": "fake", "input": [TEXT] * 400}
        headers = {"x-deadline-ms": "100000"}
        large = threads.submit(asking.post, "/v1/embeddings", json=body, headers=headers)
        items = [{"id": str(n), "text": TEXT} for n in range(30)]
        job = client.post("/v1/jobs", json={"collection": "lively", "items": items})
        before: dict[str, float] = {}

        def busy() -> bool:
            before.update(filed.embedder_stats())
            return before["queued_items"] > 100 and before["inputs"] > 0

        filed.until(busy)

        deploy(filed, live)
        filed.until(lambda: allowed(client) == {"7777"})
        filed.until(settled)
        during = filed.embedder_stats()
        assert during["queued_items"] > 0
        assert during["inputs"] >= before["inputs"] > 0
        assert during["dropped"] == before["dropped"]

        deploy(filed, wrong)
        filed.until(lambda: filed.embedder_stats()["settings_refused"] == 1)
        filed.until(settled)
        assert allowed(client) == {"7777"}
        began = filed.embedder_stats()
        reply = large.result(timeout=100)
        assert reply.status_code == httpx.codes.OK, reply.text
        assert len(reply.json()["data"]) == 400
        where = f"/v1/jobs/{job.json()['id']}"
        filed.until(lambda: client.get(where).json()["state"] == "completed", timeout_s=90)
        done = client.get(f"{where}/items").json()["data"]
        assert [(one["state"], one["attempts"]) for one in done] == [("done", 0)] * 30
        ended = filed.embedder_stats()
        inputs, batches = (ended[word] - began[word] for word in ("inputs", "batches"))
        assert 0 < inputs <= 2 * batches

        deploy(filed, None)
        filed.until(lambda: allowed(client) == {first})
    assert {part: filed.replicas(part) for part in PARTS} == processes
    assert {role: living(role) for role in ROLES} == actors
