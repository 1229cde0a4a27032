"""k8s/monitoring: every alert fires when it should and is silent when it should, every expression parses, and
every metric in one is in the table.
"""

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

from deployments.dashboard import COLUMNS, FILE, ROWS, render
from serve.telemetry import METRICS


FOLDER = Path(__file__).parents[2] / "k8s" / "monitoring"
RULE = yaml.safe_load((FOLDER / "prometheus-rule.yaml").read_text(encoding="utf-8"))
GROUPS: list[dict[str, Any]] = RULE["spec"]["groups"]
RULES: list[dict[str, Any]] = [rule for group in GROUPS for rule in group["rules"]]
ALERTS = {rule["alert"]: rule for rule in RULES if "alert" in rule}
RECORDS = {rule["record"] for rule in RULES if "record" in rule}

RAYS = {"ray_serve_autoscaling_target_replicas", "ray_serve_deployment_replica_healthy"}
"""Metrics of Ray Serve that we rest on: tests/e2e finds them in a running service."""

METRIC = re.compile(r"\b(?:ray_\w+|headrace:\w+(?::\w+)*)")


class Case(NamedTuple):
    """At `at`, after these series, the alert fires with these labels, or (None) not."""

    alert: str
    series: dict[str, str]
    at: str
    labels: dict[str, str] | None


def requests(good: int, bad: int, minutes: int) -> dict[str, str]:
    """Replies a minute."""
    return {
        'ray_headrace_requests_total{class="bulk", status="200"}': f"0+{good}x{minutes}",
        'ray_headrace_requests_total{class="bulk", status="503"}': f"0+{bad}x{minutes}",
    }


def spread(name: str, labels: str, bounds: dict[str, str], minutes: int) -> dict[str, str]:
    """A histogram: how many a minute are below each bound, as `0+nxm` wants it."""
    return {
        f'ray_headrace_{name}_bucket{{{labels}, le="{bound}"}}': f"0+{count}x{minutes}"
        for bound, count in bounds.items()
    }


TIER = {"class": "interactive", "tier": "free"}
QUEUE = 'ray_headrace_queue_tokens{pool="p", class="interactive", tier="free", WorkerId="w"}'
OLDEST = 'ray_headrace_queue_oldest_seconds{pool="p", class="%s", tier="free", WorkerId="w"}'
TARGET = 'ray_serve_autoscaling_target_replicas{application="headrace", deployment="d"}'
HEALTHY = (
    'ray_serve_deployment_replica_healthy{application="headrace", deployment="d", replica="%s"}'
)
INTERACTIVE = 'class="interactive"'

CASES = (
    Case("HeadraceErrorBudgetBurnsFast", requests(980, 20, 90), "70m", {}),
    Case("HeadraceErrorBudgetBurnsFast", requests(990, 10, 90), "70m", None),
    Case("HeadraceErrorBudgetBurnsSlowly", requests(990, 10, 500), "400m", {}),
    Case("HeadraceErrorBudgetBurnsSlowly", requests(995, 5, 500), "400m", None),
    Case(
        "HeadraceRequestsSlow",
        spread("request_seconds", INTERACTIVE, {"2.5": "90", "5.0": "100", "+Inf": "100"}, 40),
        "30m",
        {},
    ),
    Case(
        "HeadraceRequestsSlow",
        spread("request_seconds", INTERACTIVE, {"2.5": "96", "5.0": "100", "+Inf": "100"}, 40),
        "30m",
        None,
    ),
    Case("HeadraceQueueGrows", {QUEUE: "0+5000x60"}, "40m", TIER),
    Case("HeadraceQueueGrows", {QUEUE: "90000x60"}, "40m", None),
    Case("HeadraceQueueGrows", {QUEUE: "0+500x60"}, "40m", None),
    Case("HeadraceOldestInputWaits", {OLDEST % "interactive": "12x20"}, "5m", TIER),
    Case("HeadraceOldestInputWaits", {OLDEST % "interactive": "9x20"}, "5m", None),
    Case(
        "HeadraceOldestInputWaits",
        {OLDEST % "bulk": "700x20"},
        "5m",
        {"class": "bulk", "tier": "free"},
    ),
    Case("HeadraceOldestInputWaits", {OLDEST % "bulk": "300x20"}, "5m", None),
    Case(
        "HeadraceBatchesEmpty",
        {
            'ray_headrace_batch_padded_tokens_total{pool="p"}': "0+90x90",
            'ray_headrace_batch_room_tokens_total{pool="p"}': "0+1000x90",
            QUEUE: "60000x90",
        },
        "60m",
        {"pool": "p"},
    ),
    Case(
        "HeadraceBatchesEmpty",
        {
            'ray_headrace_batch_padded_tokens_total{pool="p"}': "0+90x90",
            'ray_headrace_batch_room_tokens_total{pool="p"}': "0+1000x90",
            QUEUE: "100x90",
        },
        "60m",
        None,
    ),
    Case("HeadraceEmbeddersSilent", {}, "10m", {}),
    Case(
        "HeadraceEmbeddersSilent",
        {'ray_headrace_queue_inputs{pool="p", class="bulk", tier="none"}': "0x20"},
        "10m",
        None,
    ),
    Case(
        "HeadraceReplicasPending",
        {TARGET: "3x40", HEALTHY % "a": "1x40", HEALTHY % "b": "1x40"},
        "20m",
        {"application": "headrace", "deployment": "d"},
    ),
    Case(
        "HeadraceReplicasPending",
        {TARGET: "2x40", HEALTHY % "a": "1x40", HEALTHY % "b": "1x40"},
        "20m",
        None,
    ),
    # A first failure makes the series; a later one raises it; an old one is over.
    Case(
        "HeadraceModelDoesNotLoad",
        {'ray_headrace_model_load_failures_total{model="m"}': "_x60 1x30"},
        "65m",
        {"model": "m"},
    ),
    Case(
        "HeadraceModelDoesNotLoad",
        {'ray_headrace_model_load_failures_total{model="m"}': "1x60 2x30"},
        "65m",
        {"model": "m"},
    ),
    Case(
        "HeadraceModelDoesNotLoad",
        {'ray_headrace_model_load_failures_total{model="m"}': "_x10 1x90"},
        "65m",
        None,
    ),
    Case(
        "HeadraceModelBroke",
        {'ray_headrace_model_breaks_total{model="m"}': "_x60 1x30"},
        "65m",
        {"model": "m"},
    ),
    Case(
        "HeadraceModelBroke",
        {'ray_headrace_model_breaks_total{model="m"}': "1x90"},
        "65m",
        None,
    ),
    Case(
        "HeadraceModelsThrash",
        {'ray_headrace_model_evictions_total{model="m"}': "0+1x200"},
        "180m",
        {"model": "m"},
    ),
    Case(
        "HeadraceModelsThrash",
        {'ray_headrace_model_evictions_total{model="m"}': "3x200"},
        "180m",
        None,
    ),
    Case(
        "HeadraceGpuMemoryHigh",
        {
            'ray_headrace_gpu_memory_bytes{pool="p", NodeAddress="n", WorkerId="w"}': "91x30",
            'ray_headrace_gpu_memory_total_bytes{pool="p", NodeAddress="n", WorkerId="w"}': "100x30",
        },
        "15m",
        {"pool": "p", "NodeAddress": "n"},
    ),
    Case(
        "HeadraceGpuMemoryHigh",
        {
            'ray_headrace_gpu_memory_bytes{pool="p", NodeAddress="n", WorkerId="w"}': "89x30",
            'ray_headrace_gpu_memory_total_bytes{pool="p", NodeAddress="n", WorkerId="w"}': "100x30",
        },
        "15m",
        None,
    ),
    Case(
        "HeadraceCanaryStopped",
        {'ray_headrace_canary_stopped{model="m", WorkerId="w"}': "0x2 1x20"},
        "5m",
        {"model": "m"},
    ),
    Case(
        "HeadraceCanaryStopped",
        {'ray_headrace_canary_stopped{model="m", WorkerId="w"}': "0x20"},
        "5m",
        None,
    ),
    Case("HeadraceDeadLettersGrow", {'ray_headrace_items{state="dead"}': "5x60 20x30"}, "70m", {}),
    Case("HeadraceDeadLettersGrow", {'ray_headrace_items{state="dead"}': "50x90"}, "70m", None),
    Case(
        "HeadraceWorkStands",
        {
            'ray_headrace_items{state="waiting"}': "5x60",
            'ray_headrace_jobs_oldest_seconds{class="bulk"}': "1000x60",
            'ray_headrace_items_settled_total{task="document", word="done"}': "7x60",
        },
        "30m",
        {},
    ),
    Case(
        "HeadraceWorkStands",
        {
            'ray_headrace_items{state="waiting"}': "5x60",
            'ray_headrace_jobs_oldest_seconds{class="bulk"}': "1000x60",
            'ray_headrace_items_settled_total{task="document", word="done"}': "0+1x60",
        },
        "30m",
        None,
    ),
    Case(
        "HeadraceWorkStands",  # paused
        {
            'ray_headrace_items{state="waiting"}': "5x60",
            'ray_headrace_jobs_oldest_seconds{class="bulk"}': "0x60",
        },
        "30m",
        None,
    ),
    Case(
        "HeadraceWritesLag",
        spread("lag_searchable_seconds", 'WorkerId="w"', {"300.0": "90", "900.0": "100"}, 60)
        | spread("lag_searchable_seconds", 'WorkerId="w"', {"+Inf": "100"}, 60),
        "40m",
        {},
    ),
    Case(
        "HeadraceWritesLag",
        spread("lag_searchable_seconds", 'WorkerId="w"', {"60.0": "96", "300.0": "100"}, 60)
        | spread("lag_searchable_seconds", 'WorkerId="w"', {"+Inf": "100"}, 60),
        "40m",
        None,
    ),
    Case("HeadraceStoreAway", {"ray_headrace_store_up": "0x20"}, "5m", {}),
    Case("HeadraceStoreAway", {"ray_headrace_store_up": "0x2 1x20"}, "5m", None),
    Case("HeadraceIndexAway", {"ray_headrace_index_away": "1x20"}, "5m", {}),
    Case("HeadraceIndexAway", {"ray_headrace_index_away": "1x2 0x20"}, "5m", None),
    Case("HeadraceWritesStuck", {"ray_headrace_buffer_oldest_seconds": "61x20"}, "10m", {}),
    Case("HeadraceWritesStuck", {"ray_headrace_buffer_oldest_seconds": "5x20"}, "10m", None),
    Case("HeadraceUpserterSilent", {}, "10m", {}),
    Case("HeadraceUpserterSilent", {"ray_headrace_buffer_writes": "0x20"}, "10m", None),
    Case("HeadraceWriterFaults", {"ray_headrace_writer_faults_total": "_x60 1x30"}, "65m", {}),
    Case("HeadraceWriterFaults", {"ray_headrace_writer_faults_total": "1x90"}, "65m", None),
    Case("HeadraceLedgerAway", {"ray_headrace_quota_ledger_away": "1x20"}, "5m", {}),
    Case("HeadraceLedgerAway", {"ray_headrace_quota_ledger_away": "1x1 0x20"}, "5m", None),
    Case("HeadraceSettingsRefused", {"ray_headrace_settings_refused": "1x20"}, "8m", {}),
    Case("HeadraceSettingsRefused", {"ray_headrace_settings_refused": "1x2 0x20"}, "8m", None),
)


def test_every_alert_is_shown_to_fire_and_to_be_silent():
    assert {case.alert for case in CASES if case.labels is not None} == ALERTS.keys()
    assert {case.alert for case in CASES if case.labels is None} == ALERTS.keys()


def test_every_alert_says_who_is_told_what_it_is_and_what_to_do():
    for rule in ALERTS.values():
        assert rule["labels"] in ({"severity": "page"}, {"severity": "ticket"})
        assert rule["annotations"].keys() == {"summary", "action"}
        named = set(METRIC.findall(json.dumps(rule["annotations"])))
        assert named <= {one.exported for one in METRICS.values()} | {
            one.exported for one in METRICS.values() if one.kind == "histogram"
        }


def expressions() -> dict[str, str]:
    """Of rules and panels, by where they stand; panels at five minutes."""
    found = {rule.get("alert") or rule["record"]: rule["expr"] for rule in RULES}
    for title, panels in ROWS:
        for panel in panels:
            for number, (expression, _) in enumerate(panel.queries):
                place = f"{title}: {panel.title} {number}"
                found[place] = expression.replace("$__rate_interval", "5m")
    return found


def test_every_metric_of_a_panel_or_an_alert_is_in_the_table():
    known = {*RAYS, *RECORDS}
    for one in METRICS.values():
        known.add(f"{one.exported}_bucket" if one.kind == "histogram" else one.exported)
    for place, expression in expressions().items():
        named = set(METRIC.findall(expression))
        assert named, place
        assert named <= known, place


def test_labels_of_expressions_are_those_of_their_metrics():
    rays = {"le", "NodeAddress", "application", "deployment"}
    for place, expression in expressions().items():
        named = {
            name
            for group in re.findall(r"by \(([^)]+)\)", expression)
            for name in group.split(", ")
        }
        named |= set(re.findall(r"[{,]\s*(\w+)=", expression))
        own = {
            label for one in METRICS.values() if one.exported in expression for label in one.labels
        }
        assert named <= own | rays, place


def test_the_committed_dashboard_is_current():
    assert FILE.read_text(encoding="utf-8") == render(), "run `make docs`"


def test_panels_neither_overlap_nor_lack_a_query():
    board = json.loads(render())
    taken = set()
    for panel in board["panels"]:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken
        assert max(x for x, _ in cells) < 24
        taken |= cells
        assert panel["type"] == "row" or panel["targets"]
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])
    assert COLUMNS == 3


# --- with promtool --------------------------------------------------------------------------


@pytest.fixture
def promtool(tmp_path: Path):
    program = shutil.which("promtool")
    if program is None:
        pytest.skip("promtool is not installed (Debian: apt-get install prometheus)")

    def run(*arguments: str, **files: Any) -> str:
        for name, content in files.items():
            text = yaml.safe_dump(content, sort_keys=False)
            (tmp_path / f"{name}.yaml").write_text(text, encoding="utf-8")
        done = subprocess.run(
            [program, *arguments],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    return run


def test_every_expression_parses(promtool):
    rules = [
        {"record": f"test:expression{number}", "expr": expression}
        for number, expression in enumerate(expressions().values())
    ]
    said = promtool("check", "rules", "all.yaml", all={"groups": [{"name": "all", "rules": rules}]})
    assert f"{len(rules)} rules found" in said


def test_alerts_fire_and_are_silent(promtool):
    tests = []
    for number, case in enumerate(CASES):
        rule = ALERTS[case.alert]
        wanted = []
        if case.labels is not None:
            wanted.append(
                {
                    "exp_labels": {**case.labels, **rule["labels"]},
                    "exp_annotations": {
                        name: filled(text, case.labels)
                        for name, text in rule["annotations"].items()
                    },
                }
            )
        tests.append(
            {
                "name": f"{case.alert} {number}",
                "interval": "1m",
                "input_series": [
                    {"series": name, "values": values} for name, values in case.series.items()
                ],
                "alert_rule_test": [
                    {"eval_time": case.at, "alertname": case.alert, "exp_alerts": wanted}
                ],
            }
        )
    cases = {"rule_files": ["rules.yaml"], "evaluation_interval": "1m", "tests": tests}
    promtool("test", "rules", "cases.yaml", rules={"groups": GROUPS}, cases=cases)


def filled(text: str, labels: dict[str, str]) -> str:
    """As Prometheus fills in the labels of what fires."""
    return re.sub(r"\{\{ \$labels\.(\w+) \}\}", lambda found: labels[found[1]], text)
