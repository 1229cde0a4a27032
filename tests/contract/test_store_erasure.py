"""What every Store promises of erasing a tenant: in parts, to the end, and nothing of another's."""

from itertools import count

import pytest

from serve.items import Erased, Job, NewItem, Once, Settlement, Task, new_id
from serve.jobs import erasure
from serve.records import Collection, Key
from serve.webhooks import Webhook


_ops = count()


def op() -> str:
    return f"op-{next(_ops)}"


def once(key: str) -> Once:
    return Once(key, "ab", 1e6)


async def submit(store, tenant: str, *names: str, task: Task = "document", key: str = "") -> str:
    job = Job(new_id("job", 5.25), tenant, "k", "documents", "bulk", 1.0, 5.25)
    items = [NewItem(name, task, "prepare", 1.0, {}) for name in names]
    await store.submit_job(op(), job, items, once(key) if key else None)
    return job.id


async def erased(store, tenant: str, *jobs: str) -> list[Erased]:
    """Every answer until there is nothing more."""
    answers = [Erased(more=True)]
    while answers[-1].more:
        assert len(answers) < 50
        answers.append(await store.erase_jobs(tenant, jobs))
    return answers[1:]


def webhook(tenant: str) -> Webhook:
    return Webhook(f"hook-{tenant}", tenant, "https://a.example", "s", 1.0, "")


@pytest.fixture(autouse=True)
async def _tenants(store):
    for tenant in ("acme", "other"):
        await store.create_key(op(), Key(f"k-{tenant}", tenant, "free", "ab", 1.0))


async def test_jobs_are_stopped_and_forgotten_with_their_items_and_events(store):
    mine, theirs = await submit(store, "acme", "a", "b"), await submit(store, "other", "a")
    last = (await erased(store, "acme", mine, theirs))[-1]
    assert (last.jobs, last.items) == (1, 2)
    assert await store.find_job("acme", mine) is None
    assert await store.list_items("acme", mine, (), -1, 10) == []
    assert await store.job_events("acme", mine, 0, 10) == []
    assert (await store.job_stats("acme")).total == 0
    assert (await store.find_job("other", theirs)).job.total == 1
    assert [item.job for item in (await store.claim("w", "prepare", 9, 1e9, 0.0)).items] == [theirs]
    assert await erased(store, "acme", mine) == [Erased()]


async def test_many_items_go_in_several_transactions(store, monkeypatch):
    monkeypatch.setattr(erasure, "ROWS_MAX", 2)
    job = await submit(store, "acme", *"abcde")
    answers = await erased(store, "acme", job)
    assert sum(one.items for one in answers) == 5
    assert max(one.items for one in answers) == 2
    assert [one.jobs for one in answers if not one.more] == [1]


async def test_whoever_works_on_an_erased_job_is_told_to_drop_it(store):
    job = await submit(store, "acme", "a")
    own = await submit(store, "acme", "expand", task="expand")
    items = (await store.claim("w", "prepare", 9, 1e9, 0.0)).items
    assert len(items) == 2
    await erased(store, "acme", job, own)
    assert await store.keep("w", [item.id for item in items]) == {item.id for item in items}
    told = [Settlement(item.id, item.lease, "done") for item in items]
    assert await store.settle(told) == [False, False]
    (expand,) = (item for item in items if item.task == "expand")
    more = [NewItem("late", "document", "prepare", 1.0, {})]
    assert await store.add_items(expand.id, expand.lease, 0, more) is False
    await store.tick()
    assert (await store.job_stats("acme")).total == 0


async def test_ended_jobs_are_forgotten_too(store):
    job = await submit(store, "acme", "a")
    (item,) = (await store.claim("w", "prepare", 9, 1e9, 0.0)).items
    await store.settle([Settlement(item.id, item.lease, "done")])
    assert await erased(store, "acme", job) == [Erased(jobs=1, items=1)]


async def test_the_rest_goes_of_one_tenant(store):
    for tenant in ("acme", "other"):
        await store.create_webhook(op(), webhook(tenant), 5)
        await store.send_test(op(), tenant, f"hook-{tenant}")
        await submit(store, tenant, "a", key="once")
    assert await store.erase_rest("acme") == Erased(webhooks=1)
    assert await store.list_webhooks("acme") == []
    assert await store.first_job("acme", once("once")) is None
    assert len(await store.list_deliveries("other", "hook-other", (), "", 9)) == 1
    assert await store.first_job("other", once("once")) is not None
    assert await store.erase_rest("acme") == Erased()


async def test_a_purge_says_how_many_documents_there_were(store):
    made = Collection(f"{next(_ops):032x}", "acme", "docs", "m", "r1", 4, 5.25)
    uuid = (await store.create_collection(op(), made)).uuid
    await store.grant_vectors(uuid, ["a", "b", "c"], [None] * 3)
    job = Job(new_id("job", 5.25), "acme", "k", "documents", "bulk", 1.0, 5.25, collection=uuid)
    await store.submit_job(op(), job, [NewItem("c", "delete", "embed", 1.0, {})])
    await store.delete_collection(op(), "acme", "docs")
    assert await store.purge_collection(uuid) == 2
    assert await store.purge_collection(uuid) == 0


async def test_an_erasure_stands_in_the_log(store):
    operation = op()
    for _ in range(2):  # a repeat is one entry
        await store.note_erasure(operation, "acme", "cli:ann@host", {"state": "done", "jobs": 3})
    first = (await store.list_audit("acme", None, 1))[0]
    assert (first.action, first.by, first.detail["new"]) == (
        "tenant.erase",
        "cli:ann@host",
        {"state": "done", "jobs": 3},
    )
    assert [one.action for one in await store.list_audit("acme", None, 9)].count(
        "tenant.erase"
    ) == 1
