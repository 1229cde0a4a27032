"""Writes `k8s/monitoring/dashboard.json`, the product's dashboard for Grafana: `python -m deployments.dashboard`.

A unit test compares the committed file with `render`. Ray and KubeRay bring dashboards of their own, for
clusters, nodes and deployments: those are not repeated here.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


FILE = Path(__file__).parent.parent / "k8s" / "monitoring" / "dashboard.json"

COLUMNS = 3
WIDTH, HEIGHT = 24 // COLUMNS, 7
"""Grafana's grid has 24 columns."""

SOURCE = {"type": "prometheus", "uid": "${datasource}"}
RATE = "$__rate_interval"


@dataclass(frozen=True, slots=True)
class Panel:
    """One graph. `queries` are expressions, each with its legend; `unit` is Grafana's word for it."""

    title: str
    unit: str
    queries: tuple[tuple[str, str], ...]
    text: str = ""


def _rate(metric: str, by: str = "") -> str:
    grouped = f" by ({by})" if by else ""
    return f"sum{grouped} (rate(ray_headrace_{metric}_total[{RATE}]))"


def _quantile(share: float, metric: str, by: str = "", only: str = "") -> str:
    grouped = f"{by}, le" if by else "le"
    series = f"ray_headrace_{metric}_bucket{only}"
    return f"histogram_quantile({share:g}, sum by ({grouped}) (rate({series}[{RATE}])))"


ROWS: tuple[tuple[str, tuple[Panel, ...]], ...] = (
    (
        "Requests",
        (
            Panel(
                "Replies", "reqps", ((_rate("requests", "class, status"), "{{class}} {{status}}"),)
            ),
            Panel(
                "Share of 5xx",
                "percentunit",
                (("headrace:request_errors:ratio_rate5m", "5 min"),),
                "By the recording rules of prometheus-rule.yaml.",
            ),
            Panel(
                "Time of interactive requests",
                "s",
                tuple(
                    (_quantile(share, "request_seconds", only='{class="interactive"}'), name)
                    for share, name in ((0.5, "p50"), (0.95, "p95"), (0.99, "p99"))
                ),
            ),
            Panel("Refused, by limit", "reqps", ((_rate("quota_refused", "limit"), "{{limit}}"),)),
            Panel(
                "Inputs that needed no model",
                "percentunit",
                (
                    (
                        f"{_rate('cache_hits')} / ({_rate('cache_hits')} + {_rate('cache_misses')})",
                        "kept",
                    ),
                ),
            ),
            Panel(
                "Tokenising and writing",
                "s",
                (
                    (_quantile(0.95, "tokenise_seconds"), "tokenise, p95"),
                    (_quantile(0.95, "encode_seconds"), "encode, p95"),
                ),
            ),
        ),
    ),
    (
        "Queue",
        (
            Panel(
                "Tokens that wait",
                "short",
                (("sum by (class, tier) (ray_headrace_queue_tokens)", "{{class}} {{tier}}"),),
            ),
            Panel(
                "Oldest input",
                "s",
                (
                    (
                        "max by (class, tier) (ray_headrace_queue_oldest_seconds)",
                        "{{class}} {{tier}}",
                    ),
                ),
            ),
            Panel(
                "Wait, p95",
                "s",
                ((_quantile(0.95, "queue_wait_seconds", "class, tier"), "{{class}} {{tier}}"),),
            ),
        ),
    ),
    (
        "Models",
        (
            Panel("Tokens/s", "short", ((_rate("batch_tokens", "pool"), "{{pool}}"),)),
            Panel(
                "Batches: fill and waste",
                "percentunit",
                (
                    (
                        f"{_rate('batch_padded_tokens', 'pool')} / {_rate('batch_room_tokens', 'pool')}",
                        "{{pool}} fill",
                    ),
                    (
                        f"1 - {_rate('batch_tokens', 'pool')} / {_rate('batch_padded_tokens', 'pool')}",
                        "{{pool}} padding",
                    ),
                ),
                "Fill: padded tokens over those that the batches could have held. Padding: the share of them.",
            ),
            Panel(
                "A batch at the model",
                "s",
                (
                    (_quantile(0.5, "infer_seconds", "pool"), "{{pool}} p50"),
                    (_quantile(0.95, "infer_seconds", "pool"), "{{pool}} p95"),
                ),
            ),
            Panel(
                "Slots at work",
                "short",
                ((_rate("model_busy_seconds", "pool"), "{{pool}}"),),
                "Of all replicas together: one batch after the other on one slot is 1.",
            ),
            Panel(
                "Memory",
                "bytes",
                (
                    ("sum by (model) (ray_headrace_model_bytes)", "{{model}}"),
                    (
                        "max by (pool, NodeAddress) (ray_headrace_gpu_memory_bytes)",
                        "GPU {{NodeAddress}}",
                    ),
                ),
            ),
            Panel(
                "Loads, failures, evictions",
                "short",
                tuple(
                    (
                        f"sum by (model) (increase(ray_headrace_model_{word}_total[1h]))",
                        f"{{{{model}}}} {name}",
                    )
                    for word, name in (
                        ("loads", "loads"),
                        ("load_failures", "failed"),
                        ("breaks", "broke"),
                        ("evictions", "evicted"),
                    )
                ),
                "Within an hour.",
            ),
            Panel(
                "Inputs that failed, were repeated or dropped",
                "short",
                (
                    (_rate("inputs_failed", "pool"), "{{pool}} failed"),
                    (_rate("inputs_repeated", "pool"), "{{pool}} repeated"),
                    (_rate("inputs_dropped", "pool"), "{{pool}} dropped"),
                ),
            ),
            Panel(
                "Replicas",
                "short",
                (
                    (
                        "sum by (deployment) (ray_serve_deployment_replica_healthy)",
                        "{{deployment}}",
                    ),
                    (
                        "max by (deployment) (ray_serve_autoscaling_target_replicas)",
                        "{{deployment}} wanted",
                    ),
                ),
            ),
        ),
    ),
    (
        "Canaries",
        (
            Panel(
                "Answered, fallen back",
                "reqps",
                (
                    (_rate("canary_requests", "model, arm"), "{{model}} {{arm}}"),
                    (_rate("canary_fallbacks", "model"), "{{model}} fallbacks"),
                    (_rate("canary_shadows", "model, shadow"), "{{model}} repeated: {{shadow}}"),
                ),
            ),
            Panel(
                "At the model, p95",
                "s",
                ((_quantile(0.95, "canary_infer_seconds", "model, arm"), "{{model}} {{arm}}"),),
                "Of requests that were computed in full, those that were repeated included.",
            ),
            Panel(
                "Cosine of both vectors, p01",
                "short",
                ((_quantile(0.01, "canary_cosine", "model"), "{{model}}"),),
                "Within the buckets of its histogram: GET /v1/admin/canaries is more exact.",
            ),
        ),
    ),
    (
        "Jobs",
        (
            Panel("Items", "short", (("max by (state) (ray_headrace_items)", "{{state}}"),)),
            Panel("Open jobs", "short", (("max by (state) (ray_headrace_jobs)", "{{state}}"),)),
            Panel(
                "Settled",
                "short",
                ((_rate("items_settled", "task, word"), "{{task}} {{word}}"),),
                "Items/s. `retry` is a failed try.",
            ),
            Panel(
                "Age of the oldest open job",
                "s",
                (("max by (class) (ray_headrace_jobs_oldest_seconds)", "{{class}}"),),
            ),
            Panel(
                "From claim to settlement, p95",
                "s",
                ((_quantile(0.95, "item_seconds", "task"), "{{task}}"),),
            ),
        ),
    ),
    (
        "Index",
        (
            Panel(
                "From acceptance to the index, p95",
                "s",
                (
                    (_quantile(0.95, "lag_indexed_seconds"), "indexed"),
                    (_quantile(0.95, "lag_searchable_seconds"), "searchable"),
                ),
            ),
            Panel(
                "Writes in the buffer",
                "short",
                (("max(ray_headrace_buffer_writes)", "writes"),),
            ),
            Panel(
                "Oldest write in the buffer",
                "s",
                (("max(ray_headrace_buffer_oldest_seconds)", "age"),),
            ),
            Panel(
                "Flushes",
                "short",
                ((_rate("flushes"), "taken"), (_rate("flushes_retried"), "tried again")),
                "A second.",
            ),
            Panel("Writes", "short", ((_rate("writes", "outcome"), "{{outcome}}"),), "A second."),
            Panel(
                "Away",
                "short",
                (
                    ("max(ray_headrace_index_away)", "index"),
                    ("1 - max(ray_headrace_store_up)", "Store"),
                    ("max(ray_headrace_quota_ledger_away)", "Ledger"),
                ),
                "1 while it does not answer.",
            ),
        ),
    ),
)


def render() -> str:
    """The dashboard, as Grafana imports it."""
    board = {
        "title": "Headrace",
        "uid": "headrace",
        "tags": ["headrace"],
        "schemaVersion": 39,
        "editable": True,
        "refresh": "30s",
        "time": {"from": "now-3h", "to": "now"},
        "templating": {
            "list": [{"name": "datasource", "type": "datasource", "query": "prometheus"}]
        },
        "panels": list(_panels()),
    }
    return json.dumps(board, indent=1, ensure_ascii=False) + "\n"


def _panels() -> Iterator[dict[str, Any]]:
    number = y = 0
    for title, panels in ROWS:
        number += 1
        place = {"x": 0, "y": y, "w": 24, "h": 1}
        yield {"id": number, "type": "row", "title": title, "gridPos": place, "panels": []}
        y += 1
        for index, panel in enumerate(panels):
            number += 1
            row, column = divmod(index, COLUMNS)
            place = {"x": column * WIDTH, "y": y + row * HEIGHT, "w": WIDTH, "h": HEIGHT}
            yield {"id": number, "gridPos": place, **_graph(panel)}
        y += -(-len(panels) // COLUMNS) * HEIGHT


def _graph(panel: Panel) -> dict[str, Any]:
    return {
        "type": "timeseries",
        "title": panel.title,
        "description": panel.text,
        "datasource": SOURCE,
        "fieldConfig": {"defaults": {"unit": panel.unit, "min": 0}, "overrides": []},
        "options": {"tooltip": {"mode": "multi"}},
        "targets": list(_targets(panel.queries)),
    }


def _targets(queries: Sequence[tuple[str, str]]) -> Iterator[dict[str, Any]]:
    for letter, (expression, legend) in zip("ABCDEF", queries, strict=False):
        yield {"refId": letter, "datasource": SOURCE, "expr": expression, "legendFormat": legend}


def main() -> None:
    """Write the file."""
    FILE.write_text(render(), encoding="utf-8")


if __name__ == "__main__":
    main()
