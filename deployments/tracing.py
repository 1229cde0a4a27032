"""Where this process's spans go: what OpenTelemetry's standard environment variables say, else nowhere."""

import os

from serve.tracing import begin


ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")


def trace(process: str) -> None:
    """Send spans if an endpoint is named. Each process of ours calls this once, at its start.

    The exporter reads the other variables by itself: headers, certificate, sampler, limits.
    """
    disabled = os.environ.get("OTEL_SDK_DISABLED", "").strip().lower() == "true"
    if not disabled and any(map(os.environ.get, ENDPOINTS)):
        begin(os.environ.get("OTEL_SERVICE_NAME") or "headrace", process)
