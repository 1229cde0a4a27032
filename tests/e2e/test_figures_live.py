"""What a running service tells on Ray's Prometheus ports is what the table, the dashboard and the alerts say."""

import json
import re
import time

import httpx
import pytest

from serve.telemetry import METRICS


pytestmark = [pytest.mark.e2e, pytest.mark.timeout(400)]

SEEN_S_MAX = 90
"""Ray exports every 10 s, ours come every 5, the census of the Store every 10."""

RAYS = {"ray_serve_autoscaling_target_replicas", "ray_serve_deployment_replica_healthy"}
"""What alerts and dashboard take of Ray Serve's own."""

RARE = {
    *("headrace_quota_exchange_failures", "headrace_quota_local_grants"),
    *("headrace_cache_evicted", "headrace_calls_expired", "headrace_items_lost"),
    *("headrace_inputs_repeated", "headrace_inputs_failed", "headrace_inputs_dropped"),
    *("headrace_model_load_failures", "headrace_model_breaks", "headrace_model_evictions"),
    *("headrace_gpu_memory_bytes", "headrace_gpu_memory_total_bytes"),
    *("headrace_flushes_retried", "headrace_writer_faults"),
    *("headrace_canary_requests", "headrace_canary_fallbacks", "headrace_canary_shadows"),
    *("headrace_canary_request_seconds", "headrace_canary_infer_seconds", "headrace_canary_cosine"),
}
"""Counters of failures, which appear with the first one, and what only a GPU or a canary has."""

SERIES = re.compile(r"^(ray_\w+)\{([^}]*)\}", re.MULTILINE)
LABEL = re.compile(r'(\w+)="')
RAY_LABELS = {
    "Component",
    "NodeAddress",
    "SessionName",
    "Version",
    "WorkerId",
    "JobId",
    "le",
    "ActorId",
    *("otel_scope_name", "otel_scope_version", "otel_scope_schema_url"),
}


def test_every_metric_of_the_table_is_told_and_no_other(served):
    use(served)
    wanted = {one.exported for one in METRICS.values() if one.name not in RARE} | RAYS
    deadline = time.monotonic() + SEEN_S_MAX
    while missing := wanted - set(live := scraped(served)):
        assert time.monotonic() < deadline, sorted(missing)
        time.sleep(2)
    table = {one.exported: one for one in METRICS.values()}
    ours = {name: labels for name, labels in live.items() if name.startswith("ray_headrace_")}
    assert ours.keys() <= table.keys()
    for name, labels in ours.items():
        assert labels - RAY_LABELS == set(table[name].labels), name


def use(served) -> None:
    """A little of everything: vectors twice, documents, a refusal."""
    headers = {"authorization": f"Bearer {served.key}"}
    with httpx.Client(base_url=served.url, headers=headers, timeout=180) as client:
        body = {"model": "all-MiniLM-L6-v2", "input": ["figure", "figure"]}
        for _ in range(2):
            client.post("/v1/embeddings", json=body).raise_for_status()
        client.post("/v1/collections", json={"name": "figures"}).raise_for_status()
        documents = {"documents": [{"id": "a", "text": "A figure that is told."}]}
        path = "/v1/collections/figures/documents?wait=indexed"
        client.post(path, json=documents).raise_for_status()
        key = {"authorization": f"Bearer {served.keys['free']}"}
        for _ in range(5000):  # more at once than its burst of requests
            if client.get("/v1/collections", headers=key).status_code == 429:
                return
    pytest.fail("nothing was refused")


def scraped(served) -> dict[str, set[str]]:
    """Names of what all nodes tell, histograms by their own, with the labels."""
    places = json.loads((served.temp_dir / "prom_metrics_service_discovery.json").read_text())
    found: dict[str, set[str]] = {}
    for target in (target for place in places for target in place["targets"]):
        text = httpx.get(f"http://{target}/metrics", timeout=30).text
        for name, labels in SERIES.findall(text):
            plain = re.sub(r"_(bucket|sum|count)$", "", name)
            found.setdefault(plain, set()).update(LABEL.findall(labels))
    return found
