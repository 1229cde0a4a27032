"""A job that meets every kind of trouble at once ends truthfully: each document is counted once, what
failed says why, and a replay lands it.
"""

import asyncio
from collections import Counter
from dataclasses import replace

from serve.embedding.fake import FakeEngine
from serve.embedding.tokenizer import Tokenizer
from serve.errors import ModelUnavailable, Overloaded
from tests.api.conftest import PLAIN, POISON


COUNT = 200
REFUSES_S, STEP_S = 60, 5
FLAKY_FAILS = 2
"""A document that fails in passing does so on its first two tries."""


def text(number):
    """One in twenty is poison; two in twenty, other ones, are flaky."""
    if number % 20 == 0:
        return POISON
    return f"flaky {number}" if number % 10 == 5 else f"sound {number}"


TEXTS = [text(number) for number in range(COUNT)]
FLAKY = [one for one in TEXTS if one.startswith("flaky")]


class Provider:
    """Stands before the embedder: answers 429 for a minute, and fails each flaky text twice."""

    def __init__(self, embedder, clock):
        self._embed, self._clock = embedder.embed, clock
        self._opens = clock() + REFUSES_S
        ids = Tokenizer.open(PLAIN).encode(FLAKY)
        self._fails = {tuple(one.tolist()): FLAKY_FAILS for one in ids}
        self.refused = 0

    async def embed(self, call):
        if self._clock() < self._opens:
            self.refused += 1
            raise Overloaded("The provider has too many requests.", retry_after_s=20)
        reply = await self._embed(call)
        broken = dict(reply.failures)
        for row, one in enumerate(call.inputs):
            ids = tuple(one.ids.tolist())
            if self._fails.get(ids):
                self._fails[ids] -= 1
                broken[row] = ModelUnavailable("It passes.")
        return replace(reply, failures=tuple(broken.items()))


async def ended(client, whole, job):
    """The job once it has ended; time goes on whenever nothing can be done at the moment."""
    while True:
        shown = (await client.get(f"/v1/jobs/{job}")).json()
        if shown["is_complete"]:
            return shown
        if not {one["state"] for one in shown["stages"]} & {"ready", "leased"}:
            whole.clock.advance(STEP_S)
            await whole.store.tick()
        await asyncio.sleep(0.002)


async def all_items(client, job):
    listed = await client.get(f"/v1/jobs/{job}/items", params={"limit": COUNT})
    return listed.json()["data"]


async def found_ids(client):
    answer = await client.post("/v1/collections/books/search", json={"text": "x", "top_k": 200})
    return sorted(hit["document"] for hit in answer.json()["data"])


def counted(shown):
    words = ("total", "processed", "succeeded", "skipped", "failed", "cancelled")
    return tuple(shown[word] for word in words)


async def test_poison_passing_failures_and_a_refusing_provider(whole):
    client = await whole.client("enterprise")
    assert (await client.post("/v1/collections", json={"name": "books"})).status_code == 201
    provider = Provider(whole.embedder, whole.clock)
    whole.embedder.embed = provider.embed
    began = whole.clock()
    documents = [{"id": f"d{number}", "text": one} for number, one in enumerate(TEXTS)]
    answer = await client.post("/v1/jobs", json={"collection": "books", "items": documents})
    job = answer.json()["id"]
    shown = await ended(client, whole, job)

    assert provider.refused > 0
    assert whole.clock() - began >= REFUSES_S
    assert shown["state"] == "completed_with_errors"
    assert counted(shown) == (COUNT, COUNT, 190, 0, 10, 0)
    assert shown["progress"] == 100
    items = await all_items(client, job)
    assert Counter(one["state"] for one in items) == {"done": 190, "dead": 10}
    for one, sent in zip(items, TEXTS, strict=True):
        # Neither the minute of refusals nor a neighbour's failure is a try of one's own.
        tries = {"flaky": FLAKY_FAILS, POISON: 1}.get(sent.split()[0], 0)
        assert (one["attempts"], one["state"]) == (tries, "dead" if sent == POISON else "done")
        error = one["error"] or {}
        assert (error.get("kind"), error.get("code")) == (
            ("poison", "input_failed") if sent == POISON else (None, None)
        )
    dead = sorted(one["id"] for one in items if one["state"] == "dead")
    everything = sorted(one["id"] for one in documents)
    assert await found_ids(client) == sorted(set(everything) - set(dead))

    whole.embedder.batcher._engines._engines[PLAIN.id] = FakeEngine(PLAIN)  # one that bears it
    for dry in (True, False):
        wanted = {"error_code": "input_failed", "dry_run": dry}
        replayed = await client.post(f"/v1/jobs/{job}/retry", json=wanted)
        assert replayed.json()["items"] == len(dead)
    shown = await ended(client, whole, job)
    assert (shown["state"], *counted(shown)) == ("completed", COUNT, COUNT, COUNT, 0, 0, 0)
    assert await found_ids(client) == everything
    assert (await client.get("/v1/collections/books")).json()["records"] == COUNT
