"""Spans of a request, from the client's `traceparent` to the flush of its records. The door of OpenTelemetry;
names stand in `serve.telemetry`.

Nothing is made until `begin` has said where spans go. Between processes a span travels as a *carrier*, the
value of a `traceparent` header: in the call to an embedder, in a job's `spec`, in each record on its way
to the index. What is done for many at once, a batch or a flush, is a trace of its own that links to each.
"""

import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from time import time_ns
from typing import TYPE_CHECKING, Any, Self

from opentelemetry import context, trace
from opentelemetry.trace import (
    Link,
    NonRecordingSpan,
    SpanContext,
    SpanKind,
    StatusCode,
    TraceFlags,
)

from serve.telemetry import SPANS


if TYPE_CHECKING:
    from opentelemetry.sdk.trace import SpanProcessor, TracerProvider

LINKS_MAX = 128
"""What the SDK keeps of a span unless told otherwise."""

KEPT = "trace"
"""In the `spec` of a job: the span that made it."""

Fact = str | int | float

log = logging.getLogger("headrace.tracing")

_CARRIER = re.compile(r"(?!ff)[0-9a-f]{2}-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?")


class _Switch:
    """What this process makes spans with; None: it makes none."""

    tracer: trace.Tracer | None = None
    sharer: trace.Tracer | None = None
    """For work of many: whether one of them is traced was decided before, and holds."""
    providers: tuple["TracerProvider", ...] = ()


class Part:
    """Some work: a span, or nothing where none is made."""

    def __init__(self, span: trace.Span | None = None) -> None:
        self._span = span

    def __enter__(self) -> Self:
        """It is the current span in here, and in the tasks that are made in here."""
        if self._span is not None:
            self._token = context.attach(trace.set_span_in_context(self._span))
        return self

    def __exit__(self, _kind: object, error: BaseException | None, _where: object) -> None:
        """It ends. Of an error its type is kept: messages may quote what a user sent."""
        if self._span is not None:
            if error is not None:
                self._span.set_status(StatusCode.ERROR, type(error).__name__)
            context.detach(self._token)
            self._span.end()

    def note(self, **facts: Fact) -> None:
        """What is known of it by now."""
        if self._span is not None:
            self._span.set_attributes(_named(facts))


_NOTHING = Part()


def arrival(traceparent: bytes, **facts: Fact) -> Part:
    """A request: within the client's trace, or the beginning of one."""
    tracer = _Switch.tracer
    if tracer is None:
        return _NOTHING
    within = _context(traceparent.decode("latin-1"))
    if trace.get_current_span().get_span_context().is_valid:  # Ray's own, which has read the header
        within = None
    return Part(
        tracer.start_span(
            _known("headrace.request"), within, kind=SpanKind.SERVER, attributes=_named(facts)
        )
    )


def part(name: str, carrier: str | None = None, **facts: Fact) -> Part:
    """A part of what goes on here or, where given, of what the carrier says; nothing without a trace."""
    tracer = _Switch.tracer
    if tracer is None:
        return _NOTHING
    within = context.get_current() if carrier is None else _context(carrier)
    if within is None or not trace.get_current_span(within).get_span_context().is_valid:
        return _NOTHING
    return Part(tracer.start_span(_known(name), within, attributes=_named(facts)))


def past(name: str, carrier: str, seconds: float, **facts: Fact) -> None:
    """A part of what the carrier says that took so long and ends now."""
    tracer, within = _Switch.tracer, _context(carrier) if carrier else None
    if tracer is None or within is None:
        return
    now = time_ns()
    began = now - int(seconds * 1e9)
    tracer.start_span(_known(name), within, attributes=_named(facts), start_time=began).end(now)


def joint(name: str, carriers: Iterable[str], **facts: Fact) -> Part:
    """Work for all of these at once; nothing if none is traced."""
    tracer = _Switch.sharer
    if tracer is None:
        return _NOTHING
    found = [_read(one) for one in dict.fromkeys(carriers) if one]
    links = [Link(one) for one in found if one is not None and one.trace_flags.sampled]
    if not links:
        return _NOTHING
    return Part(
        tracer.start_span(
            _known(name),
            context.Context(),
            kind=SpanKind.CONSUMER,
            attributes=_named(facts),
            links=links[:LINKS_MAX],
        )
    )


def carrier() -> str:
    """The current span, for another process; empty where there is none."""
    if _Switch.tracer is None:
        return ""
    here = trace.get_current_span().get_span_context()
    if not here.is_valid:
        return ""
    return f"00-{here.trace_id:032x}-{here.span_id:016x}-{here.trace_flags:02x}"


def kept() -> dict[str, str]:
    """The current span as a job keeps it; empty where there is none."""
    here = carrier()
    return {KEPT: here} if here else {}


def begin(name: str, process: str, processors: Sequence["SpanProcessor"] = ()) -> None:
    """Make spans from now on, as the service `name`, for the processors; none given: to the OTLP endpoint that
    OpenTelemetry's environment variables name, by HTTP.

    Without the exporter's package nothing is made, and the log says so.
    """
    # Here: the SDK and its exporter take 0.2 s of a core, for nothing in most processes.
    from opentelemetry.sdk.resources import Resource  # noqa: PLC0415
    from opentelemetry.sdk.trace import TracerProvider  # noqa: PLC0415
    from opentelemetry.sdk.trace.sampling import ALWAYS_ON  # noqa: PLC0415

    try:
        chosen = processors or _otlp()
    except ImportError:
        log.warning("an OTLP endpoint is named, and headrace[otlp] is not installed: no spans")
        return
    resource = Resource.create({"service.name": name, "headrace.process": process})
    providers = TracerProvider(resource=resource), TracerProvider(ALWAYS_ON, resource)
    for provider in providers:
        for one in chosen:
            provider.add_span_processor(one)
    _Switch.providers = providers
    _Switch.tracer, _Switch.sharer = (provider.get_tracer("headrace") for provider in providers)


def flush() -> None:
    """Send what waits to be sent; blocks until then."""
    for provider in _Switch.providers:
        provider.force_flush()


def end() -> None:
    """Make no more spans; those that wait are sent when their processors are told so."""
    _Switch.tracer = _Switch.sharer = None
    _Switch.providers = ()


def _otlp() -> list["SpanProcessor"]:
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import (  # noqa: PLC0415
        OTLPSpanExporter,
    )
    from opentelemetry.sdk.trace.export import BatchSpanProcessor  # noqa: PLC0415

    return [BatchSpanProcessor(OTLPSpanExporter())]


def _read(carrier: str) -> SpanContext | None:
    found = _CARRIER.fullmatch(carrier)
    if found is None:
        return None
    where = SpanContext(
        int(found[1], 16),
        int(found[2], 16),
        is_remote=True,
        trace_flags=TraceFlags(int(found[3], 16)),
    )
    return where if where.is_valid else None


def _context(carrier: str) -> context.Context | None:
    """None: for a new trace."""
    where = _read(carrier)
    if where is None:
        return None
    return trace.set_span_in_context(NonRecordingSpan(where), context.Context())


def _known(name: str) -> str:
    if name not in SPANS:
        raise KeyError(name)
    return name


def _named(facts: Mapping[str, Fact]) -> dict[str, Any]:
    return {f"headrace.{name}": value for name, value in facts.items()}
