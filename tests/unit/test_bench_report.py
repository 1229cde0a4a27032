import json
from itertools import islice

import numpy as np
import pytest

from bench import (
    crowd,
    engine,
    engine_loads,
    fairness,
    handout,
    http,
    servers,
    simulated,
    start,
    texts,
)
from bench.arithmetic import Shape
from bench.formula import FormulaQueue
from bench.load import LOADS, Failed, Load, Sample, Target
from bench.report import finish, jain, percentile, ratios, rounded, spread, table
from bench.servers import Health
from bench.tenants import ASKERS, FLOODS, TIERS, Phase, Waits
from serve.config import Batch
from serve.embedding.packing import Pace


def test_a_percentile_is_one_of_the_values():
    values = list(range(100, 0, -1))
    assert [percentile(values, part) for part in (0, 0.5, 0.95, 0.99, 1)] == [1, 50, 95, 99, 100]
    assert percentile([7.0], 0.01) == 7


@pytest.mark.parametrize(("values", "part"), [([], 0.5), ([1.0], 1.01), ([1.0], -0.1)])
def test_a_percentile_of_nothing_is_refused(values, part):
    with pytest.raises(ValueError, match="percentile"):
        percentile(values, part)


def test_a_spread_is_median_least_and_greatest():
    assert spread([3, 1, 8]) == {"median": 3, "min": 1, "max": 8}
    assert spread([1, 2])["median"] == 1.5
    with pytest.raises(ValueError, match="no rounds"):
        spread([])


def test_ratios_are_taken_round_by_round():
    """The machine halves its pace between the rounds: the medians of each would say 1.25."""
    assert ratios([100, 60], [80, 48]) == {"median": 1.25, "min": 1.25, "max": 1.25}
    assert ratios([10, 30, 90], [20, 30, 30]) == {"median": 1, "min": 0.5, "max": 3}
    with pytest.raises(ValueError, match="zip"):
        ratios([1, 2], [1])


def test_jain_is_one_for_equals_and_one_in_n_for_a_monopoly():
    assert jain([5, 5, 5, 5]) == 1
    assert jain([9, 0, 0]) == pytest.approx(1 / 3)
    assert jain([1, 3]) == pytest.approx(0.8)
    with pytest.raises(ValueError, match="nobody"):
        jain([0, 0])


def test_results_are_rounded_everywhere():
    assert rounded({"a": [1.23456, {"b": 0.00012345678}], "c": 123456, "d": None, "e": True}) == {
        "a": [1.235, {"b": 0.0001235}],
        "c": 123456,
        "d": None,
        "e": True,
    }
    with pytest.raises(ValueError, match="nan"):
        rounded({"a": float("nan")})


def test_a_table_lines_up():
    shown = table(("what", "n"), [("long name", 1.23456), ("x", spread([1, 2, 3]))])
    assert shown.splitlines() == [
        "what             n",
        "------------------",
        "long name    1.235",
        "x          2 (1-3)",
    ]


def test_a_program_ends_with_one_line_of_json_and_keeps_it(tmp_path, capsys):
    out = tmp_path / "result.json"
    finish("trial", "default", {"ratio": 1.23456}, out)
    printed = capsys.readouterr().out
    assert printed.count("\n") == 1
    found = json.loads(printed)
    assert found == json.loads(out.read_text())
    assert (found["program"], found["ratio"]) == ("trial", 1.235)
    assert {"commit", "date", "machine", "versions", "profile"} <= found.keys()
    assert {"cores", "cpu", "python", "load_before"} <= found["machine"].keys()
    assert {"ray", "torch", "sentence-transformers", "numpy", "fastapi"} <= found["versions"].keys()


def test_texts_are_the_same_in_every_run_and_of_the_promised_length():
    assert texts.mixed(10) == texts.mixed(10)
    assert all(3 <= len(one.split()) <= 9 for one in texts.shorts(200))
    assert all(95 <= len(one.split()) <= 190 for one in texts.passages(50))
    assert sum(len(one.split()) > 9 for one in texts.mixed(32)) == 16


def test_bodies_ask_for_base64_and_hold_as_many_texts_as_the_load_says():
    single = json.loads(next(Load("one", 1).bodies("m")))
    assert isinstance(single["input"], str)
    assert (single["model"], single["encoding_format"]) == ("m", "base64")
    many = [json.loads(body) for body in islice(Load("many", 1, 32).bodies("m"), 2)]
    assert [len(body["input"]) for body in many] == [32, 32]
    assert many[0] != many[1]


@pytest.mark.parametrize(
    ("url", "route"),
    [
        ("http://h:1", "/v1/embeddings"),
        ("http://h:1/api/", "/api/v1/embeddings"),
        ("http://h:1/embeddings", "/embeddings"),
    ],
)
def test_a_target_may_name_its_route(url, route):
    assert Target("x", url, "m").route == route


def sampled(
    pace: float, *, latency_ms: float = 1.0, cpu_s: float | None = None
) -> dict[str, list[Sample]]:
    return {
        load.name: [
            Sample(load.inputs, 2.0, [latency_ms] * int(pace * number), cpu_s, 0.1, 0.5)
            for number in (10, 20)
        ]
        for load in LOADS
    }


def test_http_ratios_are_ours_over_each_peers_and_the_first_stands_on_top():
    others = {"plain": sampled(1), "slow": sampled(0.5, latency_ms=4)}
    found = http.summary(sampled(2), others, {"plain": 0.99, "slow": 0.98})
    for key in ("rps_ratio_c1", "rps_ratio_c16", "rps_ratio_c64", "texts_ratio_32"):
        assert found[key] == found["peers"]["plain"][key] == {"median": 2, "min": 2, "max": 2}
        assert found["peers"]["slow"][key]["median"] == 4
    assert (found["cosine_min"], found["peers"]["slow"]["cosine_min"]) == (0.99, 0.98)
    assert found["ours"]["c1"]["rps"] == {"median": 15, "min": 10, "max": 20}
    assert found["peers"]["plain"]["x32"]["texts_s"]["max"] == 10 * 32
    assert found["p99_ms"]["c64"] == 1
    assert found["p99_ratio"]["c64"] == 1
    assert found["peers"]["slow"]["p99_ratio"] == dict.fromkeys(("c1", "c16", "c64", "x32"), 0.25)
    shown = http.shown(found, "ours").splitlines()
    assert len(shown) == 2 + 3 * len(LOADS)
    assert [line.split()[3] for line in shown[2:5]] == ["ours", "plain", "slow"]


def test_cpu_is_told_by_request_and_only_where_it_is_known():
    found = http.summary(
        sampled(2, cpu_s=0.3),
        {"plain": sampled(1, cpu_s=0.075), "far": sampled(1)},
        {"plain": 1, "far": 1},
    )
    assert found["cpu_ms"] == dict.fromkeys(("c1", "c16", "c64", "x32"), pytest.approx(10))
    assert found["client_cpu_ms"]["c1"] == pytest.approx(0.2 / 60 * 1e3)
    assert found["peers"]["far"]["x32"]["others_cores"] == 0.25
    assert found["cpu_ratio"]["c16"] == found["peers"]["plain"]["cpu_ratio"]["c16"] == 2
    assert found["peers"]["far"]["cpu_ratio"] == dict.fromkeys(("c1", "c16", "c64", "x32"))
    assert found["peers"]["far"]["c1"]["cpu_ms"] is None
    assert " ? " in http.shown(found, "ours")
    assert json.loads(json.dumps(rounded(found)))


@pytest.mark.parametrize(
    ("words", "peers"),
    [
        (["--serve"], ["plain", "ceiling"]),
        (["--serve", "--peer", "plain"], ["plain"]),
        (["--url", "http://h", "--peer", "http://p", "--peer", "ceiling"], ["http://p", "ceiling"]),
        (["--serve", "--peer", "infinity", "--infinity", "x"], ["infinity"]),
    ],
)
def test_http_peers_are_named_one_by_one(words, peers):
    assert http.parse(words).peer == peers


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ([], "give --serve"),
        (["--serve", "--peer", "plane"], "--peer plane"),
        (["--serve", "--peer", "infinity-onnx"], "needs --infinity"),
        (["--serve", "--peer", "plain", "--peer", "plain"], "each --peer once"),
    ],
)
def test_http_refuses_peers_that_it_cannot_start(words, reason, capsys):
    with pytest.raises(SystemExit):
        http.parse(words)
    assert reason in capsys.readouterr().err


async def test_http_turns_go_the_other_way_in_every_second_round(monkeypatch):
    order: list[str] = []

    async def measured(target: Target, load: Load, _seconds: float) -> Sample:
        order.append(target.name)
        return Sample(load.inputs, 1.0, [1.0])

    async def embedded(_target: Target, inputs: list[str]) -> np.ndarray:
        return np.eye(len(inputs), dtype=np.float32)

    monkeypatch.setattr(http, "measure", measured)
    monkeypatch.setattr(http, "embed", embedded)
    found = await http.compare([Target(name, "", "m") for name in "abc"], rounds=2, seconds=1)
    assert "".join(order) == "cba" * 4 + "abc" * 4 + "cba" * 4
    assert list(found["peers"]) == ["b", "c"]


def test_the_least_cosine_counts():
    one = np.eye(3, dtype=np.float32)
    other = one.copy()
    other[1] = [0.8, 0.6, 0.0]
    assert http.cosine_min(one, other) == pytest.approx(0.6)
    with pytest.raises(Failed, match="different models"):
        http.cosine_min(one, one[:, :2])


def played(queue_ms: float, tokens: int) -> simulated.Round:
    waits = {tier: Waits([queue_ms + 5], [queue_ms]) for tier in TIERS}
    cost = dict(zip(FLOODS.values(), (1, 4, 16, 2), strict=True))
    flooded = Phase(2.0, waits, {}, cost, [0.5])
    asked = Phase(1.0, tokens=dict.fromkeys(ASKERS, 7), cost={ASKERS[0]: 7})
    return simulated.Round(Phase(1.0, waits), flooded, asked, Phase(2.0, tokens={"all": tokens}))


def test_the_simulation_reports_waits_shares_and_what_order_costs():
    taken = {"fair": [played(10, 900)], "fifo": [played(500, 1000)], "formula": [played(90, 1000)]}
    found = simulated.summary(taken)
    assert found["queue_p95_ms"] == dict.fromkeys(TIERS, 10)
    assert found["p95_ms"] == dict.fromkeys(TIERS, 15)
    assert found["policies"]["fifo"]["queue_p95_ms"]["free"] == 500
    assert found["share_over_free"] == {"free": 1, "premium": 4, "enterprise": 16}
    assert found["interactive_over_bulk"] == 10.5
    assert found["throughput_ratio"]["median"] == 0.9
    assert found["jain"]["median"] == 1
    assert found["jain_of_cost"]["median"] == pytest.approx(1 / 6)
    assert found["tokens_s"]["max"] == 450
    assert found["handout_ms"] == {"p50": 0.5, "p95": 0.5}
    assert "enterprise" in simulated.shown(found["policies"])


def test_fairness_reports_every_policy_beside_the_fair_queue():
    def played_at(queue_ms: float, tokens_s: float) -> fairness.Round:
        waits = {tier: crowd.Waits([queue_ms + 5], [queue_ms]) for tier in TIERS}
        shares = {"flood-free": 1.0, "flood-premium": 4.1, "flood-enterprise": 15.9}
        asked = {f"asks-{inputs}": 7.0 for inputs in crowd.ASKED}
        took = {"tokens_s": tokens_s, "cost_s": 2 * tokens_s, "bulk_part": 0.1, "busy": 0.99}
        cores = {"machine": 1.5, "embedder": tokens_s / 1000}
        given = {"idle": waits, "shares": shares, "asked": asked}
        return fairness.Round(waits, [80.0, 90.0], **took, cores=cores, **given)

    taken = {policy: [played_at(500, 1000)] for policy in crowd.POLICIES}
    paired = {"fair": [played_at(10, 999)], "fifo": [played_at(500, 1000)]}
    found = fairness.summary({**taken, "fair": [played_at(10, 980)]}, paired)
    assert found["cores"] == {"machine": 1.5, "embedder": pytest.approx(0.9895)}
    assert found["queue_p95_ms"] == dict.fromkeys(TIERS, 10)
    assert found["call_ms"]["p99"]["free"] == 15
    assert found["policies"]["serve_batch"]["queue_p95_ms"]["premium"] == 500
    assert found["share_over_free"] == {"free": 1, "premium": 4.1, "enterprise": 15.9}
    assert found["throughput_ratio"]["min"] == 0.98
    assert found["throughput_ratio"]["max"] == 0.999
    assert (found["cost_s"]["max"], found["bulk_part"]["median"]) == (1998, 0.1)
    assert found["policies"]["fifo"]["busy"]["median"] == 0.99
    assert found["jain"]["median"] == 1
    assert found["handout_ms"]["p50"] == 80
    assert "serve_batch" in fairness.shown(found)


def test_a_targets_throughput_is_told_by_the_target_with_the_best_median():
    short = handout.Sample([], [800.0, 450.0, 700.0], [40.0, 20.0, 35.0], [1.1] * 3, [50.0])
    long = handout.Sample([], [1000.0, 500.0, 600.0], [50.0, 25.0, 30.0], [1.0] * 3, [900.0])
    found = handout.summary({100.0: long, 1600.0: short})["targets"]
    assert found["1600"]["ratio_of_best"] == {"median": 1, "min": 1, "max": 1}  # 700 beside 600
    assert found["100"]["ratio_of_best"]["max"] == pytest.approx(1.25)
    assert found["100"]["cpu_ratio_of_best"]["min"] == pytest.approx(30 / 35)


def test_an_engine_is_told_by_plain_encode_of_the_same_round():
    results = engine.Results(cosines={"onnx": 0.9999}, waste={"short": {"planned": 0.1}})
    for threads, pace in ((1, 1.0), (2, 1.5)):
        results.single_ms[threads] = {"encode": [20.0, 40.0], "onnx": [5.0, 10.0]}
        for wall_s in (1.0, 4.0):
            results.of(threads, "short", "encode").add(100, wall_s, wall_s)
            results.of(threads, "short", "onnx_planned").add(100, wall_s / 2 / pace, wall_s / 2)
    results.limits = {1: 1e12, 2: 2e12}
    load = engine_loads.Load("short", ["a"] * 100, [], [10] * 100, [list(range(100))])
    shape = Shape(layers=1, hidden=10, intermediate=40)
    found = engine.summary(results, "onnx_planned", [load], shape)
    assert found["tokens_s"]["short"] == 1875
    assert found["of_limit"]["short"] == pytest.approx(1.875 * shape.operations([10] * 100) / 2e12)
    assert found["texts_s"]["short"] == {"median": 187.5, "min": 75, "max": 300}
    assert found["ratio_vs_encode"]["short"] == {"median": 3, "min": 3, "max": 3}
    one = found["threads"]["1"]["short"]["onnx_planned"]
    assert one["ratio_vs_encode"]["median"] == one["cpu_ratio_vs_encode"]["median"] == 2
    assert one["cpu_ms"] == {"median": 12.5, "min": 5, "max": 20}
    assert found["single_ms"]["2"]["onnx"]["max"] == 10
    assert (found["cosine_min"], found["padding_waste"]["short"]) == (
        {"onnx": 0.9999},
        {"planned": 0.1},
    )
    assert "short: onnx_planned" in engine.shown(found)


def test_padding_is_told_by_the_batches_that_hold_it():
    texts, tokens = ["a b c d", "a", "a b c d", "a"] * 16, [4, 1, 4, 1] * 16
    load = engine_loads.Load("x", texts, [], tokens, [list(range(64))])
    assert load.waste(load.arrival()) == pytest.approx(1 - 2.5 / 4)
    assert load.waste(load.by_length()) == 0
    planned = load.planned(Pace(0.0, 1.0), Batch(tokens_max=64, items_max=8))
    assert load.waste(planned) == 0
    assert sorted(index for batch in planned for index in batch) == list(range(64))
    assert max(map(len, planned)) == 8


def test_the_formula_puts_the_paying_first_until_age_tells(clock):
    queue = FormulaQueue(clock)
    for tenant, weight in (("free", 1), ("rich", 16)):
        for number in range(2):
            queue.push("interactive", tenant, weight=weight, cost=1, item=(tenant, number))
    room = iter([True, False])
    assert queue.take(lambda _: next(room), lambda _: True) == [("rich", 0)]
    clock.advance(60)
    queue.push("interactive", "late", weight=16, cost=1, item=("late", 0))
    assert queue.take(lambda _: True, lambda item: item != ("free", 1)) == [
        ("rich", 1),
        ("free", 0),
        ("late", 0),
    ]
    assert (queue.items, queue.cost) == (0, 0)


def test_the_formula_charges_usage_and_forgets_it(clock):
    queue = FormulaQueue(clock)
    queue.push("interactive", "greedy", weight=4, cost=10**6, item="greedy 1")
    assert queue.take(lambda _: True, lambda _: True) == ["greedy 1"]
    order = {}
    for wait_s in (0, 600):
        clock.advance(wait_s)
        for tenant, weight in (("greedy", 4), ("modest", 1)):
            queue.push("interactive", tenant, weight=weight, cost=1, item=tenant)
        order[wait_s] = queue.take(lambda _: True, lambda _: True)
    assert order == {0: ["modest", "greedy"], 600: ["greedy", "modest"]}


def started(ready_s: float, rss_mb: float) -> start.Start:
    groups = {
        "server": start.Group(1, rss_mb, rss_mb / 2, 0.0),
        "embedder": start.Group(2, 30.0, 20.0, 1.5),
    }
    return start.Start({"http": ready_s / 2, "ready": ready_s}, groups, 0.01)


def test_a_start_is_told_by_its_phases_and_by_all_of_its_processes():
    found = start.summary({"headrace": [started(9, 70), started(11, 90)], "plain": [started(1, 5)]})
    assert found["ready_s"] == {"median": 10, "min": 9, "max": 11}
    assert found["rss_mb"] == {"median": 110, "min": 100, "max": 120}
    assert found["pss_mb"]["max"] == 65
    assert found["phases_s"]["http"]["median"] == 5
    assert found["processes"]["server"]["rss_mb"] == 80
    assert found["processes"]["embedder"] == {
        "count": 2,
        "rss_mb": 30,
        "pss_mb": 20,
        "began_s": 1.5,
    }
    assert found["servers"]["plain"]["ready_s"]["median"] == 1
    assert "embedder" in start.shown(found)


@pytest.mark.parametrize(
    ("health", "files", "seen"),
    [
        (None, {}, []),
        (None, {"cluster.json": b"{}"}, ["ray"]),
        (Health(404, b"Path '/health/ready' not found"), {}, ["http"]),
        (Health(503, b'{"status":"not_ready"}'), {}, ["http", "ingress"]),
        (Health(200, b'{"status":"ready"}'), {}, ["http", "ingress", "ready"]),
        (None, {servers.LOG: b"\nHeadrace is ready at http://127.0.0.1:1 (9 s).\n"}, ["said"]),
    ],
)
def test_the_phases_of_a_start_are_seen_from_outside(health, files, seen):
    look = start.Look(health, {"cluster.json": b"", servers.LOG: b"", **files})
    assert [phase for phase, reached in start.MARKS.items() if reached(look)] == seen
