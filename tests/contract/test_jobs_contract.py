"""What every Store promises of jobs to the tenant that hands them over."""

from dataclasses import replace
from typing import Any

import pytest

from serve.errors import BadInput, Conflict, Mismatch, NotFound, QuotaExceeded
from serve.items import Fault, NewItem, Once, Replay, Stats
from tests.contract.work import (
    BAD,
    BUSY,
    Store,
    claimed,
    document,
    documents,
    found,
    job,
    one,
    op,
    prepared,
    request,
    settle,
    submitted,
    tenant,
    told,
    view,
)


# Handing over


async def test_a_job_comes_back_as_it_is_kept(store: Store, clock: Any):
    uuid = await tenant(store)
    given = job(collection=uuid, spec={"a": 1}, metadata={"b": "2"}, priority=70)
    accepted = await store.submit_job(op(), given, documents("ab"))
    kept = accepted.job
    assert (kept.state, kept.total, kept.cost_left) == ("queued", 2, 20.0)
    assert (kept.spec, kept.metadata, kept.priority) == ({"a": 1}, {"b": "2"}, 70)
    assert kept.times == {"queued": clock.now}
    assert replace(await found(store, given.id), errors=()) == kept
    assert await store.find_job("other", given.id) is None


async def test_a_repeat_of_the_operation_hands_over_once(store: Store):
    await tenant(store)
    given, same = job(), op()
    first = await store.submit_job(same, given, documents("a"))
    again = await store.submit_job(same, job(), documents("b"))
    assert again.job.id == first.job.id
    assert len(await store.list_jobs("acme", None, [], "", 10)) == 1


async def test_an_idempotency_key_hands_over_once(store: Store, clock: Any):
    await tenant(store)
    once = Once("key", "print", 60.0)
    first = await store.submit_job(op(), job(), documents("a"), once)
    again = await store.submit_job(op(), job(), documents("a"), once)
    assert (again.replayed, again.job.id) == (True, first.job.id)
    with pytest.raises(Mismatch):
        await store.submit_job(op(), job(), documents("a"), Once("key", "other", 60.0))
    clock.advance(60)
    later = await store.submit_job(op(), job(), documents("a"), once)
    assert not later.replayed


async def test_the_job_of_an_idempotency_key_is_found_by_it(store: Store, clock: Any):
    await tenant(store)
    once = Once("key", "print", 60.0)
    assert await store.first_job("acme", once) is None
    made = job()
    await store.submit_job(op(), made, documents("a"), once)
    assert await store.first_job("acme", once) == await found(store, made.id)
    assert await store.first_job("other", once) is None
    with pytest.raises(Mismatch):
        await store.first_job("acme", Once("key", "other", 60.0))
    clock.advance(60)
    assert await store.first_job("acme", once) is None


async def test_an_idempotency_key_is_its_tenants_own(store: Store):
    await tenant(store)
    await tenant(store, "other")
    once = Once("key", "print", 60.0)
    await store.submit_job(op(), job(), documents("a"), once)
    assert not (await store.submit_job(op(), job("other"), documents("a"), once)).replayed


async def test_all_or_nothing(store: Store):
    uuid = await tenant(store)
    twice = job(collection=uuid)
    with pytest.raises(BadInput):
        await store.submit_job(op(), twice, documents("aba"))
    with pytest.raises(NotFound):
        await store.submit_job(op(), job(collection="f" * 32), documents("a"))
    assert await store.list_jobs("acme", None, [], "", 10) == []
    assert (await claimed(store, "prepare")).items == ()
    assert await store.job_stats("acme") == Stats()


async def test_a_tenant_has_room_for_so_many_tokens(store: Store):
    await tenant(store)
    first = await submitted(store, [document("a", 3e8)])
    with pytest.raises(QuotaExceeded) as caught:
        await store.submit_job(op(), job(), [document("b", 3e8)])
    assert caught.value.code == "open_tokens"
    await tenant(store, "other")
    await submitted(store, [document("b", 3e8)], "other")
    await store.change_job(op(), "acme", first, "cancel")
    await submitted(store, [document("b", 3e8)])


async def test_a_job_without_items_is_completed(store: Store):
    await tenant(store)
    assert (await found(store, await submitted(store, []))).state == "completed"


# Documents


async def test_each_write_gets_a_generation_and_what_has_landed_is_skipped(store: Store):
    uuid = await tenant(store)
    first = await submitted(store, [document("a", sha256="h1"), document("b")], collection=uuid)
    await prepared(store)
    items = (await claimed(store, "embed")).items
    assert [(item.name, item.generation, item.chunks_max) for item in items] == [
        ("a", 1, 1),
        ("b", 1, 1),
    ]
    await settle(store, items, "done", tokens=3, chunks=1, result={"chunks": 1})
    assert (await found(store, first)).state == "completed"
    second = await submitted(
        store, [document("a", sha256="h1"), document("b", sha256="h1")], collection=uuid
    )
    rest = (await claimed(store, "prepare")).items
    assert [(item.name, item.generation) for item in rest] == [("b", 2)]
    skipped, waiting = await store.list_items("acme", second, [], -1, 10)
    assert (skipped.state, skipped.generation) == ("skipped", 1)
    assert skipped.result == {"status": "unchanged"}
    assert waiting.state == "leased"


async def test_a_job_of_which_all_has_landed_is_completed_at_once(store: Store):
    uuid = await tenant(store)
    await submitted(store, [document("a", sha256="h")], collection=uuid)
    await prepared(store)
    await settle(store, [await one(store, "embed")], "done", chunks=1)
    again = await submitted(store, [document("a", sha256="h")], collection=uuid)
    assert (await found(store, again)).state == "completed"
    assert await told(store, again) == ["job.queued", "job.completed"]


async def test_a_content_that_has_not_landed_is_not_skipped(store: Store):
    uuid = await tenant(store)
    await submitted(store, [document("a", sha256="h")], collection=uuid)
    await submitted(store, [document("a", sha256="h")], collection=uuid)
    assert [item.generation for item in (await claimed(store, "prepare")).items] == [1, 2]


async def test_an_older_write_is_superseded_and_never_lands_after_the_newer(store: Store):
    uuid = await tenant(store)
    await submitted(store, [document("a", sha256="old")], collection=uuid)
    older = await one(store, "prepare")
    assert not older.superseded
    await settle(store, [older], "advance", cost=1.0, chunks=4)
    await submitted(store, [document("a", sha256="new")], collection=uuid)
    (older,) = (await claimed(store, "embed")).items
    assert older.superseded
    await prepared(store)
    (newer,) = (await claimed(store, "embed")).items
    assert (newer.generation, newer.chunks_max, newer.superseded) == (2, 4, False)
    await settle(store, [newer], "done", chunks=1)
    await settle(store, [older], "done", chunks=4)
    third = await submitted(store, [document("a", sha256="new")], collection=uuid)
    assert (await found(store, third)).skipped == 1
    fourth = await submitted(store, [document("a", sha256="old")], collection=uuid)
    assert (await found(store, fourth)).skipped == 0


async def test_what_a_deleted_collection_has_waiting_is_superseded(store: Store):
    uuid = await tenant(store)
    await submitted(store, documents("a"), collection=uuid)
    await store.delete_collection(op(), "acme", "docs")
    claim = await claimed(store, "prepare")
    assert [item.superseded for item in claim.items] == [True]
    assert claim.collections == {}


async def test_a_delete_raises_the_generation_and_tells_whether_there_was_something(store: Store):
    uuid = await tenant(store)
    await submitted(store, documents("a"), collection=uuid)
    gone = [NewItem(name, "delete", "embed", 1.0, {}) for name in ("a", "never")]
    deleted = await submitted(store, gone, collection=uuid)
    (item,) = (await claimed(store, "embed")).items
    assert (item.name, item.generation, item.payload) == ("a", 2, {"existed": True})
    absent = (await store.list_items("acme", deleted, ["skipped"], -1, 10))[0]
    assert (absent.name, absent.result) == ("never", {"status": "absent"})
    assert (await one(store, "prepare")).superseded


# Looking


async def test_jobs_are_listed_newest_first_by_kind_and_state(store: Store):
    await tenant(store)
    old, batch = await submitted(store, documents("a")), job(kind="embeddings")
    await store.submit_job(op(), batch, [request("r")])
    new = await submitted(store, documents("a"))
    await store.change_job(op(), "acme", old, "cancel")

    async def listed(*args: Any) -> list[str]:
        return [each.id for each in await store.list_jobs("acme", *args)]

    assert await listed(None, [], "", 10) == [new, batch.id, old]
    assert await listed(None, [], "", 2) == [new, batch.id]
    assert await listed(None, [], batch.id, 10) == [old]
    assert await listed("embeddings", [], "", 10) == [batch.id]
    assert await listed(None, ["cancelled", "running"], "", 10) == [old]
    assert await store.list_jobs("other", None, [], "", 10) == []


async def test_items_are_listed_by_number_and_state(store: Store):
    await tenant(store)
    kept = await submitted(store, documents("abcd"))
    items = (await claimed(store, "prepare", 2)).items
    await settle(store, items[:1], "dead", fault=BAD)
    await settle(store, items[1:], "retry", fault=BUSY, delay_s=5)

    async def listed(states: list[Any], after: int = -1, limit: int = 10) -> list[str]:
        return [each.name for each in await store.list_items("acme", kept, states, after, limit)]

    assert await listed([]) == ["a", "b", "c", "d"]
    assert await listed([], 0, 2) == ["b", "c"]
    assert await listed(["dead"]) == ["a"]
    assert await listed(["dead"], 0) == []
    assert await listed(["delayed", "ready"]) == ["b", "c", "d"]
    assert await store.list_items("other", kept, [], -1, 10) == []
    dead, delayed, *_ = await store.list_items("acme", kept, [], -1, 10)
    assert (dead.error_kind, dead.error_code, dead.error_text) == ("invalid", "bad_text", BAD.text)
    assert delayed.run_at == delayed.updated_at + 5
    assert (delayed.attempts, dead.attempts) == (1, 1)


async def test_stats_count_a_tenants_items_by_how_far_they_are(store: Store):
    await tenant(store)
    await tenant(store, "other")
    await submitted(store, documents("abcdef"))
    await submitted(store, documents("xyz"), "other")
    first = (await claimed(store, "prepare", 9)).items
    mine = [item for item in first if item.name in "abcdef"]
    await settle(store, mine[:3], "advance", cost=1.0)
    await settle(store, mine[3:4], "dead", fault=BAD)
    embedding = (await claimed(store, "embed", 1)).items
    await settle(store, embedding, "done")
    assert await store.job_stats("acme") == Stats(
        total=6, uploaded=0, preparing=2, embedding=2, ready=1, failed=1
    )
    assert await store.job_stats("other") == Stats(total=3, preparing=3)
    assert await store.job_stats("nobody") == Stats()


# Cancel, pause, resume


async def test_cancel_ends_what_waits_and_lets_what_is_worked_on_finish(store: Store, clock: Any):
    await tenant(store)
    kept = await submitted(store, documents("abcde"))
    items = (await claimed(store, "prepare", 4)).items
    await settle(store, items[:1], "retry", fault=BUSY, delay_s=5)
    changed = await store.change_job(op(), "acme", kept, "cancel")
    assert (changed.state, changed.cancelled) == ("cancelling", 2)
    assert (await store.change_job(op(), "acme", kept, "cancel")).state == "cancelling"
    await settle(store, items[1:2], "done")
    await settle(store, items[2:3], "advance", cost=1.0)
    await settle(store, items[3:4], "release")
    ended = await found(store, kept)
    assert (ended.state, ended.done, ended.cancelled) == ("cancelled", 1, 4)
    assert ended.times["cancelling"] <= ended.times["cancelled"] == clock.now
    with pytest.raises(Conflict):
        await store.change_job(op(), "acme", kept, "pause")
    with pytest.raises(Conflict):
        await store.retry_items(op(), "acme", kept, Replay())
    assert (await claimed(store, "embed")).items == ()


async def test_what_ended_with_all_done_is_not_cancelled(store: Store):
    await tenant(store)
    kept = await submitted(store, documents("a"))
    item = await one(store, "prepare")
    await store.change_job(op(), "acme", kept, "cancel")
    await settle(store, [item], "dead", fault=BAD)
    assert (await found(store, kept)).state == "cancelled"


async def test_another_tenants_job_cannot_be_changed(store: Store):
    await tenant(store)
    kept = await submitted(store, documents("a"))
    for change in ("cancel", "pause", "resume"):
        with pytest.raises(NotFound):
            await store.change_job(op(), "other", kept, change)
    with pytest.raises(NotFound):
        await store.retry_items(op(), "other", kept, Replay())


async def test_a_large_job_stops_pauses_and_goes_on_in_parts(
    store: Store, monkeypatch: pytest.MonkeyPatch
):
    for name in ("move", "stop"):
        monkeypatch.setattr(f"serve.jobs.progress.{name}.__defaults__", (3,))
    await tenant(store)
    kept = await submitted(store, documents("abcdefgh"))
    await store.change_job(op(), "acme", kept, "pause")
    assert (await claimed(store, "prepare")).items == ()  # what no tick has come to, either
    await store.tick()
    states = {each.state: each.items for each in (await view(store, kept)).counts}
    assert states == {"paused": 8}
    await store.change_job(op(), "acme", kept, "resume")
    assert len((await claimed(store, "prepare", 2)).items) == 2
    await store.tick()
    assert len((await claimed(store, "prepare", 2)).items) == 2
    await store.change_job(op(), "acme", kept, "cancel")
    assert (await found(store, kept)).cancelled == 3
    await store.tick()
    assert (await found(store, kept)).cancelled == 4
    await store.leave("w")
    assert (await found(store, kept)).state == "cancelled"


async def test_what_pauses_is_not_claimed_until_it_goes_on(store: Store, clock: Any):
    await tenant(store)
    kept = await submitted(store, documents("abcd"))
    items = (await claimed(store, "prepare", 3)).items
    await settle(store, items[:1], "retry", fault=BUSY, delay_s=5)
    paused = await store.change_job(op(), "acme", kept, "pause")
    assert paused.paused
    await settle(store, items[1:2], "advance", cost=1.0, payload={"x": 1})
    await settle(store, items[2:3], "release")
    clock.advance(5)
    await store.tick()
    for stage in ("prepare", "embed"):
        assert (await claimed(store, stage)).items == ()
    assert {each.state for each in (await view(store, kept)).counts} == {"paused"}
    await store.change_job(op(), "acme", kept, "resume")
    assert [item.name for item in (await claimed(store, "prepare")).items] == ["a", "c", "d"]
    assert [item.payload for item in (await claimed(store, "embed")).items] == [{"x": 1}]
    assert (await told(store, kept))[1:] == ["job.running", "job.paused", "job.resumed"]


async def test_a_paused_job_ends_when_all_was_under_way(store: Store):
    await tenant(store)
    kept = await submitted(store, documents("a"))
    item = await one(store, "prepare")
    await store.change_job(op(), "acme", kept, "pause")
    await settle(store, [item], "done")
    assert (await found(store, kept)).state == "completed"


async def test_a_paused_job_can_be_cancelled(store: Store):
    await tenant(store)
    kept = await submitted(store, documents("ab"))
    await store.change_job(op(), "acme", kept, "pause")
    assert (await store.change_job(op(), "acme", kept, "cancel")).state == "cancelled"
    assert (await found(store, kept)).cancelled == 2


# How a job ends


@pytest.mark.parametrize(
    ("words", "state"),
    [
        (["done", "skipped"], "completed"),
        (["done", "dead"], "completed_with_errors"),
        (["skipped", "dead"], "completed_with_errors"),
        (["dead", "dead"], "failed"),
    ],
)
async def test_a_job_ends_as_its_items_did(store: Store, words: list[str], state: str):
    await tenant(store)
    kept = await submitted(store, documents("ab"))
    items = (await claimed(store, "prepare")).items
    for item, word in zip(items, words, strict=True):
        await settle(store, [item], word, tokens=4, fault=BAD if word == "dead" else None)
    ended = await found(store, kept)
    assert (ended.state, ended.tokens) == (state, 8)
    assert list(ended.times) == ["queued", "running", state]


async def test_the_first_dead_item_may_stop_a_job(store: Store):
    await tenant(store)
    kept = await submitted(store, documents("abcd"), on_error="stop")
    items = (await claimed(store, "prepare", 3)).items
    await settle(store, items[:1], "done")
    await settle(store, items[1:2], "dead", fault=BAD)
    assert (await found(store, kept)).state == "cancelling"
    await settle(store, items[2:], "done")
    ended = await found(store, kept)
    assert (ended.state, ended.done, ended.dead, ended.cancelled) == ("failed", 2, 1, 1)
    with pytest.raises(Conflict):
        await store.retry_items(op(), "acme", kept, Replay())


async def test_a_job_expires(store: Store, clock: Any):
    await tenant(store)
    kept = await submitted(store, documents("ab"), expires_at=clock.now + 10)
    later = await submitted(store, documents("a"), expires_at=clock.now + 100)
    item = await one(store, "prepare")
    clock.advance(10)
    await store.keep("w", [item.id])
    await store.tick()
    assert (await found(store, kept)).state == "cancelling"
    await settle(store, [item], "done")
    ended = await found(store, kept)
    assert (ended.state, ended.done, ended.cancelled) == ("expired", 1, 1)
    assert (await found(store, later)).state == "queued"


async def test_a_job_whose_time_is_over_is_not_tried_again(store: Store, clock: Any):
    await tenant(store)
    kept = await submitted(store, documents("ab"), expires_at=clock.now + 10)
    items = (await claimed(store, "prepare")).items
    await settle(store, items[:1], "done")
    await settle(store, items[1:], "dead", fault=BAD)
    clock.advance(10)
    with pytest.raises(Conflict):
        await store.retry_items(op(), "acme", kept, Replay())


# Trying again


async def test_dead_items_are_tried_again(store: Store):
    await tenant(store)
    kept = await submitted(store, documents("abc"))
    items = (await claimed(store, "prepare")).items
    await settle(store, items[:1], "done")
    await settle(store, items[1:2], "dead", fault=BAD)
    await settle(store, items[2:], "dead", fault=Fault("server", "broken", ""))
    before = await found(store, kept)

    async def retried(**which: Any) -> int:
        return await store.retry_items(op(), "acme", kept, Replay(**which))

    assert await retried(dry_run=True) == 2
    assert await retried(error_code="broken", dry_run=True) == 1
    assert await retried(seq=1, dry_run=True) == 1
    assert await retried(seq=0) == 0
    assert await found(store, kept) == before
    assert await retried(error_code="broken") == 1
    again = await found(store, kept)
    assert (again.state, again.dead, again.cost_left) == ("queued", 1, 10.0)
    item = await one(store, "prepare")
    assert (item.name, item.attempts, item.payload) == ("c", 0, {"text": "c"})
    await settle(store, [item], "done")
    assert await retried() == 1
    await settle(store, [await one(store, "prepare")], "done")
    ended = await found(store, kept)
    assert (ended.state, ended.done, ended.dead) == ("completed", 3, 0)
    views = await store.list_items("acme", kept, [], -1, 10)
    assert {each.error_code for each in views} == {""}


async def test_dead_items_are_tried_again_in_parts(store: Store):
    await tenant(store)
    kept = await submitted(store, documents("abcde"))
    await settle(store, (await claimed(store, "prepare")).items, "dead", fault=BAD)
    for part, count in (((0, 2), 2), ((0, 2), 0), ((2, 4), 2), ((4, 6), 1), ((6, 8), 0)):
        assert await store.retry_items(op(), "acme", kept, Replay(part=part)) == count
    assert (await found(store, kept)).dead == 0
    assert len((await claimed(store, "prepare")).items) == 5


async def test_what_is_tried_again_has_no_result_yet(store: Store):
    await tenant(store)
    kept = await submitted(store, documents("a"))
    await settle(store, [await one(store, "prepare")], "dead", fault=BAD, result={"status": 400})
    await store.retry_items(op(), "acme", kept, Replay())
    assert [each.result for each in await store.list_items("acme", kept, [], -1, 10)] == [{}]


async def test_a_replay_never_overwrites_what_was_accepted_since(store: Store):
    uuid = await tenant(store)
    kept = await submitted(store, documents("a"), collection=uuid)
    await settle(store, [await one(store, "prepare")], "dead", fault=BAD)
    await submitted(store, documents("a"), collection=uuid)
    await store.retry_items(op(), "acme", kept, Replay())
    items = (await claimed(store, "prepare")).items
    assert [(item.generation, item.superseded) for item in items] == [(2, False), (1, True)]


async def test_what_is_tried_again_of_a_paused_job_waits_for_it(store: Store):
    await tenant(store)
    kept = await submitted(store, documents("ab"))
    item = await one(store, "prepare")
    await settle(store, [item], "dead", fault=BAD)
    await store.change_job(op(), "acme", kept, "pause")
    assert await store.retry_items(op(), "acme", kept, Replay()) == 1
    assert (await claimed(store, "prepare")).items == ()
    await store.change_job(op(), "acme", kept, "resume")
    assert [item.name for item in (await claimed(store, "prepare")).items] == ["a", "b"]


# Batches: a job that is read from a file, and writes others


async def test_events_tell_of_states_and_at_most_two_a_second_of_progress(store: Store, clock: Any):
    await tenant(store)
    kept = await submitted(store, documents("abcd"))
    clock.advance(1)
    items = (await claimed(store, "prepare")).items
    for item in items[:3]:
        clock.advance(0.3)
        await settle(store, [item], "done")
    assert await told(store, kept) == ["job.queued", "job.running", "job.progress"]
    clock.advance(0.5)
    await store.tick()  # what was too soon to tell
    events = await store.job_events("acme", kept, 0, 100)
    assert events[-1].type == "job.progress"
    assert events[-1].data["done"] == 3
    await store.tick()
    await settle(store, items[3:], "done")
    later = await store.job_events("acme", kept, events[-1].number, 100)
    assert [(each.type, each.data["done"]) for each in later] == [("job.completed", 4)]
    assert await store.job_events("other", kept, 0, 100) == []


async def test_events_of_all_tenants_are_read_from_a_number_on(store: Store):
    await tenant(store)
    await tenant(store, "other")
    (before,) = await store.events(-1, 1, 0)
    first = await submitted(store, documents("a"))
    second = await submitted(store, documents("a"), "other")
    events = await store.events(before.number, 10, 0)
    assert [(each.job, each.tenant) for each in events] == [(first, "acme"), (second, "other")]
    assert [each.job for each in await store.events(events[0].number, 10, 0)] == [second]
    (last,) = await store.events(-1, 1, 0)
    assert last.number == events[1].number
    assert await store.events(last.number, 10, 0) == []


async def test_jobs_that_ended_long_ago_are_forgotten(store: Store, clock: Any):
    await tenant(store)
    old = [await submitted(store, documents("abc")) for _ in range(3)]
    for each in old:
        await store.change_job(op(), "acme", each, "cancel")
    kept_open = await submitted(store, documents("a"))
    clock.advance(31 * 86_400)
    young = await submitted(store, documents("a"))
    await store.change_job(op(), "acme", young, "cancel")
    await store.tick()
    listed = await store.list_jobs("acme", None, [], "", 10)
    assert [each.id for each in listed] == [young, kept_open]
    assert await store.list_items("acme", old[0], [], -1, 10) == []
    assert await told(store, old[0]) == []
    assert await store.job_stats("acme") == Stats(total=2, uploaded=1, cancelled=1)
