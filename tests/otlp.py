"""An OTLP endpoint over HTTP for tests, that keeps what it is sent."""

import gzip
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest


class Told(NamedTuple):
    """A span as it came: who made it, of which trace, and the spans of others that it links to."""

    name: str
    service: str
    process: str
    trace: str
    span: str
    links: tuple[tuple[str, str], ...]


class Endpoint(ThreadingHTTPServer):
    """`spans` are those that came, `paths` where to."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Receiver)
        self.spans: list[Told] = []
        self.paths: set[str] = set()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def keep(self, sent: ExportTraceServiceRequest) -> None:
        for resource in sent.resource_spans:
            facts = {one.key: one.value.string_value for one in resource.resource.attributes}
            for span in (span for scope in resource.scope_spans for span in scope.spans):
                links = tuple((one.trace_id.hex(), one.span_id.hex()) for one in span.links)
                self.spans.append(
                    Told(
                        span.name,
                        facts["service.name"],
                        facts["headrace.process"],
                        span.trace_id.hex(),
                        span.span_id.hex(),
                        links,
                    )
                )


class _Receiver(BaseHTTPRequestHandler):
    server: Endpoint

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        if self.headers.get("content-encoding") == "gzip":
            body = gzip.decompress(body)
        self.server.paths.add(self.path)
        self.server.keep(ExportTraceServiceRequest.FromString(body))
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_: Any) -> None: ...


@contextmanager
def listening() -> Iterator[Endpoint]:
    with Endpoint() as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
