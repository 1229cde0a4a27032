"""serve.flows.readings: from what was counted to figures that the table has."""

from collections.abc import Iterable
from types import SimpleNamespace

from serve.admission.quotas import Tally as Refusals
from serve.config import Buffer, Index, Model, Pool
from serve.embedding.holdings import Holdings
from serve.flows import readings, reuse
from serve.flows.answers import Answers
from serve.flows.pending import Tally
from serve.flows.turns import Waiting
from serve.index.memory import MemoryIndex
from serve.index.writer import Writer
from serve.jobs.runner import Done
from serve.telemetry import LABELS, METRICS, Census, Reading


def told(found: Iterable[Reading]) -> dict[tuple[str, ...], float]:
    """By name and labels; each as the table has it, and none twice but in a histogram."""
    values: dict[tuple[str, ...], float] = {}
    for one in found:
        metric = METRICS[one.name]
        assert len(one.labels) == len(metric.labels)
        for label, value in zip(metric.labels, one.labels, strict=True):
            assert isinstance(LABELS[label], str) or value in LABELS[label]
        place = (one.name.removeprefix("headrace_"), *one.labels)
        assert place not in values or metric.kind == "histogram"
        values[place] = one.value
    return values


def test_answers_by_class_and_status_with_their_times():
    answers = Answers()
    answers.add("interactive", 200, 0.5)
    answers.add("interactive", 200, 0.7)
    answers.add("none", 401, 0.1)
    answers.tokenised.add(0.01)
    answers.encoded.add(0.02)
    found = list(readings.of_answers(answers))
    assert told(found) == {
        ("requests", "interactive", "200"): 2,
        ("requests", "none", "401"): 1,
        ("request_seconds", "interactive"): 0.7,
        ("request_seconds", "none"): 0.1,
        ("tokenise_seconds",): 0.01,
        ("encode_seconds",): 0.02,
    }
    assert [one.value for one in found if one.labels == ("interactive",)] == [0.5, 0.7]


def test_refusals_by_limit_and_the_state_of_the_ledger():
    quotas = SimpleNamespace(tally=Refusals(exchanges=5, failures=1, local_grants=2), away=True)
    quotas.tally.refused["tenant_tokens_per_minute"] += 3
    assert told(readings.of_quotas(quotas)) == {
        ("quota_refused", "tenant_tokens_per_minute"): 3,
        ("quota_exchanges",): 5,
        ("quota_exchange_failures",): 1,
        ("quota_local_grants",): 2,
        ("quota_ledger_away",): True,
    }


def test_what_was_kept_and_shared():
    cache = SimpleNamespace(evicted=1, size_bytes=4096)
    seen = SimpleNamespace(tally=reuse.Tally(hits=5, misses=7, shared=2), cache=cache)
    assert told(readings.of_reuse(seen)) == {
        ("cache_hits",): 5,
        ("cache_misses",): 7,
        ("cache_shared",): 2,
        ("cache_evicted",): 1,
        ("cache_bytes",): 4096,
    }
    assert told(readings.of_reuse(None)) == {}


def test_a_queue_tells_every_class_and_tier_also_where_nothing_waits():
    waiting = {("bulk", "free"): Waiting(3, 60.0, 2.5)}
    found = told(readings.of_queue(waiting, "default", ["free"]))
    assert {place for place, value in found.items() if value} == {
        (f"queue_{word}", "default", "bulk", "free")
        for word in ("inputs", "tokens", "oldest_seconds")
    }
    assert found["queue_oldest_seconds", "default", "bulk", "free"] == 2.5
    assert len(found) == 3 * 2 * 2  # figures, classes, tiers with `none`


def test_batches_are_told_by_pool():
    tally = Tally(batches=2, tokens=80, padded=100, room=400, model_s=0.5)
    tally.waits.add(0.3, "bulk", "free")
    tally.passes.add(0.25)
    found = told(readings.of_batches(tally, "default"))
    assert {place[0] for place in found} == {
        *(name.removeprefix("headrace_") for name in readings._TALLY.values()),
        "queue_wait_seconds",
        "infer_seconds",
    }
    assert found["batch_room_tokens", "default"] == 400
    assert found["queue_wait_seconds", "default", "bulk", "free"] == 0.3


def test_models_are_told_by_id_and_the_card_where_there_is_one():
    models = [
        Model(id=name, engine="fake", dimensions=8, tokens_max=64, pinned=name == "a")
        for name in "ab"
    ]
    holdings = Holdings(Pool(models=models))
    holdings.loaded("a", 70, 0)
    holdings.broke("a", 1)
    holdings.unloaded("a")
    holdings.failed("a", 1)
    holdings.loaded("a", 80, 2)
    holdings.loaded("b", 50, 2)
    holdings.unloaded("b")
    found = told(readings.of_models(holdings))
    assert {place: value for place, value in found.items() if value} == {
        ("model_loads", "a"): 2,
        ("model_loads", "b"): 1,
        ("model_load_failures", "a"): 1,
        ("model_breaks", "a"): 1,
        ("model_evictions", "b"): 1,
        ("model_bytes", "a"): 80,
    }
    assert found["model_bytes", "b"] == 0
    assert told(readings.of_gpu((4, 9), "p")) == {
        ("gpu_memory_bytes", "p"): 4,
        ("gpu_memory_total_bytes", "p"): 9,
    }
    assert told(readings.of_gpu(None, "p")) == {}


def test_work_is_told_by_task_and_word():
    done = Done(claimed=4, settled=3, lost=1)
    done.words["document", "done"] += 3
    done.took.add(1.5, "document")
    assert told(readings.of_work(done)) == {
        ("items_claimed",): 4,
        ("items_lost",): 1,
        ("items_settled", "document", "done"): 3,
        ("item_seconds", "document"): 1.5,
    }


def test_each_lag_is_told_once():
    untold = [[("indexed", 0.2), ("searchable", 0.7), ("indexed", 0.3)], []]
    lags = SimpleNamespace(take=lambda: untold.pop(0))
    seen = [(one.name, one.value) for _ in range(2) for one in readings.of_lags(lags)]
    assert seen == [
        ("headrace_lag_indexed_seconds", 0.2),
        ("headrace_lag_searchable_seconds", 0.7),
        ("headrace_lag_indexed_seconds", 0.3),
    ]


async def test_the_writer_tells_its_buffer_and_what_became_of_writes(clock, rng):
    writer = Writer(
        MemoryIndex(Index()),
        SimpleNamespace(),
        name="w",
        epoch=1,
        settings=Buffer(),
        clock=clock,
        rng=rng,
    )
    found = told(readings.of_buffer(writer.stats()))
    assert set(found.values()) == {0}
    assert len(found) == len(readings._BUFFER) + len(LABELS["outcome"])


def test_a_census_tells_every_open_state_and_a_store_that_is_away_nothing_else():
    census = Census({"running": 2}, {"bulk": 30.0}, {"waiting": 5, "dead": 1})
    found = told(readings.of_census(census))
    assert {place: value for place, value in found.items() if value} == {
        ("store_up",): True,
        ("jobs", "running"): 2,
        ("jobs_oldest_seconds", "bulk"): 30,
        ("items", "waiting"): 5,
        ("items", "dead"): 1,
    }
    assert found["jobs", "queued"] == 0
    assert told(readings.of_census(None)) == {("store_up",): False}
