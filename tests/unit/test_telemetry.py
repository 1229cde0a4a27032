"""serve.telemetry: the one table of metrics; nothing tells what is not in it, and all of it is told."""

import re
from pathlib import Path
from typing import get_args

from serve.admission.limits import limits_of
from serve.allowance import Allowance, Quota
from serve.canary import ARMS, ShadowEnd
from serve.items import ENDS, JobState, Settlement, Task
from serve.records import KLASSES, OutcomeWord
from serve.telemetry import LABELS, METRICS, SAMPLES_MAX, Reading, Samples


ROOT = Path(__file__).parents[2]
WORDS = re.compile(r"[\"`](headrace_\w+)[\"`]")

SNAPSHOT = """
counter ray_headrace_requests_total class status
histogram ray_headrace_request_seconds class
histogram ray_headrace_tokenise_seconds
histogram ray_headrace_encode_seconds
gauge ray_headrace_settings_refused
counter ray_headrace_quota_refused_total limit
counter ray_headrace_quota_exchanges_total
counter ray_headrace_quota_exchange_failures_total
counter ray_headrace_quota_local_grants_total
gauge ray_headrace_quota_ledger_away
counter ray_headrace_cache_hits_total
counter ray_headrace_cache_misses_total
counter ray_headrace_cache_shared_total
counter ray_headrace_cache_evicted_total
gauge ray_headrace_cache_bytes
counter ray_headrace_canary_requests_total model arm
counter ray_headrace_canary_fallbacks_total model
counter ray_headrace_canary_shadows_total model shadow
histogram ray_headrace_canary_request_seconds model arm
histogram ray_headrace_canary_infer_seconds model arm
histogram ray_headrace_canary_cosine model
gauge ray_headrace_canary_stopped model
gauge ray_headrace_queue_inputs pool class tier
gauge ray_headrace_queue_tokens pool class tier
gauge ray_headrace_queue_oldest_seconds pool class tier
histogram ray_headrace_queue_wait_seconds pool class tier
counter ray_headrace_handouts_total pool
counter ray_headrace_batches_total pool
counter ray_headrace_batch_inputs_total pool
counter ray_headrace_batch_tokens_total pool
counter ray_headrace_batch_padded_tokens_total pool
counter ray_headrace_batch_room_tokens_total pool
histogram ray_headrace_infer_seconds pool
counter ray_headrace_model_busy_seconds_total pool
counter ray_headrace_inputs_repeated_total pool
counter ray_headrace_inputs_failed_total pool
counter ray_headrace_inputs_dropped_total pool
counter ray_headrace_calls_expired_total pool
counter ray_headrace_model_loads_total model
counter ray_headrace_model_load_failures_total model
counter ray_headrace_model_breaks_total model
counter ray_headrace_model_evictions_total model
gauge ray_headrace_model_bytes model
gauge ray_headrace_gpu_memory_bytes pool
gauge ray_headrace_gpu_memory_total_bytes pool
counter ray_headrace_items_claimed_total
counter ray_headrace_items_settled_total task word
counter ray_headrace_items_lost_total
histogram ray_headrace_item_seconds task
gauge ray_headrace_store_up
gauge ray_headrace_jobs state
gauge ray_headrace_jobs_oldest_seconds class
gauge ray_headrace_items state
gauge ray_headrace_buffer_writes
gauge ray_headrace_buffer_bytes
gauge ray_headrace_buffer_oldest_seconds
gauge ray_headrace_buffer_lanes
gauge ray_headrace_index_away
counter ray_headrace_flushes_total
counter ray_headrace_flushes_retried_total
counter ray_headrace_writes_total outcome
histogram ray_headrace_lag_indexed_seconds
histogram ray_headrace_lag_searchable_seconds
counter ray_headrace_writer_faults_total
"""
"""Names, kinds and labels follow semantic versioning: dashboards and alerts of others rest on them."""


def test_names_kinds_and_labels_are_those_that_were_promised():
    lines = [
        f"{one.kind} {one.exported} {' '.join(one.labels)}".rstrip() for one in METRICS.values()
    ]
    assert "\n".join(lines) == SNAPSHOT.strip()


def test_whatever_is_told_stands_in_the_table_and_whatever_stands_there_is_told():
    code = [
        path.read_text(encoding="utf-8")
        for folder in ("serve", "deployments")
        for path in (ROOT / folder).rglob("*.py")
        if path.name != "telemetry.py" and path.parent.name != "config"  # names of tables
    ]
    assert {name for text in code for name in WORDS.findall(text)} == METRICS.keys()


def test_labels_are_a_closed_set_without_anything_unbounded():
    used = {label for one in METRICS.values() for label in one.labels}
    assert used == LABELS.keys()
    unbounded = {
        "tenant",
        "key",
        "collection",
        "document",
        "job",
        "item",
        "request",
        "user",
        "path",
    }
    assert not used & unbounded
    named = {name for name, values in LABELS.items() if isinstance(values, str)}
    assert named == {"model", "pool", "status", "tier"}  # bounded by settings and code


def test_the_values_of_labels_are_those_of_the_code():
    assert set(LABELS["outcome"]) == set(get_args(OutcomeWord))
    assert set(LABELS["task"]) == set(get_args(Task))
    assert set(LABELS["word"]) == set(get_args(Settlement.__annotations__["word"]))
    assert set(KLASSES) < set(LABELS["class"])
    assert LABELS["arm"] == ARMS
    assert LABELS["shadow"] == get_args(ShadowEnd)
    assert set(LABELS["state"]) <= {*get_args(JobState), *ENDS, "waiting", "delayed", "leased"}
    quota = Quota(
        requests_per_minute=1,
        requests_burst=1,
        tokens_per_minute=1,
        tokens_burst=100,
        concurrent_max=1,
        queued_tokens_max=100,
    )
    allowance = Allowance(interactive=quota, bulk=quota, tokens_per_month=1)
    names = {
        limit.name
        for scope in ("tenant", "key")
        for limits in limits_of("o", scope, allowance).values()
        for limit in limits
    }
    assert set(LABELS["limit"]) == names


def test_units_and_buckets_fit_the_names():
    for one in METRICS.values():
        assert one.name.endswith("_seconds") == (one.unit == "seconds"), one.name
        assert one.name.endswith("_bytes") == (one.unit == "bytes"), one.name
        assert bool(one.bounds) == (one.kind == "histogram"), one.name
        assert list(one.bounds) == sorted(set(one.bounds)), one.name
        assert one.text.endswith("."), one.name


def test_samples_are_read_once_under_the_labels_of_both():
    samples = Samples()
    samples.add(0.5, "bulk", "free")
    samples.add(2.0, "bulk", "premium")
    assert list(samples.read("headrace_queue_wait_seconds", "default")) == [
        Reading("headrace_queue_wait_seconds", 0.5, ("default", "bulk", "free")),
        Reading("headrace_queue_wait_seconds", 2.0, ("default", "bulk", "premium")),
    ]
    assert list(samples.read("headrace_queue_wait_seconds", "default")) == []


def test_samples_that_nobody_reads_are_bounded():
    samples = Samples()
    for _ in range(SAMPLES_MAX + 5):
        samples.add(1.0)
    assert len(list(samples.read("headrace_infer_seconds"))) == SAMPLES_MAX
