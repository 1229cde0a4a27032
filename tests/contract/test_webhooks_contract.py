"""What every Store promises of webhooks and of what is delivered to them."""

import asyncio
import json
from collections.abc import Sequence
from dataclasses import replace
from itertools import count
from typing import Any, Protocol

import pytest

from serve.errors import Conflict, NotFound, QuotaExceeded
from serve.items import Fault, Job, NewItem, Replay, Settlement
from serve.job_ports import Deliveries, Jobs, Queue, Webhooks
from serve.ports import Collections
from serve.records import Collection
from serve.webhooks import Due, Share, Tried, Webhook


class Store(Webhooks, Deliveries, Jobs, Queue, Collections, Protocol):
    async def tick(self) -> None: ...


SHARE = Share(most=10, tenant_most=10, lease_s=45.0)
DAY_S = 86_400.0
LONG_S = 3600.0

_ops = count()


def op() -> str:
    return f"hook-op-{next(_ops)}"


async def hooked(store: Store, tenant: str = "acme", **fields: Any) -> Webhook:
    made = Webhook(
        f"wh_{next(_ops):04}", tenant, f"https://{tenant}.example/hook", "sealed", 1.0, **fields
    )
    return await store.create_webhook(op(), made, 100)


async def handed_over(store: Store, tenant: str = "acme", webhook: str = "", items: int = 1) -> Job:
    uuid = f"{next(_ops):032x}"
    await store.create_collection(op(), Collection(uuid, tenant, uuid, "m", "r", 4, 1.0))
    job = Job(
        f"job_{next(_ops):04}",
        tenant,
        "key",
        "documents",
        "bulk",
        1.0,
        1.0,
        collection=uuid,
        webhook=webhook,
    )
    new = [NewItem(f"doc-{place}", "document", "prepare", 1.0, {}) for place in range(items)]
    return (await store.submit_job(op(), job, new)).job


async def worked_off(store: Store, word: str = "done") -> None:
    claim = await store.claim("worker", "prepare", 100, 1e6, 0)
    fault = Fault("poison", "bad", "It is bad.") if word == "dead" else None
    settlements = [Settlement(one.id, one.lease, word, fault=fault) for one in claim.items]
    assert all(await store.settle(settlements))


async def one_due(store: Store) -> Due:
    (due,) = await store.claim_deliveries(SHARE, 0)
    return due


async def soon(waiting: asyncio.Task[Sequence[Due]]) -> Sequence[Due]:
    """What a claim found that was woken: else it would have waited for an hour."""
    async with asyncio.timeout(20):
        return await waiting


async def settled(store: Store, due: Due, word: str, **fields: Any) -> bool:
    return await store.settle_delivery(Tried(due.delivery.id, due.delivery.lease, word, **fields))


async def log(store: Store, webhook: Webhook, states: tuple[str, ...] = (), limit: int = 100):
    return await store.list_deliveries(webhook.tenant, webhook.id, states, "", limit)


# Webhooks


async def test_a_webhook_is_its_tenants_only(store: Store):
    mine = await hooked(store)
    assert await store.find_webhook("acme", mine.id) == mine
    assert await store.find_webhook("other", mine.id) is None
    assert await store.list_webhooks("other") == []
    for call in (
        store.rotate_webhook(op(), "other", mine.id, "fresh", 1),
        store.enable_webhook("other", mine.id),
        store.list_deliveries("other", mine.id, (), "", 10),
        store.redeliver(op(), "other", mine.id, "msg_1"),
        store.send_test(op(), "other", mine.id),
    ):
        with pytest.raises(NotFound) as caught:
            await call
        assert caught.value.code == "webhook_not_found"
    assert not await store.delete_webhook(op(), "other", mine.id)
    assert await store.list_webhooks("acme") == [mine]
    assert await store.delete_webhook(op(), "acme", mine.id)
    assert await store.find_webhook("acme", mine.id) is None


async def test_a_tenant_has_so_many_webhooks_at_most(store: Store):
    first, second = [Webhook(f"wh_{place}", "acme", "u", "s", 1.0) for place in "ab"]
    made_by = op()
    await store.create_webhook(made_by, first, 1)
    assert await store.create_webhook(made_by, first, 1) == first  # a repeat
    with pytest.raises(QuotaExceeded) as caught:
        await store.create_webhook(op(), second, 1)
    assert caught.value.code == "webhooks"
    await store.create_webhook(op(), replace(second, tenant="other"), 1)


async def test_a_rotated_secret_stays_live_for_its_overlap(store: Store, clock):
    hook = await hooked(store)
    rotated = await store.rotate_webhook(op(), "acme", hook.id, "fresh", 60)
    assert await store.find_webhook("acme", hook.id) == rotated
    assert rotated.live(clock()) == ("fresh", "sealed")
    assert rotated.live(clock() + 60) == ("fresh",)
    again = await store.rotate_webhook(op(), "acme", hook.id, "third", 60)
    assert again.live(clock()) == ("third", "fresh")


# What makes a delivery


@pytest.mark.parametrize(("word", "state"), [("done", "completed"), ("dead", "failed")])
async def test_the_end_of_a_job_is_delivered_once(store: Store, clock, word, state):
    hook = await hooked(store)
    job = await handed_over(store, webhook=hook.id, items=2)
    assert await log(store, hook) == []
    await worked_off(store, word)
    (delivery,) = await log(store, hook)
    counts = {"done": 0, "skipped": 0, "dead": 0, "cancelled": 0, "tokens": 0, word: 2}
    assert json.loads(delivery.payload) == {
        "type": f"job.{state}",
        "timestamp": "1970-01-01T00:16:40.000Z",
        "data": {"id": job.id, "state": state, "total": 2, **counts},
    }
    assert (delivery.job, delivery.type, delivery.state) == (job.id, f"job.{state}", "waiting")
    assert (delivery.tenant, delivery.run_at, delivery.attempts) == ("acme", clock(), 0)
    due = await one_due(store)
    assert (due.webhook, due.delivery.id) == (hook, delivery.id)
    assert (due.delivery.state, due.delivery.run_at) == ("leased", clock() + 45)


async def test_a_cancelled_job_is_delivered_and_a_second_end_again(store: Store, clock):
    hook = await hooked(store)
    job = await handed_over(store, webhook=hook.id)
    await store.change_job(op(), "acme", job.id, "cancel")
    clock.advance(1)
    job = await handed_over(store, webhook=hook.id)
    await worked_off(store, "dead")
    clock.advance(1)
    assert await store.retry_items(op(), "acme", job.id, Replay()) == 1
    await worked_off(store, "done")
    assert [one.type for one in await log(store, hook)] == [
        "job.completed",
        "job.failed",
        "job.cancelled",
    ]


async def test_nobody_is_told_who_is_not_named_or_not_active(store: Store, clock):
    hook, gone = await hooked(store), await hooked(store)
    await handed_over(store)
    await handed_over(store, webhook=gone.id)
    await handed_over(store, webhook=hook.id)
    await store.delete_webhook(op(), "acme", gone.id)
    await store.send_test(op(), "acme", hook.id)
    await settled(store, await one_due(store), "disabled", disabled="gone")
    await worked_off(store)
    assert [one.type for one in await log(store, hook)] == ["webhook.test"]
    assert await store.claim_deliveries(SHARE, 0) == []


async def test_a_job_names_a_webhook_of_its_own_tenant(store: Store):
    theirs = await hooked(store, "other")
    for webhook in (theirs.id, "wh_none"):
        with pytest.raises(NotFound) as caught:
            await handed_over(store, webhook=webhook)
        assert (caught.value.param, caught.value.code) == ("webhook", "webhook_not_found")
    assert await store.list_jobs("acme", None, (), "", 10) == []


async def test_a_test_is_delivered_to_an_active_webhook(store: Store):
    hook = await hooked(store)
    made_by = op()
    made = await store.send_test(made_by, "acme", hook.id)
    assert await store.send_test(made_by, "acme", hook.id) == made  # a repeat
    assert (await one_due(store)).delivery.id == made.id
    assert json.loads(made.payload)["data"] == {"id": hook.id}
    assert (made.type, made.job) == ("webhook.test", "")


# Claims


async def test_an_end_wakes_who_waits(store: Store):
    hook = await hooked(store)
    await handed_over(store, webhook=hook.id)
    waiting = asyncio.create_task(store.claim_deliveries(SHARE, LONG_S))
    await asyncio.sleep(0)
    await worked_off(store)
    (due,) = await soon(waiting)
    assert due.webhook == hook


async def test_what_is_not_settled_is_due_again_under_its_id(store: Store, clock):
    hook = await hooked(store)
    await store.send_test(op(), "acme", hook.id)
    first = await one_due(store)
    assert await store.claim_deliveries(SHARE, 0) == []
    clock.advance(45)
    second = await one_due(store)
    assert second.delivery.id == first.delivery.id
    assert second.delivery.attempts == 0  # a crash is no try
    assert not await settled(store, first, "delivered")
    assert [one.state for one in await log(store, hook)] == ["leased"]
    assert await settled(store, second, "delivered", status=204)
    assert not await settled(store, second, "delivered", status=204)
    (delivery,) = await log(store, hook)
    assert (delivery.state, delivery.attempts, delivery.last_status) == ("delivered", 1, 204)
    assert delivery.run_at is None


async def test_claims_are_fair_between_tenants_and_bounded_for_each(store: Store, clock):
    loud, quiet = await hooked(store, "loud"), await hooked(store, "quiet")
    other = await hooked(store, "loud")
    for hook in (loud, loud, loud, loud, other, quiet):
        await store.send_test(op(), hook.tenant, hook.id)
        clock.advance(1)
    first = await store.claim_deliveries(Share(2, 3, 45), 0)
    assert {one.webhook.tenant for one in first} == {"loud", "quiet"}
    rest = await store.claim_deliveries(Share(10, 3, 45), 0)
    assert {one.webhook.id for one in rest} == {loud.id, other.id}  # each of its webhooks in turn
    assert len(rest) == 2  # three at once
    assert await store.claim_deliveries(Share(10, 3, 45), 0) == []
    await settled(store, rest[0], "delivered")
    assert len(await store.claim_deliveries(Share(10, 3, 45), 0)) == 1


async def test_claims_that_run_at_once_share_out(store: Store):
    hook = await hooked(store)
    for _ in range(6):
        await store.send_test(op(), "acme", hook.id)
    claims = await asyncio.gather(*(store.claim_deliveries(Share(2, 100, 45), 0) for _ in range(5)))
    ids = [one.delivery.id for claim in claims for one in claim]
    assert 2 <= len(ids) == len(set(ids))


# What follows from a try


async def test_a_retry_waits_for_its_moment(store: Store, clock):
    hook = await hooked(store)
    await store.send_test(op(), "acme", hook.id)
    began = clock()
    await settled(store, await one_due(store), "retry", delay_s=5, status=500, error="oops")
    (waits,) = await log(store, hook)
    assert (waits.state, waits.run_at, waits.attempts) == ("waiting", began + 5, 1)
    assert (waits.last_status, waits.last_error) == (500, "oops")
    clock.advance(4.5)
    assert await store.claim_deliveries(SHARE, 0) == []
    clock.advance(0.5)
    due = await one_due(store)
    assert due.webhook.failing_since == began
    await settled(store, due, "retry", delay_s=5)
    waiting = asyncio.create_task(store.claim_deliveries(SHARE, LONG_S))
    await asyncio.sleep(0)
    await store.find_webhook("acme", hook.id)  # the claim has looked
    clock.advance(5)
    await store.tick()  # wakes it
    (due,) = await soon(waiting)
    assert due.webhook.failing_since == began
    await settled(store, due, "delivered")
    found = await store.find_webhook("acme", hook.id)
    assert found is not None
    assert found.failing_since is None


async def test_a_webhook_on_hold_gets_nothing_until_then(store: Store, clock):
    hook, other = await hooked(store), await hooked(store)
    for each in (hook, hook, other):
        await store.send_test(op(), "acme", each.id)
        clock.advance(0.001)
    first, *_ = await store.claim_deliveries(Share(1, 10, 45), 0)
    assert first.webhook == hook
    await settled(store, first, "retry", delay_s=5, hold_s=60)
    assert (await one_due(store)).webhook == other
    clock.advance(59)
    assert await store.claim_deliveries(Share(10, 10, 600), 0) == await _only(store, other)
    clock.advance(1)
    assert (
        len([one for one in await store.claim_deliveries(SHARE, 0) if one.webhook.id == hook.id])
        == 2
    )


async def _only(store: Store, webhook: Webhook) -> list[Due]:
    """What of `webhook` is leased, as its claim returned it."""
    return [Due(one, webhook) for one in await log(store, webhook, ("leased",))]


async def test_a_disabled_webhook_gives_up_what_waits_until_it_is_enabled(store: Store, clock):
    hook = await hooked(store)
    for _ in range(3):
        await store.send_test(op(), "acme", hook.id)
    under_way, second, _ = await store.claim_deliveries(SHARE, 0)
    await settled(store, second, "disabled", disabled="gone", status=410)
    found = await store.find_webhook("acme", hook.id)
    assert found is not None
    assert (found.active, found.disabled_reason) == (False, "gone")
    clock.advance(45)  # nobody settles the other one
    assert await store.claim_deliveries(SHARE, 0) == []
    await store.tick()
    states = {one.state for one in await log(store, hook)}
    assert states == {"given_up"}
    assert not await settled(store, under_way, "delivered")
    with pytest.raises(Conflict) as caught:
        await store.send_test(op(), "acme", hook.id)
    assert caught.value.code == "webhook_disabled"
    assert await store.enable_webhook("acme", hook.id) == hook
    await store.send_test(op(), "acme", hook.id)
    assert (await one_due(store)).webhook == hook


async def test_a_deleted_webhook_gives_up_what_waits(store: Store):
    hook, other = await hooked(store), await hooked(store)
    for each in (hook, other):
        await store.send_test(op(), "acme", each.id)
    await store.delete_webhook(op(), "acme", hook.id)
    await store.tick()
    assert (await one_due(store)).webhook == other
    assert await store.claim_deliveries(SHARE, 0) == []


# The log


async def test_a_delivery_is_sent_again_on_demand(store: Store, clock):
    hook = await hooked(store)
    made = await store.send_test(op(), "acme", hook.id)
    with pytest.raises(NotFound) as caught:
        await store.redeliver(op(), "acme", hook.id, "msg_none")
    assert caught.value.code == "delivery_not_found"
    due = await one_due(store)
    with pytest.raises(Conflict) as busy:
        await store.redeliver(op(), "acme", hook.id, made.id)
    assert busy.value.code == "delivery_under_way"
    await settled(store, due, "given_up", error="no")
    clock.advance(10)
    again = await store.redeliver(op(), "acme", hook.id, made.id)
    assert (again.id, again.state, again.attempts, again.run_at) == (
        made.id,
        "waiting",
        0,
        clock(),
    )
    due = await one_due(store)
    assert due.delivery.payload == made.payload
    await settled(store, due, "retry", delay_s=3600)
    await store.redeliver(op(), "acme", hook.id, made.id)  # now, not in an hour
    assert (await one_due(store)).delivery.id == made.id


async def test_the_log_is_read_in_pages_the_newest_first(store: Store, clock):
    hook, other = await hooked(store), await hooked(store)
    made = []
    for each in (hook, other, hook, hook):
        made.append(await store.send_test(op(), "acme", each.id))
        clock.advance(1)
    first, third, fourth = (one.id for one in (made[0], made[2], made[3]))
    page = await log(store, hook, limit=2)
    assert [one.id for one in page] == [fourth, third]
    rest = await store.list_deliveries("acme", hook.id, (), third, 2)
    assert [one.id for one in rest] == [first]
    (due,) = [one for one in await store.claim_deliveries(SHARE, 0) if one.delivery.id == third]
    await settled(store, due, "delivered")
    assert [one.id for one in await log(store, hook, ("delivered",))] == [third]
    assert [one.id for one in await log(store, hook, ("leased", "waiting"))] == [fourth, first]


async def test_what_has_ended_is_forgotten_in_time(store: Store, clock):
    hook = await hooked(store)
    for word in ("delivered", "given_up", "retry"):
        await store.send_test(op(), "acme", hook.id)
        await settled(store, await one_due(store), word, delay_s=40 * DAY_S)
    clock.advance(30 * DAY_S)
    await store.tick()
    assert len(await log(store, hook)) == 3
    clock.advance(1)
    await store.tick()
    assert [one.state for one in await log(store, hook)] == ["waiting"]
