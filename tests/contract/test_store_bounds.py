"""Bounds hold however many ask at once: on Postgres, from several connections."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bench.postgres_server import careless, emptied
from serve.config import Jobs, Store
from serve.errors import Conflict, NotFound, QuotaExceeded, ServiceError
from serve.items import FileRoom, StoredFile
from serve.jobs.owner import StoreOwner
from serve.records import Collection, Key
from serve.webhooks import Share, Webhook
from tests.contract.work import EXPAND, documents, job, op, request, submitted


MOST = 3
"""Of anything that a tenant may have."""

AT_ONCE = 24


@pytest.fixture(params=["owner", pytest.param("postgres", marks=pytest.mark.postgres)])
async def store(
    request: pytest.FixtureRequest, tmp_path: Path, clock: Callable[[], float]
) -> AsyncIterator[StoreOwner]:
    """With a tenant, `acme`, that has a key already."""
    place: AbstractContextManager[Path | str] = nullcontext(tmp_path / "store.db")
    if request.param == "postgres":
        careless()
        place = emptied()
    with place as where:
        owner = StoreOwner(
            where,
            Store(keys_max=MOST + 1, connections=8),
            clock,
            collections_max=MOST,
            jobs=Jobs(open_jobs_max=MOST, open_items_max=100),
        )
        await owner.create_key(op(), key("k0"))
        await asyncio.gather(*(owner.find_tenant("acme") for _ in names()))  # all connections
        yield owner
        owner.close()


def key(name: str, tenant: str = "acme", **fields: Any) -> Key:
    return Key(name, tenant, "free", "ab", 1.0, **fields)


def file(name: str) -> StoredFile:
    return StoredFile(f"file-{name}", "acme", "batch", "f", 1, "ab", 1.0, 1e12)


async def kept(calls: Iterable[Awaitable[Any]]) -> int:
    """How many of these calls, made at once, were not refused."""
    found = await asyncio.gather(*calls, return_exceptions=True)
    odd = [one for one in found if isinstance(one, BaseException) and not refusal(one)]
    assert not odd
    return sum(not isinstance(one, ServiceError) for one in found)


def refusal(error: BaseException) -> bool:
    return isinstance(error, QuotaExceeded | Conflict | NotFound)


def names() -> list[str]:
    return [f"n{number:02}" for number in range(AT_ONCE)]


async def test_a_tenant_has_so_many_keys_and_no_more(store: StoreOwner):
    assert await kept(store.create_key(op(), key(name)) for name in names()) == MOST


async def test_a_tenant_has_so_many_collections_and_no_more(store: StoreOwner):
    made = (Collection(f"{name:>032}", "acme", name, "m", "r", 4, 1.0) for name in names())
    assert await kept(store.create_collection(op(), one) for one in made) == MOST


async def test_a_tenant_has_so_many_webhooks_and_no_more(store: StoreOwner):
    made = (Webhook(f"wh_{name}", "acme", "u", "s", 1.0) for name in names())
    assert await kept(store.create_webhook(op(), one, MOST) for one in made) == MOST


async def test_a_tenant_has_so_many_files_and_no_more(store: StoreOwner):
    room = FileRoom(MOST, 1000)
    made = (store.create_file(op(), file(name), room) for name in names())
    assert await kept(made) == MOST


async def test_a_tenant_has_so_many_open_jobs_and_no_more(store: StoreOwner):
    made = (store.submit_job(op(), job(), documents("a")) for _ in names())
    assert await kept(made) == MOST


async def test_files_that_are_read_at_once_have_so_many_lines_and_no_more(store: StoreOwner):
    for _ in range(MOST):
        await submitted(store, [EXPAND], kind="embeddings")
    claim = await store.claim("w", "prepare", 9, 1e9, 0)
    assert len(claim.items) == MOST
    lots = (
        store.add_items(item.id, item.lease, start, [request(f"r{start + n}") for n in range(20)])
        for start in range(0, 100, 20)
        for item in claim.items
    )
    assert await kept(lots) == 5


async def test_a_key_gets_one_successor(store: StoreOwner):
    made = (store.rotate_key(op(), "k0", key(name), 60, "ann") for name in names())
    assert await kept(made) == 1


async def test_one_admin_key_stays(store: StoreOwner):
    """Each is revoked by its neighbour; on Postgres none waits for another tenant."""
    admins = names()[:8]
    for name in admins:
        await store.create_key(op(), key(name, f"t-{name}", role="admin"))
    revoked = await kept(store.revoke_key(op(), name, "ann") for name in admins)
    assert revoked == len(admins) - 1


async def test_settings_of_a_tenant_that_are_made_at_once_are_both_kept(store: StoreOwner):
    limits = {"bulk": {"requests_per_minute": 1}}
    for _ in range(8):
        await store.set_tenant(op(), "acme", "free", {}, "ann")
        await asyncio.gather(
            store.set_tenant(op(), "acme", "premium", None, "ann"),
            store.set_tenant(op(), "acme", None, limits, "ann"),
        )
        found = await store.find_tenant("acme")
        assert found is not None
        assert (found.tier, found.limits) == ("premium", limits)


async def test_a_tenant_has_so_many_deliveries_under_way_and_no_more(store: StoreOwner):
    hooks = [Webhook(f"wh_{name}", "acme", "u", "s", 1.0) for name in names()]
    for hook in hooks:
        await store.create_webhook(op(), hook, 100)
        await store.send_test(op(), "acme", hook.id)
    share = Share(most=2, tenant_most=MOST, lease_s=45.0)
    due = await asyncio.gather(*(store.claim_deliveries(share, 0) for _ in range(12)))
    assert sum(len(some) for some in due) == MOST
    assert await store.claim_deliveries(replace(share, tenant_most=MOST + 1), 0)
