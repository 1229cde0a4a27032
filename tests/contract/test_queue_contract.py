"""What every Store promises of its queue to the workers."""

import asyncio
from collections.abc import Awaitable
from typing import Any

from serve.items import Item, Replay, Settlement
from serve.records import Key
from tests.contract.work import (
    BAD,
    BUSY,
    Store,
    claimed,
    document,
    documents,
    found,
    one,
    op,
    request,
    settle,
    settlement,
    submitted,
    tenant,
)


LEASE_S = 15


def names(claim: Any) -> str:
    return "".join(item.name[0] for item in claim.items)


async def passes(store: Store, clock: Any, seconds: float, held: dict[str, list[int]]) -> None:
    """Time passes; these owners say that they live, with what they hold."""
    for _ in range(int(seconds / 5)):
        clock.advance(5)
        for owner, items in held.items():
            await store.keep(owner, items)
        await store.tick()


# Claims


async def test_a_claim_holds_what_a_worker_needs(store: Store):
    uuid = await tenant(store)
    kept = await submitted(store, [document("a", 7.0, "hash")], collection=uuid)
    claim = await claimed(store, "prepare")
    (item,) = claim.items
    assert (item.job, item.seq, item.name, item.task, item.stage) == (
        kept,
        0,
        "a",
        "document",
        "prepare",
    )
    assert (item.cost, item.attempts, item.payload, item.sha256) == (7.0, 0, {"text": "a"}, "hash")
    assert (item.generation, item.chunks_max, item.superseded) == (1, 0, False)
    assert claim.jobs[kept].state == "running"
    assert claim.collections[uuid].name == "docs"
    assert claim.payers[kept].id == "acme-key"
    assert not claim.alone
    assert (await found(store, kept)).times.keys() == {"queued", "running"}


async def test_a_job_is_paid_for_by_its_family_or_else_its_tenant(store: Store):
    await tenant(store)
    await store.rotate_key(op(), "acme-key", Key("new", "", "", "cd", 2.0), 0.0, "test")
    kept = await submitted(store, documents("ab"))
    payer = (await claimed(store, "prepare", 1)).payers[kept]
    assert (payer.id, payer.family) == ("new", "acme-key")
    await store.revoke_key(op(), "new", "cli:test")
    payer = (await claimed(store, "prepare", 1)).payers[kept]
    assert (payer.id, payer.tenant, payer.tier) == ("acme-key", "acme", "free")


async def test_a_claim_is_bounded_by_items_and_by_cost(store: Store):
    await tenant(store)
    await submitted(store, documents("abcdef", cost=10))
    assert names(await store.claim("w", "prepare", 2, 1e9, 0)) == "ab"
    assert names(await store.claim("w", "prepare", 9, 25, 0)) == "cd"
    assert names(await store.claim("w", "prepare", 9, 1, 0)) == "e"  # one at least
    assert names(await claimed(store, "prepare")) == "f"
    assert names(await claimed(store, "prepare")) == ""


async def test_a_claim_waits_for_the_first_item(store: Store):
    await tenant(store)
    waiting = [asyncio.create_task(store.claim(f"w{n}", "prepare", 1, 1e9, 30)) for n in range(3)]
    await asyncio.sleep(0)
    await submitted(store, documents("abc"))
    claims = await asyncio.gather(*waiting)
    assert sorted(names(claim) for claim in claims) == ["a", "b", "c"]


async def woken(store: Store, stage: Any, owner: str, *acts: Awaitable[Any]) -> Item:
    """What one who waits gets once all this has happened."""
    waiting = asyncio.create_task(store.claim(owner, stage, 9, 1e9, 1000))
    await asyncio.sleep(0)
    for act in acts:
        await act
    (item,) = (await waiting).items
    return item


async def test_whatever_makes_an_item_ready_wakes_who_waits(store: Store, clock: Any):
    await tenant(store)
    kept = await submitted(store, [request("a")], kind="embeddings")
    item = await one(store, "embed")
    item = await woken(store, "embed", "1", settle(store, [item], "release"))
    on = settle(store, [item], "advance", stage="predict", cost=1.0)
    item = await woken(store, "predict", "2", on)
    await settle(store, [item], "release", delay_s=3)
    clock.advance(3)
    item = await woken(store, "predict", "3", store.tick())
    item = await woken(store, "predict", "4", store.leave("3"))
    await store.change_job(op(), "acme", kept, "pause")
    again = store.change_job(op(), "acme", kept, "resume")
    item = await woken(store, "predict", "5", settle(store, [item], "release"), again)
    dead, replay = settle(store, [item], "dead"), store.retry_items(op(), "acme", kept, Replay())
    item = await woken(store, "predict", "6", dead, replay)
    item = await woken(store, "prepare", "7", settle(store, [item], "done"))
    assert item.task == "finish"


async def test_events_wake_everybody_who_waits_for_them(store: Store):
    await tenant(store)
    (last,) = await store.events(-1, 1, 0)
    waiting = [asyncio.create_task(store.events(last.number, 10, 1000)) for _ in range(3)]
    await asyncio.sleep(0)
    kept = await submitted(store, documents("a"))
    for events in await asyncio.gather(*waiting):
        assert [(each.job, each.type) for each in events] == [(kept, "job.queued")]


# The fair order


async def test_tenants_take_turns_by_their_weight(store: Store):
    for name in ("a", "b"):
        await tenant(store, name)
    await submitted(store, documents([f"a{n}" for n in range(20)]), "a", weight=4.0)
    await submitted(store, documents([f"b{n}" for n in range(20)]), "b", weight=1.0)
    assert names(await claimed(store, "prepare", 10)).count("a") == 8
    assert names(await claimed(store, "prepare", 10)).count("a") == 8


async def test_a_newcomer_does_not_wait_behind_anothers_backlog(store: Store):
    for name in ("a", "b"):
        await tenant(store, name)
    await submitted(store, documents([f"a{n}" for n in range(50)]), "a")
    await claimed(store, "prepare", 10)
    await submitted(store, documents("b"), "b")
    assert "b" in names(await claimed(store, "prepare", 2))


async def test_a_weight_changes_for_all_that_waits(store: Store):
    for name in ("a", "b"):
        await tenant(store, name)
    await submitted(store, documents([f"a{n}" for n in range(40)]), "a", weight=1.0)
    await submitted(store, documents([f"b{n}" for n in range(40)]), "b", weight=1.0)
    assert names(await claimed(store, "prepare", 10)).count("a") == 5
    await submitted(store, documents(["a"]), "a", weight=4.0)
    assert names(await claimed(store, "prepare", 20)).count("a") in (15, 16)
    old = await submitted(store, documents(["b"]), "b", weight=1.0)
    assert (await found(store, old, "b")).weight == 1.0


async def test_a_priority_orders_its_tenants_own_items_and_moves_nobody_else(store: Store):
    for name in ("a", "b"):
        await tenant(store, name)
    await submitted(store, documents([f"x{n}" for n in range(4)]), "a", priority=10)
    await submitted(store, documents([f"b{n}" for n in range(6)]), "b")
    await submitted(store, documents(["y1", "y2"]), "a", priority=90)
    await submitted(store, documents(["z1"]), "a", priority=50)
    order = names(await claimed(store, "prepare"))
    assert [each for each in order if each != "b"] == list("yyzxxxx")
    places = [at for at, each in enumerate(order) if each == "b"]
    turns = [1, 3, 5, 7, 9, 11]  # as without priorities, but for who is first of equals
    assert all(abs(at - turn) <= 1 for at, turn in zip(places, turns, strict=True))


async def test_what_was_cancelled_makes_place_for_its_tenants_later_items(store: Store):
    for name in ("a", "b"):
        await tenant(store, name)
    first = await submitted(store, documents([f"x{n}" for n in range(20)]), "a")
    await submitted(store, documents([f"b{n}" for n in range(20)]), "b")
    await submitted(store, documents([f"y{n}" for n in range(5)]), "a")
    await store.change_job(op(), "a", first, "cancel")
    assert names(await claimed(store, "prepare", 10)).count("y") == 5
    await submitted(store, documents([f"z{n}" for n in range(5)]), "a")
    assert names(await claimed(store, "prepare", 10)).count("z") == 5


async def test_what_was_paused_makes_place_and_comes_back_behind(store: Store):
    for name in ("a", "b"):
        await tenant(store, name)
    first = await submitted(store, documents([f"x{n}" for n in range(3)]), "a")
    await submitted(store, documents([f"b{n}" for n in range(20)]), "b")
    await submitted(store, documents([f"y{n}" for n in range(3)]), "a")
    await store.change_job(op(), "a", first, "pause")
    assert names(await claimed(store, "prepare", 4)).count("y") == 2
    await store.change_job(op(), "a", first, "resume")
    assert names(await claimed(store, "prepare", 8)).replace("b", "") == "yxxx"


async def test_classes_share_by_their_shares_while_both_wait(store: Store):
    await tenant(store)
    await submitted(store, documents([f"i{n}" for n in range(300)]), klass="interactive")
    await submitted(store, documents([f"b{n}" for n in range(300)]), klass="bulk")
    order = "".join([names(await claimed(store, "prepare", 5)) for _ in range(40)])
    assert order.count("i") == 180
    assert order[:50].count("b") in (5, 10)


async def test_idle_time_earns_a_class_no_credit(store: Store):
    await tenant(store)
    await submitted(store, documents([f"b{n}" for n in range(300)]), klass="bulk")
    for _ in range(5):
        await claimed(store, "prepare", 50)
    await submitted(store, documents([f"i{n}" for n in range(900)]), klass="interactive")
    order = "".join([names(await claimed(store, "prepare", 50)) for _ in range(11)])
    # Nine times what bulk was given last, and not what it was given in all.
    assert order == "i" * 450 + "b" * 50 + "i" * 50


async def test_a_claim_takes_what_is_left_from_the_other_class(store: Store):
    await tenant(store)
    await submitted(store, documents(["i1", "i2"]), klass="interactive")
    await submitted(store, documents(["b1", "b2", "b3"]), klass="bulk")
    assert names(await claimed(store, "prepare", 4)) == "iibb"


async def test_what_comes_back_from_a_wait_overtakes_nobody(store: Store, clock: Any):
    for name in ("a", "b"):
        await tenant(store, name)
    await submitted(store, documents([f"a{n}" for n in range(20)]), "a")
    back = (await claimed(store, "prepare")).items
    await settle(store, back, "release", delay_s=5)
    await submitted(store, documents([f"b{n}" for n in range(20)]), "b")
    assert names(await claimed(store, "prepare", 4)) == "bbbb"
    clock.advance(5)
    await store.tick()
    assert names(await claimed(store, "prepare", 10)).count("a") in (5, 6)


# Settlements


async def test_an_item_goes_through_its_stages(store: Store):
    await tenant(store)
    kept = await submitted(store, documents("a", cost=10))
    item = await one(store, "prepare")
    await settle(store, [item], "advance", stage="predict", cost=4.0, payload={"x": 1})
    assert (await found(store, kept)).cost_left == 4.0
    assert (await claimed(store, "embed")).items == ()
    item = await one(store, "predict")
    assert (item.cost, item.payload) == (4.0, {"x": 1})
    await settle(store, [item], "advance", cost=6.0)
    item = await one(store, "embed")
    assert (item.cost, item.payload) == (6.0, {"x": 1})
    await settle(store, [item], "done", tokens=5, result={"chunks": 2})
    (seen,) = await store.list_items("acme", kept, [], -1, 10)
    assert (seen.state, seen.tokens, seen.result) == ("done", 5, {"chunks": 2})


async def test_a_failed_try_is_repeated_until_no_attempt_is_left(store: Store, clock: Any):
    await tenant(store)
    kept = await submitted(store, documents("a"))
    for attempt in range(5):
        item = await one(store, "prepare")
        assert item.attempts == attempt
        await settle(store, [item], "retry", fault=BUSY, delay_s=60)
        assert (await claimed(store, "prepare")).items == ()
        clock.advance(59)
        await store.tick()
        assert (await claimed(store, "prepare")).items == ()
        clock.advance(1)
        await store.tick()
    ended = await found(store, kept)
    assert (ended.state, ended.dead) == ("failed", 1)


async def test_the_next_stage_has_all_its_attempts(store: Store):
    await tenant(store)
    await submitted(store, documents("a"))
    await settle(store, [await one(store, "prepare")], "retry", fault=BUSY)
    await settle(store, [await one(store, "prepare")], "advance", cost=1.0)
    assert (await one(store, "embed")).attempts == 0


async def test_what_is_given_back_burns_no_attempt(store: Store, clock: Any):
    await tenant(store)
    kept = await submitted(store, documents("a"))
    for _ in range(20):
        await settle(store, [await one(store, "prepare")], "release", fault=BUSY, delay_s=5)
        clock.advance(5)
        await store.tick()
    item = await one(store, "prepare")
    assert item.attempts == 0
    await settle(store, [item], "done")
    (seen,) = await store.list_items("acme", kept, [], -1, 10)
    assert (seen.state, seen.error_kind) == ("done", "")


async def test_a_settlement_counts_once(store: Store):
    await tenant(store)
    kept = await submitted(store, documents("ab"))
    first, second = (await claimed(store, "prepare")).items
    done = settlement(first, "done", tokens=3)
    assert await store.settle([done, done]) == [True, False]
    assert await store.settle([done, settlement(second, "dead", fault=BAD)]) == [False, True]
    ended = await found(store, kept)
    assert (ended.done, ended.dead, ended.tokens) == (1, 1, 3)
    assert await store.settle([Settlement(10**9, 1, "done")]) == [False]


async def test_many_jobs_are_settled_at_once(store: Store):
    await tenant(store)
    await tenant(store, "other")
    some = [await submitted(store, documents("a")) for _ in range(5)]
    theirs = await submitted(store, documents("b"), "other")
    await settle(store, (await claimed(store, "prepare")).items, "done", tokens=1)
    for each in some:
        assert (await found(store, each)).state == "completed"
    assert (await found(store, theirs, "other")).tokens == 1


# Leases


async def test_leases_hold_while_their_owner_lives(store: Store, clock: Any):
    await tenant(store)
    await submitted(store, documents("a"))
    item = await one(store, "prepare")
    await passes(store, clock, 100, {"w": [item.id]})
    assert (await claimed(store, "prepare")).items == ()
    await settle(store, [item], "done")


async def test_what_a_dead_owner_had_goes_to_another_and_its_late_word_is_refused(
    store: Store, clock: Any
):
    await tenant(store)
    kept = await submitted(store, documents("a"))
    item = await one(store, "prepare", "dies")
    await passes(store, clock, LEASE_S + 5, {})
    again = await one(store, "prepare", "lives")
    assert (again.id, again.attempts) == (item.id, 0)
    assert again.lease > item.lease
    assert await store.keep("dies", [item.id]) == {item.id}  # it comes back
    assert await store.settle([settlement(item, "done", tokens=9)]) == [False]
    await settle(store, [again], "done", tokens=2)
    assert (await found(store, kept)).tokens == 2


async def test_after_an_absence_of_the_store_everybody_has_time_to_say_that_he_lives(
    store: Store, clock: Any
):
    await tenant(store)
    await submitted(store, documents("a"))
    item = await one(store, "prepare")
    await store.tick()
    clock.advance(3600)
    store._answered_at -= 3600
    await store.tick()
    await settle(store, [item], "release")
    item = await one(store, "prepare")
    clock.advance(LEASE_S + 1)
    await store.tick()
    assert await store.settle([settlement(item, "done")]) == [False]


async def test_a_claim_whose_reply_was_lost_goes_back(store: Store, clock: Any):
    await tenant(store)
    await submitted(store, documents("ab"))
    await one(store, "prepare")  # the reply never came
    held = await one(store, "prepare")
    await passes(store, clock, LEASE_S, {"w": [held.id]})
    assert (await claimed(store, "prepare")).items == ()  # it may still come
    await passes(store, clock, 5, {"w": [held.id]})
    assert names(await claimed(store, "prepare")) == "a"
    assert await store.keep("w", [held.id]) == frozenset()


async def test_who_leaves_gives_back_and_gets_nothing_any_more(store: Store, clock: Any):
    await tenant(store)
    kept = await submitted(store, documents("abc"))
    held = (await claimed(store, "prepare", 2)).items
    await store.leave("w")
    assert (await claimed(store, "prepare")).items == ()  # a claim that was under way
    assert await store.keep("w", [item.id for item in held]) == {item.id for item in held}
    assert names(await claimed(store, "prepare", owner="w2")) == "abc"
    await store.leave("never seen")
    await passes(store, clock, 100, {})
    assert (await found(store, kept)).total == 3


async def test_an_item_that_crashes_its_worker_comes_alone_and_is_given_up(
    store: Store, clock: Any
):
    await tenant(store)
    kept = await submitted(store, documents("abc"))
    for crash in range(2):
        claim = await claimed(store, "prepare", 2, f"w{crash}")
        assert (names(claim), claim.alone) == ("ab", False)
        await passes(store, clock, LEASE_S + 5, {})
    for crash in range(2, 10):
        claim = await claimed(store, "prepare", 9, f"w{crash}")
        assert (names(claim), claim.alone) == ("a", True)
        # Another such one would only wait in that process; another process may have it.
        assert names(await claimed(store, "prepare", 9, f"w{crash}")) == ""
        assert names(await claimed(store, "prepare", 9, f"other{crash}")) == "b"
        assert names(await claimed(store, "prepare", 9, f"w{crash}")) == "c"
        await store.leave(f"other{crash}")
        await passes(store, clock, LEASE_S + 5, {})
    dead, *others = await store.list_items("acme", kept, [], -1, 9)
    assert (dead.state, dead.error_code, dead.attempts) == ("dead", "crashed", 0)
    assert {each.state for each in others} == {"ready"}
    assert names(await claimed(store, "prepare", 9, "last")) == "b"
    assert names(await claimed(store, "prepare", 9, "other last")) == "c"
    assert (await found(store, kept)).dead == 1


async def test_efforts_say_how_often_a_task_succeeds_and_how_long_it_takes(
    store: Store, clock: Any
):
    uuid = await tenant(store)
    await submitted(store, documents("abc"), collection=uuid)
    first, second, third = (await claimed(store, "prepare")).items
    clock.advance(2)
    await settle(store, [first, second], "done")
    await settle(store, [third], "retry", fault=BUSY, delay_s=60)
    assert [
        (each.task, each.stage, each.word, each.tries, each.seconds)
        for each in await store.list_efforts("acme", 1)
    ] == [("document", "prepare", "done", 2, 4.0), ("document", "prepare", "retry", 1, 2.0)]
    assert await store.list_efforts("other", 1) == []
    clock.advance(86_400)
    assert await store.list_efforts("acme", 1) == []
    assert len(await store.list_efforts("acme", 2)) == 2
    clock.advance(91 * 86_400)
    await store.tick()
    assert await store.list_efforts("acme", 1000) == []
