"""serve.tracing: spans from carriers, nothing where there is nothing to trace, and a real OTLP endpoint."""

import sys
from collections.abc import Iterator

import pytest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from deployments.observed import observe
from serve import tracing
from serve.config import Logs
from serve.errors import BadInput
from tests.otlp import listening


TRACE = "0af7651916cd43dd8448eb211c80319c"
CLIENT = f"00-{TRACE}-b7ad6b7169203331-01"
OTHER = "00-11111111111111111111111111111111-2222222222222222-01"
UNSAMPLED = "00-33333333333333333333333333333333-4444444444444444-00"


@pytest.fixture
def made() -> Iterator[InMemorySpanExporter]:
    exporter = InMemorySpanExporter()
    tracing.begin("headrace", "test", [SimpleSpanProcessor(exporter)])
    yield exporter
    tracing.end()


def one(exporter: InMemorySpanExporter) -> ReadableSpan:
    (span,) = exporter.get_finished_spans()
    return span


def trace_of(span: ReadableSpan) -> str:
    return f"{span.context.trace_id:032x}"


def test_without_an_endpoint_nothing_is_made_and_nothing_travels():
    with tracing.arrival(CLIENT.encode()) as span:
        span.note(status=200)
        assert tracing.carrier() == ""
        assert tracing.kept() == {}
        with tracing.part("headrace.tokenise"), tracing.joint("headrace.batch", [CLIENT]):
            tracing.past("headrace.queue", CLIENT, 1.0)
    assert tracing._Switch.tracer is None


def test_a_request_goes_on_in_the_clients_trace_and_parts_go_on_in_it(made):
    with tracing.arrival(CLIENT.encode(), request="r") as span:
        inside = tracing.carrier()
        with tracing.part("headrace.tokenise"):
            pass
        span.note(status=200)
    part, request = made.get_finished_spans()
    assert trace_of(request) == trace_of(part) == TRACE
    assert f"{request.parent.span_id:016x}" == CLIENT.split("-")[2]
    assert part.parent.span_id == request.context.span_id
    assert inside == f"00-{TRACE}-{request.context.span_id:016x}-01"
    assert dict(request.attributes) == {"headrace.request": "r", "headrace.status": 200}
    assert request.resource.attributes["service.name"] == "headrace"
    assert request.resource.attributes["headrace.process"] == "test"


@pytest.mark.parametrize(
    "header",
    [
        *(b"", b"nonsense", CLIENT.upper().encode(), f"ff{CLIENT[2:]}".encode(), b"\xff" * 55),
        f"00-{'0' * 32}-b7ad6b7169203331-01".encode(),
        f"00-{TRACE}-{'0' * 16}-01".encode(),
    ],
)
def test_a_header_that_is_none_begins_a_trace(made, header):
    with tracing.arrival(header):
        pass
    assert one(made).parent is None
    assert trace_of(one(made)) != TRACE


def test_a_later_version_of_the_header_is_read(made):
    with tracing.arrival(f"01{CLIENT[2:]}-more".encode()):
        pass
    assert trace_of(one(made)) == TRACE


def test_a_client_that_does_not_sample_is_not_sampled(made):
    with tracing.arrival(UNSAMPLED.encode()):
        assert tracing.carrier().endswith("-00")
    assert made.get_finished_spans() == ()


def test_a_part_of_nothing_is_not_made(made):
    with tracing.part("headrace.store"), tracing.part("headrace.work", ""):
        pass
    assert made.get_finished_spans() == ()


def test_what_has_passed_ends_now_and_took_so_long(made):
    tracing.past("headrace.queue", CLIENT, 1.5)
    span = one(made)
    assert span.end_time - span.start_time == 1_500_000_000
    assert trace_of(span) == TRACE


def test_shared_work_is_a_trace_of_its_own_with_a_link_to_each_that_is_sampled(made):
    with tracing.joint("headrace.batch", [CLIENT, "", OTHER, CLIENT, UNSAMPLED], inputs=3):
        pass
    span = one(made)
    assert span.parent is None
    assert {f"{link.context.trace_id:032x}" for link in span.links} == {TRACE, "1" * 32}
    assert len(span.links) == 2
    with tracing.joint("headrace.batch", ["", UNSAMPLED]):
        pass
    assert len(made.get_finished_spans()) == 1


def test_links_are_bounded(made):
    many = [f"00-{number:032x}-2222222222222222-01" for number in range(1, 200)]
    with tracing.joint("headrace.flush", many):
        pass
    assert len(one(made).links) == tracing.LINKS_MAX


def test_of_an_error_only_the_type_is_told(made):
    with pytest.raises(BadInput), tracing.arrival(b""):
        raise BadInput("the secret text")
    span = one(made)
    assert span.status.description == "BadInput"
    assert "secret" not in span.to_json()


def test_only_names_of_the_table_are_made(made):
    with pytest.raises(KeyError):
        tracing.part("headrace.invented", CLIENT)


# --- where they go ----------------------------------------------------------------------------


@pytest.fixture
def _off_again() -> Iterator[None]:
    yield
    tracing.end()


@pytest.mark.usefixtures("_off_again")
def test_spans_reach_the_endpoint_that_the_environment_names(monkeypatch):
    pytest.importorskip("opentelemetry.exporter.otlp.proto.http", reason="needs headrace[otlp]")
    with listening() as endpoint:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", endpoint.url)
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_COMPRESSION", "gzip")
        monkeypatch.setenv("OTEL_SERVICE_NAME", "ours")
        observe("ingress", Logs())
        with tracing.arrival(CLIENT.encode(), request="r"):
            pass
        with tracing.joint("headrace.batch", [CLIENT]):
            pass
        tracing.flush()
    request, batch = sorted(endpoint.spans, reverse=True)
    assert endpoint.paths == {"/v1/traces"}
    assert request[:4] == ("headrace.request", "ours", "ingress", TRACE)
    assert (batch.name, batch.links) == ("headrace.batch", ((TRACE, "b7ad6b7169203331"),))


@pytest.mark.usefixtures("_off_again")
@pytest.mark.parametrize(
    "environment", [{}, {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://x", "OTEL_SDK_DISABLED": "true"}]
)
def test_nothing_begins_where_nothing_is_said(monkeypatch, environment):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    observe("ingress", Logs())
    assert tracing._Switch.tracer is None


@pytest.mark.usefixtures("_off_again")
def test_a_missing_exporter_is_said_and_nothing_breaks(monkeypatch, caplog):
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "http://127.0.0.1:9/v1/traces")
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    observe("ingress", Logs())
    assert tracing._Switch.tracer is None
    assert "headrace[otlp]" in caplog.text
