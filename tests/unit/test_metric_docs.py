"""docs/metrics.md is what the table says."""

from deployments.metric_docs import PAGE, render
from serve.telemetry import LABELS, METRICS, SPANS, Metric


def test_the_committed_page_is_current():
    written = PAGE.read_text(encoding="utf-8")
    assert written == render(METRICS.values(), LABELS, SPANS), "run `make docs`"


def test_rows_stand_under_their_place_as_prometheus_sees_them():
    one = Metric("A", "counter", "headrace_x", ("pool", "tier"), "calls", "What it is.")
    two = Metric("B", "gauge", "headrace_y", (), "bytes", "Something else.")
    page = render([one, two], {"pool": "names", "tier": ("a", "b")}, {"headrace.z": "Work."})
    assert page.index("## A") < page.index("headrace_x") < page.index("## B")
    assert "| `ray_headrace_x_total{pool, tier}` | counter | calls | What it is. |" in page
    assert "| `ray_headrace_y` | gauge | bytes | Something else. |" in page
    assert "| `tier` | `a`, `b` |" in page
    assert "| `headrace.z` | Work. |" in page
