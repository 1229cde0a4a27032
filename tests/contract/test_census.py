"""What every Store promises of its census: all tenants together, by state."""

from typing import Any

import pytest

from serve.telemetry import Census
from tests.contract.work import (
    BAD,
    BUSY,
    EXPAND,
    Store,
    claimed,
    documents,
    op,
    settle,
    submitted,
    tenant,
)


NOTHING = dict.fromkeys(("waiting", "delayed", "leased", "done", "skipped", "dead", "cancelled"), 0)


async def test_an_empty_store_holds_nothing(store: Store):
    nothing = {"prepare": 0, "predict": 0, "embed": 0}
    assert await store.census() == Census({}, {}, NOTHING, {}, nothing)


async def test_items_are_counted_by_state_over_all_tenants(store: Store):
    await tenant(store)
    await tenant(store, "other")
    await submitted(store, documents("abcdef"))
    await submitted(store, documents("xy"), "other")
    items = list((await claimed(store, "prepare", 6)).items)
    await settle(store, items[:1], "done")
    await settle(store, items[1:2], "dead", fault=BAD)
    await settle(store, items[2:3], "retry", fault=BUSY, delay_s=60.0)
    await settle(store, items[3:4], "skipped")
    census = await store.census()
    assert census.items == {
        **NOTHING,
        "waiting": 2,
        "delayed": 1,
        "leased": 2,
        "done": 1,
        "dead": 1,
        "skipped": 1,
    }


async def test_what_a_job_does_for_itself_is_no_item(store: Store):
    await tenant(store)
    await submitted(store, [EXPAND], kind="embeddings")
    assert (await store.census()).items == NOTHING
    assert len((await claimed(store, "prepare")).items) == 1
    assert (await store.census()).items == NOTHING


async def test_open_jobs_are_counted_by_state_and_the_oldest_has_its_age(store: Store, clock: Any):
    await tenant(store)
    at = clock.now
    first = await submitted(store, documents("a"), created_at=at)
    clock.advance(30)
    second = await submitted(store, documents("b"), created_at=clock.now)
    await submitted(store, documents("c"), created_at=clock.now, klass="interactive")
    await claimed(store, "prepare", 1, owner="w")
    clock.advance(5)
    census = await store.census()
    assert sum(census.jobs.values()) == 3
    assert set(census.jobs) <= {"queued", "running"}
    assert census.oldest_s == {"bulk": 35.0, "interactive": 5.0}
    await store.change_job(op(), "acme", first, "pause")
    assert (await store.census()).oldest_s["bulk"] == 5.0
    await store.change_job(op(), "acme", second, "cancel")
    assert "bulk" not in (await store.census()).oldest_s
    assert (await store.census()).items["cancelled"] == 1


async def test_tokens_that_are_left_are_summed_by_model_without_what_is_paused(store: Store):
    await tenant(store)
    await tenant(store, "other")
    first = await submitted(store, documents("ab"), spec={"model": "small"})
    await submitted(store, documents("cde"), "other", spec={"model": "small"})
    await submitted(store, documents("f"), spec={"model": "large"})
    await submitted(store, documents("g"))
    census = await store.census()
    one = census.tokens["large"]
    assert one > 0
    assert census.tokens == pytest.approx({"small": 5 * one, "large": one, "": one})
    await store.change_job(op(), "acme", first, "pause")
    assert (await store.census()).tokens["small"] == pytest.approx(3 * one)


async def test_items_are_counted_by_stage_while_they_are_ready_or_in_work(store: Store):
    await tenant(store)
    await submitted(store, documents("abcdef"))
    items = list((await claimed(store, "prepare", 4)).items)
    await settle(store, items[:1], "done")
    await settle(store, items[1:2], "retry", fault=BUSY, delay_s=60.0)
    assert (await store.census()).stages == {"prepare": 4, "predict": 0, "embed": 0}
