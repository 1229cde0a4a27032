"""One trace from a client's `traceparent` to the flush of its records, through everything but Ray."""

from collections import defaultdict
from collections.abc import Iterator

import pytest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from serve import tracing
from tests.api.lines import ended, line, submit


TRACE = "0af7651916cd43dd8448eb211c80319c"
HEADERS = {"traceparent": f"00-{TRACE}-b7ad6b7169203331-01"}
PATH = "/v1/collections/books/documents"


@pytest.fixture
def spans() -> Iterator[InMemorySpanExporter]:
    exporter = InMemorySpanExporter()
    tracing.begin("headrace", "all", [SimpleSpanProcessor(exporter)])
    yield exporter
    tracing.end()


def by_name(exporter: InMemorySpanExporter) -> dict[str, list[ReadableSpan]]:
    found = defaultdict(list)
    for span in exporter.get_finished_spans():
        found[span.name].append(span)
    return found


def mine(spans: list[ReadableSpan]) -> list[ReadableSpan]:
    return [span for span in spans if f"{span.context.trace_id:032x}" == TRACE]


def linked(spans: list[ReadableSpan]) -> list[int]:
    """Ids of the client's spans that these link to."""
    links = (link.context for span in spans for link in span.links)
    return [one.span_id for one in links if f"{one.trace_id:032x}" == TRACE]


async def test_an_embedding_is_followed_to_its_batch(spans, client):
    body = {"model": "plain", "input": ["one", "two"]}
    reply = await client.post("/v1/embeddings", json=body, headers=HEADERS)
    assert reply.status_code == 200
    found = by_name(spans)
    (request,) = mine(found["headrace.request"])
    (tokenise,) = mine(found["headrace.tokenise"])
    (queue,) = mine(found["headrace.queue"])
    assert tokenise.parent.span_id == queue.parent.span_id == request.context.span_id
    assert request.attributes["headrace.status"] == 200
    assert request.attributes["headrace.klass"] == "interactive"
    assert linked(found["headrace.batch"]) == [request.context.span_id]


async def test_documents_are_followed_to_the_flush(spans, client):
    await client.post("/v1/collections", json={"name": "books"})
    spans.clear()
    documents = {"documents": [{"id": name, "text": f"text {name}"} for name in "ab"]}
    reply = await client.post(PATH, params={"wait": "indexed"}, json=documents, headers=HEADERS)
    assert reply.status_code == 200
    found = by_name(spans)
    (request,) = mine(found["headrace.request"])
    works = mine(found["headrace.work"])
    assert {span.attributes["headrace.stage"] for span in works} == {"prepare", "embed"}
    assert {span.parent.span_id for span in works} == {request.context.span_id}
    offers = [span.context.span_id for span in mine(found["headrace.offer"])]
    assert offers
    assert set(linked(found["headrace.flush"])) == set(offers)
    assert linked(found["headrace.batch"])
    assert mine(found["headrace.queue"])


async def test_raw_vectors_are_followed_to_the_flush(spans, client):
    await client.post("/v1/collections", json={"name": "books"})
    spans.clear()
    body = {"vectors": [{"id": name, "vector": [1.0] * 16} for name in "ab"]}
    reply = await client.post("/v1/collections/books/vectors", json=body, headers=HEADERS)
    assert reply.status_code == 200
    found = by_name(spans)
    (request,) = mine(found["headrace.request"])
    (offer,) = mine(found["headrace.offer"])
    assert offer.parent.span_id == request.context.span_id
    assert offer.attributes["headrace.writes"] == 2
    assert linked(found["headrace.flush"]) == [offer.context.span_id]


async def test_a_batch_is_followed_from_its_making_to_its_output(spans, whole, client):
    await client.post("/v1/collections", json={"name": "books"})
    ai = await whole.openai()
    spans.clear()
    batch = await submit(
        ai, line("a"), line("b"), extra_body={"collection": "books"}, extra_headers=HEADERS
    )
    assert (await ended(whole, ai, batch)).status == "completed"
    found = by_name(spans)
    (request,) = mine(found["headrace.request"])
    works = mine(found["headrace.work"])
    assert {span.parent.span_id for span in works} == {request.context.span_id}
    assert len(works) == 3  # the file is read, its lines embedded, the output written
    (offer,) = mine(found["headrace.offer"])
    assert offer.parent.span_id in {span.context.span_id for span in works}
    assert linked(found["headrace.flush"]) == [offer.context.span_id]
    assert linked(found["headrace.batch"])


async def test_without_a_traceparent_a_trace_begins_here(spans, client):
    await client.get("/v1/models")
    (request,) = by_name(spans)["headrace.request"]
    assert request.parent is None


async def test_what_is_not_traced_keeps_no_mark(whole, client):
    await client.post("/v1/collections", json={"name": "books"})
    body = {"documents": [{"id": "a", "text": "text"}]}
    receipt = (await client.post(PATH, params={"wait": "indexed"}, json=body)).json()
    (job,) = await whole.store.list_jobs("acme", None, [], "", 10)
    assert tracing.KEPT not in job.spec
    assert receipt
