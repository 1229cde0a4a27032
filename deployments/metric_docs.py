"""Writes `docs/metrics.md` from the table of `serve.telemetry`: `python -m deployments.metric_docs`.

A unit test compares the committed page with `render`, so it cannot go stale.
"""

from collections.abc import Iterable, Mapping
from itertools import groupby
from pathlib import Path

from serve.telemetry import LABELS, METRICS, SPANS, Metric


PAGE = Path(__file__).parent.parent / "docs" / "metrics.md"

INTRODUCTION = """\
# Metrics

<!-- Written by `make docs` from serve/telemetry.py: do not edit. -->

Ray exports them on each node, for Prometheus (`<temp dir>/prom_metrics_service_discovery.json` names the
ports), 15 s old at most. A histogram's series end in `_bucket`, `_sum` and `_count`. Names and labels follow
semantic versioning. Ray adds labels of its own (`NodeAddress`, `WorkerId`, `SessionName`, ...): a gauge of a
process that is gone lingers under its `WorkerId`, so aggregate with `sum by` or `max by`. A counter appears with
its first event, at its first value: `increase` alone does not see that one.

Dashboard and alerts stand in `k8s/monitoring/`.
"""


SPAN_HEADER = """
## Spans

Made where `OTEL_EXPORTER_OTLP_ENDPOINT` is set ([operations.md](operations.md#traces)). Attributes carry ids, classes
and counts; no text, vector, key or tenant.

| span | |
|---|---|
"""


def render(
    metrics: Iterable[Metric],
    labels: Mapping[str, tuple[str, ...] | str],
    spans: Mapping[str, str],
) -> str:
    """The whole page: a table of each place, then the labels and the spans."""
    parts = [INTRODUCTION]
    for place, rows in groupby(metrics, key=lambda one: one.place):
        parts.append(f"\n## {place}\n\n| metric | kind | unit | |\n|---|---|---|---|\n")
        parts += map(_row, rows)
    parts.append("\n## Labels\n\n| label | values |\n|---|---|\n")
    for name, values in labels.items():
        text = values if isinstance(values, str) else ", ".join(f"`{one}`" for one in values)
        parts.append(f"| `{name}` | {text} |\n")
    parts.append(SPAN_HEADER)
    parts += (f"| `{name}` | {text} |\n" for name, text in spans.items())
    return "".join(parts)


def _row(one: Metric) -> str:
    labels = f"{{{', '.join(one.labels)}}}" if one.labels else ""
    return f"| `{one.exported}{labels}` | {one.kind} | {one.unit} | {one.text} |\n"


def main() -> None:
    """Write the page."""
    PAGE.write_text(render(METRICS.values(), LABELS, SPANS), encoding="utf-8")


if __name__ == "__main__":
    main()
