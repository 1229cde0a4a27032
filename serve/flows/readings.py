"""From what a process has counted to the figures that it tells: names of `serve.telemetry`. Pure, but that
samples are forgotten once they are read.

A gauge is told for every value of its labels, also where it is 0: else the last one would stand.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, get_args

from serve.admission.quotas import Quotas
from serve.embedding.holdings import Holdings
from serve.flows.answers import Answers
from serve.flows.pending import Tally
from serve.flows.reuse import Reuse
from serve.flows.trial import Tally as Tried
from serve.flows.turns import Rank, Waiting
from serve.index.lags import Lags
from serve.items import JOB_ENDS, JobState
from serve.jobs.runner import Done
from serve.records import KLASSES
from serve.telemetry import NONE, Census, Reading


OPEN = tuple(state for state in get_args(JobState) if state not in JOB_ENDS)

_TALLY = {
    "handouts": "headrace_handouts",
    "batches": "headrace_batches",
    "inputs": "headrace_batch_inputs",
    "tokens": "headrace_batch_tokens",
    "padded": "headrace_batch_padded_tokens",
    "room": "headrace_batch_room_tokens",
    "model_s": "headrace_model_busy_seconds",
    "repeated": "headrace_inputs_repeated",
    "failed": "headrace_inputs_failed",
    "dropped": "headrace_inputs_dropped",
    "expired": "headrace_calls_expired",
}
_MODEL = {
    "loads": "headrace_model_loads",
    "load_failures": "headrace_model_load_failures",
    "breaks": "headrace_model_breaks",
    "evictions": "headrace_model_evictions",
}
_BUFFER = {
    "depth": "headrace_buffer_writes",
    "bytes": "headrace_buffer_bytes",
    "oldest_age_s": "headrace_buffer_oldest_seconds",
    "lanes": "headrace_buffer_lanes",
    "paused": "headrace_index_away",
    "flushes": "headrace_flushes",
    "retried": "headrace_flushes_retried",
    "faults": "headrace_writer_faults",
}
_OUTCOMES = ("landed", "rejected", "superseded", "released")


def of_answers(answers: Answers) -> Iterator[Reading]:
    """What an ingress replica has answered."""
    for labels, count in answers.replies.items():
        yield Reading("headrace_requests", count, labels)
    yield from answers.took.read("headrace_request_seconds")
    yield from answers.tokenised.read("headrace_tokenise_seconds")
    yield from answers.encoded.read("headrace_encode_seconds")


def of_quotas(quotas: Quotas) -> Iterator[Reading]:
    """What a replica refused, and how it stands with the Ledger."""
    tally = quotas.tally
    for limit, count in tally.refused.items():
        yield Reading("headrace_quota_refused", count, (limit,))
    yield Reading("headrace_quota_exchanges", tally.exchanges)
    yield Reading("headrace_quota_exchange_failures", tally.failures)
    yield Reading("headrace_quota_local_grants", tally.local_grants)
    yield Reading("headrace_quota_ledger_away", quotas.away)


def of_reuse(reuse: Reuse | None) -> Iterator[Reading]:
    """How many inputs needed no model; None: where nothing is kept or shared."""
    if reuse is None:
        return
    yield Reading("headrace_cache_hits", reuse.tally.hits)
    yield Reading("headrace_cache_misses", reuse.tally.misses)
    yield Reading("headrace_cache_shared", reuse.tally.shared)
    yield Reading("headrace_cache_evicted", reuse.cache.evicted)
    yield Reading("headrace_cache_bytes", reuse.cache.size_bytes)


def of_canaries(tally: Tried, stopped: Mapping[str, bool]) -> Iterator[Reading]:
    """What an ingress replica has compared, by the id of the stable model."""
    for (model, arm), count in tally.requests.items():
        yield Reading("headrace_canary_requests", count, (model, arm))
    for model, count in tally.fallbacks.items():
        yield Reading("headrace_canary_fallbacks", count, (model,))
    for (model, end), count in tally.shadows.items():
        yield Reading("headrace_canary_shadows", count, (model, end))
    yield from tally.took.read("headrace_canary_request_seconds")
    yield from tally.infer.read("headrace_canary_infer_seconds")
    yield from tally.cosines.read("headrace_canary_cosine")
    for model, has in stopped.items():
        yield Reading("headrace_canary_stopped", has, (model,))


def of_queue(waiting: Mapping[Rank, Waiting], pool: str, tiers: Iterable[str]) -> Iterator[Reading]:
    """What waits in an embedder replica."""
    names = (*tiers, NONE)
    for klass in KLASSES:
        for tier in names:
            one, labels = waiting.get((klass, tier), Waiting()), (pool, klass, tier)
            yield Reading("headrace_queue_inputs", one.inputs, labels)
            yield Reading("headrace_queue_tokens", one.tokens, labels)
            yield Reading("headrace_queue_oldest_seconds", one.oldest_s, labels)


def of_batches(tally: Tally, pool: str) -> Iterator[Reading]:
    """What an embedder replica gave its models."""
    for field, count in tally.counts().items():
        yield Reading(_TALLY[field], count, (pool,))
    yield from tally.waits.read("headrace_queue_wait_seconds", pool)
    yield from tally.passes.read("headrace_infer_seconds", pool)


def of_models(holdings: Holdings) -> Iterator[Reading]:
    """The models of an embedder replica."""
    for model, (counts, size_bytes) in holdings.counts().items():
        yield Reading("headrace_model_bytes", size_bytes, (model,))
        for field, name in _MODEL.items():
            yield Reading(name, getattr(counts, field), (model,))


def of_gpu(memory: tuple[int, int] | None, pool: str) -> Iterator[Reading]:
    """Bytes of a GPU that are taken, and all of them; None: there is no GPU."""
    if memory is not None:
        yield Reading("headrace_gpu_memory_bytes", memory[0], (pool,))
        yield Reading("headrace_gpu_memory_total_bytes", memory[1], (pool,))


def of_work(done: Done) -> Iterator[Reading]:
    """What a worker has done."""
    yield Reading("headrace_items_claimed", done.claimed)
    yield Reading("headrace_items_lost", done.lost)
    for labels, count in done.words.items():
        yield Reading("headrace_items_settled", count, labels)
    yield from done.took.read("headrace_item_seconds")


_LAGS = {
    "indexed": "headrace_lag_indexed_seconds",
    "searchable": "headrace_lag_searchable_seconds",
}


def of_lags(lags: Lags) -> Iterator[Reading]:
    """How long writes took from their acceptance to the index, and until searches saw them."""
    for reached, seconds in lags.take():
        yield Reading(_LAGS[reached], seconds)


def of_buffer(stats: Mapping[str, Any]) -> Iterator[Reading]:
    """What `serve.index.writer` says of itself."""
    for field, name in _BUFFER.items():
        yield Reading(name, float(stats[field]))
    for outcome in _OUTCOMES:
        yield Reading("headrace_writes", stats[outcome], (outcome,))


def of_census(census: Census | None) -> Iterator[Reading]:
    """What the Store holds; None: it does not answer, and what was told before stands."""
    yield Reading("headrace_store_up", census is not None)
    if census is None:
        return
    for state in OPEN:
        yield Reading("headrace_jobs", census.jobs.get(state, 0), (state,))
    for klass in KLASSES:
        yield Reading("headrace_jobs_oldest_seconds", census.oldest_s.get(klass, 0), (klass,))
    for state, count in census.items.items():
        yield Reading("headrace_items", count, (state,))
