"""One trace, from a client's `traceparent` through every process to the flush, at a real OTLP endpoint."""

import time
from collections.abc import Iterator

import httpx
import pytest

from tests.e2e.conftest import Served, start, stop
from tests.otlp import Endpoint, listening


pytestmark = [pytest.mark.e2e, pytest.mark.timeout(400)]

TRACE = "0af7651916cd43dd8448eb211c80319c"
HEADERS = {"traceparent": f"00-{TRACE}-b7ad6b7169203331-01"}
SEEN_S_MAX = 60
"""Processors send every 5 s."""


@pytest.fixture
def endpoint() -> Iterator[Endpoint]:
    with listening() as one:
        yield one


@pytest.fixture
def traced(
    endpoint: Endpoint, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Served]:
    pytest.importorskip("opentelemetry.exporter.otlp.proto.http", reason="needs headrace[otlp]")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", endpoint.url)
    service = start(tmp_path_factory.mktemp("traced") / "data")
    yield service
    stop(service)


def test_a_write_is_followed_through_every_process(traced, endpoint):
    headers = {"authorization": f"Bearer {traced.key}"}
    with httpx.Client(base_url=traced.url, headers=headers, timeout=180) as client:
        client.post("/v1/collections", json={"name": "traced"}).raise_for_status()
        body = {"documents": [{"id": "a", "text": "A text that is followed."}]}
        path = "/v1/collections/traced/documents?wait=indexed"
        client.post(path, json=body, headers=HEADERS).raise_for_status()
    wanted = {
        *(("headrace.request", "ingress"), ("headrace.store", "ingress")),
        *(("headrace.work", "worker"), ("headrace.offer", "worker")),
        *(("headrace.queue", "embedder"), ("headrace.batch", "embedder")),
        ("headrace.flush", "upserter"),
    }
    deadline = time.monotonic() + SEEN_S_MAX
    while missing := wanted - {(one.name, one.process) for one in followed(endpoint)}:
        assert time.monotonic() < deadline, missing
        time.sleep(0.5)
    offers = {one.span for one in endpoint.spans if one.name == "headrace.offer"}
    flushed = {
        span for one in endpoint.spans if one.name == "headrace.flush" for _, span in one.links
    }
    assert offers <= flushed


def followed(endpoint: Endpoint):
    """What is of the trace, and what links to it."""
    for one in tuple(endpoint.spans):
        if one.trace == TRACE or TRACE in {trace for trace, _ in one.links}:
            yield one
