"""What every Store keeps of how far landed writes reach into the index's log."""

import pytest

from serve.config import Store as StoreSettings
from serve.freshness import UNPROVED
from serve.items import Settlement
from serve.jobs import tokens
from serve.jobs.owner import StoreOwner
from tests.contract.work import document, job, op, submitted, tenant


async def prepared(store, job_id):
    """All of a job's items, ready for the stage that lands them."""
    claim = await store.claim("w", "prepare", 500, 1e9, 0.0)
    await store.settle([Settlement(one.id, one.lease, "advance", chunks=1) for one in claim.items])
    landing = await store.claim("w", "embed", 500, 1e9, 0.0)
    return [item for item in landing.items if item.job == job_id]


async def land(store, items, *tokens):
    told = [
        Settlement(one.id, one.lease, "done", chunks=1, token=token)
        for one, token in zip(items, tokens, strict=True)
    ]
    assert all(await store.settle(told))


async def token(store, job_id):
    return (await store.find_job("acme", job_id)).token


async def test_a_job_reaches_as_far_as_its_last_write(store):
    uuid = await tenant(store)
    job_id = await submitted(store, [document(name) for name in "abcd"], collection=uuid)
    assert await token(store, job_id) is None
    first, *rest = await prepared(store, job_id)
    await land(store, rest[:2], 5, 3)
    assert await token(store, job_id) == 5
    await land(store, [first], 4)  # another worker's, which landed earlier
    assert await token(store, job_id) == 5
    await land(store, rest[2:], UNPROVED)
    assert await token(store, job_id) == UNPROVED


async def test_where_searches_lag_behind_nothing_nothing_is_kept(store):
    uuid = await tenant(store)
    job_id = await submitted(store, [document("a"), document("b")], collection=uuid)
    await land(store, await prepared(store, job_id), None, None)
    assert await token(store, job_id) is None


async def test_an_item_that_was_lost_has_landed_nothing(store):
    uuid = await tenant(store)
    job_id = await submitted(store, [document("a")], collection=uuid)
    (item,) = await prepared(store, job_id)
    late = Settlement(item.id, item.lease - 1, "done", chunks=1, token=9)
    assert await store.settle([late]) == [False]
    assert await token(store, job_id) is None


async def test_unchanged_documents_reach_as_far_as_their_collection(store):
    uuid, other = await tenant(store), await tenant(store, "other")
    some = [document("a", sha256="x"), document("b", sha256="y")]
    first = await submitted(store, some, collection=uuid)
    await land(store, await prepared(store, first), 7, UNPROVED)
    again = await submitted(store, some[:1], collection=uuid)
    assert await token(store, again) == 7  # what has no proof is no proof of the others
    changed = await submitted(store, [document("c", sha256="z")], collection=uuid)
    assert await token(store, changed) is None
    elsewhere = await submitted(store, [document("a")], "other", collection=other)
    assert (await store.find_job("other", elsewhere)).token is None


async def test_a_token_goes_with_its_job_and_its_collection(store):
    uuid = await tenant(store)
    some = [document("a", sha256="x")]
    job_id = await submitted(store, some, collection=uuid)
    await land(store, await prepared(store, job_id), 7)
    while (await store.erase_jobs("acme", [job_id])).more:
        pass
    await store.submit_job(op(), job(id=job_id, collection=uuid), [document("b")])
    assert await token(store, job_id) is None


async def test_a_collection_that_is_gone_has_no_token(store):
    uuid = await tenant(store)
    job_id = await submitted(store, [document("a"), document("b")], collection=uuid)
    first, second = await prepared(store, job_id)
    await land(store, [first], 7)
    await store.delete_collection(op(), "acme", "docs")
    await store.purge_collection(uuid)
    await land(store, [second], 8)  # a worker was at it
    assert await token(store, job_id) == 8
    found = await store._do(lambda conn, _: tokens.find(conn, uuid))
    assert found is None


async def test_an_old_job_is_forgotten_with_its_token(store, clock):
    uuid = await tenant(store)
    job_id = await submitted(store, [document("a")], collection=uuid)
    await land(store, await prepared(store, job_id), 7)
    clock.advance(31 * 86_400)
    await store.tick()
    assert await store.find_job("acme", job_id) is None
    await store.submit_job(op(), job(id=job_id, collection=uuid), [document("b")])
    assert await token(store, job_id) is None


async def test_a_token_outlives_the_process(tmp_path, clock):
    opened = StoreOwner(tmp_path / "store.db", StoreSettings(), clock)
    uuid = await tenant(opened)
    job_id = await submitted(opened, [document("a")], collection=uuid)
    await land(opened, await prepared(opened, job_id), 7)
    opened.close()
    again = StoreOwner(tmp_path / "store.db", StoreSettings(), clock)
    try:
        assert await token(again, job_id) == 7
    finally:
        again.close()


@pytest.mark.parametrize("high", [UNPROVED, 2**53 + 1])
async def test_a_token_is_kept_to_the_last_digit(store, high):
    uuid = await tenant(store)
    job_id = await submitted(store, [document("a"), document("b")], collection=uuid)
    await land(store, await prepared(store, job_id), high - 1, high)
    assert await token(store, job_id) == high
