"""Where what a process says of its work goes: spans and lines of the log."""

import os

from serve import logs, tracing
from serve.config import Logs


ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")


def observe(process: str, settings: Logs) -> None:
    """Send spans if OpenTelemetry's environment names an endpoint, and write JSON if the settings say so.

    Each process of ours calls this once, at its start. The exporter reads the other variables by itself:
    headers, certificate, sampler, limits.
    """
    if settings.encoding == "json":
        logs.begin(process, settings.level)
    disabled = os.environ.get("OTEL_SDK_DISABLED", "").strip().lower() == "true"
    if not disabled and any(map(os.environ.get, ENDPOINTS)):
        tracing.begin(os.environ.get("OTEL_SERVICE_NAME") or "headrace", process)
