"""What the contracts of jobs and their queue begin with: a tenant, a collection, jobs, settlements."""

from collections import Counter
from collections.abc import Sequence
from itertools import count
from typing import Any, Protocol

from serve.items import Claim, Fault, Item, Job, JobView, NewItem, Settlement
from serve.job_ports import Events, Jobs, Queue
from serve.ports import Collections, Keys
from serve.records import Collection, Key


BUSY = Fault("network", "upstream", "It did not answer.")
BAD = Fault("invalid", "bad_text", "It is empty.")

_numbers = count(1)


class Store(Jobs, Queue, Events, Keys, Collections, Protocol):
    async def tick(self) -> None: ...


def op() -> str:
    return f"op-{next(_numbers)}"


async def tenant(store: Store, name: str = "acme") -> str:
    """A tenant with a key and a collection; returns the collection's uuid."""
    await store.create_key(op(), Key(f"{name}-key", name, "free", "ab", 1.0, family=f"{name}-key"))
    made = Collection(f"{next(_numbers):032x}", name, "docs", "m", "r1", 8, 1.0)
    return (await store.create_collection(op(), made)).uuid


def job(name: str = "acme", **fields: Any) -> Job:
    plain: dict[str, Any] = {
        "id": f"job_{next(_numbers):012d}",
        "tenant": name,
        "key": f"{name}-key",
        "kind": "documents",
        "klass": "bulk",
        "weight": 1.0,
        "created_at": 0.0,
    }
    return Job(**{**plain, **fields})


def document(name: str, cost: float = 10.0, sha256: str = "") -> NewItem:
    return NewItem(name, "document", "prepare", cost, {"text": name}, sha256)


def documents(names: Sequence[str], cost: float = 10.0) -> list[NewItem]:
    return [document(name, cost) for name in names]


def request(name: str, cost: float = 10.0) -> NewItem:
    return NewItem(name, "request", "embed", cost, {"input": name})


EXPAND = NewItem("file", "expand", "prepare", 1.0, {"file": "f1"})


async def submitted(
    store: Store, items: Sequence[NewItem], name: str = "acme", **fields: Any
) -> str:
    made = job(name, **fields)
    accepted = await store.submit_job(op(), made, items)
    assert not accepted.replayed
    return made.id


async def claimed(store: Store, stage: Any, most: int = 100, owner: str = "w") -> Claim:
    return await store.claim(owner, stage, most, 1e9, 0.0)


async def one(store: Store, stage: Any, owner: str = "w") -> Item:
    """The next item."""
    (item,) = (await claimed(store, stage, 1, owner)).items
    return item


def settlement(item: Item, word: Any, **fields: Any) -> Settlement:
    return Settlement(item.id, item.lease, word, **fields)


async def settle(store: Store, items: Sequence[Item], word: Any, **fields: Any) -> None:
    given = [settlement(item, word, **fields) for item in items]
    assert all(await store.settle(given))


async def prepared(store: Store, most: int = 100, cost: float = 5.0) -> None:
    """Everything that waits for `prepare` goes on to `embed`."""
    while items := (await claimed(store, "prepare", most)).items:
        await settle(store, items, "advance", cost=cost, chunks=1)


async def view(store: Store, job_id: str, name: str = "acme") -> JobView:
    """A job, whose counts are held against its items."""
    found = await store.find_job(name, job_id)
    assert found is not None
    counts: Counter[str] = Counter()
    for each in found.counts:
        counts[each.state] += each.items
    kept = found.job
    states = {"done", "skipped", "dead", "cancelled"}
    assert {state: counts[state] for state in states} == {
        state: getattr(kept, state) for state in states
    }
    assert counts.total() == kept.total
    if kept.ended:
        assert kept.processed == kept.total
        assert kept.cost_left == 0
    return found


async def found(store: Store, job_id: str, name: str = "acme") -> Job:
    return (await view(store, job_id, name)).job


async def told(store: Store, job_id: str, name: str = "acme") -> list[str]:
    """The types of a job's events."""
    return [each.type for each in await store.job_events(name, job_id, 0, 100)]
