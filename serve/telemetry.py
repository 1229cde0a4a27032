"""What the service tells of itself: every metric, every label and every span, in one table.

Nothing else knows a metric's kind, help or buckets. What has figures gives them as `Reading`s
(`serve.flows.readings`), `deployments.metrics` hands them to Ray, docs/metrics.md is written from
here, and dashboards and alerts are compared with it.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal, cast

from serve.records import KLASSES


Kind = Literal["counter", "gauge", "histogram"]

Labels = tuple[str, ...]
"""Values of a metric's labels, in the order of the table."""

_SCOPES = ("tenant", "tenant_bulk", "key", "key_bulk")
_LIMITS = ("requests_per_minute", "tokens_per_minute", "concurrent_requests", "queued_tokens")

NONE = "none"
"""The value of a label where there is none."""

LABELS: Mapping[str, tuple[str, ...] | str] = {
    "arm": ("stable", "candidate"),
    "class": (*KLASSES, NONE),
    "limit": (
        *(f"{scope}_{limit}" for scope in _SCOPES for limit in _LIMITS),
        *("tenant_tokens_per_month", "key_tokens_per_month"),
    ),
    "model": "the ids in `pools[].models`",
    "outcome": ("landed", "rejected", "superseded", "released"),
    "pool": "the names in `pools`",
    "shadow": ("compared", "failed", "dropped", "skipped"),
    "state": (
        *("validating", "queued", "running", "finalizing", "cancelling"),
        *("waiting", "delayed", "leased", "done", "skipped", "dead", "cancelled"),
    ),
    "status": "the HTTP status codes of the API",
    "task": ("expand", "document", "delete", "request", "finish"),
    "tier": "the names in `admission.tiers`, and `none`",
    "word": ("done", "skipped", "dead", "retry", "release", "advance"),
}
"""Every label: its values, or what bounds them. No tenant, key, collection, job or request is one: there is
no bound to their number, and Prometheus keeps a series for each.
"""

_BUCKETS: Mapping[str, tuple[float, ...]] = {
    "cosine": (0.5, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.998, 0.999, 0.9995, 0.9999, 1.0),
    "step": (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0),
    "wait": (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0),
    "work": (0.1, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0, 900.0, 3600.0),
}
"""Of histograms: cosines; and in seconds what takes a moment, what a caller waits for, what workers do."""

_TABLE = """
Ingress replicas: requests
  counter  headrace_requests{class,status}  requests  HTTP replies; class `none`: not charged, or refused before it was known.
  wait     headrace_request_seconds{class}  seconds  From a request's arrival to the first byte of its reply.
  step     headrace_tokenise_seconds  seconds  Tokenising of a request, its wait for a thread included.
  step     headrace_encode_seconds  seconds  From a request's vectors to the first byte of its reply.

Replicas: live settings
  gauge    headrace_settings_refused  flag  1 while the last `user_config` was refused, and what held before it holds.

Ingress replicas and workers: limits
  counter  headrace_quota_refused{limit}  requests  Requests refused, by the name of the limit.
  counter  headrace_quota_exchanges  exchanges  Exchanges that the Ledger (or Redis) answered.
  counter  headrace_quota_exchange_failures  exchanges  Exchanges that it did not answer.
  counter  headrace_quota_local_grants  requests  Requests admitted by the replica's own share while it was away.
  gauge    headrace_quota_ledger_away  flag  1 while the Ledger (or Redis) is away.

Ingress replicas and workers: inputs that were embedded before
  counter  headrace_cache_hits  inputs  Inputs whose vectors were kept.
  counter  headrace_cache_misses  inputs  Inputs whose vectors were not.
  counter  headrace_cache_shared  inputs  Of the misses, those that stood twice in a request or were just being computed.
  counter  headrace_cache_evicted  vectors  Vectors that made place for others: if it rises with the hits, raise `cache.bytes_max`.
  gauge    headrace_cache_bytes  bytes  Memory of the vectors that are kept.

Ingress replicas: canaries, by the stable model
  counter  headrace_canary_requests{model,arm}  requests  Requests to a model with a canary, by which of the two answered.
  counter  headrace_canary_fallbacks{model}  requests  Requests that the candidate should have answered, and the stable model did.
  counter  headrace_canary_shadows{model,shadow}  requests  Requests that were to be repeated on the candidate, by what became of that.
  wait     headrace_canary_request_seconds{model,arm}  seconds  From a request's call of the embedder to its reply, where all of it was computed.
  step     headrace_canary_infer_seconds{model,arm}  seconds  From the first batch with a part of a request to the end of the last; those that were repeated, too.
  cosine   headrace_canary_cosine{model}  cosine  Cosine of the two vectors of an input that was repeated.
  gauge    headrace_canary_stopped{model}  flag  1 while a canary of the model is stopped.

Embedder replicas: the queue
  gauge    headrace_queue_inputs{pool,class,tier}  inputs  Inputs that wait, also for their model to be loaded.
  gauge    headrace_queue_tokens{pool,class,tier}  tokens  Their cost, in tokens corrected per model.
  gauge    headrace_queue_oldest_seconds{pool,class,tier}  seconds  How long the oldest of them has waited; 0 when none waits.
  wait     headrace_queue_wait_seconds{pool,class,tier}  seconds  From a call's arrival to the model's first look at it.

Embedder replicas: batches
  counter  headrace_handouts{pool}  handouts  Hand-outs of the fair queue.
  counter  headrace_batches{pool}  batches  Calls of a model.
  counter  headrace_batch_inputs{pool}  inputs  Inputs in them.
  counter  headrace_batch_tokens{pool}  tokens  Tokens in them without padding: their rate is the throughput.
  counter  headrace_batch_padded_tokens{pool}  tokens  Tokens with padding: what exceeds `headrace_batch_tokens` is waste.
  counter  headrace_batch_room_tokens{pool}  tokens  Padded tokens that these batches could have held: `headrace_batch_padded_tokens` over it is the fill.
  step     headrace_infer_seconds{pool}  seconds  A batch at the model.
  counter  headrace_model_busy_seconds{pool}  seconds  Time of batches at the model, over all slots.
  counter  headrace_inputs_repeated{pool}  inputs  Inputs that were run again after a failure.
  counter  headrace_inputs_failed{pool}  inputs  Inputs that were answered with an error of their own.
  counter  headrace_inputs_dropped{pool}  inputs  Inputs that expired or lost their caller before the model saw them.
  counter  headrace_calls_expired{pool}  calls  Calls whose deadline passed.

Embedder replicas: models
  counter  headrace_model_loads{model}  loads  Loads of a model.
  counter  headrace_model_load_failures{model}  loads  Loads that failed.
  counter  headrace_model_breaks{model}  failures  Times that a model failed on a known good input.
  counter  headrace_model_evictions{model}  unloads  Unloads, idle or to make room: a rate that stays up is thrashing.
  gauge    headrace_model_bytes{model}  bytes  Memory of a loaded model as measured; 0 while it is not loaded.
  gauge    headrace_gpu_memory_bytes{pool}  bytes  What is taken of the memory of the replica's GPU, by whomever. GPU pools only.
  gauge    headrace_gpu_memory_total_bytes{pool}  bytes  The memory of that GPU. GPU pools only.

Workers
  counter  headrace_items_claimed  items  Items of jobs that were claimed.
  counter  headrace_items_settled{task,word}  items  Tries of items by what became of them; after its last try a `retry` is dead.
  counter  headrace_items_lost  items  Items whose lease was over before they were settled.
  work     headrace_item_seconds{task}  seconds  From the claim of items of a task to their settlement.

The Upserter: the Store
  gauge    headrace_store_up  flag  Whether the Store answered when it was asked for the next three.
  gauge    headrace_jobs{state}  jobs  Open jobs.
  gauge    headrace_jobs_oldest_seconds{class}  seconds  Age of the oldest open job that is not paused; 0 when there is none.
  gauge    headrace_items{state}  items  Items of all jobs that are kept; `dead` are the dead letters, `waiting` also those of paused jobs.

The Upserter: writes
  gauge    headrace_buffer_writes  writes  Writes in the buffer, those in flight included.
  gauge    headrace_buffer_bytes  bytes  Their size.
  gauge    headrace_buffer_oldest_seconds  seconds  How long the oldest of them has waited; 0 when none waits.
  gauge    headrace_buffer_lanes  lanes  Collections they go to.
  gauge    headrace_index_away  flag  1 while flushes pause because the index does not answer.
  counter  headrace_flushes  flushes  Bulk upserts that the index took.
  counter  headrace_flushes_retried  flushes  Bulk upserts that it did not take, and that are tried again.
  counter  headrace_writes{outcome}  writes  Writes by what became of them.
  work     headrace_lag_indexed_seconds  seconds  From when the Store accepted a write until the index had it, by landing: what a worker brings at once, of one job.
  work     headrace_lag_searchable_seconds  seconds  The same, until searches saw it; of writes without proof (deletes on Pinecone) there are none.
  counter  headrace_writer_faults  faults  Flushes that failed for a fault of ours.
"""
_ROW = re.compile(r"  (\w+) +(\w+)(?:\{([\w,]+)\})?  (\w+)  (.+)")


@dataclass(frozen=True, slots=True)
class Metric:
    """One row of the table. `place` is who tells it; `bounds` are the buckets of a histogram."""

    place: str
    kind: Kind
    name: str
    labels: Labels
    unit: str
    text: str
    bounds: tuple[float, ...] = ()

    @property
    def exported(self) -> str:
        """As Prometheus sees it; a histogram's series end in `_bucket`, `_sum` and `_count`."""
        return f"ray_{self.name}" + ("_total" if self.kind == "counter" else "")


def _rows(table: str) -> Iterator[Metric]:
    place = ""
    for line in filter(None, table.splitlines()):
        if not line.startswith(" "):
            place = line
            continue
        row = _ROW.fullmatch(line)
        if row is None:
            raise ValueError(line)
        word, name, labels, unit, text = row.groups(default="")
        kind = cast("Kind", "histogram" if word in _BUCKETS else word)
        bounds = _BUCKETS.get(word, ())
        yield Metric(place, kind, name, tuple(filter(None, labels.split(","))), unit, text, bounds)


METRICS: Mapping[str, Metric] = {row.name: row for row in _rows(_TABLE)}
"""By name, in the order of the table."""

SPANS: Mapping[str, str] = {
    "headrace.request": "A request, from its arrival to the end of its reply; within the client's `traceparent`.",
    "headrace.tokenise": "Tokenising of a request, its wait for a thread included.",
    "headrace.store": "A call of the Store's actor within a request or a job.",
    "headrace.queue": "A call's wait in the fair queue, and for its model.",
    "headrace.batch": "A batch at the model: a trace of its own, with a link to each call.",
    "headrace.work": "A worker at items of a job; within the request that made the job.",
    "headrace.offer": "Writes of a worker, or of raw vectors, until the index has answered.",
    "headrace.flush": "A bulk upsert: a trace of its own, with a link to each offer.",
}
"""What `serve.tracing` makes. Attributes carry ids, classes and counts; no text, vector, key or tenant."""


@dataclass(frozen=True, slots=True)
class Reading:
    """One figure. Of a counter: all that was counted since the process began. Of a histogram: one more value."""

    name: str
    value: float
    labels: Labels = ()


@dataclass(frozen=True, slots=True)
class Census:
    """What the Store holds of all tenants together.

    Attributes:
        jobs: open ones, by state.
        oldest_s: age of the oldest open job that is not paused, by class.
        items: by state; `waiting` are those that are ready or paused.
        tokens: estimated tokens left of open jobs that are not paused, by model; "": of jobs that name none.
        stages: items that are ready, some thousands at most, or leased, by stage.
    """

    jobs: Mapping[str, int] = field(default_factory=dict)
    oldest_s: Mapping[str, float] = field(default_factory=dict)
    items: Mapping[str, int] = field(default_factory=dict)
    tokens: Mapping[str, float] = field(default_factory=dict)
    stages: Mapping[str, int] = field(default_factory=dict)


SAMPLES_MAX = 10_000
"""Values held until they are read, every 5 s: 2,000 a second, several times what a process serves."""


class Samples:
    """Values for a histogram since they were last read; past SAMPLES_MAX they are not kept.

    To add one costs 0.4 us, to hand it to Ray several: that is done elsewhere.
    """

    def __init__(self) -> None:
        self._held: list[tuple[float, Labels]] = []

    def add(self, value: float, *labels: str) -> None:
        """Note a value, with those of the histogram's labels that its owner knows."""
        if len(self._held) < SAMPLES_MAX:
            self._held.append((value, labels))

    def read(self, name: str, *labels: str) -> Iterator[Reading]:
        """All that were noted, under these labels and their own; they are forgotten."""
        held, self._held = self._held, []
        return (Reading(name, value, (*labels, *own)) for value, own in held)
